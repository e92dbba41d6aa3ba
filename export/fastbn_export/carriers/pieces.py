"""Operators that join tensors or cut them up: Concat, Split, Slice, Gather."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ..affine import Array, ChannelAffine
from ..expressions import bounds
from ..plan import Refused, SetConstant, Step
from ..registry import Operator, Site, operator

__all__ = ["Concat", "Gather", "Slice", "Split"]


def _length(site: Site, value: ir.Value, axis: int) -> int:
    size = site.facts.size(value, axis)
    if not isinstance(size, int):
        raise site.unknown(f"the number of channels of '{value.name}' is unknown")
    return size


@operator("Concat")
class Concat(Operator):
    """Along the channels each input takes its piece; along another axis each takes the whole."""

    upstream = "carries: each input takes its piece, all or none"
    downstream = "carries along the channel axis, as the identity on the other inputs"

    def _axis(self, site: Site) -> int:
        return site.int("axis", 1) % site.rank(site.node.outputs[0])

    def pull(self, site: Site) -> Sequence[Step]:
        """Cut the map into pieces."""
        axis, a = self._axis(site), site.affine
        inputs = [site.input(i) for i in range(len(site.node.inputs))]
        if axis != a.axis:
            return [Step.carry(*((v, a) for v in inputs))]
        onward, start = [], 0
        for value in inputs:
            size = _length(site, value, axis)
            onward.append((value, a.take(slice(start, start + size))))
            start += size
        if start != a.size:
            raise Refused(f"the map has {a.size} channels, Concat delivers {start}")
        return [Step.carry(*onward)]

    def push(self, site: Site) -> Sequence[Step]:
        """The other inputs have the identity."""
        axis, a = self._axis(site), site.affine
        if axis != a.axis:
            raise Refused("the other inputs of Concat would need the same map")
        sizes = [_length(site, site.input(i), axis) for i in range(len(site.node.inputs))]
        return [Step.carry((site.node.outputs[0], a.within(sum(sizes[: site.index]), sum(sizes))))]


@operator("Split")
class Split(Operator):
    """The inverse of Concat."""

    upstream = "carries along the channel axis, as the identity on the other outputs; along another axis all must agree"
    downstream = "carries: each output lacks its piece (the whole, along another axis)"

    def _axis(self, site: Site) -> int:
        return site.int("axis", 0) % site.rank(site.input(0))

    joins = True

    def join(self, site: Site, wanted: Mapping[int, ChannelAffine]) -> Sequence[Step]:
        """Along the channels the outputs that nobody asked have the identity; along another axis all must agree."""
        axis, node = self._axis(site), site.node
        a = next(iter(wanted.values()))
        if any(other.axis != a.axis for other in wanted.values()):
            raise Refused("the outputs of Split would need maps along different axes")
        if axis != a.axis:
            read = [i for i, v in enumerate(node.outputs) if v.uses() or v.is_graph_output()]
            if any(i not in wanted or not wanted[i].equals(a) for i in read):
                raise Refused("the other outputs of Split would get the same map")
            return [Step.carry((site.input(0), a))]
        total = _length(site, site.input(0), axis)
        scale, shift, start = np.ones(total), np.zeros(total), 0
        for i, value in enumerate(node.outputs[: max(wanted) + 1]):
            size = _length(site, value, axis)
            if i in wanted:
                scale[start : start + size], shift[start : start + size] = wanted[i].scale, wanted[i].shift
            start += size
        return [Step.carry((site.input(0), ChannelAffine(scale, shift, axis)))]

    def push(self, site: Site) -> Sequence[Step]:
        """Cut the map into pieces."""
        if site.index != 0:
            raise Refused("the map feeds a parameter of Split")
        axis, a = self._axis(site), site.affine
        onward, start = [], 0
        for value in site.node.outputs:
            piece = a
            if axis == a.axis:
                size = _length(site, value, axis)
                piece = a.take(slice(start, start + size))
                start += size
            if value.uses() or value.is_graph_output():
                onward.append((value, piece))
        if axis == a.axis and start != a.size:
            raise Refused(f"the map has {a.size} channels, Split delivers {start}")
        return [Step.carry(*onward)]


@operator("Slice")
class Slice(Operator):
    """Constant bounds along the channels, anything along other axes."""

    upstream = downstream = "carries; bounds along the channel axis must be constant"

    def _kept(self, site: Site) -> Array | None:
        """Which channels stay; None when all do."""
        starts = site.ints("starts", 1) if site.opset < 10 else None
        axes = site.ints("axes", 3)
        if axes is None:
            count = len(starts or ()) or self._count(site)
            axes = list(range(count))
        rank = site.rank(site.input(0))
        axes = [x % rank for x in axes]
        if site.affine.axis not in axes:
            return None
        k = axes.index(site.affine.axis)
        starts, ends = site.ints("starts", 1), site.ints("ends", 2)
        steps = site.ints("steps", 4) or [1] * len(axes)
        if starts is None or ends is None:
            raise Refused("Slice lacks its bounds")
        size = _length(site, site.input(0), site.affine.axis)
        return np.arange(size)[bounds(starts[k], ends[k], steps[k], size)]

    def _count(self, site: Site) -> int:
        dims = site.dims(site.input(1))
        if len(dims) != 1 or not isinstance(dims[0], int):
            raise Refused("the axes of Slice are unknown")
        return dims[0]

    def channels(self, site: Site) -> Array | None:
        """The slice."""
        return self._kept(site) if site.index == 0 else None

    def pull(self, site: Site) -> Sequence[Step]:
        """The channels that are cut off have the identity."""
        kept = self._kept(site)
        if kept is None:
            return [Step.carry((site.input(0), site.affine))]
        return [Step.carry((site.input(0), _scatter(site, kept)))]

    def push(self, site: Site) -> Sequence[Step]:
        """The channels that stay keep their map."""
        if site.index != 0:
            raise Refused("the map feeds a parameter of Slice")
        kept = self._kept(site)
        a = site.affine
        if kept is not None and (a.size != _length(site, site.input(0), a.axis)):
            raise Refused(f"the map has {a.size} channels, Slice reads another number")
        return [Step.carry((site.node.outputs[0], a if kept is None else a.take(kept)))]


def _scatter(site: Site, kept: Array) -> ChannelAffine:
    """A map on the input of a selection of channels: the identity where nothing is selected."""
    a = site.affine
    if kept.size != a.size or np.unique(kept).size != kept.size:
        raise Refused(f"{site.node.op_type} delivers a channel twice")
    total = _length(site, site.input(0), a.axis)
    scale, shift = np.ones(total), np.zeros(total)
    scale[kept], shift[kept] = a.scale, a.shift
    return ChannelAffine(scale, shift, a.axis)


@operator("Gather")
class Gather(Operator):
    """Selection by index: of channels when the indices are constant, and of rows of a constant table."""

    upstream = "carries (constant, distinct indices along the channel axis); absorbs into a constant table"
    downstream = "carries; indices along the channel axis must be constant"

    def _place(self, site: Site) -> tuple[int, int]:
        """(gathered axis, rank of the indices)."""
        rank = site.rank(site.input(0))
        return site.int("axis", 0) % rank, site.rank(site.input(1))

    def _indices(self, site: Site, axis: int) -> Array:
        indices, size = site.constant(1, "indices").reshape(-1).astype(np.int64), _length(site, site.input(0), axis)
        if np.any(indices < -size) or np.any(indices >= size):
            raise Refused("Gather reads behind the end")
        return np.where(indices < 0, indices + size, indices)

    def channels(self, site: Site) -> Array | None:
        """The constant indices."""
        axis, _ = self._place(site)
        return self._indices(site, axis) if site.index == 0 and site.affine.axis == axis else None

    def pull(self, site: Site) -> Sequence[Step]:
        """Back to the axis it came from."""
        axis, count = self._place(site)
        a = site.affine
        if axis <= a.axis < axis + count:
            if count != 1:
                raise Refused("the map lies along one of several gathered axes")
            back = _scatter(site, self._indices(site, axis))
        else:
            back = a if a.axis < axis else a.at(a.axis - count + 1)
        table = site.facts.constant(site.input(0))
        if table is None:
            return [Step.carry((site.input(0), back))]
        if table.shape[back.axis] != back.size:
            raise Refused(f"the map has {back.size} channels, the table {table.shape[back.axis]}")
        scale, shift = back.broadcast(back.scale, table.ndim), back.broadcast(back.shift, table.ndim)
        dtype = site.dtype(site.input(0))
        wide = table
        return [
            Step.absorbed(SetConstant(site.node, 0, lambda: wide.astype(np.float64) * scale + shift, dtype, back.axis))
        ]

    def push(self, site: Site) -> Sequence[Step]:
        """Forward to the axis it goes to."""
        if site.index != 0:
            raise Refused("the map feeds the indices of Gather")
        axis, count = self._place(site)
        a = site.affine
        if a.axis == axis:
            if count != 1:
                raise Refused("the map lies along the gathered axis")
            return [Step.carry((site.node.outputs[0], a.take(self._indices(site, axis))))]
        return [Step.carry((site.node.outputs[0], a if a.axis < axis else a.at(a.axis + count - 1)))]
