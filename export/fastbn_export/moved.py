"""The original with its factors moved by half an ulp: the same function, rounded otherwise all the way down.

A *factor* is a constant that nothing but products and sums of products read: the weight of a convolution, the scale of
a batch normalization. To move it by an ulp changes the result by what one rounding of those products does, so that a
run of the moved model is as good as the original's own, and independent of it. What is only added or subtracted stays
where it is: an ulp of a large mean is much more than the rounding of a small difference, and whoever moved it would
excuse a fold that makes an exact subtraction inexact. Powers of two (products with them are exact) and subnormal
numbers (whose ulp is no rounding error of anybody's products) stay for the same reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from fastbn_export.float64 import mixed_bits
from fastbn_export.protos import graphs_of, nodes_of

__all__ = ["move_factors", "neighbours"]

_FACTORS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "DeformConv", "PRelu", "DequantizeLinear"), (1,)),
    **dict.fromkeys(("MatMul", "Gemm", "Mul", "Div"), (0, 1)),
    **dict.fromkeys(("BatchNormalization", "InstanceNormalization", "GroupNormalization"), (1,)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), (1,)),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), (1, 2)),
    "Einsum": tuple(range(8)),
}
"""Inputs that an operator multiplies by."""

_LAYOUT = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that leave the values of their first input as they are."""

_NORMAL = {
    TensorProto.DOUBLE: 2.0**-1022,
    TensorProto.FLOAT: 2.0**-126,
    TensorProto.FLOAT16: 2.0**-14,
    TensorProto.BFLOAT16: 2.0**-126,
}
"""The smallest normal number of each type."""

_WORDS: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def move_factors(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Move one in four of the factors' distinct values to a neighbour: half an ulp in the root mean square.

    Parameters
    ----------
    model : onnx.ModelProto
        The model, its external data loaded; it is changed.
    rng : numpy.random.Generator
        The source of the choice.
    """
    uses: defaultdict[str, list[tuple[Any, int]]] = defaultdict(list)
    for node in nodes_of(model):
        for position, name in enumerate(node.input):
            uses[name].append((node, position))
    outputs = {value.name for graph in graphs_of(model) for value in graph.output}
    outputs |= {name for function in model.functions for name in function.output}
    for name, tensor in _constants(model):
        if tensor.data_type in _NORMAL and _is_factor(name, uses, outputs):
            tensor.CopyFrom(numpy_helper.from_array(neighbours(tensor, rng), tensor.name))


def _constants(model: onnx.ModelProto) -> Iterator[tuple[str, Any]]:
    for graph in graphs_of(model):
        for tensor in graph.initializer:
            yield tensor.name, tensor
    for node in nodes_of(model):
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield node.output[0], attribute.t


def _is_factor(name: str, uses: dict[str, list[tuple[Any, int]]], outputs: set[str]) -> bool:
    """Return whether somebody reads the value, and everybody multiplies by it."""
    if name in outputs or not uses.get(name):
        return False
    return all(
        position in _FACTORS.get(node.op_type, ())
        or (node.op_type in _LAYOUT and position == 0 and _is_factor(node.output[0], uses, outputs))
        for node, position in uses[name]
    )


def neighbours(tensor: Any, rng: np.random.Generator) -> NDArray[Any]:
    """Return the tensor's array, one in four of its distinct values an ulp nearer to zero or farther from it.

    Equal values move alike: the errors of a constant weight do not average out.
    """
    array = np.array(numpy_helper.to_array(tensor), order="C")  # a scalar stays one
    wide = array.astype(np.float64)
    eighth = mixed_bits(wide, rng) >> np.uint64(61)
    bits = array.view(_WORDS[array.dtype.itemsize])
    step = (eighth == 0).astype(bits.dtype) - (eighth == 1).astype(bits.dtype)  # -1 wraps around, and adds as -1 does
    there = (bits + step).view(array.dtype)
    free = np.isfinite(wide) & np.isfinite(there) & (np.abs(wide) > _NORMAL[tensor.data_type])
    free &= np.abs(np.frexp(wide)[0]) != 0.5  # no power of two
    return np.where(free, there, array).astype(array.dtype)
