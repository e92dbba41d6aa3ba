"""What each operator does with constants: one rule for each, in float64 where it computes with floats.

Requirement: exact, or `Unknown`. Integers keep their type; what rounds to integers is left out, because float64 may
round another way than the type that the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from .affine import Array

__all__ = ["RULES", "Unknown", "bounds", "cast", "tensor_array"]

_LIMIT = 1 << 28
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


def _wide(array: Array) -> Array:
    """Floats become float64; integers stay; anything else is unknown."""
    if array.dtype in (np.float64, np.int64, np.int32):
        return array
    if array.dtype in (np.float32, np.float16) or array.dtype.name == "bfloat16":
        return array.astype(np.float64)
    raise Unknown


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def _ints(node: ir.Node, name: str, inputs: list[Array], index: int) -> list[int] | None:
    """Axes and the like: an attribute in old opsets, an input in new ones."""
    if len(inputs) > index and inputs[index] is not None:
        return [int(i) for i in np.atleast_1d(inputs[index])]
    attribute = node.attributes.get(name)
    return None if attribute is None else [int(i) for i in attribute.as_ints()]


_BINARY: dict[str, Callable[[Array, Array], Array]] = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}


@_rule("Add", "Sub", "Mul", "Div")
def _arithmetic(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    a, b = _wide(inputs[0]), _wide(inputs[1])
    if opset < 7 and a.shape != b.shape and a.ndim and b.ndim:
        raise Unknown  # broadcasting by attributes
    if node.op_type == "Div":
        if np.issubdtype(a.dtype, np.integer):
            if np.any(a < 0) or np.any(b <= 0):
                raise Unknown  # truncation towards zero
            return np.asarray(a // b)
        return np.asarray(a / b)
    return np.asarray(_BINARY[node.op_type](a, b))


@_rule("Pow")
def _pow(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    base = _wide(inputs[0])
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


@_rule(*_UNARY)
def _unary(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    x = _wide(inputs[0])
    if np.issubdtype(x.dtype, np.integer) and node.op_type not in ("Neg", "Abs"):
        raise Unknown
    return np.asarray(_UNARY[node.op_type](x))


_VARIADIC: dict[str, Callable[[Array, Array], Array]] = {"Sum": np.add, "Max": np.maximum, "Min": np.minimum}


@_rule(*_VARIADIC)
def _variadic(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    arrays = [_wide(a) for a in inputs]
    if opset < 8 and any(a.shape != arrays[0].shape for a in arrays):
        raise Unknown  # no broadcasting
    return np.asarray(reduce(_VARIADIC[node.op_type], arrays))


@_rule("Clip")
def _clip(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    x = _wide(inputs[0])
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


@_rule(*_JUMPS)
def _jump(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    """Of stored numbers only: what was computed in float64 could fall on the other side in the type of the model."""
    if any(a.dtype == np.float64 for a in inputs):
        raise Unknown
    return np.asarray(_JUMPS[node.op_type](*inputs))


@_rule("Where")
def _where(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return np.asarray(np.where(inputs[0], _wide(inputs[1]), _wide(inputs[2])))


@_rule("MatMul")
def _matmul(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    a, b = _wide(inputs[0]), _wide(inputs[1])
    if a.size * b.shape[-1] > _LIMIT:
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


@_rule(*_REDUCTIONS)
def _reduce(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    x = _wide(inputs[0])
    if np.issubdtype(x.dtype, np.integer) and node.op_type in ("ReduceMean", "ReduceL1", "ReduceL2"):
        raise Unknown
    axes, idle = _ints(node, "axes", inputs, 1), node.attributes.get_int("noop_with_empty_axes", 0)
    if not axes and idle:
        raise Unknown
    along = None if not axes else tuple(axes)
    out = _REDUCTIONS[node.op_type](x, axis=along, keepdims=bool(node.attributes.get_int("keepdims", 1)))
    return np.asarray(out, x.dtype)


@_rule("Identity")
def _identity(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return inputs[0]


@_rule("Dropout")
def _dropout(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    if opset < 7 or (len(inputs) > 2 and inputs[2] is not None and bool(np.any(inputs[2]))):
        raise Unknown
    return inputs[0]


@_rule("Cast")
def _cast_rule(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return cast(inputs[0], ir.DataType(node.attributes["to"].as_int()))


@_rule("Reshape")
def _reshape(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    shape = _ints(node, "shape", inputs, 1)
    if shape is None:
        raise Unknown
    if not node.attributes.get_int("allowzero", 0):
        shape = [inputs[0].shape[i] if d == 0 else d for i, d in enumerate(shape)]
    return inputs[0].reshape(shape)


@_rule("Flatten")
def _flatten(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    axis = node.attributes.get_int("axis", 1)
    axis += inputs[0].ndim if axis < 0 else 0
    return inputs[0].reshape(prod(inputs[0].shape[:axis]), -1)


@_rule("Unsqueeze")
def _unsqueeze(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    axes = _ints(node, "axes", inputs, 1)
    if axes is None:
        raise Unknown
    return np.expand_dims(inputs[0], tuple(axes))


@_rule("Squeeze")
def _squeeze(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    axes = _ints(node, "axes", inputs, 1)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


@_rule("Transpose")
def _transpose(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    perm = node.attributes.get("perm")
    return np.transpose(inputs[0], None if perm is None else tuple(perm.as_ints()))


@_rule("ConstantOfShape")
def _constant_of_shape(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    shape = inputs[0].tolist()
    if prod(shape) > _LIMIT or min(shape, default=0) < 0:
        raise Unknown
    attribute = node.attributes.get("value")
    if attribute is None:
        return np.broadcast_to(np.zeros((), np.float32), shape)
    filler = tensor_array(attribute.value)  # `as_tensor` checks a protocol by its 20 names, every time
    if filler is None:
        raise Unknown
    return np.ndarray(shape, filler.dtype, filler.tobytes(), strides=(0,) * len(shape))  # as broadcast_to, but faster


@_rule("Expand")
def _expand(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(int(d) for d in inputs[1]))
    if prod(shape) > _LIMIT:
        raise Unknown
    return np.broadcast_to(inputs[0], shape)


@_rule("Tile")
def _tile(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    repeats = [int(i) for i in inputs[1]]
    if opset < 6 or len(repeats) != inputs[0].ndim or inputs[0].size * prod(repeats) > _LIMIT:
        raise Unknown
    return np.tile(inputs[0], repeats)


@_rule("Pad")
def _pad(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    pads = _ints(node, "pads", inputs, 1)
    if pads is None or len(pads) != 2 * inputs[0].ndim or min(pads) < 0 or len(inputs) > 3 or max(pads) > _LIMIT:
        raise Unknown
    if node.attributes.get_string("mode", "constant") != "constant":
        raise Unknown
    value: Any = inputs[2].reshape(()) if len(inputs) > 2 and inputs[2] is not None else 0
    if opset < 11:
        value = node.attributes.get_float("value", 0.0)
    around = list(zip(pads[: inputs[0].ndim], pads[inputs[0].ndim :], strict=True))
    if prod(d + before + after for d, (before, after) in zip(inputs[0].shape, around, strict=True)) > _LIMIT:
        raise Unknown
    return np.pad(inputs[0], around, constant_values=value)


@_rule("Range")
def _range(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    start, limit, delta = (a.reshape(()) for a in inputs)
    if not np.issubdtype(start.dtype, np.integer) or abs(int(limit) - int(start)) > _LIMIT:
        raise Unknown
    return np.arange(int(start), int(limit), int(delta), dtype=start.dtype)


@_rule("Split")
def _split(node: ir.Node, inputs: list[Array], opset: int) -> tuple[Array, ...]:
    axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
    sizes = _ints(node, "split", inputs, 1)
    if sizes is None:  # equal pieces, the last one smaller
        size = -(-inputs[0].shape[axis] // count)
        sizes = [size] * (count - 1)
    return tuple(np.split(inputs[0], np.cumsum(sizes)[: count - 1], axis))


@_rule("Concat")
def _concat(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return np.concatenate(inputs, axis=node.attributes.get_int("axis", 1))


@_rule("Gather")
def _gather(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return np.asarray(np.take(inputs[0], inputs[1].astype(np.int64), axis=node.attributes.get_int("axis", 0)))


@_rule("Slice")
def _slice(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    starts, ends = _ints(node, "starts", inputs, 1), _ints(node, "ends", inputs, 2)
    if starts is None or ends is None:
        raise Unknown
    axes = _ints(node, "axes", inputs, 3) or list(range(len(starts)))
    steps = _ints(node, "steps", inputs, 4) or [1] * len(starts)
    out = inputs[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        out = out[(slice(None),) * (axis % out.ndim) + (bounds(start, end, step, out.shape[axis]),)]
    return out


@_rule("DequantizeLinear")
def _dequantize(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    if node.attributes.get_int("block_size", 0) or np.issubdtype(inputs[0].dtype, np.floating):
        raise Unknown
    x, scale = inputs[0].astype(np.float64), _wide(inputs[1])
    zero = inputs[2].astype(np.float64) if len(inputs) > 2 and inputs[2] is not None else np.zeros(())
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * x.ndim
        shape[node.attributes.get_int("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    return (x - zero.reshape(scale.shape if zero.ndim else ())) * scale


@_rule("QuantizeLinear")
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
