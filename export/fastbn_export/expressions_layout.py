"""Constant expressions that move, repeat and select: one rule for each operator, the numbers stay as they are."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from .affine import Array
from .expressions import LIMIT, Unknown, bounds, ints, rule, tensor_array

__all__: list[str] = []


@rule("Identity")
def _identity(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return inputs[0]


@rule("Dropout")
def _dropout(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    if opset < 7 or (len(inputs) > 2 and inputs[2] is not None and bool(np.any(inputs[2]))):
        raise Unknown
    return inputs[0]


@rule("Reshape")
def _reshape(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    shape = ints(node, "shape", inputs, 1)
    if shape is None:
        raise Unknown
    if not node.attributes.get_int("allowzero", 0):
        shape = [inputs[0].shape[i] if d == 0 else d for i, d in enumerate(shape)]
    return inputs[0].reshape(shape)


@rule("Flatten")
def _flatten(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    axis = node.attributes.get_int("axis", 1)
    axis += inputs[0].ndim if axis < 0 else 0
    return inputs[0].reshape(prod(inputs[0].shape[:axis]), -1)


@rule("Unsqueeze")
def _unsqueeze(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    axes = ints(node, "axes", inputs, 1)
    if axes is None:
        raise Unknown
    return np.expand_dims(inputs[0], tuple(axes))


@rule("Squeeze")
def _squeeze(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    axes = ints(node, "axes", inputs, 1)
    return np.squeeze(inputs[0], None if axes is None else tuple(axes))


@rule("Transpose")
def _transpose(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    perm = node.attributes.get("perm")
    return np.transpose(inputs[0], None if perm is None else tuple(perm.as_ints()))


@rule("ConstantOfShape")
def _constant_of_shape(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    shape = inputs[0].tolist()
    if prod(shape) > LIMIT or min(shape, default=0) < 0:
        raise Unknown
    attribute = node.attributes.get("value")
    if attribute is None:
        return np.broadcast_to(np.zeros((), np.float32), shape)
    filler = tensor_array(attribute.value)  # `as_tensor` checks a protocol by its 20 names, every time
    if filler is None:
        raise Unknown
    return np.ndarray(shape, filler.dtype, filler.tobytes(), strides=(0,) * len(shape))  # as broadcast_to, but faster


@rule("Expand")
def _expand(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    shape = np.broadcast_shapes(inputs[0].shape, tuple(int(d) for d in inputs[1]))
    if prod(shape) > LIMIT:
        raise Unknown
    return np.broadcast_to(inputs[0], shape)


@rule("Tile")
def _tile(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    repeats = [int(i) for i in inputs[1]]
    if opset < 6 or len(repeats) != inputs[0].ndim or inputs[0].size * prod(repeats) > LIMIT:
        raise Unknown
    return np.tile(inputs[0], repeats)


@rule("Pad")
def _pad(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    pads = ints(node, "pads", inputs, 1)
    if pads is None or len(pads) != 2 * inputs[0].ndim or min(pads) < 0 or len(inputs) > 3 or max(pads) > LIMIT:
        raise Unknown
    if node.attributes.get_string("mode", "constant") != "constant":
        raise Unknown
    value: Any = inputs[2].reshape(()) if len(inputs) > 2 and inputs[2] is not None else 0
    if opset < 11:
        value = node.attributes.get_float("value", 0.0)
    around = list(zip(pads[: inputs[0].ndim], pads[inputs[0].ndim :], strict=True))
    if prod(d + before + after for d, (before, after) in zip(inputs[0].shape, around, strict=True)) > LIMIT:
        raise Unknown
    return np.pad(inputs[0], around, constant_values=value)


@rule("Range")
def _range(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    start, limit, delta = (a.reshape(()) for a in inputs)
    if not np.issubdtype(start.dtype, np.integer) or abs(int(limit) - int(start)) > LIMIT:
        raise Unknown
    return np.arange(int(start), int(limit), int(delta), dtype=start.dtype)


@rule("Split")
def _split(node: ir.Node, inputs: list[Array], opset: int) -> tuple[Array, ...]:
    axis, count = node.attributes.get_int("axis", 0), len(node.outputs)
    sizes = ints(node, "split", inputs, 1)
    if sizes is None:  # equal pieces, the last one smaller
        size = -(-inputs[0].shape[axis] // count)
        sizes = [size] * (count - 1)
    return tuple(np.split(inputs[0], np.cumsum(sizes)[: count - 1], axis))


@rule("Concat")
def _concat(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return np.concatenate(inputs, axis=node.attributes.get_int("axis", 1))


@rule("Gather")
def _gather(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    return np.asarray(np.take(inputs[0], inputs[1].astype(np.int64), axis=node.attributes.get_int("axis", 0)))


@rule("Slice")
def _slice(node: ir.Node, inputs: list[Array], opset: int) -> Array:
    starts, ends = ints(node, "starts", inputs, 1), ints(node, "ends", inputs, 2)
    if starts is None or ends is None:
        raise Unknown
    axes = ints(node, "axes", inputs, 3) or list(range(len(starts)))
    steps = ints(node, "steps", inputs, 4) or [1] * len(starts)
    out = inputs[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        out = out[(slice(None),) * (axis % out.ndim) + (bounds(start, end, step, out.shape[axis]),)]
    return out
