"""SequenceAt of SplitToSequence: what an exporter writes where Split would do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import ChannelAffine
from ..plan import Refused, Step
from ..registry import Operator, Site, operator

__all__ = ["SequenceAt"]


@operator("SequenceAt")
class SequenceAt(Operator):
    """The element of a sequence that was split off a tensor; the sequence itself stays what it was elsewhere."""

    upstream = "carries along the axis that SplitToSequence splits (constant sizes, other constant positions elsewhere)"

    def pull(self, site: Site) -> Sequence[Step]:
        """The identity on the other elements."""
        split = site.input(0).producer()
        if split is None or split.op_type != "SplitToSequence" or split.domain != "":
            raise Refused("SequenceAt of a sequence that is not split off a tensor")
        inner = Site(site.facts, split, 0, site.affine)
        data = inner.input(0)
        axis = inner.int("axis", 0) % inner.rank(data)
        if site.affine.axis != axis or not inner.has(1) or split.graph is not site.node.graph:
            raise Refused("the map does not lie along the axis of SplitToSequence")
        total = site.facts.size(data, axis)
        if not isinstance(total, int):
            raise Refused(f"the number of channels of '{data.name}' is unknown")
        sizes = _sizes(inner, total)
        mine = _position(site, len(sizes))
        self._must_be_alone(site, mine, len(sizes))
        if sum(sizes) != total or sizes[mine] != site.affine.size:
            raise Refused(f"the map has {site.affine.size} channels, SequenceAt delivers {sizes[mine]}")
        scale, shift, start = np.ones(total), np.zeros(total), sum(sizes[:mine])
        scale[start : start + sizes[mine]], shift[start : start + sizes[mine]] = site.affine.scale, site.affine.shift
        return [Step([], [(data, ChannelAffine(scale, shift, axis))], reader=split)]

    def _must_be_alone(self, site: Site, mine: int, count: int) -> None:
        value = site.input(0)
        for use in value.uses():
            other = Site(site.facts, use.node, 0, site.affine)
            if use.node is not site.node and (use.node.op_type != "SequenceAt" or _position(other, count) == mine):
                raise Refused("the sequence has other readers")
        if value.is_graph_output():
            raise Refused("the sequence is a graph output")


def _sizes(split: Site, total: int) -> list[int]:
    given = split.constant(1, "sizes")
    if given.ndim:
        return [int(i) for i in given]
    size = int(given)
    if size < 1:
        raise Refused("SplitToSequence into pieces of no size")
    return [min(size, total - start) for start in range(0, total, size)]


def _position(site: Site, count: int) -> int:
    position = int(site.constant(1, "position").reshape(()))
    if not -count <= position < count:
        raise Refused("SequenceAt reads behind the end")
    return position % count
