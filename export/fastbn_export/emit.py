"""How each layer becomes ONNX nodes: its parameters checked against the shape that reaches it, then written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn_export import layers as L

__all__ = ["Dim", "Graph", "Shape", "emitter", "is_norm"]

OPSET = 17
IR_VERSION = 8
"""Old enough for every runtime in use, new enough for BatchNormalization of mixed precision (opset 15)."""

Dim = int | str
Shape = tuple[Dim, ...]


def is_norm(layer: L.Layer) -> bool:
    """Return whether a layer is a fastbn.BatchNorm, or quacks like one."""
    return all(hasattr(layer, name) for name in ("running_mean", "running_var", "eps", "axis"))


class Graph:
    """The model under construction: nodes, constants, and the value and shape that the next layer gets."""

    def __init__(self, dtype: np.dtype[Any], shape: Shape):
        self.dtype = dtype
        self.at = ""
        self.value, self.shape = "input", shape
        self.nodes: list[Any] = []
        self.used: Counter[str] = Counter()
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

    def wrong(self, expected: str, got: object) -> ArgumentValueError:
        """Return the error that the current layer does not fit."""
        return ArgumentValueError(self.at, expected, got)

    def finish(self) -> onnx.ModelProto:
        """Return the model; the last value is its output."""
        self.nodes[-1].output[0] = "output"
        output = helper.make_tensor_value_info("output", self.onnx_type, self.shape)
        graph = helper.make_graph(self.nodes, "fastbn", [self.input], [output], self.constants)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="fastbn"
        )


def _parameter(graph: Graph, name: str, value: Any, size: int) -> NDArray[Any]:
    array = np.asarray(value)
    if array.shape != (size,):
        raise ArgumentValueError(f"{graph.at}.{name}", f"shape ({size},)", array.shape)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise ArgumentTypeError(f"{graph.at}.{name}", "floating point numbers", array.dtype)
    return array


def _linear(graph: Graph, layer: L.Linear) -> None:
    weight = np.asarray(layer.weight)
    if weight.ndim != 2:
        raise ArgumentValueError(f"{graph.at}.weight", "shape (out_features, in_features)", weight.shape)
    if graph.shape[-1] != weight.shape[1]:
        raise graph.wrong(f"{weight.shape[1]} features on the last axis", graph.shape)
    shape = (*graph.shape[:-1], weight.shape[0])
    bias = None
    if layer.bias is not None:
        bias = graph.constant("bias", _parameter(graph, "bias", layer.bias, weight.shape[0]).astype(graph.dtype))
    if len(graph.shape) == 2:
        graph.add("Gemm", [graph.constant("weight", weight), *([bias] if bias else [])], shape, transB=1)
        return
    graph.add("MatMul", [graph.constant("weight", weight.T)], shape)
    if bias:
        graph.add("Add", [bias])


def _sizes(graph: Graph, name: str, value: L.Size, low: int) -> list[int]:
    rank = len(graph.shape) - 2
    sizes = [value] * rank if isinstance(value, (int, np.integer)) else list(value)
    if len(sizes) != rank or any(int(size) != size or size < low for size in sizes):
        raise ArgumentValueError(f"{graph.at}.{name}", f"{rank} integers >= {low}, or one for all", value)
    return [int(size) for size in sizes]


def _windows(graph: Graph, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Shape:
    """Return the spatial sizes after a sliding window; names of unknown sizes get a new name."""
    dims: list[Dim] = []
    for axis, size in enumerate(graph.shape[2:]):
        if isinstance(size, str):
            same = stride[axis] == 1 and 2 * padding[axis] == dilation[axis] * (kernel[axis] - 1)
            dims.append(size if same else f"{graph.at}.size_{axis + 2}")
            continue
        room = size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1
        if room < 0:
            raise graph.wrong(f"room for a kernel of {kernel}", f"spatial sizes {graph.shape[2:]}")
        dims.append(room // stride[axis] + 1)
    return tuple(dims)


def _conv(graph: Graph, layer: L.Conv) -> None:
    weight = np.asarray(layer.weight)
    if not 3 <= weight.ndim <= 5 or 0 in weight.shape:
        raise ArgumentValueError(f"{graph.at}.weight", "shape (out, in / groups, 1 to 3 kernel sizes)", weight.shape)
    if len(graph.shape) != weight.ndim:
        raise graph.wrong(f"an input of rank {weight.ndim}", graph.shape)
    groups = layer.groups
    if groups < 1 or weight.shape[0] % groups:
        raise ArgumentValueError(f"{graph.at}.groups", f"a divisor of {weight.shape[0]} output channels", groups)
    if graph.shape[1] != weight.shape[1] * groups:
        raise graph.wrong(f"{weight.shape[1] * groups} channels on axis 1", graph.shape)
    kernel = list(weight.shape[2:])
    stride, dilation = _sizes(graph, "stride", layer.stride, 1), _sizes(graph, "dilation", layer.dilation, 1)
    padding = _sizes(graph, "padding", layer.padding, 0)
    inputs = [graph.constant("weight", weight)]
    if layer.bias is not None:
        bias = _parameter(graph, "bias", layer.bias, weight.shape[0]).astype(graph.dtype)
        inputs.append(graph.constant("bias", bias))
    shape = (graph.shape[0], weight.shape[0], *_windows(graph, kernel, stride, padding, dilation))
    graph.add(
        *("Conv", inputs, shape),
        kernel_shape=kernel,
        strides=stride,
        pads=padding * 2,
        dilations=dilation,
        group=groups,
    )


def _norm(graph: Graph, layer: Any) -> None:
    if layer.running_mean is None or layer.running_var is None:
        raise graph.wrong("a BatchNorm with running statistics", "track_running_stats=False")
    if layer.activation not in (None, "relu"):
        raise graph.wrong('activation None or "relu"', layer.activation)
    size, rank = len(layer.running_mean), len(graph.shape)
    if not -rank <= layer.axis < rank:
        raise graph.wrong(f"an axis of a rank {rank} input", layer.axis)
    axis = layer.axis % rank
    if graph.shape[axis] != size:
        raise graph.wrong(f"{size} channels on axis {axis}", graph.shape)
    shape = graph.shape
    if axis != 1:
        order = _swapped(rank, axis)
        graph.add("Transpose", shape=tuple(shape[i] for i in order), perm=order)
    inputs = [graph.constant(name, array) for name, array in _norm_parameters(graph, layer, size)]
    graph.add("BatchNormalization", inputs, epsilon=float(layer.eps))
    if axis != 1:
        graph.add("Transpose", shape=shape, perm=order)
    if layer.activation == "relu":
        graph.add("Relu")


def _swapped(rank: int, axis: int) -> list[int]:
    order = list(range(rank))
    order[1], order[axis] = axis, 1
    return order


def _norm_parameters(graph: Graph, layer: Any, size: int) -> list[tuple[str, NDArray[Any]]]:
    dtype = np.dtype(np.float32) if graph.dtype == np.float16 else graph.dtype
    given = {
        "weight": np.ones(size) if layer.weight is None else layer.weight,
        "bias": np.zeros(size) if layer.bias is None else layer.bias,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }
    return [(name, _parameter(graph, name, value, size).astype(dtype)) for name, value in given.items()]


def _pool(graph: Graph, layer: L.MaxPool | L.AveragePool) -> None:
    rank = len(graph.shape)
    if not 3 <= rank <= 5:
        raise graph.wrong("an input (N, C, 1 to 3 spatial axes)", graph.shape)
    kernel = _sizes(graph, "kernel_size", layer.kernel_size, 1)
    stride = kernel if layer.stride is None else _sizes(graph, "stride", layer.stride, 1)
    padding = _sizes(graph, "padding", layer.padding, 0)
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise ArgumentValueError(f"{graph.at}.padding", "at most half the kernel", padding)
    shape = (*graph.shape[:2], *_windows(graph, kernel, stride, padding, [1] * len(kernel)))
    extra = {"count_include_pad": int(layer.count_include_pad)} if isinstance(layer, L.AveragePool) else {}
    op = "AveragePool" if isinstance(layer, L.AveragePool) else "MaxPool"
    graph.add(op, (), shape, kernel_shape=kernel, strides=stride, pads=padding * 2, **extra)


def _global_pool(graph: Graph, layer: L.GlobalAveragePool) -> None:
    if len(graph.shape) < 3:
        raise graph.wrong("an input with spatial axes", graph.shape)
    graph.add("GlobalAveragePool", shape=(*graph.shape[:2], *[1] * (len(graph.shape) - 2)))


def _flatten(graph: Graph, layer: L.Flatten) -> None:
    rank = len(graph.shape)
    if not 0 <= layer.axis <= rank:
        raise ArgumentValueError(f"{graph.at}.axis", f"0 to {rank}", layer.axis)
    halves = (graph.shape[: layer.axis], graph.shape[layer.axis :])
    shape = tuple(_product(graph, half, index) for index, half in enumerate(halves))
    graph.add("Flatten", shape=shape, axis=layer.axis)


def _product(graph: Graph, dims: Shape, index: int) -> Dim:
    known = [dim for dim in dims if isinstance(dim, int)]
    if len(known) == len(dims):
        return prod(known)
    return dims[0] if len(dims) == 1 else f"{graph.at}.size_{index}"


def _softmax(graph: Graph, layer: L.Softmax) -> None:
    if not -len(graph.shape) <= layer.axis < len(graph.shape):
        raise ArgumentValueError(f"{graph.at}.axis", f"an axis of {graph.shape}", layer.axis)
    graph.add("Softmax", axis=layer.axis)


_EMITTERS: dict[type, Callable[[Graph, Any], None]] = {
    L.Linear: _linear,
    L.Conv: _conv,
    L.MaxPool: _pool,
    L.AveragePool: _pool,
    L.GlobalAveragePool: _global_pool,
    L.Flatten: _flatten,
    L.Softmax: _softmax,
    L.ReLU: lambda graph, _: graph.add("Relu"),
    L.Sigmoid: lambda graph, _: graph.add("Sigmoid"),
}


def emitter(layer: L.Layer, at: str) -> Callable[[Graph, Any], None]:
    """Return the function that appends a layer to a graph; ``at`` names the layer in the error."""
    if type(layer) in _EMITTERS:
        return _EMITTERS[type(layer)]
    if is_norm(layer):
        return _norm
    raise ArgumentTypeError(at, "a fastbn.BatchNorm or a layer of fastbn_export.layers", type(layer).__name__)
