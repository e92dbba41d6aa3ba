"""Einsum with constant operands: a label is an axis, wherever it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_letters

import numpy as np

from ..affine import ChannelAffine
from ..plan import Edit, Refused, Step
from ..registry import Operator, Site, operator
from .common import vector_shape, weight_edit
from .matmul import carry_scale, shift_steps

__all__ = ["Einsum"]


def _labels(site: Site) -> tuple[list[str], str]:
    """Labels of the inputs and of the output; an ellipsis stands for labels that nobody else has."""
    equation = site.text("equation", "").replace(" ", "")
    left, arrow, out = equation.partition("->")
    inputs = left.split(",")
    if len(inputs) != len(site.node.inputs):
        raise Refused(f"Einsum '{equation}' has another number of operands")
    if not arrow:
        if "." in equation:
            raise Refused("Einsum with an ellipsis and without an output")
        out = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    if "." in equation:
        inputs, out = _spelled_out(site, inputs, out)
    if any(len(set(term)) != len(term) for term in inputs):
        raise Refused(f"Einsum '{equation}' repeats a label")
    return inputs, out


def _spelled_out(site: Site, inputs: list[str], out: str) -> tuple[list[str], str]:
    """The terms with labels in the place of the ellipsis, which broadcasts from the right."""
    counts = [site.rank(site.input(i)) - len(term) + 3 if "." in term else 0 for i, term in enumerate(inputs)]
    fresh = "".join(c for c in ascii_letters if c not in out and not any(c in term for term in inputs))
    if max(counts) > len(fresh):
        raise Refused("Einsum with more labels than letters")
    fresh = fresh[: max(counts)]
    terms = [t.replace("...", fresh[len(fresh) - n :]) for t, n in zip(inputs, counts, strict=True)]
    return terms, out.replace("...", fresh)


def _holder(site: Site, inputs: list[str], label: str, data: int = -1) -> int | None:
    """A constant operand with the label, if there is one."""
    for i, term in enumerate(inputs):
        if i != data and label in term and site.facts.is_constant(site.input(i)):
            return i
    return None


@operator("Einsum")
class Einsum(Operator):
    """Linear in each operand."""

    upstream = (
        "absorbs into a constant operand that has the axis; elsewhere a computed one is asked for the scale; a shift "
        "becomes an Add; a transposition carries"
    )
    downstream = (
        "absorbs into a constant operand that has the axis; a shift only if it stays a vector; a scale along other "
        "axes is carried, and any map by a transposition"
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
        if index is None:
            return carry_scale(
                site, [(i, term.index(out[a.axis])) for i, term in enumerate(inputs) if out[a.axis] in term]
            )
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
        if index is None:
            return [self._through(site, label, out)]
        edits = self._scale(site, index, inputs[index].index(label)) if a.has_scale else []
        if not a.has_shift:
            return [Step.absorbed(*edits)]
        if len(inputs) != 2 or set(inputs[site.index]) - set(inputs[index]) - set(out):
            raise Refused("a shift does not stay a vector in this Einsum")
        rest = [c for c in inputs[index] if c in out]
        if len(rest) != 1:
            raise Refused("a shift does not stay a vector in this Einsum")
        weight = site.constant(index, "weight").astype(np.float64)
        self._must_match(site, inputs[site.index], dict(zip(inputs[index], weight.shape, strict=True)))
        added = np.einsum(f"{inputs[index]},{label}->{rest[0]}", weight, a.shift)
        return shift_steps(site, edits, ChannelAffine(np.ones(added.size), added, out.index(rest[0])), onward=True)

    def _through(self, site: Site, label: str, out: str) -> Step:
        """On to the output, where no constant operand has the label."""
        a = site.affine
        if a.has_shift or label not in out:
            raise Refused(f"no constant operand of Einsum has the axis '{label}'")
        if site.facts.size(site.node.outputs[0], out.index(label)) != a.size:
            raise Refused("Einsum broadcasts along the channels")
        return Step.carry((site.node.outputs[0], a.at(out.index(label))))

    def _must_match(self, site: Site, term: str, sizes: Mapping[str, int]) -> None:
        """Refuse where the data may be broadcast along an axis of the weight, or the weight along one of the data."""
        for axis, label in enumerate(term):
            if label in sizes and site.facts.size(site.input(site.index), axis) != sizes[label]:
                raise Refused(f"the data of Einsum may not have {sizes[label]} entries along '{label}'")

    def _scale(self, site: Site, index: int, axis: int) -> list[Edit]:
        a, weight = site.affine, site.constant(index, "operand")
        if weight.shape[axis] != a.size:
            raise Refused(f"the map has {a.size} channels, Einsum's operand has shape {weight.shape}")
        factor = a.scale.reshape(vector_shape(a.size, axis, weight.ndim))
        return weight_edit(site, index, "operand", factor, axis)
