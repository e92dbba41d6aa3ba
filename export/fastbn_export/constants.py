"""Constant expressions: what a value holds when everything it is computed from is constant.

Requirement: exact. Float arithmetic is done in float64, so that a folded parameter is rounded once, when it is written;
integers keep their type. An operator without a rule (`expressions`) makes its result unknown, never guessed.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from . import expressions_layout, expressions_numbers  # noqa: F401 -- they register their rules
from .affine import Array, Dims
from .expressions import RULES, Unknown, cast, tensor_array

if TYPE_CHECKING:
    from .facts import Facts

__all__ = ["evaluate", "tensor_array"]


def evaluate(facts: Facts, value: ir.Value, known: dict[ir.Value, Array | None]) -> None:
    """Fill `known` for `value` and for all that it is computed from, without recursion."""
    stack = [value]
    while stack:
        current = stack[-1]
        if current in known:
            stack.pop()
            continue
        node = current.producer()
        if node is None or node.domain != "" or (current.index() != 0 and node.op_type != "Split"):
            known[current] = None
            continue
        if node.op_type == "Constant":
            known[current] = _constant_node(node)
            continue
        if node.op_type == "Shape" or (node.op_type in ("CastLike", "Size")):
            known[current] = _from_shape(facts, node, known, stack)
            continue
        if node.op_type in ("Gather", "Slice") and (shape := _shape_of(node)) is not None:
            known[current] = _some_sizes(facts, node, shape)
            continue
        if node.op_type not in RULES or any(a.is_ref() for a in node.attributes.data.values()):
            known[current] = None
            continue
        waiting = [v for v in node.inputs if v is not None and v.producer() is not None and v not in known]
        if waiting:
            if len(stack) > 10_000:  # a cycle, or an expression nobody writes
                known[current] = None
                continue
            # An unknown input decides; look at them one at a time so that a long run-time graph is not walked.
            if any(v is not None and v in known and known[v] is None for v in node.inputs):
                known[current] = None
            else:
                stack.append(waiting[0])
            continue
        known[current] = _apply(facts, node, known, current.index() or 0)


def _apply(facts: Facts, node: ir.Node, known: dict[ir.Value, Array | None], index: int) -> Array | None:
    """Output `index` of an operator whose inputs are known."""
    inputs: list[Any] = []
    for v in node.inputs:
        if v is None:
            inputs.append(None)
            continue
        array = known[v] if v.producer() is not None else facts.constant(v)
        if array is None:
            return None
        inputs.append(array)
    try:
        with np.errstate(all="ignore"):
            out = RULES[node.op_type](node, inputs, facts.opset(node))
            return out[index] if isinstance(out, tuple) else out
    except (Unknown, ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError):
        return None


def _constant_node(node: ir.Node) -> Array | None:
    if len(node.attributes) != 1:
        return None
    ((name, attribute),) = node.attributes.items()
    if attribute.is_ref():
        return None
    if name == "value":
        return tensor_array(attribute.value)
    if name in ("value_float", "value_floats"):
        return np.asarray(attribute.value, np.float32)
    if name in ("value_int", "value_ints"):
        return np.asarray(attribute.value, np.int64)
    return None


def _from_shape(
    facts: Facts, node: ir.Node, known: dict[ir.Value, Array | None], stack: list[ir.Value]
) -> Array | None:
    """Operators that need only the shape or the type of their input, which need not be constant."""
    source = node.inputs[0]
    if source is None:
        return None
    if node.op_type == "CastLike":
        like = node.inputs[1]
        array = facts.constant(source)
        dtype = None if like is None else facts.dtype(like)
        try:
            return None if array is None or dtype is None else cast(array, dtype)
        except Unknown:
            return None
    dims = facts.dims(source)
    if dims is None:
        return None
    wanted = dims if node.op_type == "Size" else _written(node, dims)
    sizes = [d for d in wanted if isinstance(d, int)]
    if len(sizes) != len(wanted):
        return None
    return np.asarray(prod(sizes) if node.op_type == "Size" else sizes, np.int64)


def _written(shape: ir.Node, dims: Dims) -> Dims:
    """The sizes that a Shape operator delivers."""
    start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", len(dims))
    return dims[slice(start, end)]


def _shape_of(node: ir.Node) -> ir.Node | None:
    """The Shape operator that `node` selects from."""
    maker = None if not node.inputs or node.inputs[0] is None else node.inputs[0].producer()
    return maker if maker is not None and maker.op_type == "Shape" and maker.domain == "" else None


def _some_sizes(facts: Facts, node: ir.Node, shape: ir.Node) -> Array | None:
    """Sizes selected from a shape of which others need not be known."""
    source, selection = shape.inputs[0], [facts.constant(v) for v in node.inputs[1:]]
    dims = None if source is None else facts.dims(source)
    if dims is None or any(a is None for a in selection) or any(a.is_ref() for a in node.attributes.values()):
        return None
    try:
        sizes = RULES[node.op_type](node, [np.array(_written(shape, dims), object), *selection], facts.opset(node))
    except (Unknown, ValueError, TypeError, IndexError):
        return None
    assert not isinstance(sizes, tuple)
    unknown = any(d is None or isinstance(d, str) for d in sizes.reshape(-1))
    return None if unknown else np.asarray(sizes, np.int64)
