"""Conv and ConvTranspose: ``y = W * x + b`` with the channel axis at 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import Array
from ..plan import Refused, Step
from ..registry import Operator, Site, operator
from .common import bias_edit, weight_edit

__all__ = ["Conv", "ConvTranspose"]


def _check_axis(site: Site) -> None:
    if site.affine.axis != 1:
        raise Refused(f"the map lies along axis {site.affine.axis}, {site.node.op_type} has its channels along axis 1")


def _bias_needed(site: Site) -> bool:
    return site.affine.has_shift or site.has(2)


def _padded(site: Site, kernel: Sequence[int]) -> bool:
    """Whether any output position sees zeros outside the input."""
    auto = site.text("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return any(k > 1 for k in kernel)
    if auto == "VALID":
        return False
    return any(p > 0 for p in site.ints("pads") or ())


@operator("Conv")
class Conv(Operator):
    """Weights (M, C/group, k...): the map scales rows upstream and columns, group by group, downstream."""

    upstream = "absorbs: W[m] *= scale[m], b = scale*b + shift; constant weights and bias, any group"
    downstream = "absorbs: W[:, c] *= scale[c], b += sum W*shift; a shift only where nothing is padded"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale the filters and the bias."""
        _check_axis(site)
        a = site.affine
        weight = site.constant(1, "weight")
        if weight.shape[0] != a.size:
            raise Refused(f"the map has {a.size} channels, Conv delivers {weight.shape[0]}")
        edits = weight_edit(site, 1, "weight", a.scale.reshape(-1, *[1] * (weight.ndim - 1)), 0)
        if _bias_needed(site):
            edits.append(bias_edit(site, 2, lambda b: a.scale * b + a.shift, a.size, "bias"))
        return [Step.absorbed(*edits)]

    def push(self, site: Site) -> Sequence[Step]:
        """Scale what each filter reads."""
        if site.index != 0:
            raise Refused("the map feeds the weights of a Conv")
        _check_axis(site)
        a = site.affine
        weight = site.constant(1, "weight")
        group = site.int("group", 1)
        filters, per_group = weight.shape[:2]
        if per_group * group != a.size or filters % group:
            raise Refused(f"the map has {a.size} channels, Conv reads {per_group * group}")
        if a.has_shift and _padded(site, weight.shape[2:]):
            raise Refused("the next Conv pads with zeros, and the shift is not zero")
        rows = np.repeat(np.arange(group), filters // group)  # group of each filter
        scale = a.scale.reshape(group, per_group)[rows].reshape(filters, per_group, *[1] * (weight.ndim - 2))
        edits = weight_edit(site, 1, "weight", scale, 0)
        if a.has_shift:
            shift = a.shift.reshape(group, per_group)[rows]

            def bias(b: Array) -> Array:
                taps: Array = weight.reshape(filters, per_group, -1).sum(axis=2, dtype=np.float64)
                added: Array = np.einsum("mc,mc->m", taps, shift)
                return b + added

            edits.append(bias_edit(site, 2, bias, filters, "bias"))
        return [Step.absorbed(*edits)]


@operator("ConvTranspose")
class ConvTranspose(Operator):
    """Weights (C, M/group, k...): output channel m of group g is column m of the rows of that group."""

    upstream = "absorbs: W[c, m] *= scale[g(c), m], b = scale*b + shift; constant weights and bias, any group"
    downstream = "absorbs: W[c] *= scale[c]; a shift only into a 1x1 kernel with stride 1"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale the columns of each group."""
        _check_axis(site)
        a = site.affine
        weight = site.constant(1, "weight")
        group = site.int("group", 1)
        channels, per_group = weight.shape[:2]
        if per_group * group != a.size or channels % group:
            raise Refused(f"the map has {a.size} channels, ConvTranspose delivers {per_group * group}")
        rows = np.repeat(np.arange(group), channels // group)
        scale = a.scale.reshape(group, per_group)[rows].reshape(channels, per_group, *[1] * (weight.ndim - 2))
        edits = weight_edit(site, 1, "weight", scale, 1)
        if _bias_needed(site):
            edits.append(bias_edit(site, 2, lambda b: a.scale * b + a.shift, a.size, "bias"))
        return [Step.absorbed(*edits)]

    def push(self, site: Site) -> Sequence[Step]:
        """Scale the rows; a shift reaches each output once only if the kernel is a point."""
        if site.index != 0:
            raise Refused("the map feeds the weights of a ConvTranspose")
        _check_axis(site)
        a = site.affine
        weight = site.constant(1, "weight")
        group = site.int("group", 1)
        if weight.shape[0] != a.size:
            raise Refused(f"the map has {a.size} channels, ConvTranspose reads {weight.shape[0]}")
        edits = weight_edit(site, 1, "weight", a.scale.reshape(-1, *[1] * (weight.ndim - 1)), 0)
        if a.has_shift:
            point = all(k == 1 for k in weight.shape[2:]) and all(s == 1 for s in site.ints("strides") or ())
            plain = not any(site.ints("pads") or ()) and not any(site.ints("output_padding") or ())
            if not point or not plain or site.ints("output_shape") or site.text("auto_pad", "NOTSET") != "NOTSET":
                raise Refused("the next ConvTranspose reaches its borders less often than its middle")
            taps = weight.reshape(group, weight.shape[0] // group, weight.shape[1]).astype(np.float64)
            added = np.einsum("gcm,gc->gm", taps, a.shift.reshape(group, -1)).reshape(-1)
            edits.append(bias_edit(site, 2, lambda b: b + added, added.size, "bias"))
        return [Step.absorbed(*edits)]
