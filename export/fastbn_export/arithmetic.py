"""Mul, Add, Sub and Div by a constant as maps, in the broadcasting rules of every opset.

Requirement: a constant that broadcasts along the width, or enlarges its partner, is not taken for a per-channel one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .affine import Array, ChannelAffine
from .facts import Facts
from .plan import FLOATS

__all__ = ["ConstantOperand", "constant_operand", "lift", "own_map"]

_THIN_LIMIT = 1 << 22
"""Largest constant, in elements, that is searched for repetitions."""

_KINDS = {"Add": ("x+c", "x+c"), "Sub": ("x-c", "c-x"), "Mul": ("x*c", "x*c"), "Div": ("x/c", "c/x")}
"""What each operator does with its constant, by which input is the data."""

BINARY = frozenset(_KINDS)


@dataclass(frozen=True, eq=False)
class ConstantOperand:
    """An elementwise operator with one constant operand.

    Attributes
    ----------
    data, index : int
        Which input is the data and which the constant.
    value : array
        The constant, float64, with as many dimensions as the output.
    """

    node: ir.Node
    data: int
    index: int
    value: Array

    @property
    def kind(self) -> str:
        """One of "x+c", "x-c", "c-x", "x*c", "x/c" or "c/x"."""
        return _KINDS[self.node.op_type][self.data]


def constant_operand(facts: Facts, node: ir.Node) -> ConstantOperand | None:
    """The constant operand of a binary elementwise operator on floats, if it has exactly one."""
    if node.op_type not in BINARY or node.domain != "" or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if first is None or second is None or first is second:
        return None
    index = _which(facts, node, first, second)
    if index is None:
        return None
    data, constant = (second, first) if index == 0 else (first, second)
    if facts.dtype(constant) not in FLOATS and facts.dtype(data) not in FLOATS:
        return None
    array = facts.constant(constant)
    if array is None:
        array = facts.constant(_expanded(constant))
    if array is None:
        return None
    rank = facts.rank(data)
    if rank is None:
        if array.ndim:
            return None
        rank = 0
    aligned = _align(node, facts.opset(node), array.astype(np.float64), rank, index)
    if aligned is None:
        return None
    return ConstantOperand(node, 1 - index, index, _thin(aligned, facts, data))


def _which(facts: Facts, node: ir.Node, first: ir.Value, second: ir.Value) -> int | None:
    """Which operand is constant, up to being written out to the shape of the other one at run time."""
    fixed = [facts.is_constant(first), facts.is_constant(second)]
    if any(fixed):
        return None if all(fixed) else fixed.index(True)
    for index, (data, value) in ((1, (first, second)), (0, (second, first))):
        source = _expanded(value)
        if source is not None and facts.is_constant(source):
            dims = facts.dims(data)
            if dims is not None and None not in dims and dims == facts.dims(node.outputs[0]):
                return index
    return None


def _expanded(value: ir.Value) -> ir.Value | None:
    """What an Expand repeats."""
    maker = value.producer()
    return maker.inputs[0] if maker is not None and maker.op_type == "Expand" and maker.domain == "" else None


def _thin(array: Array, facts: Facts, data: ir.Value) -> Array:
    """Drop what an Expand wrote out: axes along which the constant repeats, where the data has that length anyway."""
    if array.size == max(array.shape, default=1) or array.size > _THIN_LIMIT:
        return array
    for axis, size in enumerate(array.shape):
        if size > 1 and facts.size(data, axis) == size:
            first = array.take([0], axis)
            if np.array_equal(np.broadcast_to(first, array.shape), array):
                array = first
    return array


def _align(node: ir.Node, opset: int, array: Array, rank: int, index: int) -> Array | None:
    """Give the constant the rank of the data; None where it would enlarge the rank."""
    if array.ndim > rank:
        return None
    if opset < 7 and array.ndim and array.ndim != rank:
        # Before opset 7 only the second operand broadcasts, and `axis` says where its first dimension lies.
        if index != 1 or not node.attributes.get_int("broadcast", 0):
            return None
        start = node.attributes.get_int("axis", rank - array.ndim)
        if not 0 <= start <= rank - array.ndim:
            return None
        return array.reshape((1,) * start + array.shape + (1,) * (rank - array.ndim - start))
    return array.reshape((1,) * (rank - array.ndim) + array.shape)


def own_map(facts: Facts, operand: ConstantOperand) -> ChannelAffine | None:
    """The operator as a map along one axis of its data; scalars have axis -1 and size 1."""
    value = operand.value
    axes = [i for i, d in enumerate(value.shape) if d != 1]
    if len(axes) > 1 or operand.kind == "c/x":
        return None
    axis = axes[0] if axes else -1
    if axis >= 0:
        data = operand.node.inputs[operand.data]
        if data is None or facts.size(data, axis) != value.shape[axis]:
            return None  # the constant enlarges the data, or may
    c = value.reshape(-1)
    one, zero = np.ones_like(c), np.zeros_like(c)
    with np.errstate(all="ignore"):
        scale, shift = {
            "x+c": (one, c),
            "x-c": (one, -c),
            "c-x": (-one, c),
            "x*c": (c, zero),
            "x/c": (1.0 / c, zero),
        }[operand.kind]
    result = ChannelAffine(scale, shift, axis)
    return result if result.is_finite else None


def lift(affine: ChannelAffine, axis: int, size: int) -> ChannelAffine | None:
    """A scalar map (axis -1) along any axis; None if the map lies along another axis."""
    if affine.axis == axis:
        return affine if affine.size == size else None
    if affine.axis == -1:
        return ChannelAffine.of(affine.scale[0], affine.shift[0], axis, size)
    return None
