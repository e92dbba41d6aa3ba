"""Constant expressions that compute: one rule for each operator, floats in float64.

Requirement: what rounds to integers is left out, because float64 may round another way than the type that the model
computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from .affine import Array
from .expressions import LIMIT, Unknown, cast, ints, rule, wide

__all__: list[str] = []

_BINARY: dict[str, Callable[[Array, Array], Array]] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


@rule("Add", "Sub", "Mul", "Div")
def _arithmetic(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    a, b = wide(inputs[0]), wide(inputs[1])
    if opset < 7 and a.shape != b.shape and a.ndim and b.ndim:
        raise Unknown  # broadcasting by attributes
    if node.op_type == "Div":
        if np.issubdtype(a.dtype, np.integer):
            if np.any(a < 0) or np.any(b <= 0):
                raise Unknown  # truncation towards zero
            return np.asarray(a // b)
        return np.asarray(a / b)
    return np.asarray(_BINARY[node.op_type](a, b))


@rule("Pow")
def _pow(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    base = wide(inputs[0])
    if np.issubdtype(base.dtype, np.integer):
        raise Unknown
    return np.asarray(base ** inputs[1].astype(np.float64))


_UNARY: dict[str, Callable[[Array], Any]] = {
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Neg": np.negative,
    "Exp": np.exp,
    "Log": np.log,
    "Tanh": np.tanh,
    "Abs": np.abs,
    "Sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "Softplus": lambda x: np.logaddexp(0.0, x),
}


@rule(*_UNARY)
def _unary(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    x = wide(inputs[0])
    if np.issubdtype(x.dtype, np.integer) and node.op_type not in ("Neg", "Abs"):
        raise Unknown
    return np.asarray(_UNARY[node.op_type](x))


_VARIADIC: dict[str, Callable[[Array, Array], Array]] = {"Sum": np.add, "Max": np.maximum, "Min": np.minimum}


@rule(*_VARIADIC)
def _variadic(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    arrays = [wide(a) for a in inputs]
    if opset < 8 and any(a.shape != arrays[0].shape for a in arrays):
        raise Unknown  # no broadcasting
    return np.asarray(reduce(_VARIADIC[node.op_type], arrays))


@rule("Clip")
def _clip(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    x = wide(inputs[0])
    given: list[Any] = [*inputs[1:3], None, None][:2]
    if opset < 11:
        given = [None if (a := node.attributes.get(name)) is None else a.as_float() for name in ("min", "max")]
    x = x if given[0] is None else np.maximum(x, given[0])
    return np.asarray(x if given[1] is None else np.minimum(x, given[1]))


_JUMPS: dict[str, Callable[..., Any]] = {
    "Sign": np.sign,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Round": np.rint,
    "Equal": np.equal,
    "Greater": np.greater,
    "Less": np.less,
    "GreaterOrEqual": np.greater_equal,
    "LessOrEqual": np.less_equal,
}


@rule(*_JUMPS)
def _jump(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    """Of stored numbers only: what was computed in float64 could fall on the other side in the type of the model."""
    if any(a.dtype == np.float64 for a in inputs):
        raise Unknown
    return np.asarray(_JUMPS[node.op_type](*inputs))


@rule("Where")
def _where(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return np.asarray(np.where(inputs[0], wide(inputs[1]), wide(inputs[2])))


@rule("MatMul")
def _matmul(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    a, b = wide(inputs[0]), wide(inputs[1])
    if a.size * b.shape[-1] > LIMIT:
        raise Unknown
    return np.asarray(a @ b)


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceProd": np.prod,
    "ReduceSumSquare": lambda x, **along: np.sum(x * x, **along),
    "ReduceL1": lambda x, **along: np.sum(np.abs(x), **along),
    "ReduceL2": lambda x, **along: np.sqrt(np.sum(x * x, **along)),
}


@rule(*_REDUCTIONS)
def _reduce(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    x = wide(inputs[0])
    if np.issubdtype(x.dtype, np.integer) and node.op_type in ("ReduceMean", "ReduceL1", "ReduceL2"):
        raise Unknown
    axes, idle = ints(node, "axes", inputs, 1), node.attributes.get_int("noop_with_empty_axes", 0)
    if not axes and idle:
        raise Unknown
    along = None if not axes else tuple(axes)
    out = _REDUCTIONS[node.op_type](x, axis=along, keepdims=bool(node.attributes.get_int("keepdims", 1)))
    return np.asarray(out, x.dtype)


@rule("Cast")
def _cast_rule(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return cast(inputs[0], ir.DataType(node.attributes["to"].as_int()))


@rule("DequantizeLinear")
def _dequantize(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    if node.attributes.get_int("block_size", 0) or np.issubdtype(inputs[0].dtype, np.floating):
        raise Unknown
    x, scale = inputs[0].astype(np.float64), wide(inputs[1])
    zero = inputs[2].astype(np.float64) if len(inputs) > 2 and inputs[2] is not None else np.zeros(())
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * x.ndim
        shape[node.attributes.get_int("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return (x - zero.reshape(scale.shape if zero.ndim else ())) * scale


@rule("QuantizeLinear")
def _quantize(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    """In float32, as runtimes do: the rounding of a tie must not differ."""
    if any(node.attributes.get_int(a, 0) for a in ("block_size", "output_dtype", "precision")) or len(inputs) < 3:
        raise Unknown
    x, scale, zero = inputs[0], inputs[1], inputs[2]
    if x.dtype != np.float32 or scale.dtype != np.float32 or zero is None or zero.dtype not in (np.int8, np.uint8):
        raise Unknown
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * x.ndim
        shape[node.attributes.get_int("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    info = np.iinfo(zero.dtype)
    q: Array = np.clip(np.rint(x / scale) + zero.astype(np.float32), info.min, info.max)
    return q.astype(zero.dtype)
