"""Pools, reductions and other averages over positions: weights that sum to one commute with any map."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from ..affine import ChannelAffine
from ..plan import Refused, Step
from ..registry import Operator, Site, operator

__all__ = ["AveragePool", "GlobalAveragePool", "GridSample", "MaxPool", "Reduce", "Resize"]


def _through(site: Site, up: bool, affine: ChannelAffine | None = None) -> Sequence[Step]:
    if not up and site.index != 0:
        raise Refused(f"the map feeds a parameter of {site.node.op_type}")
    a = site.affine if affine is None else affine
    return [Step.carry((site.input(0) if up else site.node.outputs[0], a))]


def _channels_first(site: Site) -> None:
    if site.affine.axis != 1:
        raise Refused(f"the map does not lie along the channel axis of {site.node.op_type}")


def _not_negative(site: Site) -> None:
    if np.any(site.affine.scale < 0):
        raise Refused(f"a negative scale turns the extreme of {site.node.op_type} into the other one")


class Commuting(Operator):
    """An operator that commutes with every map that `check` lets pass."""

    def check(self, site: Site) -> None:
        """Refuse what does not commute."""

    def pull(self, site: Site) -> Sequence[Step]:
        """Before instead of after."""
        self.check(site)
        return _through(site, True)

    def push(self, site: Site) -> Sequence[Step]:
        """After instead of before."""
        self.check(site)
        return _through(site, False)


@operator("AveragePool")
class AveragePool(Commuting):
    """Counts its padding as zeros only with count_include_pad."""

    upstream = downstream = "carries; a shift only where padding is absent or not counted"

    def check(self, site: Site) -> None:
        """Refuse what does not commute."""
        _channels_first(site)
        padded = any(site.ints("pads") or ()) or site.text("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
        counted = site.int("count_include_pad", 0) and (padded or site.int("ceil_mode", 0))
        if counted and site.affine.has_shift and (padded or self._overhangs(site)):
            raise Refused("AveragePool counts padded zeros, and the shift is not zero")

    def _overhangs(self, site: Site) -> bool:
        """Whether windows may reach behind the end, where runtimes do not agree on what is counted."""
        kernel, dims = site.ints("kernel_shape") or [], site.facts.dims(site.input(0)) or ()
        ones = [1] * len(kernel)
        windows = zip(dims[2:], kernel, site.ints("strides") or ones, site.ints("dilations") or ones, strict=False)
        fits = [isinstance(d, int) and (d - dilation * (k - 1) - 1) % step == 0 for d, k, step, dilation in windows]
        return len(fits) != len(kernel) or not all(fits)


@operator("GlobalAveragePool")
class GlobalAveragePool(Commuting):
    """The mean over all positions."""

    upstream = downstream = "carries"

    def check(self, site: Site) -> None:
        """Only the channel axis stays."""
        _channels_first(site)


@operator("MaxPool", "GlobalMaxPool")
class MaxPool(Commuting):
    """The maximum commutes with any increasing map; padding is minus infinity."""

    upstream = downstream = "carries where no scale is negative and the indices are not used"

    def check(self, site: Site) -> None:
        """Refuse what does not commute."""
        _channels_first(site)
        _not_negative(site)
        if site.index or any(o.uses() or o.is_graph_output() for o in site.node.outputs[1:]):
            raise Refused("the indices of MaxPool are used")


@operator("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
class Reduce(Operator):
    """Reductions over axes other than the channels; a sum counts the shift once for each element."""

    upstream = downstream = (
        "carries over other axes (ReduceMax, ReduceMin: no negative scale; ReduceSum: shift times static count)"
    )

    def _axes(self, site: Site) -> tuple[list[int], int]:
        rank = site.rank(site.input(0))
        axes = site.ints("axes", 1)
        if not axes:
            axes = [] if site.int("noop_with_empty_axes", 0) else list(range(rank))
        return [x % rank for x in axes], rank

    def _carried(self, site: Site, axis: int, axes: list[int], up: bool) -> ChannelAffine:
        a = site.affine
        if axis in axes:
            raise Refused(f"{site.node.op_type} reduces the channel axis")
        if site.node.op_type in ("ReduceMax", "ReduceMin"):
            _not_negative(site)
        if site.node.op_type == "ReduceSum" and a.has_shift:
            dims = site.dims(site.input(0))
            sizes = [d for i in axes if isinstance(d := dims[i], int)]
            if len(sizes) != len(axes) or not prod(sizes):
                raise Refused("ReduceSum over an unknown number of elements")
            count = prod(sizes)
            return ChannelAffine(a.scale, a.shift / count if up else a.shift * count, a.axis)
        return a

    def pull(self, site: Site) -> Sequence[Step]:
        """Back to the axis before the reduction."""
        axes, rank = self._axes(site)
        kept = list(range(rank)) if site.int("keepdims", 1) else [i for i in range(rank) if i not in axes]
        if site.affine.axis >= len(kept):
            raise Refused(f"the map's axis is not one of {site.node.op_type}")
        axis = kept[site.affine.axis]
        return _through(site, True, self._carried(site, axis, axes, True).at(axis))

    def push(self, site: Site) -> Sequence[Step]:
        """Forward to the axis after the reduction."""
        axes, rank = self._axes(site)
        kept = list(range(rank)) if site.int("keepdims", 1) else [i for i in range(rank) if i not in axes]
        carried = self._carried(site, site.affine.axis, axes, False)
        if site.affine.axis not in kept:
            raise Refused(f"the map's axis is not one of {site.node.op_type}")
        return _through(site, False, carried.at(kept.index(site.affine.axis)))


@operator("Resize", "Upsample")
class Resize(Commuting):
    """Interpolation weights sum to one; only tf_crop_and_resize writes values from outside."""

    upstream = downstream = (
        "carries (tf_crop_and_resize a scale only, where it fills in zeros); the channels must not be resized"
    )

    def check(self, site: Site) -> None:
        """Refuse what does not commute."""
        if site.text("coordinate_transformation_mode", "") == "tf_crop_and_resize" and (
            site.affine.has_shift or site.float("extrapolation_value", 0.0) != 0.0
        ):
            raise Refused("Resize fills in values from outside the input")
        before, after = (site.facts.size(v, site.affine.axis) for v in (site.input(0), site.node.outputs[0]))
        if not isinstance(before, int) or before != after or self._factor(site) != 1.0:
            raise Refused(f"{site.node.op_type} may resize the channel axis")

    def _factor(self, site: Site) -> float:
        """By how much the channel axis grows before its length is rounded down: 1.2 keeps 3 channels, and mixes them.

        1 where that is not constant: an exporter computes the factors of positions.
        """
        rank, axes = site.rank(site.input(0)), site.ints("axes")
        along = list(range(rank)) if axes is None else [x % rank for x in axes]
        if site.affine.axis not in along:
            return 1.0
        if site.text("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise Refused("Resize keeps the aspect ratio of the channel axis too")
        given = site.node.attributes.get("scales")
        if given is not None:
            factors = list(given.as_floats())
        else:
            index = 2 if site.node.op_type == "Resize" and site.opset >= 11 else 1
            scales = site.facts.constant(site.input(index)) if site.has(index) else None
            factors = [] if scales is None else scales.reshape(-1).tolist()
        return float(dict(zip(along, factors, strict=False)).get(site.affine.axis, 1.0))


@operator("GridSample")
class GridSample(Commuting):
    """Interpolation weights sum to one, but for what zero padding takes away."""

    upstream = downstream = "carries; a shift only where nothing is padded with zeros"

    def check(self, site: Site) -> None:
        """Refuse what does not commute."""
        _channels_first(site)
        if site.affine.has_shift and site.text("padding_mode", "zeros") == "zeros":
            raise Refused("GridSample pads with zeros, and the shift is not zero")
