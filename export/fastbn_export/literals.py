"""A constant that stands where data does takes a map itself: a class token before a Concat, a branch of a Where.

Requirement: it is rewritten where it is read, so that whoever else reads it, and what it is computed from, stay.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from .affine import Array, ChannelAffine
from .facts import Facts
from .plan import FLOATS, Edit, Refused, SetConstant, Step
from .registry import Site

__all__ = ["spread", "taken"]

_LIMIT = 1 << 22
"""Largest expression, in elements, that is written out for a map."""


def taken(facts: Facts, node: ir.Node, step: Step) -> Step:
    """The same step of `node`, upstream, in which the constants among what it asks for have their map."""
    if not any(facts.is_constant(value) for value, _ in step.onward):
        return step
    reader, edits, rest, met = step.reader or node, list(step.edits), [], Counter[ir.Value]()
    for value, affine in step.onward:
        places = [i for i, operand in enumerate(reader.inputs) if operand is value]
        if facts.is_constant(value) and met[value] < len(places):
            edits.append(_rewritten(facts, reader, places[met[value]], affine))
            met[value] += 1
        else:
            rest.append((value, affine))
    return Step(edits, rest, step.absorbs or not rest, step.by, step.reader)


def _rewritten(facts: Facts, node: ir.Node, index: int, affine: ChannelAffine) -> Edit:
    value = node.inputs[index]
    array, dtype = facts.constant(value), None if value is None else facts.dtype(value)
    if value is None or array is None or dtype is None or dtype not in FLOATS:
        raise Refused(f"'{'' if value is None else value.name}' is a constant of another type")
    if affine.axis >= array.ndim or array.shape[affine.axis] != affine.size:
        raise Refused(f"the constant '{value.name}' is broadcast along the channels")
    if array.size > _LIMIT and not value.is_initializer():
        raise Refused(f"the constant '{value.name}' is too large to be written out")
    scale, shift = (affine.broadcast(v, array.ndim) for v in (affine.scale, affine.shift))

    def mapped() -> Array:
        new: Array = array.astype(np.float64) * scale + shift
        return new

    return SetConstant(node, index, mapped, dtype)


def spread(site: Site, index: int, affine: ChannelAffine) -> list[Edit] | None:
    """The edits that give a constant operand the map although it is broadcast along the channels; None if it is not.

    It grows to one value for each channel, unless the map leaves it as it is: zero under a scale.
    """
    value, rank = site.input(index), site.rank(site.node.outputs[0])
    array = site.facts.constant(value)
    if array is None or array.ndim > rank:
        return None
    wide = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if affine.axis >= rank or wide.shape[affine.axis] != 1 or affine.size == 1:
        return None
    scale, shift = (affine.broadcast(v, rank) for v in (affine.scale, affine.shift))
    with np.errstate(all="ignore"):
        new = wide.astype(np.float64) * scale + shift
    if np.array_equal(new, np.broadcast_to(wide, new.shape)):
        return []
    if new.size > max(array.size, affine.size):
        raise Refused(f"the constant '{value.name}' would grow beyond both of its axes")
    shape = new.shape
    while shape[0] == 1:  # leading ones say nothing
        shape = shape[1:]
    return [SetConstant(site.node, index, lambda: new.reshape(shape), site.dtype(value))]
