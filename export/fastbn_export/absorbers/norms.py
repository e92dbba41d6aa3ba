"""Normalizations that have an affine of their own: it takes the map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..affine import Array
from ..plan import Edit, Refused, SetConstant, Step
from ..registry import Operator, Site, operator
from ..sources import must_infer

__all__ = ["BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"]


def _vector_edit(site: Site, index: int, what: str, compute: Callable[[Array], Array], size: int) -> Edit:
    axis = 0 if what == "scale" else None  # a scale must keep its precision, a bias only its range
    vector = site.constant(index, what)
    if vector.shape != (size,):
        raise Refused(f"the {what} of {site.node.op_type} has shape {vector.shape}, expected ({size},)")
    wide = vector.astype(np.float64)
    return SetConstant(site.node, index, lambda: compute(wide), site.dtype(site.input(index)), axis)


def _own_affine(site: Site) -> Sequence[Step]:
    """``scale' = s * scale, bias' = s * bias + t`` on inputs 1 and 2."""
    a = site.affine
    if a.axis != 1:
        raise Refused(f"the map does not lie along the channel axis of {site.node.op_type}")
    edits = [
        _vector_edit(site, 1, "scale", lambda v: a.scale * v, a.size),
        _vector_edit(site, 2, "bias", lambda v: a.scale * v + a.shift, a.size),
    ]
    return [Step.absorbed(*edits)]


@operator("BatchNormalization")
class BatchNormalization(Operator):
    """Another normalization that itself could not be folded."""

    upstream = "absorbs into its scale and bias (inference form)"
    downstream = "absorbs into its scale and bias (inference form)"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale and shift its result."""
        if site.index != 0:
            raise Refused("the map stands on a statistic of BatchNormalization")
        must_infer(site.node, site.facts)
        return _own_affine(site)

    def push(self, site: Site) -> Sequence[Step]:
        """``k (s x + t - m) + b = k s (x - m) + (b + k (t - m + s m))`` with k = scale / sqrt(var + epsilon)."""
        if site.index != 0 or site.affine.axis != 1:
            raise Refused("the map feeds a parameter or another axis of BatchNormalization")
        must_infer(site.node, site.facts)
        a = site.affine
        gamma, mean, variance = (site.constant(i, "parameter").astype(np.float64) for i in (1, 3, 4))
        epsilon = np.float64(np.float32(site.float("epsilon", 1e-5)))
        if gamma.shape != (a.size,) or mean.shape != gamma.shape or variance.shape != gamma.shape:
            raise Refused("the parameters of BatchNormalization do not match the channels")
        with np.errstate(all="ignore"):
            k = gamma / np.sqrt(variance + epsilon)
        return [
            Step.absorbed(
                _vector_edit(site, 1, "scale", lambda v: a.scale * v, a.size),
                _vector_edit(site, 2, "bias", lambda b: b + k * (a.shift - mean + a.scale * mean), a.size),
            )
        ]


@operator("InstanceNormalization")
class InstanceNormalization(Operator):
    """Scale and B of shape (C,)."""

    upstream = "absorbs into its scale and bias"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale and shift its result."""
        return _own_affine(site)


@operator("GroupNormalization")
class GroupNormalization(Operator):
    """Scale and bias per channel since opset 21, per group before."""

    upstream = "absorbs into its scale and bias; before opset 21 the map must agree within each group"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale and shift its result."""
        if site.opset >= 21:
            return _own_affine(site)
        a, groups = site.affine, site.int("num_groups", 0)
        if a.axis != 1 or groups < 1 or a.size % groups:
            raise Refused("the map does not lie along the channel axis of GroupNormalization")
        first = np.arange(groups) * (a.size // groups)
        for vector in (a.scale, a.shift):
            if np.any(vector.reshape(groups, -1) != vector[first][:, None]):
                raise Refused("the map differs within a group of GroupNormalization")
        per_group = a.take(first)
        return _own_affine(Site(site.facts, site.node, site.index, per_group))


@operator("LayerNormalization", "RMSNormalization")
class LayerNormalization(Operator):
    """Scale and B broadcast over the normalised axes, from `axis` to the last."""

    upstream = "absorbs into its scale and bias along a normalised axis; RMSNormalization a scale only"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale and shift its result."""
        if site.index != 0:
            raise Refused("the map stands on a statistic of a normalization")
        a, rank = site.affine, site.rank(site.input(0))
        if a.axis < site.int("axis", -1) % rank:
            raise Refused(f"the map lies along an axis that {site.node.op_type} does not normalise")
        if site.facts.size(site.input(0), a.axis) != a.size:
            raise Refused(f"the number of channels of {site.node.op_type} is unknown")
        behind = rank - 1 - a.axis
        scale, shift = (v.reshape(-1, *[1] * behind) for v in (a.scale, a.shift))
        weight = site.constant(1, "scale").astype(np.float64)
        kept = tuple(range(np.broadcast(weight, scale).ndim))
        dtype = site.dtype(site.input(1))
        edits: list[Edit] = [SetConstant(site.node, 1, lambda: weight * scale, dtype, kept)]
        if a.has_shift or site.has(2):
            if site.node.op_type == "RMSNormalization":
                raise Refused("RMSNormalization has no bias to take a shift")
            bias = site.constant(2, "bias").astype(np.float64) if site.has(2) else np.zeros(weight.shape)
            edits.append(SetConstant(site.node, 2, lambda: bias * scale + shift, dtype, None, "bias"))
        return [Step.absorbed(*edits)]
