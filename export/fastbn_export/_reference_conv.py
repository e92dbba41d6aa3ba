"""Convolutions in NumPy for the float64 evaluation: matrix products over the places of the kernel.

onnx's own fail on some legal shapes and, transposed, loop in Python; explicit padding only, the rest goes to them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn_export._reference_base import WithOriginal

__all__ = ["Conv", "ConvTranspose"]


class Conv(WithOriginal):
    """y[n, m, o] = b[m] + sum over c, k of w[m, c, k] x[n, c, o * stride + k * dilation - pad], in groups."""

    def _run(self, x: Any, w: Any, b: Any = None, **attributes: Any) -> tuple[Any, ...]:
        if attributes.get("auto_pad") not in (None, "NOTSET"):
            return self._original(x, w, *([] if b is None else [b]))
        strides, dilations, pads, groups = _geometry(x, attributes)
        rank, kernel = x.ndim - 2, w.shape[2:]
        x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
        ends = [n - d * (k - 1) for n, d, k in zip(x.shape[2:], dilations, kernel, strict=True)]
        size = [-(-end // step) for end, step in zip(ends, strides, strict=True)]
        windows = [
            tuple(
                slice(p * d, p * d + end, step) for p, d, end, step in zip(place, dilations, ends, strides, strict=True)
            )
            for place in np.ndindex(*kernel)
        ]
        rows = w.reshape(groups, len(w) // groups, -1)
        y = np.empty((len(x), groups, rows.shape[1], int(np.prod(size))), np.result_type(x, w))
        for example, result in zip(x, y, strict=True):  # one at a time: the columns are as many copies as places
            columns = np.stack([example[(slice(None), *window)] for window in windows], axis=1)
            np.matmul(rows, columns.reshape(groups, rows.shape[2], -1), out=result)
        return (_with_bias(y.reshape(len(x), len(w), *size), b),)


class ConvTranspose(WithOriginal):
    """The transpose of Conv: each input value adds its multiple of the kernel to the output."""

    def _run(self, x: Any, w: Any, b: Any = None, **attributes: Any) -> tuple[Any, ...]:
        if attributes.get("auto_pad") not in (None, "NOTSET") or attributes.get("output_shape"):
            return self._original(x, w, *([] if b is None else [b]))
        strides, dilations, pads, groups = _geometry(x, attributes)
        rank, kernel, per_group = x.ndim - 2, w.shape[2:], w.shape[1]
        extra = attributes.get("output_padding") or [0] * rank
        spans = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], strides, strict=True)]
        full = [span + d * (k - 1) + more for span, d, k, more in zip(spans, dilations, kernel, extra, strict=True)]
        y: Any = np.zeros((len(x), groups * per_group, *full), x.dtype)
        inputs = x.reshape(len(x), groups, x.shape[1] // groups, -1)
        for place in np.ndindex(*kernel):
            weight = w[(..., *place)].reshape(groups, -1, per_group).transpose(0, 2, 1)
            window = tuple(
                slice(p * d, p * d + span, step)
                for p, d, span, step in zip(place, dilations, spans, strides, strict=True)
            )
            y[(..., *window)] += (weight @ inputs).reshape(len(x), groups * per_group, *x.shape[2:])
        kept = tuple(slice(first, n - last) for first, last, n in zip(pads[:rank], pads[rank:], full, strict=True))
        return (_with_bias(y[(..., *kept)], b),)


def _geometry(x: Any, attributes: dict[str, Any]) -> tuple[list[int], list[int], list[int], int]:
    rank = x.ndim - 2
    return (
        attributes.get("strides") or [1] * rank,
        attributes.get("dilations") or [1] * rank,
        attributes.get("pads") or [0] * 2 * rank,
        attributes.get("group") or 1,
    )


def _with_bias(y: Any, b: Any) -> Any:
    return y if b is None else y + b.reshape(-1, *[1] * (y.ndim - 2))
