"""Constant expressions: what a value holds when everything it is computed from is constant.

Requirement: exact. Float arithmetic is done in float64, so that a folded parameter is rounded once, when it is written;
integers keep their type. An operator that is not in the table below makes its result unknown, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from .affine import Array

if TYPE_CHECKING:
    from .facts import Facts

__all__ = ["evaluate", "tensor_array"]

_LIMIT = 1 << 28
"""Largest constant, in elements, that an expression may grow to."""

_PLAIN: dict[int, tuple[Any, str]] = {
    int(ir.DataType.FLOAT): (np.dtype("<f4"), "float_data"),
    int(ir.DataType.INT64): (np.dtype("<i8"), "int64_data"),
}

Rule = Callable[[ir.Node, list[Array], int], Array]
_RULES: dict[str, Rule] = {}


class _Unknown(Exception):
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


def evaluate(facts: Facts, value: ir.Value, known: dict[ir.Value, Array | None]) -> None:
    """Fill `known` for `value` and for all that it is computed from, without recursion."""
    stack = [value]
    while stack:
        current = stack[-1]
        if current in known:
            stack.pop()
            continue
        node = current.producer()
        if node is None or node.domain != "" or current.index() != 0:
            known[current] = None
            continue
        if node.op_type == "Constant":
            known[current] = _constant_node(node)
            continue
        if node.op_type == "Shape" or (node.op_type in ("CastLike", "Size")):
            known[current] = _from_shape(facts, node, known, stack)
            continue
        if node.op_type not in _RULES or any(a.is_ref() for a in node.attributes.data.values()):
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
        known[current] = _apply(facts, node, known)


def _apply(facts: Facts, node: ir.Node, known: dict[ir.Value, Array | None]) -> Array | None:
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
            out = _RULES[node.op_type](node, inputs, facts.opset(node))
    except (_Unknown, ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError):
        return None
    return out


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
        return None if array is None or dtype is None else _cast(array, dtype)
    dims = facts.dims(source)
    if dims is None or not all(isinstance(d, int) for d in dims):
        return None
    if node.op_type == "Size":
        return np.asarray(prod(int(d) for d in dims if isinstance(d, int)), np.int64)
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
    return np.asarray(dims[slice(start, end)], np.int64)


def _cast(array: Array, dtype: ir.DataType) -> Array:
    floats = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    integers = (ir.DataType.INT64, ir.DataType.INT32)
    if dtype in floats:
        return array.astype(dtype.numpy())
    if dtype in integers and np.issubdtype(array.dtype, np.integer):
        return array.astype(dtype.numpy())
    raise _Unknown


def _wide(array: Array) -> Array:
    """Floats become float64; integers stay; anything else is unknown."""
    if array.dtype in (np.float64, np.int64, np.int32):
        return array
    if array.dtype in (np.float32, np.float16) or array.dtype.name == "bfloat16":
        return array.astype(np.float64)
    raise _Unknown


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            _RULES[name] = rule
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
        raise _Unknown  # broadcasting by attributes
    if node.op_type == "Div":
        if np.issubdtype(a.dtype, np.integer):
            if np.any(a < 0) or np.any(b <= 0):
                raise _Unknown  # truncation towards zero
            return np.asarray(a // b)
        return np.asarray(a / b)
    return np.asarray(_BINARY[node.op_type](a, b))


@_rule("Pow")
def _pow(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    base = _wide(inputs[0])
    if np.issubdtype(base.dtype, np.integer):
        raise _Unknown
    return np.asarray(base ** inputs[1].astype(np.float64))


@_rule("Sqrt", "Reciprocal", "Neg", "Exp", "Abs")
def _unary(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    x = _wide(inputs[0])
    if np.issubdtype(x.dtype, np.integer) and node.op_type not in ("Neg", "Abs"):
        raise _Unknown
    table: dict[str, Callable[[Array], Any]] = {
        "Sqrt": np.sqrt,
        "Reciprocal": lambda v: 1.0 / v,
        "Neg": np.negative,
        "Exp": np.exp,
        "Abs": np.abs,
    }
    return np.asarray(table[node.op_type](x))


@_rule("Identity")
def _identity(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return inputs[0]


@_rule("Dropout")
def _dropout(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    if opset < 7 or (len(inputs) > 2 and inputs[2] is not None and bool(np.any(inputs[2]))):
        raise _Unknown
    return inputs[0]


@_rule("Cast")
def _cast_rule(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return _cast(inputs[0], ir.DataType(node.attributes["to"].as_int()))


@_rule("Reshape")
def _reshape(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    shape = _ints(node, "shape", inputs, 1)
    if shape is None:
        raise _Unknown
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
        raise _Unknown
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
        raise _Unknown
    attribute = node.attributes.get("value")
    if attribute is None:
        return np.broadcast_to(np.zeros((), np.float32), shape)
    filler = tensor_array(attribute.value)  # `as_tensor` checks a protocol by its 20 names, every time
    if filler is None:
        raise _Unknown
    return np.ndarray(shape, filler.dtype, filler.tobytes(), strides=(0,) * len(shape))  # as broadcast_to, but faster


@_rule("Expand")
def _expand(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(int(d) for d in inputs[1]))
    if prod(shape) > _LIMIT:
        raise _Unknown
    return np.broadcast_to(inputs[0], shape)


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
        raise _Unknown
    axes = _ints(node, "axes", inputs, 3) or list(range(len(starts)))
    steps = _ints(node, "steps", inputs, 4) or [1] * len(starts)
    if any(s <= 0 for s in steps):
        raise _Unknown
    out = inputs[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        out = out[(slice(None),) * (axis % out.ndim) + (slice(start, end, step),)]
    return out


@_rule("DequantizeLinear")
def _dequantize(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    if node.attributes.get_int("block_size", 0) or np.issubdtype(inputs[0].dtype, np.floating):
        raise _Unknown
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
        raise _Unknown
    x, scale, zero = inputs[0], inputs[1], inputs[2]
    if x.dtype != np.float32 or scale.dtype != np.float32 or zero is None or zero.dtype not in (np.int8, np.uint8):
        raise _Unknown
    if scale.ndim == 1 and scale.size > 1:
        shape = [1] * x.ndim
        shape[node.attributes.get_int("axis", 1)] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    info = np.iinfo(zero.dtype)
    q: Array = np.clip(np.rint(x / scale) + zero.astype(np.float32), info.min, info.max)
    return q.astype(zero.dtype)
