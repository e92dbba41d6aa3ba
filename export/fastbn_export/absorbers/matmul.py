"""MatMul with one constant factor, of any rank, on either side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import Array, ChannelAffine
from ..plan import AddShift, BecomeGemm, Edit, Refused, Step
from ..registry import Operator, Site, operator
from .common import vector_shape, weight_edit

__all__ = ["MatMul"]


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


def _two_matrices(site: Site) -> bool:
    return site.opset >= 7 and all(site.facts.rank(site.input(i)) == 2 for i in (0, 1))


@operator("MatMul")
class MatMul(Operator):
    """``Y = A @ B``: columns of Y belong to B, rows to A, batches to both."""

    upstream = (
        "absorbs: columns of a constant B, rows of a constant A; a shift goes into the Add that follows, "
        "makes a Gemm of two matrices, or becomes an Add in the place of the normalization"
    )
    downstream = "absorbs: rows of a constant B, columns of a constant A; a scale along other axes is carried"

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale the constant factor that the axis belongs to."""
        a, rank = site.affine, site.rank(site.node.outputs[0])
        left, right = site.rank(site.input(0)), site.rank(site.input(1))
        columns, rows = (rank - 1 if right > 1 else -1), (rank - (2 if right > 1 else 1) if left > 1 else -1)
        if a.axis == columns and site.facts.is_constant(site.input(1)):
            index, axis = 1, right - 1
        elif a.axis == rows and site.facts.is_constant(site.input(0)):
            index, axis = 0, left - 2
        else:
            index, axis = self._batch(site, rank, left, right, columns, rows)
        weight = site.constant(index, "weight")
        if weight.shape[axis] != a.size:
            raise Refused(f"the map has {a.size} channels, MatMul's weight has shape {weight.shape}")
        factor = a.scale.reshape(vector_shape(a.size, axis, weight.ndim))
        edits = weight_edit(site, index, "weight", factor, axis) if a.has_scale else []
        if not a.has_shift:
            return [Step.absorbed(*edits)]
        return shift_steps(site, edits, ChannelAffine(np.ones(a.size), a.shift, a.axis), onward=False)

    def _batch(self, site: Site, rank: int, left: int, right: int, columns: int, rows: int) -> tuple[int, int]:
        """A constant factor that has the map's axis among its batch axes."""
        axis = site.affine.axis
        for index, own in ((1, right), (0, left)):
            mine = axis - (rank - own)
            if axis not in (columns, rows) and min(left, right) > 1 and 0 <= mine < own - 2:
                weight = site.facts.constant(site.input(index))
                if weight is not None and weight.shape[mine] == site.affine.size:
                    return index, mine
        which = 1 if axis == columns else 0
        if not site.facts.is_constant(site.input(0)) and not site.facts.is_constant(site.input(1)):
            site.constant(which, "weight")
        raise Refused("the map lies along an axis of MatMul's data, not of its weight")

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
            return [Step.carry((site.node.outputs[0], a.at(a.axis + out_rank - rank)))]
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
