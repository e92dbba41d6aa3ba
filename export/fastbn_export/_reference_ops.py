"""Operators that onnx's reference evaluator gets wrong or does slowly; imported in the child process only.

Pooling there loops over every output value; here over the few places of the kernel.
`onnx.reference` runs BatchNormalization of opset 9 in training mode and cannot run opsets 7 and 8. Whether a node is
in training form is told by ``training_mode`` since opset 14, by ``is_test`` in opset 6, and by the presence of the
extra outputs in between (https://onnx.ai/onnx/operators/onnx__BatchNormalization.html).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from fastbn_export._reference_base import WithOriginal
from fastbn_export._reference_conv import Conv, ConvTranspose

__all__ = ["CORRECTED"]


class BatchNormalization(OpRun):  # type: ignore[misc]
    """y = scale * (x - mean) / sqrt(var + epsilon) + B, of any opset, in the dtype of x."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, **attributes: Any) -> tuple[Any, ...]:
        epsilon = attributes.get("epsilon") or 0.0
        if self._is_training(attributes):
            return self._train(x, scale, bias, mean, var, epsilon, attributes.get("momentum", 0.9))
        return (_normalise(x, scale, bias, mean, var, epsilon),)

    def _is_training(self, attributes: dict[str, Any]) -> bool:
        opset = self.run_params["opsets"][""]
        if opset >= 14:
            return bool(attributes.get("training_mode", 0))
        if opset < 7:
            return not any(a.name == "is_test" and a.i for a in self.onnx_node.attribute)
        return sum(bool(name) for name in self.onnx_node.output) > 1

    def _train(
        self, x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float, momentum: float
    ) -> tuple[Any, ...]:
        axes = tuple(axis for axis in range(x.ndim) if axis != 1)
        batch_mean, batch_var = x.mean(axis=axes), x.var(axis=axes)
        running = (mean * momentum + batch_mean * (1 - momentum), var * momentum + batch_var * (1 - momentum))
        results = (_normalise(x, scale, bias, batch_mean, batch_var, epsilon), *running, batch_mean, batch_var)
        return results[: len(self.onnx_node.output)]


def _normalise(x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float) -> Any:
    if mean.ndim == 1:  # per channel; otherwise spatial=0 of opsets 6 to 8: one value per activation
        shape = (1, -1) + (1,) * (x.ndim - 2) if x.ndim > 1 else (-1,)
        scale, bias, mean, var = (p.reshape(shape) for p in (scale, bias, mean, var))
    return (scale * (x - mean) / np.sqrt(var + epsilon) + bias).astype(x.dtype)


class QuantizeLinear(WithOriginal):
    """saturate(round(x / scale) + zero_point), per tensor or per axis, of any opset (onnx has it from 19 on).

    In float64, that is in a lifted model, without the rounding: the truth is then continuous, and a small error of a
    fold shows instead of being rounded away, or blown up to a step, by chance.
    """

    def _run(self, x: Any, scale: Any, zero_point: Any = None, **attributes: Any) -> tuple[Any, ...]:
        dtype = np.dtype(np.uint8) if zero_point is None else zero_point.dtype
        if attributes.get("block_size") or attributes.get("output_dtype") or dtype.name not in _CODES:
            return self._original(x, scale, *([] if zero_point is None else [zero_point]))
        scale, zero_point = _along(x, attributes, scale, zero_point)
        limits = np.iinfo(dtype)
        if x.dtype == np.float64:
            return (np.clip(x / scale + zero_point, limits.min, limits.max),)
        return (np.clip(np.rint(x / scale) + zero_point, limits.min, limits.max).astype(dtype),)


class DequantizeLinear(WithOriginal):
    """(x - zero_point) * scale in the type of scale, per tensor or per axis, of any opset."""

    def _run(self, x: Any, scale: Any, zero_point: Any = None, **attributes: Any) -> tuple[Any, ...]:
        if attributes.get("block_size") or x.dtype.name not in (*_CODES, "int32", "float64"):
            return self._original(x, scale, *([] if zero_point is None else [zero_point]))
        wide, zero_point = _along(x, attributes, scale, zero_point)
        return (((x.astype(np.float64) - zero_point) * wide).astype(scale.dtype),)


_CODES = ("uint8", "int8", "uint16", "int16")


def _along(x: Any, attributes: dict[str, Any], scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """Return scale and zero point in a shape that broadcasts against x, the zero point as float64."""
    axis = attributes.get("axis", 1)
    shape = [1] * x.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    zero = np.zeros(1) if zero_point is None else zero_point.astype(np.float64)
    return scale.reshape(shape), zero.reshape(shape if zero.size == scale.size else [1] * x.ndim)


class _Pool(WithOriginal):
    """A pool as a few operations on whole arrays."""

    def _windows(self, x: Any, attributes: dict[str, Any], fill: float) -> list[Any] | None:
        """Return the padded input shifted to each place of the kernel and strided; None for the unusual."""
        rank = x.ndim - 2
        unusual = attributes.get("ceil_mode") or attributes.get("auto_pad") not in (None, "NOTSET")
        if unusual or len(self.onnx_node.output) != 1:
            return None
        kernel = attributes["kernel_shape"]
        strides, dilations = attributes.get("strides") or [1] * rank, attributes.get("dilations") or [1] * rank
        pads = attributes.get("pads") or [0] * 2 * rank
        widths = [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]
        x = np.pad(x, widths, constant_values=fill)
        ends = [n - d * (k - 1) for n, d, k in zip(x.shape[2:], dilations, kernel, strict=True)]
        shifts = (tuple(p * d for p, d in zip(place, dilations, strict=True)) for place in np.ndindex(*kernel))
        return [
            x[(..., *(slice(s, s + end, step) for s, end, step in zip(shift, ends, strides, strict=True)))]
            for shift in shifts
        ]


class MaxPool(_Pool):
    """The largest value of each window."""

    def _run(self, x: Any, **attributes: Any) -> tuple[Any, ...]:
        windows = self._windows(x, attributes, -np.inf) if x.dtype.kind == "f" else None
        if windows is None:
            return self._original(x)
        return (functools.reduce(np.maximum, windows),)


class AveragePool(_Pool):
    """The mean of each window, padding counted or not."""

    def _run(self, x: Any, **attributes: Any) -> tuple[Any, ...]:
        windows = self._windows(x, attributes, 0.0)
        if windows is None:
            return self._original(x)
        total = functools.reduce(np.add, windows)
        if attributes.get("count_include_pad"):
            return (total / len(windows),)
        return (total / functools.reduce(np.add, self._windows(np.ones_like(x[:1, :1]), attributes, 0.0) or []),)


CORRECTED = [BatchNormalization, Conv, ConvTranspose, QuantizeLinear, DequantizeLinear, MaxPool, AveragePool]
