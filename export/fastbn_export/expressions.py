"""What each operator does with constants: one rule for each, and what all rules share.

Requirement: exact, or `Unknown`. Integers keep their type, floats become float64 where a rule computes with them. The
rules are in `expressions_layout` (move, repeat, select) and `expressions_numbers` (compute).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from .affine import Array

__all__ = ["LIMIT", "RULES", "Unknown", "bounds", "cast", "ints", "rule", "tensor_array", "wide"]

LIMIT = 1 << 28
"""Largest constant, in elements, that an expression may grow to."""

_PLAIN: dict[int, tuple[Any, str]] = {
    int(ir.DataType.FLOAT): (np.dtype("<f4"), "float_data"),
    int(ir.DataType.INT64): (np.dtype("<i8"), "int64_data"),
}

Rule = Callable[[ir.Node, list[Any], int], Array | tuple[Array, ...]]
RULES: dict[str, Rule] = {}
"""From op type to ``rule(node, inputs, opset)``: the output, or all of them where an operator has several."""


def bounds(start: int, end: int, step: int, size: int) -> slice:
    """Python's slice for ONNX's bounds: backwards these are clipped to the axis, or to right before it for the end."""
    if step < 0:
        return slice(max(start, -size), None if end < -size else end, step)
    return slice(start, end, step)


class Unknown(Exception):
    """The expression cannot be evaluated here."""


def tensor_array(tensor: ir.TensorProtocol) -> Array | None:
    """A tensor as an array: a view where the storage allows one, None for strings and packed types."""
    if isinstance(tensor, ir.TensorProtoTensor):
        raw = tensor.raw  # the plain cases without the checks of `numpy`, which cost three times as much as the array
        dtype, field = _PLAIN.get(raw.data_type, (None, ""))
        if field and raw.HasField("raw_data"):
            return np.frombuffer(raw.raw_data, dtype).reshape(raw.dims)
        if field and (written := getattr(raw, field)):
            return np.array(written, dtype).reshape(raw.dims)
    if tensor.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return None
    return np.asarray(tensor.numpy())


def cast(array: Array, dtype: ir.DataType) -> Array:
    """A constant in another type; floats do not become integers here."""
    floats = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    integers = (ir.DataType.INT64, ir.DataType.INT32)
    if dtype in floats:
        return array.astype(dtype.numpy())
    if dtype in integers and np.issubdtype(array.dtype, np.integer):
        return array.astype(dtype.numpy())
    raise Unknown


def wide(array: Array) -> Array:
    """Floats become float64; integers stay; anything else is unknown."""
    if array.dtype in (np.float64, np.int64, np.int32):
        return array
    if array.dtype in (np.float32, np.float16) or array.dtype.name == "bfloat16":
        return array.astype(np.float64)
    raise Unknown


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what these operators do with constants."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def ints(node: ir.Node, name: str, inputs: list[Array], index: int) -> list[int] | None:
    """Axes and the like: an attribute in old opsets, an input in new ones."""
    if len(inputs) > index and inputs[index] is not None:
        return [int(i) for i in np.atleast_1d(inputs[index])]
    attribute = node.attributes.get(name)
    return None if attribute is None else [int(i) for i in attribute.as_ints()]
