"""The operations of ``launch`` in NumPy float64, for ``NUMBA_DISABLE_JIT=1``: same arguments, same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import reference

Array = npt.NDArray[Any]
Dims = tuple[int, int, int]
Table = tuple[Array, Array, Array | None]
_quiet = np.errstate(all="ignore")  # compiled kernels do not warn of inf and NaN either


def _decode(x: Array | None, dims: Dims) -> Array | None:
    if x is None:
        return None
    if x.dtype == np.uint16:
        x = x.view(np.float16)
    elif x.dtype == np.int16:
        x = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.reshape(dims).astype(np.float64)


def _encode(value: Array, out: Array) -> None:
    value = value.reshape(-1)
    if out.dtype == np.uint16:
        out[:] = value.astype(np.float16).view(np.uint16)
    elif out.dtype == np.int16:
        bits = value.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        out[:] = np.where(np.isnan(value), quiet, rounded).astype(np.uint16).view(np.int16)
    else:
        out[:] = value


@_quiet
def moments(x: Array, weight: Array, dims: Dims, eps: float) -> Array:
    """See ``launch.moments``."""
    values = _decode(x, dims)
    assert values is not None
    mean, var = reference.statistics(values)
    return np.concatenate([mean, 1.0 / np.sqrt(var + eps), var])


@_quiet
def given(mean: Array, var: Array, eps: float) -> Array:
    """See ``launch.given``."""
    wide = var.astype(np.float64)
    return np.concatenate([mean, 1.0 / np.sqrt(wide + eps), wide])


def keeps_signs(
    x: Array, residual: Array | None, out: Array, dims: Dims, relu: bool | None, once: bool = False
) -> bool:
    """See ``launch.keeps_signs``: never, here."""
    return False


@_quiet
def train(
    x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array,
    dims: Dims, eps: float, momentum: float, relu: bool | None, signs: Array | None = None,
) -> Array:  # fmt: skip
    """See ``launch.train``."""
    stats, n = moments(x, weight, dims, eps), dims[0] * dims[2]
    infer(x, residual, out, weight, bias, stats, dims, relu)
    if running_mean.size:
        mean, _, var = stats.reshape(3, -1)
        running_mean[:] = reference.running(running_mean, mean, momentum)
        running_var[:] = reference.running(running_var, var * n / (n - 1), momentum)
    return stats


@_quiet
def infer(
    x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, stats: Array, dims: Dims,
    relu: bool | None, signs: Array | None = None,
) -> None:  # fmt: skip
    """See ``launch.infer``."""
    mean, invstd = stats.reshape(3, -1)[:2]
    values = _decode(x, dims)
    assert values is not None
    scale = np.asarray(weight, np.float64) * invstd
    y = reference.apply(
        values, mean, np.ones_like(mean), scale, bias, eps=0.0,
        activation="relu" if relu else None, residual=_decode(residual, dims),
    )  # fmt: skip
    _encode(y, out)


def infer_by(
    x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, mean: Array, var: Array, eps: float,
    dims: Dims, relu: bool | None,
) -> None:  # fmt: skip
    """See ``launch.infer_by``."""
    infer(x, residual, out, weight, bias, given(mean, var, eps), dims, relu)


@_quiet
def backward(
    x: Array, grad: Array, y: Array | None, out: Array, grad_residual: Array | None, weight: Array, bias: Array,
    stats: Array, dims: Dims, frozen: bool, relu: bool | None,
) -> tuple[Array, Array]:  # fmt: skip
    """See ``launch.backward``."""
    mean, invstd = stats.reshape(3, -1)[:2]
    values, g, output = _decode(x, dims), _decode(grad, dims), _decode(y, dims)
    assert values is not None and g is not None
    if output is not None:
        g, relu = np.where(output <= 0.0, 0.0, g), None
    dx, dweight, dbias, gated = reference.backward(
        g, values, mean, 1.0 / np.square(invstd), weight, bias, eps=0.0,
        activation="relu" if relu else None, frozen=frozen,
    )  # fmt: skip
    _encode(dx, out)
    if grad_residual is not None:
        _encode(gated, grad_residual)
    return dweight.astype(weight.dtype), dbias.astype(bias.dtype)


def pieces(mask: Array, samples: int, per: int) -> Table:
    """See ``launch.pieces``."""
    sample, start = np.nonzero(mask.reshape(samples, -1)) if samples else (mask, mask)
    first = np.searchsorted(sample, np.arange(samples + 1))
    return first, start * per, np.arange(start.size + 1) * per


def _positions(table: Table, S: int) -> Array:
    """Return where the valid values lie in (N, S), flat."""
    first, start, place = table
    length = np.ones_like(start) if place is None else np.diff(place)
    samples = np.repeat(np.arange(first.size - 1), np.diff(first))
    pieces = [np.arange(n * S + a, n * S + a + m) for n, a, m in zip(samples, start, length, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *pieces])


def pack(x: Array, packed: Array, table: Table, C: int, S: int, M: int, lo: int, hi: int) -> None:
    """See ``launch.pack``."""
    by_channel = x.reshape(-1, C, S).swapaxes(0, 1)[lo:hi].reshape(hi - lo, -1)
    packed.reshape(hi - lo, M)[...] = by_channel[:, _positions(table, S)]


def unpack(packed: Array, y: Array, table: Table, C: int, S: int, M: int, lo: int, hi: int) -> None:
    """See ``launch.unpack``."""
    by_channel = np.zeros((hi - lo, y.size // C), y.dtype)
    by_channel[:, _positions(table, S)] = packed.reshape(hi - lo, M)
    y.reshape(-1, C, S)[:, lo:hi] = by_channel.reshape(hi - lo, -1, S).swapaxes(0, 1)
