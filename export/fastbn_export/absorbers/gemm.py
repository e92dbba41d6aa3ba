"""Gemm: ``Y = alpha * A' B' + beta * C``, where ' is an optional transposition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from ..affine import Array, ChannelAffine
from ..plan import Edit, Refused, SetAttribute, SetConstant, Step
from ..registry import Operator, Site, operator
from .common import weight_edit

__all__ = ["Gemm"]


@operator("Gemm")
class Gemm(Operator):
    """Columns of Y belong to B', rows to A'; the constant one of them takes the scale, C takes the shift."""

    upstream = (
        "absorbs: B'[:, n] *= scale[n] (A'[m] along axis 0), C = scale*beta*C + shift, beta = 1; any shape of C; "
        "a C that is computed takes the map too, a computed factor the scale"
    )
    downstream = "absorbs: B'[k] *= scale[k] (A'[:, k]), C = beta*C + alpha*shift B', beta = 1"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale the constant factor that the axis belongs to."""
        a = site.affine
        if a.axis not in (0, 1):
            raise Refused("the map does not lie along an axis of the Gemm's output")
        index, flag = (1, "transB") if a.axis == 1 else (0, "transA")
        edits, onward = self._factor(site, index, a.axis ^ bool(site.int(flag, 0)))
        along = (1, -1) if a.axis == 1 else (-1, 1)
        scale, shift = a.scale.reshape(along), a.shift.reshape(along)
        beta = site.float("beta", 1.0)
        if site.has(2) and beta != 0.0 and not site.facts.is_constant(site.input(2)):
            return [Step(edits, [*onward, _branch(site, beta)], True)]
        if a.has_shift or (site.has(2) and beta != 0.0):
            edits += _offset(site, lambda c: c * scale + shift)
        return [Step(edits, onward, bool(edits) or not onward)]

    def _factor(self, site: Site, index: int, axis: int) -> tuple[list[Edit], list[tuple[ir.Value, ChannelAffine]]]:
        """Scale a constant factor along one of its axes, or ask a computed one for the scale."""
        a, value = site.affine, site.input(index)
        if value.producer() is not None and not site.facts.is_constant(value):
            if site.facts.size(value, axis) != a.size:
                raise Refused(f"the map has {a.size} channels, the factor of Gemm may have another number")
            return [], [(value, a.linear().at(axis))]
        if site.facts.is_constant(site.input(1 - index)) and not site.facts.is_constant(value):
            raise Refused("the map lies along an axis of Gemm's data, not of its weight")
        weight = site.constant(index, "weight")
        if weight.ndim != 2 or weight.shape[axis] != a.size:
            raise Refused(f"the map has {a.size} channels, Gemm's weight has shape {weight.shape}")
        return weight_edit(site, index, "weight", a.at(axis).broadcast(a.scale, 2), axis), []

    def push(self, site: Site) -> Sequence[Step]:
        """Scale the factor that meets the map in the contraction."""
        if site.index > 1:
            raise Refused("the map feeds the offset C of a Gemm")
        a = site.affine
        mine, other = (("transA", 1), ("transB", 0))[:: 1 if site.index == 0 else -1]
        if a.axis ^ bool(site.int(mine[0], 0)) != mine[1]:
            raise Refused("the map lies along an axis that Gemm does not contract")
        index = 1 - site.index
        weight = site.constant(index, "weight")
        axis = other[1] ^ bool(site.int(other[0], 0))
        if weight.ndim != 2 or weight.shape[axis] != a.size:
            raise Refused(f"the map has {a.size} channels, Gemm's weight has shape {weight.shape}")
        edits = weight_edit(site, index, "weight", a.at(axis).broadcast(a.scale, 2), 1 - axis)
        if a.has_shift:
            alpha = site.float("alpha", 1.0)
            wide = weight.astype(np.float64)
            added = alpha * (a.shift @ (wide if axis == 0 else wide.T))
            added = added.reshape((1, -1) if index == 1 else (-1, 1))
            edits += _offset(site, lambda c: c + added)
        return [Step.absorbed(*edits)]


def _branch(site: Site, beta: float) -> tuple[ir.Value, ChannelAffine]:
    """What a C that is computed at run time must deliver: ``s (x + beta C) + t = s x + beta (s C + t / beta)``."""
    a, c = site.affine, site.input(2)
    if c.producer() is None:
        site.constant(2, "offset C")
    return c, ChannelAffine(a.scale, a.shift / beta, site.operand_axis(2))


def _offset(site: Site, compute: Callable[[Array], Array]) -> list[Edit]:
    """Replace ``beta * C`` by a function of it; the new C is as small as broadcasting allows."""
    beta = site.float("beta", 1.0)
    edits: list[Edit] = []
    if site.has(2) and beta != 0.0:
        c = site.constant(2, "offset C").astype(np.float64) * beta
        if c.ndim > 2:
            raise Refused(f"the offset C of Gemm has shape {c.shape}")
    else:
        c = np.zeros(())
    value = compute(c)
    if value.ndim == 2 and value.shape[0] == 1:
        value = value[0]
    dtype = site.dtype(site.input(2) if site.has(2) else site.input(1))
    edits.append(SetConstant(site.node, 2, lambda: value, dtype, None, "bias"))
    if beta != 1.0:
        edits.append(SetAttribute(site.node, ir.AttrFloat32("beta", 1.0)))
    if site.opset < 7:
        edits.append(SetAttribute(site.node, ir.AttrInt64("broadcast", 1)))
    return edits
