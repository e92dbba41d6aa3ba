"""How each plain layer becomes ONNX nodes: its parameters checked against the shape that reaches it, then written."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn_export import layers as L
from fastbn_export.emit_norms import norm_emitter
from fastbn_export.graph import Dim, Graph, Shape, parameter

__all__ = ["emitter"]


def _bias(graph: Graph, value: Any, size: int) -> NDArray[Any]:
    return graph.cast("bias", parameter(graph, "bias", value, (size,)), graph.dtype)


def _linear(graph: Graph, layer: L.Linear) -> None:
    weight = np.asarray(layer.weight)
    if weight.ndim != 2:
        raise ArgumentValueError(f"{graph.at}.weight", "shape (out_features, in_features)", weight.shape)
    if graph.shape[-1] != weight.shape[1]:
        raise graph.wrong(f"{weight.shape[1]} features on the last axis", graph.shape)
    shape = (*graph.shape[:-1], weight.shape[0])
    bias = None
    if layer.bias is not None:
        bias = graph.constant("bias", _bias(graph, layer.bias, weight.shape[0]))
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
        bias = _bias(graph, layer.bias, weight.shape[0])
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
    norm = norm_emitter(layer)
    if norm is None:
        raise ArgumentTypeError(at, "a fastbn.BatchNorm or a layer of fastbn_export.layers", type(layer).__name__)
    return norm
