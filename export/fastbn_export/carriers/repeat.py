"""Operators that repeat a tensor: Tile and Expand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import ChannelAffine
from ..plan import Refused, Step
from ..registry import Operator, Site, operator

__all__ = ["Expand", "Tile"]


@operator("Tile")
class Tile(Operator):
    """Along the channels the map must repeat as well."""

    upstream = "carries; along the channels the map must repeat too (constant repeats)"
    downstream = "carries (constant repeats)"

    def _times(self, site: Site) -> int:
        if site.opset < 6:
            raise Refused("Tile of opset 1 repeats one axis by inputs")
        repeats = site.ints("repeats", 1)
        if repeats is None or site.affine.axis >= len(repeats):
            raise Refused("the repeats of Tile do not match its axes")
        return repeats[site.affine.axis]

    def pull(self, site: Site) -> Sequence[Step]:
        """The first period, if all are alike."""
        times, a = self._times(site), site.affine
        if times < 1 or a.size % times:
            raise Refused("the map has no whole number of Tile's periods")
        size = a.size // times
        for vector in (a.scale, a.shift):
            if np.any(vector.reshape(times, size) != vector[:size]):
                raise Refused("the map differs between the periods of Tile")
        return [Step.carry((site.input(0), a.take(slice(0, size))))]

    def push(self, site: Site) -> Sequence[Step]:
        """Repeat the map."""
        if site.index != 0:
            raise Refused("the map feeds a parameter of Tile")
        a = site.affine
        indices = np.tile(np.arange(a.size), self._times(site))
        return [Step.carry((site.node.outputs[0], a.take(indices)))]


@operator("Expand")
class Expand(Operator):
    """The channels must be there before, or be one and the map the same for all."""

    upstream = downstream = "carries where the channels are not what is repeated"

    def pull(self, site: Site) -> Sequence[Step]:
        """Back to the axis before leading ones were added."""
        a = site.affine
        axis = a.axis - site.rank(site.node.outputs[0]) + site.rank(site.input(0))
        size = site.facts.size(site.input(0), axis) if axis >= 0 else None
        if size == 1 and a.is_uniform and a.size:
            return [Step.carry((site.input(0), ChannelAffine.of(a.scale[0], a.shift[0], axis, 1)))]
        if size != a.size:
            raise site.unknown("Expand repeats along the channels")
        return [Step.carry((site.input(0), a.at(axis)))]

    def push(self, site: Site) -> Sequence[Step]:
        """Forward to the axis behind the leading ones."""
        if site.index != 0:
            raise Refused("the map feeds the shape of Expand")
        a, out = site.affine, site.node.outputs[0]
        axis = a.axis + site.rank(out) - site.rank(site.input(0))
        size = site.facts.size(out, axis)
        if not isinstance(size, int) or a.size not in (1, size):
            raise site.unknown("Expand repeats along the channels")
        return [Step.carry((out, ChannelAffine.of(a.scale, a.shift, axis, size)))]
