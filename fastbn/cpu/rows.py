"""Batch norm on rows (N, C), and on channels-first arrays (N, C, S) whose runs are short: one read, one write.

Both are one matrix with rows of V = C*S elements; where that is short, ``widen`` lays several rows side by side. The
column v belongs to channel (v // S) % C. Here a block of columns holds whole channels and all its rows fit in the
cache, so the tensor is read from memory once and written once. Where the rows are too many, see ``rows_swept``.

Blocks are numbered by the shape alone and handed out by an atomic counter (``claim``: next channel, channels done), so
any number of threads gives the same bits. Arrays are flat, as in ``planes``; ``dims`` is (N, C, S), ``V`` the row
length, ``per`` the most channels of a block (all C if the matrix is widened).
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, jit
from fastbn.cpu.band import NEAR, band_gradient, band_normalise, band_sums, nothing_yet
from fastbn.cpu.columns import phase, settle_gradients, settle_moments, spread_affine, spread_pivots
from fastbn.cpu.finalize import put_given
from fastbn.cpu.simd import base, empty, fence, fetch_add, head, lanes, least, like, signs
from fastbn.cpu.tuning import SIDE

PAD = 32  # spare elements of an array of columns from NumPy, so that its first one can begin a vector


def stride(V: int) -> int:
    """Distance of two column arrays: V elements in whole vectors, one vector more, one that is spare, a ``phase``."""
    return V // 32 * 32 + 128


column_stride = helper(stride)


@helper
def _block(lo, per, dims, V):
    """Channels and columns of the block that begins with channel lo: (hi, v0, v1)."""
    hi = least(lo + per, dims[1])
    if per >= dims[1]:
        return hi, 0, V
    return hi, lo * dims[2], hi * dims[2]


@helper
def _channels(y, per, dims, V):
    """Channels of a block: fewer than ``per`` where blocks of rows are whole lines of y.

    Sums and constants of so many columns share L1 with two rows: training takes 0.7-0.93 of the time, gradients
    0.62-0.85, inference in the cache 0.7 (streamed 1.0-1.1). Where lines cross the ends of blocks, training of
    (1024, 2048) takes 1.35x. Sums of a column are the same.
    """
    C, S = dims[1], dims[2]
    if V < 2 * SIDE or V != C * S or V % lanes(y) != 0 or head(y, 0) != 0:
        return per
    parts = V // SIDE
    n = (C + parts - 1) // parts
    return least(per, n if n < 32 else (n + 31) // 32 * 32)


@jit
def train(
    x, residual, y, weight, bias, running_mean, running_var, stats, dims, V, per, eps, momentum, relu, streamed, claim
):
    """Training forward. Floor: one read and one write of the tensor."""
    T = x.size
    R, tracked = (T + V - 1) // V, running_mean.size > 0
    x, y, residual = base(x), base(y), base(residual)
    per = _channels(y, per, dims, V)
    wide = column_stride(V if per >= dims[1] else per * dims[2])
    scratch, totals = empty(5 * wide, weight), empty(2 * wide, stats)
    weight, bias, stats = base(weight), base(bias), base(stats)
    running_mean, running_var, claim = base(running_mean), base(running_var), base(claim)
    m, ts = like(x, base(scratch)), base(totals)
    k, b, s, q, tq = m + wide, m + 2 * wide, m + 3 * wide, m + 4 * wide, ts + wide
    lo = fetch_add(claim, 0, per)
    while lo < dims[1]:
        hi, v0, v1 = _block(lo, per, dims, V)
        block = (lo, hi, v1 - v0)
        spread_pivots(x, dims, block, m)
        nothing_yet(x, v1 - v0, ts, tq)
        band_sums(x, None, None, None, T, T > NEAR, V, 0, R, v0, v1, v0, m, m, m, None, s, q, ts, tq)
        settle_moments(x, dims, block, m, ts, tq, stats, running_mean, running_var, tracked, eps, momentum, False)
        d = phase(y, v0, V)
        spread_affine(x, stats, weight, bias, dims, block, m + d, k + d, b + d)
        band_normalise(x, residual, y, T, T > NEAR, V, 0, R, v0, v1, v0, m + d, k + d, b + d, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size + totals.size  # keeps the scratch arrays alive: Numba frees an array after its last use


@jit
def infer(x, residual, y, weight, bias, stats, dims, V, per, relu, streamed, claim):
    """Inference with the statistics in ``stats``. Floor: one read, one write. For small tensors: one call, not two."""
    T = x.size
    R = (T + V - 1) // V
    x, y, residual = base(x), base(y), base(residual)
    per = per if streamed else _channels(y, per, dims, V)
    wide = column_stride(V if per >= dims[1] else per * dims[2])
    scratch = empty(3 * wide, weight)
    weight, bias, stats, claim = base(weight), base(bias), base(stats), base(claim)
    m = like(x, base(scratch))
    k, b = m + wide, m + 2 * wide
    lo = fetch_add(claim, 0, per)
    while lo < dims[1]:
        hi, v0, v1 = _block(lo, per, dims, V)
        d = phase(y, v0, V)
        spread_affine(x, stats, weight, bias, dims, (lo, hi, v1 - v0), m + d, k + d, b + d)
        band_normalise(x, residual, y, T, T > NEAR, V, 0, R, v0, v1, v0, m + d, k + d, b + d, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size


@jit
def infer_by(x, residual, y, weight, bias, stats, mean, var, eps, dims, V, per, relu, streamed, claim):
    """Inference by a mean and a variance of so many channels that statistics lie in no cache; ``stats``: their type.

    Written whole and read back they are 72 MB beside the 128 MB that move for (16, 1048576): 0.89 of the time.
    Statistics, and gradients of parameters, in kept memory (``recycled``) would bring nothing (0.98-1.02).
    """
    T, S = x.size, dims[2]
    R = T // V
    x, y, residual = base(x), base(y), base(residual)
    wide = column_stride(per * S)
    scratch, known = empty(3 * wide, weight), empty(3 * per, stats)
    weight, bias, mean, var, claim = base(weight), base(bias), base(mean), base(var), base(claim)
    m, stats = like(x, base(scratch)), base(known)
    k, b = m + wide, m + 2 * wide
    lo = fetch_add(claim, 0, per)
    while lo < dims[1]:
        hi, v0, v1 = _block(lo, per, dims, V)
        put_given(stats, hi - lo, mean + lo, var + lo, eps)
        d, alone = phase(y, v0, V), (dims[0], hi - lo, S)
        spread_affine(x, stats, weight + lo, bias + lo, alone, (0, hi - lo, v1 - v0), m + d, k + d, b + d)
        band_normalise(x, residual, y, T, T > NEAR, V, 0, R, v0, v1, v0, m + d, k + d, b + d, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size + known.size


@jit
def backward(x, g, y, dx, dr, weight, bias, dweight, dbias, stats, dims, V, per, frozen, relu, streamed, claim):
    """Gradients. Floor: two reads and one write of the tensor (and y, dr where they exist)."""
    T = x.size
    R = (T + V - 1) // V
    x, g, dx, dr = base(x), base(g), base(dx), base(dr)
    y = signs(base(y), x)
    per = _channels(dx, per, dims, V)
    wide = column_stride(V if per >= dims[1] else per * dims[2])
    scratch, totals = empty(7 * wide, weight), empty(2 * wide, stats)
    weight, bias, dweight, dbias = base(weight), base(bias), base(dweight), base(dbias)
    stats, claim, s, ts = base(stats), base(claim), like(x, base(scratch)), base(totals)
    q, tq = s + wide, ts + wide
    lo = fetch_add(claim, 0, per)
    while lo < dims[1]:
        hi, v0, v1 = _block(lo, per, dims, V)
        block, m = (lo, hi, v1 - v0), s + (2 * wide + phase(dx, v0, V))
        k, b, c1, c0 = m + wide, m + 2 * wide, m + 3 * wide, m + 4 * wide
        spread_affine(x, stats, weight, bias, dims, block, m, k, b)
        nothing_yet(x, v1 - v0, ts, tq)
        band_sums(x, g, y, None, T, T > NEAR, V, 0, R, v0, v1, v0, m, k, b, relu, s, q, ts, tq)
        settle_gradients(
            x, g, y, dims, block, m, ts, tq, stats, weight, bias, dweight, dbias, frozen, relu, c1, c0, False
        )
        band_gradient(x, g, y, dx, dr, T, T > NEAR, V, 0, R, v0, v1, v0, m, k, b, c1, c0, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size + totals.size
