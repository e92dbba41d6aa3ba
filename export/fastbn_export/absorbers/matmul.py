"""MatMul of factors of any rank: a constant one takes the scale, a computed one is asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from ..affine import Array, ChannelAffine
from ..plan import AddShift, BecomeGemm, Edit, Refused, Step
from ..registry import Operator, Site, operator
from .common import vector_shape, weight_edit

__all__ = ["MatMul", "carry_scale", "shift_steps"]


def shift_steps(site: Site, edits: Sequence[Edit], shift: ChannelAffine, onward: bool) -> list[Step]:
    """How the output can get a shift that the operator itself has no place for, best first."""
    out, dtype, steps = site.node.outputs[0], site.dtype(site.node.outputs[0]), []
    if onward:
        steps.append(Step([*edits], [(out, shift)], True))
    if site.node.op_type == "MatMul" and _two_matrices(site):
        bias = shift.shift if shift.axis == 1 else shift.shift[:, None]
        steps.append(Step.absorbed(*edits, BecomeGemm(site.node, bias, dtype)))
    steps.append(Step.absorbed(*edits, AddShift(site.node, out, shift, site.rank(out), dtype, site.opset)))
    return steps


def carry_scale(site: Site, places: Sequence[tuple[int, int]]) -> list[Step]:
    """Ask a computed operand for the scale, one of `places` (operand, axis of it); the output gets the shift."""
    a = site.affine
    scales = [
        (value, a.linear().at(axis))
        for value, axis in ((site.input(index), axis) for index, axis in places)
        if value.producer() is not None and not site.facts.is_constant(value) and site.facts.size(value, axis) == a.size
    ]
    if not scales:
        _no_operand(site, places)
    if not a.has_shift:
        return [Step.carry(scale) for scale in scales]
    shifts = shift_steps(site, [], ChannelAffine(np.ones(a.size), a.shift, a.axis), onward=False)
    return [Step(shift.edits, [scale], True) for scale in scales for shift in shifts]


def _no_operand(site: Site, places: Sequence[tuple[int, int]]) -> NoReturn:
    """Say why no operand takes the scale."""
    op_type, given = site.node.op_type, [i for i, _ in places if site.input(i).producer() is None]
    if given and not any(site.facts.is_constant(value) for value in site.node.inputs):
        site.constant(given[0], "weight")
    if given and not site.facts.is_constant(site.input(given[0])):
        raise Refused(f"the map lies along an axis of {op_type}'s data, not of its weight")
    raise Refused(f"no operand of {op_type} has all {site.affine.size} channels of the map")


def _two_matrices(site: Site) -> bool:
    return site.opset >= 7 and all(site.facts.rank(site.input(i)) == 2 for i in (0, 1))


@operator("MatMul")
class MatMul(Operator):
    """``Y = A @ B``: columns of Y belong to B, rows to A, batches to both."""

    upstream = (
        "absorbs: columns of a constant B, rows of a constant A; elsewhere a computed factor is asked for the scale; a "
        "shift goes into the Add that follows, makes a Gemm of two matrices, or becomes an Add in the place of the "
        "normalization"
    )
    downstream = "absorbs: rows of a constant B, columns of a constant A; a scale along other axes is carried"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale a constant factor that has the axis, or ask a computed one for the scale."""
        a = site.affine
        places = self._places(site)
        for index, axis in places:
            weight = site.facts.constant(site.input(index))
            if weight is None or weight.shape[axis] != a.size:
                continue
            factor = a.scale.reshape(vector_shape(a.size, axis, weight.ndim))
            edits = weight_edit(site, index, "weight", factor, axis) if a.has_scale else []
            if not a.has_shift:
                return [Step.absorbed(*edits)]
            return shift_steps(site, edits, ChannelAffine(np.ones(a.size), a.shift, a.axis), onward=False)
        return carry_scale(site, places)

    def _places(self, site: Site) -> list[tuple[int, int]]:
        """(factor, axis of it) where the map's axis is: columns of the right, rows of the left, batches of both."""
        axis, rank = site.affine.axis, site.rank(site.node.outputs[0])
        left, right = site.rank(site.input(0)), site.rank(site.input(1))
        if right > 1 and axis == rank - 1:
            return [(1, right - 1)]
        if left > 1 and axis == rank - (2 if right > 1 else 1):
            return [(0, left - 2)]
        if min(left, right) == 1:  # a vector has no batches, and its axis is not one of the output's
            return [(0 if right == 1 else 1, axis)] if axis < rank else []
        found = [(index, axis - rank + own) for index, own in ((1, right), (0, left))]
        return [(index, mine) for index, mine in found if mine >= 0]

    def push(self, site: Site) -> Sequence[Step]:
        """Scale the constant factor along the contraction; elsewhere the scale goes through."""
        a, x = site.affine, site.input(site.index)
        rank, out_rank = site.rank(x), site.rank(site.node.outputs[0])
        contracted = rank - 1 if site.index == 0 or rank == 1 else rank - 2
        other = 1 - site.index
        other_rank = site.rank(site.input(other))
        if a.axis != contracted:
            if a.has_shift or rank < 2 or other_rank < 2:
                raise Refused("a shift does not pass MatMul along this axis" if a.has_shift else "MatMul of a vector")
            axis = a.axis + out_rank - rank
            if site.facts.size(site.node.outputs[0], axis) != a.size:
                raise Refused("MatMul broadcasts along the channels")
            return [Step.carry((site.node.outputs[0], a.at(axis)))]
        weight = site.constant(other, "weight")
        axis = 0 if weight.ndim == 1 else weight.ndim - (2 if other == 1 else 1)
        if weight.shape[axis] != a.size:
            raise Refused(f"the map has {a.size} channels, MatMul's weight has shape {weight.shape}")
        kept = tuple(i for i in range(weight.ndim) if i != axis)
        factor = a.scale.reshape(vector_shape(a.size, axis, weight.ndim))
        edits = weight_edit(site, other, "weight", factor, kept) if a.has_scale else []
        if not a.has_shift:
            return [Step.absorbed(*edits)]
        if weight.ndim != 2:
            raise Refused("a shift does not pass a MatMul whose weight is no matrix")
        wide: Array = weight.astype(np.float64)
        added = a.shift @ wide if other == 1 else wide @ a.shift
        along = out_rank - 1 if other == 1 or rank == 1 else out_rank - 2
        return shift_steps(site, edits, ChannelAffine(np.ones(added.size), added, along), onward=True)
