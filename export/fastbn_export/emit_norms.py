"""How fastbn's own layers become ONNX nodes: batch norm in its inference form, the others as one node each.

- BatchNorm, whatever it does in training (ghosts, renormalisation, frozen), and an InstanceNorm that tracks running
  statistics normalise by those: BatchNormalization.
- LayerNorm is LayerNormalization (opset 17).
- GroupNorm is GroupNormalization (opset 21, the first with one scale per channel; those of opset 18 are per group and
  deprecated). Its statistics are asked for in float64 (``stash_type``): the operator is defined by the mean of squares
  minus the squared mean, which in float32 is off by 0.16 at mean 1e3 and NaN at 1e4, standard deviation 1, in
  onnxruntime. float64 costs 8.6 ms there instead of 2.4, (8, 64, 56, 56), one thread.
- InstanceNorm is InstanceNormalization; in float64, for which onnxruntime has no kernel, GroupNormalization with one
  channel per group.

The operators' channels lie along axis 1; another axis is moved there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

import fastbn
from fastbn.errors import ArgumentTypeError
from fastbn_export.graph import Dim, Graph, parameter

__all__ = ["norm_dtype", "norm_emitter"]

Emit = Callable[[Graph, Any], None]

_RUNNING = ("running_mean", "running_var")


def _array(layer: Any, name: str) -> Any:
    """Return an array of a layer, on the host."""
    value = getattr(layer, name)
    if value is None or not isinstance(layer, fastbn.state.Layer):
        return value
    return layer.state_dict()[name]


def _affine(graph: Graph, layer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[str]:
    """Keep weight and bias as constants, ones and zeros where there are none: the operators require both."""
    weight, bias = _array(layer, "weight"), _array(layer, "bias")
    given = {
        "weight": np.ones(shape) if weight is None else weight,
        "bias": np.zeros(shape) if bias is None else bias,
    }
    return _constants(graph, given, shape, dtype)


def _constants(graph: Graph, given: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> list[str]:
    arrays = {name: parameter(graph, name, value, shape) for name, value in given.items()}
    return [graph.constant(name, graph.cast(name, array, dtype)) for name, array in arrays.items()]


def _along(graph: Graph, layer: Any, op: str, inputs: Sequence[str], **attributes: Any) -> None:
    """Append a node whose channels lie along axis 1, between two transposes where the layer's do not."""
    axis, shape = layer.axis % len(graph.shape), graph.shape
    order = list(range(len(shape)))
    order[1], order[axis] = axis, 1
    if axis != 1:
        graph.add("Transpose", shape=tuple(shape[i] for i in order), perm=order)
    graph.add(op, inputs, epsilon=float(layer.eps), **attributes)
    if axis != 1:
        graph.add("Transpose", shape=shape, perm=order)


def _check_channels(graph: Graph, axis: int, channels: int, lowest: int = 0) -> None:
    rank = len(graph.shape)
    if not -rank <= axis < rank or axis % rank < lowest:
        raise graph.wrong(f"an axis of a rank {rank} input" + (", not the first" if lowest else ""), axis)
    if graph.shape[axis] != channels:
        raise graph.wrong(f"{channels} channels on axis {axis % rank}", graph.shape)


def _behind(graph: Graph, axis: int) -> list[Dim]:
    """Return the sizes of all axes but the samples' and the channels'."""
    return [size for at, size in enumerate(graph.shape) if at not in (0, axis % len(graph.shape))]


def _batch_norm(graph: Graph, layer: Any) -> None:
    if layer.running_mean is None or layer.running_var is None:
        raise graph.wrong("a BatchNorm with running statistics", "track_running_stats=False")
    activation = getattr(layer, "activation", None)
    if activation not in (None, "relu"):
        raise graph.wrong('activation None or "relu"', activation)
    size = len(layer.running_mean)
    _check_channels(graph, layer.axis, size)
    dtype = np.dtype(np.float32) if graph.dtype == np.float16 else graph.dtype
    inputs = _affine(graph, layer, (size,), dtype)
    inputs += _constants(graph, {name: _array(layer, name) for name in _RUNNING}, (size,), dtype)
    _along(graph, layer, "BatchNormalization", inputs)
    if activation == "relu":
        graph.add("Relu")


def _layer_norm(graph: Graph, layer: fastbn.LayerNorm) -> None:
    shape = layer.normalized_shape
    if graph.shape[-len(shape) :] != shape:
        raise graph.wrong(f"last axes {shape}", graph.shape)
    graph.need(17, "LayerNormalization")
    inputs = _affine(graph, layer, shape, graph.dtype)
    if layer.bias is None:
        inputs.pop()  # optional there
        graph.constants.pop()
    graph.add("LayerNormalization", inputs, axis=-len(shape), epsilon=float(layer.eps))


def _instance_norm(graph: Graph, layer: fastbn.InstanceNorm) -> None:
    if layer.running_mean is not None:
        return _batch_norm(graph, layer)
    C = layer.num_features
    _check_channels(graph, layer.axis, C, lowest=1)
    if all(size == 1 for size in _behind(graph, layer.axis)):
        raise graph.wrong("more than 1 value per channel and sample", graph.shape)
    if graph.dtype == np.float64:
        return _groups(graph, layer, C, C, "GroupNormalization; onnxruntime has no InstanceNormalization in float64")
    return _along(graph, layer, "InstanceNormalization", _affine(graph, layer, (C,), graph.dtype))


def _group_norm(graph: Graph, layer: fastbn.GroupNorm) -> None:
    _check_channels(graph, layer.axis, layer.num_channels, lowest=1)
    sizes = (graph.shape[0], layer.num_channels // layer.num_groups, *_behind(graph, layer.axis))
    if all(size == 1 for size in sizes):
        raise graph.wrong("more than 1 value per group", graph.shape)
    _groups(graph, layer, layer.num_channels, layer.num_groups, "GroupNormalization with one scale per channel")


def _groups(graph: Graph, layer: Any, channels: int, groups: int, why: str) -> None:
    graph.need(21, why)
    inputs = _affine(graph, layer, (channels,), graph.dtype)
    _along(graph, layer, "GroupNormalization", inputs, num_groups=groups, stash_type=TensorProto.DOUBLE)


def _recurrent(graph: Graph, layer: fastbn.RecurrentBatchNorm) -> None:
    raise ArgumentTypeError(
        graph.at,
        "layers that do the same at every time step (for one step t, a fastbn.BatchNorm with weight, bias and row t of "
        "running_mean and running_var; for one statistic over batch and time, fastbn.BatchNorm(C, axis=-1))",
        "RecurrentBatchNorm",
    )


_EMITTERS: dict[type, Emit] = {
    fastbn.BatchNorm: _batch_norm,
    fastbn.LayerNorm: _layer_norm,
    fastbn.InstanceNorm: _instance_norm,
    fastbn.GroupNorm: _group_norm,
    fastbn.RecurrentBatchNorm: _recurrent,
}


def norm_emitter(layer: Any) -> Emit | None:
    """Return the function that appends one of fastbn's layers, or what quacks like its BatchNorm; None for others."""
    for kind, emit in _EMITTERS.items():
        if isinstance(layer, kind):
            return emit
    quacks = all(hasattr(layer, name) for name in (*_RUNNING, "weight", "bias", "eps", "axis", "activation"))
    return _batch_norm if quacks else None


def norm_dtype(layer: Any) -> np.dtype[Any] | None:
    """Return the dtype of the parameters of one of those layers."""
    if norm_emitter(layer) is None:
        return None
    own: NDArray[Any] | np.dtype[Any] = getattr(layer, "dtype", None) or np.asarray(layer.running_var).dtype
    return np.dtype(own)
