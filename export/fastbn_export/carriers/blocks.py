"""DepthToSpace and SpaceToDepth: blocks of channels become positions and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import Array, ChannelAffine
from ..plan import Refused, Step
from ..registry import Operator, Site, operator

__all__ = ["DepthToSpace", "SpaceToDepth"]


def _spread(a: ChannelAffine, block: int, interleaved: bool) -> ChannelAffine:
    """The map on the deep side of the map on the wide side."""
    deep = np.arange(a.size * block * block)
    return a.take(deep // (block * block) if interleaved else deep % a.size)


def _gather(site: Site, block: int, interleaved: bool) -> ChannelAffine:
    """The map on the wide side of one on the deep side, which must agree within each block."""
    a, count = site.affine, block * block
    if a.size % count:
        raise Refused(f"{a.size} channels are no whole blocks of {count}")
    channels = a.size // count
    index: Array = np.arange(a.size).reshape((channels, count) if interleaved else (count, channels))
    index = index.T if interleaved else index
    for vector in (a.scale, a.shift):
        if np.any(vector[index] != vector[index[:1]]):
            raise Refused(f"the map differs within a block of {site.node.op_type}")
    return a.take(index[0])


@operator("DepthToSpace")
class DepthToSpace(Operator):
    """Depth index is (by, bx, c) in mode DCR and (c, by, bx) in mode CRD."""

    upstream = "carries"
    downstream = "carries where the map agrees within each block"

    def pull(self, site: Site) -> Sequence[Step]:
        """Each deep channel has the map of the channel that it becomes."""
        if site.affine.axis != 1:
            raise Refused("the map does not lie along the channel axis of DepthToSpace")
        crd = site.text("mode", "DCR") == "CRD"
        return [Step.carry((site.input(0), _spread(site.affine, site.int("blocksize", 1), crd)))]

    def push(self, site: Site) -> Sequence[Step]:
        """Blocks must agree."""
        if site.affine.axis != 1:
            raise Refused("the map does not lie along the channel axis of DepthToSpace")
        crd = site.text("mode", "DCR") == "CRD"
        return [Step.carry((site.node.outputs[0], _gather(site, site.int("blocksize", 1), crd)))]


@operator("SpaceToDepth")
class SpaceToDepth(Operator):
    """Depth index is (by, bx, c)."""

    upstream = "carries where the map agrees within each block"
    downstream = "carries"

    def pull(self, site: Site) -> Sequence[Step]:
        """Blocks must agree."""
        if site.affine.axis != 1:
            raise Refused("the map does not lie along the channel axis of SpaceToDepth")
        return [Step.carry((site.input(0), _gather(site, site.int("blocksize", 1), False)))]

    def push(self, site: Site) -> Sequence[Step]:
        """Each deep channel has the map of the channel that it was."""
        if site.affine.axis != 1:
            raise Refused("the map does not lie along the channel axis of SpaceToDepth")
        return [Step.carry((site.node.outputs[0], _spread(site.affine, site.int("blocksize", 1), False)))]
