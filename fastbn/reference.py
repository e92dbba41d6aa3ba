"""The oracle: batch norm and its family in NumPy float64, a few lines each, to be read rather than run fast.

Ioffe & Szegedy 2015, algorithm 1 and section 3. Every kernel is tested against this file before it is timed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _column(v: Array | None, ndim: int, axis: int, default: float) -> Any:
    """Shape a vector of C so that it broadcasts along the channel axis."""
    if v is None:
        return np.float64(default)
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(v, np.float64).reshape(shape)


def statistics(x: Array, axis: int = 1) -> tuple[Array, Array]:
    """Mean and biased variance by channel: mean = sum(x)/n, var = sum((x - mean)^2)/n."""
    rows = np.moveaxis(np.asarray(x, np.float64), axis, -1).reshape(-1, x.shape[axis])
    mean = rows[0] + (rows - rows[0]).mean(0)  # about the first value: a constant channel has variance 0 exactly
    mean = np.where(np.isfinite(mean), mean, rows.mean(0))  # unless that is inf
    return mean, np.square(rows - mean).mean(0)


def apply(
    x: Array, mean: Array, var: Array, weight: Array | None = None, bias: Array | None = None, *,
    eps: float = 1e-5, axis: int = 1, activation: str | None = None, residual: Array | None = None,
) -> Array:  # fmt: skip
    """Y = activation(weight*(x - mean)/sqrt(var + eps) + bias + residual)."""
    m, v = _column(mean, x.ndim, axis, 0.0), _column(var, x.ndim, axis, 1.0)
    y = (np.asarray(x, np.float64) - m) / np.sqrt(v + eps)
    y = y * _column(weight, x.ndim, axis, 1.0) + _column(bias, x.ndim, axis, 0.0)
    if residual is not None:
        y = y + np.asarray(residual, np.float64)
    return np.where(y <= 0.0, 0.0, y) if activation == "relu" else y


def running(old: Array, new: Array, momentum: float) -> Array:
    """Exponential average as PyTorch writes it: momentum is the weight of the new value."""
    return (1.0 - momentum) * np.asarray(old, np.float64) + momentum * np.asarray(new, np.float64)


def backward(
    grad: Array, x: Array, mean: Array, var: Array, weight: Array | None = None, bias: Array | None = None, *,
    eps: float = 1e-5, axis: int = 1, activation: str | None = None, residual: Array | None = None,
    frozen: bool = False,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Gradients of input, weight, bias and residual; with ``frozen`` the statistics are constants."""
    g = np.asarray(grad, np.float64)
    if activation == "relu":
        y = apply(x, mean, var, weight, bias, eps=eps, axis=axis, residual=residual)
        g = np.where(y <= 0.0, 0.0, g)
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    xhat = apply(x, mean, var, eps=eps, axis=axis)
    dweight, dbias = (g * xhat).sum(others), g.sum(others)
    scale = _column(weight, x.ndim, axis, 1.0) / np.sqrt(_column(var, x.ndim, axis, 1.0) + eps)
    if frozen:
        return scale * g, dweight, dbias, g
    n = x.size // x.shape[axis]
    centred = g - _column(dbias, x.ndim, axis, 0.0) / n - xhat * _column(dweight, x.ndim, axis, 0.0) / n
    return scale * centred, dweight, dbias, g


def normalise(
    x: Array, axes: tuple[int, ...], weight: Array | None = None, bias: Array | None = None, *, eps: float = 1e-5
) -> Array:
    """Y = weight*(x - mean)/sqrt(var + eps) + bias, mean and var over ``axes``; weight and bias broadcast to x."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axes, keepdims=True)
    xhat = centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + eps)
    y: Array = xhat * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)
    return y


def normalise_backward(
    grad: Array, x: Array, axes: tuple[int, ...], weight: Array | None = None, *, eps: float = 1e-5
) -> tuple[Array, Array]:
    """Gradient of x, and u*xhat, whose sum over the axes that weight lacks is its gradient. Bias: the sum of u.

    With v = weight*u: dx = (v - mean(v) - xhat*mean(v*xhat))/sqrt(var + eps), means over ``axes``.
    """
    x, u = np.asarray(x, np.float64), np.asarray(grad, np.float64)
    centred, v = x - x.mean(axes, keepdims=True), u * (1.0 if weight is None else weight)
    invstd = 1.0 / np.sqrt(np.square(centred).mean(axes, keepdims=True) + eps)
    xhat = centred * invstd
    dx = invstd * (v - v.mean(axes, keepdims=True) - xhat * (v * xhat).mean(axes, keepdims=True))
    return dx, u * xhat
