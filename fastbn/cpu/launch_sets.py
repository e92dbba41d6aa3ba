# mypy: allow-untyped-calls
"""From the sizes of layer and group norm to one call of the kernels in ``sets`` and ``sets_backward``.

Tensors arrive flat and contiguous, half types as 16-bit integers, parameters in the arithmetic type or both None.
``d`` is (B, G, C, S): samples, groups, channels, values behind a channel; layer norm is (R, 1, D, 1). Statistics are
float64 of 3*B*G: means, invstds, biased variances.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import recycled
from fastbn.cpu import (
    pool,
    sets,
    sets_backward,
    sets_four,
    sets_long,
    sets_long_backward,
    sets_of_channels,
    sets_parameters,
    tuning,
)

Array = npt.NDArray[Any]
Sizes = tuple[int, int, int, int]
WIDE = np.dtype(np.float64)

# Elements of a run from which one number of the affine for all of it beats one for each: forward 49 take 2.9 and 1.2
# copies, 196 take 1.2; backward (64, 1280, 8, 8) takes 2.6 and 3.5, 49 up to 1.6 times as long.
LONG, LONG_BACK = 128, 64
BLOCKS = 32  # blocks of samples with parameter gradients of their own, each of at least LEAST samples
LEAST = 16
GRAIN = 1 << 19  # elements of a block up to which it has ROWS samples: sums of every 16 took a fifth of (381, 16384)
# Sets that ``sets_long`` sweeps twice: of so many elements where they are few, or of so many bytes (half types counted
# as float32). Forward 0.6-1.1 and 0.66-0.97 of the time, (190, 131072) 1.2; gradients 0.5-0.95 and 0.4-0.96.
SWEPT, FEW, ALWAYS = 1 << 15, 8, 3 << 18
SWEPT_BACK, FEW_BACK, ALWAYS_BACK = 1 << 12, 32, 3 << 16


@functools.cache
def _kind(wide: bool) -> Array:
    """Return the empty array that tells kernels the type of their lanes."""
    return np.empty(0, np.float64 if wide else np.float32)


def of_channels(d: Sizes) -> bool:
    """Tell whether ``sets_of_channels`` takes instance norm."""
    _, G, C, S = d
    return G == C > 1 and S < sets_of_channels.LONG


def forward_kernel(d: Sizes, itemsize: int, affine: bool) -> tuple[Any, tuple[int | None, ...]]:
    """Return the kernel, and what it takes behind the length of a set."""
    _, G, _, S = d
    if affine and of_channels(d):
        return sets_of_channels.train, (G, S, S)
    run = S if affine and S >= LONG else None
    return (sets_four.train, (S,)) if run is None and in_fours(d, itemsize) else (sets.train, (G, S, run))


def backward_kernel(d: Sizes, itemsize: int, affine: bool) -> tuple[Any, tuple[int | None, ...]]:
    """Return the same for gradients."""
    _, G, _, S = d
    if affine and of_channels(d):
        return sets_of_channels.backward, (G, S, S)
    run = S if affine and S >= LONG_BACK else None
    if run is None and in_fours_back(d, itemsize, affine):
        return sets_four.backward, (S,)
    return sets_backward.backward, (G, S, run)


def _constant(x: Array, C: int, value: float) -> Array:
    """Stand in for an absent weight or bias, in ``sets_of_channels`` a number a set like the others."""
    return np.full(C, value, _kind(x.itemsize == 8).dtype)


def train(
    x: Array, out: Array, weight: Array | None, bias: Array | None, d: Sizes, eps: float
) -> Array:  # fmt: skip
    """Normalise each set by its own statistics into ``out``; returns the statistics."""
    B, G, C, S = d
    count, length = B * G, C // G * S
    if weight is not None and _in_chunks(d, x.itemsize, FEW, SWEPT, ALWAYS):
        return _swept_train(x, out, weight, bias, count, length, eps)
    if weight is None and of_channels(d):
        weight, bias = _constant(x, C, 1.0), _constant(x, C, 0.0)
    kernel, place = forward_kernel(d, x.itemsize, weight is not None)
    stats, streamed = np.empty(3 * count), tuning.streams(x, out)
    arrays, parallel = (x, out, weight, bias, stats, _kind(x.itemsize == 8), count, length), x.size >= tuning.PARALLEL
    pool.run(kernel, (*arrays, *place, eps, streamed), count, parallel)
    return stats


def _swept_train(
    x: Array, out: Array, weight: Array, bias: Array | None, count: int, length: int, eps: float
) -> Array:  # fmt: skip
    """As ``train`` by two sweeps."""
    units, parallel = sets_long.chunks_of(length), x.size >= tuning.PARALLEL
    stats, part = np.empty(3 * count), np.empty(2 * count * units)
    pool.run(sets_long.moments, (x, part, count, length), units, parallel)
    sets_long.settle_moments(x, part, stats, count, length, eps)
    work = (x, out, weight, bias, stats, count, length, tuning.streams(x, out))
    pool.run(sets_long.normalise, work, units, parallel)
    return stats


def _in_chunks(d: Sizes, itemsize: int, few: int, swept: int, always: int) -> bool:
    """Tell whether ``sets_long`` takes layer norm with an affine, in chunks of columns."""
    B, G, C, S = d
    return G == S == 1 and ((few >= B and swept <= C) or C * max(itemsize, 4) >= always)


def in_fours(d: Sizes, itemsize: int) -> bool:
    """Tell whether ``sets_four`` takes sets, four at a time."""
    _, G, C, S = d
    return G == 1 and C * S * itemsize <= (sets_four.SHORT_HALF if itemsize == 2 else sets_four.SHORT)


def in_fours_back(d: Sizes, itemsize: int, affine: bool) -> bool:
    """Tell the same for gradients."""
    _, G, C, S = d
    return G == 1 and (C * S * itemsize <= sets_four.SHORT or (affine and C * S * max(itemsize, 4) <= sets_four.LONG))


def is_small(d: Sizes) -> bool:
    """Tell whether float32 sets with an affine are one call of a kernel, by one thread."""
    B, G, C, S = d
    return B * C * S < tuning.PARALLEL and not (G == S == 1 and C >= SWEPT_BACK)


def _singly(d: Sizes) -> bool:
    """Tell whether gradients of the affine are added element by element, not run by run."""
    return d[3] < LONG_BACK and not of_channels(d)


def sums(d: Sizes, affine: bool) -> tuple[int, int]:
    """Return how many samples share sums of parameter gradients, and how many numbers these are."""
    B, _, C, S = d
    per = max(1, B // BLOCKS)
    if not affine:
        return per, 0
    if _singly(d):
        per = max(LEAST, -(-B // BLOCKS), min(sets_parameters.ROWS, GRAIN // (C * S)))
    elif not of_channels(d):
        return per, 2 * B * C
    return per, -(-B // per) * 2 * C


def _large(grad: Array, length: int) -> bool:
    """Tell whether products of the gradient and xhat, which is below sqrt(length), may leave float32's range."""
    if grad.dtype == np.uint16:  # float16
        return False
    kind = np.float32 if grad.dtype == np.int16 else grad.dtype  # bfloat16 has float32's range
    most = float(np.finfo(kind).max) / (2 * sets_parameters.ROWS * length**0.5)
    return bool(sets_parameters.beyond(grad, most))


def backward(
    x: Array, grad: Array, out: Array, weight: Array | None, stats: Array, d: Sizes
) -> tuple[Array, Array]:  # fmt: skip
    """Input gradient into ``out``, which may be grad; returns dweight and dbias, zero without a weight."""
    B, G, C, S = d
    count, length, affine, kind = B * G, C // G * S, weight is not None, _kind(x.itemsize == 8)
    if weight is None and of_channels(d):
        weight = _constant(x, C, 1.0)
    kernel, place = backward_kernel(d, x.itemsize, weight is not None)
    per, room = sums(d, weight is not None)
    singly = weight is not None and _singly(d)
    if singly and np.may_share_memory(grad, out) and _large(grad, length):
        grad = grad.copy()  # it may be wanted again when it is written over
    if weight is not None and _in_chunks(d, x.itemsize, FEW_BACK, SWEPT_BACK, ALWAYS_BACK):
        return _swept_backward(x, grad, out, weight, stats, count, length)
    parts = recycled.empty((room,), WIDE)
    parts.fill(0.0)
    tensors, parallel = (x, grad, out, weight, stats, parts, kind, count, length), x.size >= tuning.PARALLEL
    pool.run(kernel, (*tensors, *place, per, tuning.streams(x, grad, out, over=(out, grad))), B, parallel)
    if not affine:
        return np.zeros(C), np.zeros(C)
    found = parts.reshape(2, -1, C).sum(1)
    if singly and not np.isfinite(found).all():
        wide = np.zeros((2, C * S))
        sets_parameters.wide_parameters(x, grad, stats, wide.reshape(-1), count, length, G)
        found = np.where(np.isfinite(found), found, wide.reshape(2, C, S).sum(2))
    return found[0], found[1]


def _swept_backward(
    x: Array, grad: Array, out: Array, weight: Array, stats: Array, count: int, length: int
) -> tuple[Array, Array]:
    """As ``backward`` by two sweeps; gradients of weight and bias in their type."""
    across, parallel = sets_long.chunks_of(length), x.size >= tuning.PARALLEL
    dweight, dbias = recycled.empty_like(weight), recycled.empty_like(weight)
    part, fine, kind = np.zeros(2 * count * across), np.empty(across, np.int64), _kind(x.itemsize == 8)
    streamed = count == 1 or tuning.streams(dweight, dbias)
    sums = (x, grad, weight, dweight, dbias, stats, part, fine, kind, count, length, streamed)
    pool.run(sets_long_backward.sums, sums, across, parallel)
    sets_long_backward.settle_sums(x, grad, weight, stats, part, count, length)
    work = (x, grad, out, weight, stats, part, count, length, tuning.streams(x, grad, out, over=(out, grad)))
    pool.run(sets_long_backward.gradients, work, across, parallel)
    if fine.all():
        return dweight, dbias
    wide = np.zeros((2, length))
    sets_parameters.wide_parameters(x, grad, stats, wide.reshape(-1), count, length, 1)
    return np.where(np.isfinite(dweight), dweight, wide[0]), np.where(np.isfinite(dbias), dbias, wide[1])
