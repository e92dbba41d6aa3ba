"""The model under construction: what the layers append their nodes and constants to, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fastbn.errors import ArgumentTypeError, ArgumentValueError

__all__ = ["OLDEST", "OPSET", "Dim", "Graph", "Shape", "parameter"]

OPSET = 17
"""Old enough for every runtime in use, new enough for LayerNormalization. Layers that need more ask for it."""

OLDEST = 15
"""BatchNormalization of mixed precision."""

Dim = int | str
Shape = tuple[Dim, ...]


class Graph:
    """The model under construction: nodes, constants, and the value and shape that the next layer gets."""

    def __init__(self, dtype: np.dtype[Any], shape: Shape, opset: int | None):
        self.dtype, self.asked, self.opset = dtype, opset, OPSET if opset is None else opset
        self.at = ""
        self.value, self.shape = "input", shape
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.input = helper.make_tensor_value_info("input", self.onnx_type, shape)

    @property
    def onnx_type(self) -> int:
        """The element type of inputs, weights and outputs."""
        return int(helper.np_dtype_to_tensor_dtype(self.dtype))

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Keep a constant of the current layer and return its full name."""
        full = f"{self.at}.{name}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), full))
        return full

    def add(self, op: str, inputs: Sequence[str] = (), shape: Shape | None = None, **attributes: Any) -> None:
        """Append a node on the current value, its other inputs given; its output is the current value now."""
        out = (
            f"{self.at}.{op}" if not any(n.name == f"{self.at}.{op}" for n in self.nodes[-4:]) else f"{self.at}.{op}.2"
        )
        self.nodes.append(helper.make_node(op, [self.value, *inputs], [out], name=out, **attributes))
        self.value, self.shape = out, self.shape if shape is None else shape

    def need(self, opset: int, why: str) -> None:
        """Declare at least this opset, or refuse if the caller asked for an older one."""
        if self.asked is not None and self.asked < opset:
            raise ArgumentValueError("opset", f">= {opset} for {self.at}: {why}", self.asked)
        self.opset = max(self.opset, opset)

    def cast(self, name: str, array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a parameter of the current layer in another type, refused where a value leaves its range."""
        with np.errstate(over="ignore"):
            cast = array.astype(dtype)
        lost = np.isinf(cast) & np.isfinite(array)
        if lost.any():
            raise ArgumentValueError(f"{self.at}.{name}", f"values in the range of {dtype}", array[lost].flat[0])
        return cast

    def wrong(self, expected: str, got: object) -> ArgumentValueError:
        """Return the error that the current layer does not fit."""
        return ArgumentValueError(self.at, expected, got)

    def finish(self) -> onnx.ModelProto:
        """Return the model; the last value is its output."""
        self.nodes[-1].output[0] = "output"
        output = helper.make_tensor_value_info("output", self.onnx_type, self.shape)
        graph = helper.make_graph(self.nodes, "fastbn", [self.input], [output], self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        ir_version = helper.find_min_ir_version_for(opsets)
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="fastbn")


def parameter(graph: Graph, name: str, value: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Check a parameter of the current layer."""
    array = np.asarray(value)
    if array.shape != shape:
        raise ArgumentValueError(f"{graph.at}.{name}", f"shape {shape}", array.shape)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ArgumentTypeError(f"{graph.at}.{name}", "floating point numbers", array.dtype)
    return array
