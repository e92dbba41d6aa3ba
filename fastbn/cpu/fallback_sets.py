"""The operations of ``launch_sets`` in NumPy float64, for ``NUMBA_DISABLE_JIT=1``: same arguments, same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import reference
from fastbn.cpu.fallback import _decode, _encode, _quiet

Array = npt.NDArray[Any]
Sizes = tuple[int, int, int, int]


def _statistics(values: Array, eps: float) -> Array:
    """Statistics of the sets in (sets, length)."""
    mean, var = reference.statistics(values, axis=0)
    return np.concatenate([mean, 1.0 / np.sqrt(var + eps), var])


def _shaped(x: Array, d: Sizes) -> Array:
    B, G, C, S = d
    values = _decode(x, (B * G, 1, C // G * S))
    assert values is not None
    return values.reshape(B, G, C // G, S)


def _parameter(p: Array | None, d: Sizes) -> Any:
    """Shape a parameter by channel so that it broadcasts; 1 where there is none."""
    return 1.0 if p is None else np.asarray(p, np.float64).reshape(d[1], d[2] // d[1], 1)


def _xhat(values: Array, stats: Array, d: Sizes) -> tuple[Array, Array]:
    mean, invstd = (row.reshape(d[0], d[1], 1, 1) for row in stats.reshape(3, -1)[:2])
    return (values - mean) * invstd, invstd


@_quiet
def train(x: Array, out: Array, weight: Array | None, bias: Array | None, d: Sizes, eps: float) -> Array:
    """See ``launch_sets.train``."""
    values = _shaped(x, d)
    stats = _statistics(values.reshape(d[0] * d[1], -1), eps)
    y = _xhat(values, stats, d)[0] * _parameter(weight, d)
    _encode(y if bias is None else y + _parameter(bias, d), out)
    return stats


@_quiet
def backward(
    x: Array, grad: Array, out: Array, weight: Array | None, stats: Array, d: Sizes
) -> tuple[Array, Array]:  # fmt: skip
    """See ``launch_sets.backward``."""
    g = _shaped(grad, d)
    xhat, invstd = _xhat(_shaped(x, d), stats, d)
    u = g * _parameter(weight, d)
    centred = u - u.mean((2, 3), keepdims=True) - xhat * (u * xhat).mean((2, 3), keepdims=True)
    _encode(invstd * centred, out)
    if weight is None:
        return np.zeros(d[2]), np.zeros(d[2])
    return (g * xhat).sum((0, 3)).reshape(-1), g.sum((0, 3)).reshape(-1)
