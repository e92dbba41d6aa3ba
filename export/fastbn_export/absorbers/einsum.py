"""Einsum with constant operands: a label is an axis, wherever it stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import ChannelAffine
from ..plan import Edit, Refused, Step
from ..registry import Operator, Site, operator
from .common import vector_shape, weight_edit
from .matmul import shift_steps

__all__ = ["Einsum"]


def _labels(site: Site) -> tuple[list[str], str]:
    """Labels of the inputs and of the output."""
    equation = site.text("equation", "").replace(" ", "")
    if "." in equation:
        raise Refused("Einsum with an ellipsis")
    left, arrow, out = equation.partition("->")
    inputs = left.split(",")
    if not arrow:
        out = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    if len(inputs) != len(site.node.inputs) or any(len(set(term)) != len(term) for term in inputs):
        raise Refused(f"Einsum '{equation}' repeats a label")
    return inputs, out


def _holder(site: Site, inputs: list[str], label: str, data: int = -1) -> int:
    """A constant operand with the label."""
    for i, term in enumerate(inputs):
        if i != data and label in term and site.facts.is_constant(site.input(i)):
            return i
    raise Refused(f"no constant operand of Einsum has the axis '{label}'")


@operator("Einsum")
class Einsum(Operator):
    """Linear in each operand."""

    upstream = "absorbs into a constant operand that has the axis; a shift becomes an Add; a transposition carries"
    downstream = (
        "absorbs into a constant operand that has the axis; a shift only if it stays a vector; a transposition carries"
    )

    def pull(self, site: Site) -> Sequence[Step]:
        """Scale a constant operand along the label of the map's axis."""
        inputs, out = _labels(site)
        a = site.affine
        if a.axis >= len(out):
            raise Refused("the map's axis is not one of the Einsum")
        if len(inputs) == 1 and len(inputs[0]) == len(out):  # a transposition
            return [Step.carry((site.input(0), a.at(inputs[0].index(out[a.axis]))))]
        index = _holder(site, inputs, out[a.axis])
        edits = self._scale(site, index, inputs[index].index(out[a.axis])) if a.has_scale else []
        if not a.has_shift:
            return [Step.absorbed(*edits)]
        return shift_steps(site, edits, ChannelAffine(np.ones(a.size), a.shift, a.axis), onward=False)

    def push(self, site: Site) -> Sequence[Step]:
        """Scale a constant operand along the label of the map's axis on the data."""
        inputs, out = _labels(site)
        a = site.affine
        label = inputs[site.index][a.axis]
        if len(inputs) == 1 and len(inputs[0]) == len(out):
            return [Step.carry((site.node.outputs[0], a.at(out.index(label))))]
        index = _holder(site, inputs, label, site.index)
        edits = self._scale(site, index, inputs[index].index(label)) if a.has_scale else []
        if not a.has_shift:
            return [Step.absorbed(*edits)]
        free = set(inputs[site.index]) - {label}
        if len(inputs) != 2 or free & set(inputs[index]) or not free <= set(out) or label in out:
            raise Refused("a shift does not stay a vector in this Einsum")
        rest = [c for c in inputs[index] if c != label and c in out]
        if len(rest) != 1:
            raise Refused("a shift does not stay a vector in this Einsum")
        weight = site.constant(index, "weight").astype(np.float64)
        added = np.einsum(f"{inputs[index]},{label}->{rest[0]}", weight, a.shift)
        return shift_steps(site, edits, ChannelAffine(np.ones(added.size), added, out.index(rest[0])), onward=True)

    def _scale(self, site: Site, index: int, axis: int) -> list[Edit]:
        a, weight = site.affine, site.constant(index, "operand")
        if weight.shape[axis] != a.size:
            raise Refused(f"the map has {a.size} channels, Einsum's operand has shape {weight.shape}")
        factor = a.scale.reshape(vector_shape(a.size, axis, weight.ndim))
        return weight_edit(site, index, "operand", factor, axis)
