"""Conv and ConvTranspose: ``y = W * x + b`` with channels along axis 1; the weights of one are the other's, turned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import Array
from ..plan import Refused, Step
from ..registry import Operator, Site, operator
from .common import bias_edit, weight_edit

__all__ = ["Conv", "ConvTranspose", "DeformConv"]


class Convolution(Operator):
    """Of the weights' axes 0 and 1, axis 1 counts the channels of one group, axis 0 those of all groups."""

    filters = 0
    """The axis of the channels that are delivered; the other one has those that are read."""
    bias = 2
    """Which input is the bias."""

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale the filters and the bias."""
        a = site.affine
        weight = site.constant(1, "weight")
        factor = self._spread(site, weight, a.scale, self.filters)
        edits = weight_edit(site, 1, "weight", factor, self.filters)
        if a.has_shift or site.has(self.bias):
            edits.append(bias_edit(site, self.bias, lambda b: a.scale * b + a.shift, a.size, "bias"))
        return [Step.absorbed(*edits)]

    def push(self, site: Site) -> Sequence[Step]:
        """Scale what each filter reads; a shift reaches every output equally often, or not at all."""
        if site.index != 0:
            raise Refused(f"the map feeds the weights of a {site.node.op_type}")
        a = site.affine
        weight = site.constant(1, "weight")
        factor = self._spread(site, weight, a.scale, 1 - self.filters)
        if a.has_shift:
            self._must_reach_all(site, weight.shape[2:])
        edits = weight_edit(site, 1, "weight", factor, self.filters)
        if a.has_shift:
            shift = self._spread(site, weight, a.shift, 1 - self.filters)
            taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2, dtype=np.float64)
            added = self._collected(site, taps * shift.reshape(shift.shape[:2]))
            edits.append(bias_edit(site, self.bias, lambda b: b + added, added.size, "bias"))
        return [Step.absorbed(*edits)]

    def _spread(self, site: Site, weight: Array, vector: Array, axis: int) -> Array:
        """One value for each channel along `axis` of the weights, shaped to be multiplied with them."""
        if site.affine.axis != 1:
            place = f"the map lies along axis {site.affine.axis}"
            raise Refused(f"{place}, {site.node.op_type} has its channels along axis 1")
        group = site.int("group", 1)
        if weight.ndim < 3 or group < 1:
            raise Refused(f"the weights of {site.node.op_type} have shape {list(weight.shape)} in {group} groups")
        total, per_group = weight.shape[:2]
        channels = total if axis == 0 else per_group * group
        if channels != vector.size or total % group:
            verb = "delivers" if axis == self.filters else "reads"
            raise Refused(f"the map has {vector.size} channels, {site.node.op_type} {verb} {channels}")
        behind = [1] * (weight.ndim - 2)
        if axis == 0:
            return vector.reshape(-1, 1, *behind)
        if group == 1:  # along one axis, as dequantized weights need it
            return vector.reshape(1, -1, *behind)
        group_of_row = np.repeat(np.arange(group), total // group)
        return vector.reshape(group, per_group)[group_of_row].reshape(total, per_group, *behind)

    def _collected(self, site: Site, products: Array) -> Array:
        """Sum over what each filter reads."""
        if self.filters == 0:
            return np.asarray(products.sum(axis=1))
        group = site.int("group", 1)
        return np.asarray(products.reshape(group, -1, products.shape[1]).sum(axis=1).reshape(-1))

    def _must_reach_all(self, site: Site, kernel: Sequence[int]) -> None:
        """Refuse where borders see less of a shift."""
        raise NotImplementedError


@operator("Conv")
class Conv(Convolution):
    """Weights (M, C/group, k...): the map scales rows upstream and columns, group by group, downstream."""

    upstream = "absorbs: W[m] *= scale[m], b = scale*b + shift; constant weights and bias, any group"
    downstream = "absorbs: W[:, c] *= scale[c], b += sum W*shift; a shift only where nothing is padded"

    def _must_reach_all(self, site: Site, kernel: Sequence[int]) -> None:
        """No output position may see zeros outside the input."""
        auto = site.text("auto_pad", "NOTSET")
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            padded = any(k > 1 for k in kernel)
        else:
            padded = auto != "VALID" and any(p > 0 for p in site.ints("pads") or ())
        if padded:
            raise Refused("the next Conv pads with zeros, and the shift is not zero")


@operator("ConvTranspose")
class ConvTranspose(Convolution):
    """Weights (C, M/group, k...): output channel m of group g is column m of the rows of that group."""

    upstream = "absorbs: W[c, m] *= scale[g(c), m], b = scale*b + shift; constant weights and bias, any group"
    downstream = "absorbs: W[c] *= scale[c]; a shift only into a 1x1 kernel with stride 1"
    filters = 1

    def _must_reach_all(self, site: Site, kernel: Sequence[int]) -> None:
        """The kernel must be a point."""
        point = all(k == 1 for k in kernel) and all(s == 1 for s in site.ints("strides") or ())
        plain = not any(site.ints("pads") or ()) and not any(site.ints("output_padding") or ())
        if not point or not plain or site.ints("output_shape") or site.text("auto_pad", "NOTSET") != "NOTSET":
            raise Refused("the next ConvTranspose reaches its borders less often than its middle")


@operator("DeformConv")
class DeformConv(Convolution):
    """As Conv on what it samples; where it samples, and the mask, do not depend on the weights."""

    upstream = "absorbs as Conv"
    downstream = "absorbs a scale as Conv; it samples zeros outside, so no shift"
    bias = 3

    def _must_reach_all(self, site: Site, kernel: Sequence[int]) -> None:
        """Samples may lie anywhere."""
        raise Refused("the next DeformConv may sample zeros outside the input, and the shift is not zero")
