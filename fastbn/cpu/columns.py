"""Column constants of the rows kernels: spread a channel's numbers over its columns, gather its columns' sums.

A block of columns v0 <= v < v1 holds the whole channels c0 <= c < c1; its column number j = v - v0 belongs to channel
c0 + (j // S) % (c1 - c0). Either the block is one of many in a matrix that is not widened, or it is the whole matrix.
``dims`` is (N, C, S), ``block`` is (c0, c1, width).
"""

from __future__ import annotations

from fastbn.cpu._jit import helper
from fastbn.cpu.finalize import affine, gradients, keep, resolve, trusted
from fastbn.cpu.simd import get, lanes, load_n, put, rounded, splat, store_n


@helper
def _fill(values, number, c, S, period, width):
    """Give every column of one channel (counted from the block's first) the same number."""
    for run in range(c * S, width, period * S):
        for j in range(run, run + S):
            put(values, j, number)


@helper
def _gather(sums, c, S, period, width):
    """Add the columns of one channel, in order."""
    s = 0.0
    for run in range(c * S, width, period * S):
        for j in range(run, run + S):
            s += get(sums, j)
    return s


@helper
def _spread(N):
    """Eight of N rows, unevenly spread: even steps would meet data with a period in one phase."""
    return (
        N * 37 >> 10, N * 161 >> 10, N * 290 >> 10, N * 413 >> 10,
        N * 542 >> 10, N * 671 >> 10, N * 799 >> 10, N * 926 >> 10,
    )  # fmt: skip


@helper
def _row_pivots(x, N, C, c0, c1, m):
    """Set m to the mean of eight rows, added so that equal numbers give exactly themselves."""
    W, r = lanes(x), _spread(N)
    eighth = splat(x, 0.125)
    for c in range(c0, c1, W):
        n = min(W, c1 - c)
        a = load_n(x, r[0] * C + c, n) + load_n(x, r[1] * C + c, n)
        b = load_n(x, r[2] * C + c, n) + load_n(x, r[3] * C + c, n)
        d = load_n(x, r[4] * C + c, n) + load_n(x, r[5] * C + c, n)
        e = load_n(x, r[6] * C + c, n) + load_n(x, r[7] * C + c, n)
        store_n(m, c - c0, ((a + b) + (d + e)) * eighth, n)


@helper
def _run_pivot(x, N, C, S, c):
    """Mean of the first or last elements of eight runs of channel c, added as in ``_row_pivots``."""
    r, first, last = _spread(N), c * S, c * S + S - 1
    a = get(x, r[0] * C * S + first) + get(x, r[1] * C * S + last)
    b = get(x, r[2] * C * S + first) + get(x, r[3] * C * S + last)
    d = get(x, r[4] * C * S + first) + get(x, r[5] * C * S + last)
    e = get(x, r[6] * C * S + first) + get(x, r[7] * C * S + last)
    return rounded(x, ((a + b) + (d + e)) * 0.125)


@helper
def spread_pivots(x, dims, block, m):
    """Set m to the pivot of each column's channel: a number near its mean, exactly its value if it is constant."""
    N, C, S = dims
    c0, c1, width = block
    if S > 1:
        for c in range(c0, c1):
            _fill(m, _run_pivot(x, N, C, S, c), c - c0, S, c1 - c0, width)
        return
    _row_pivots(x, N, C, c0, c1, m)
    for j in range(c1 - c0, width):
        put(m, j, get(m, j - (c1 - c0)))


@helper
def spread_affine(x, stats, weight, bias, dims, block, m, k, b):
    """(m, k, b) = the affine map of each column's channel (see ``finalize.affine``)."""
    _, C, S = dims
    c0, c1, width = block
    for c in range(c0, c1):
        mc, kc, bc = affine(stats, weight, bias, C, c, x)
        _fill(m, mc, c - c0, S, c1 - c0, width)
        _fill(k, kc, c - c0, S, c1 - c0, width)
        _fill(b, bc, c - c0, S, c1 - c0, width)


@helper
def settle_moments(x, dims, block, m, s, q, stats, running_mean, running_var, tracked, eps, momentum):
    """Statistics of the block's channels from their columns' sums about m."""
    N, C, S = dims
    c0, c1, width = block
    for c in range(c0, c1):
        j = c - c0
        total_s = _gather(s, j, S, c1 - c0, width)
        total_q = _gather(q, j, S, c1 - c0, width)
        mean, var = resolve(x, N, C, S, c, get(m, j * S), total_s, total_q, eps)
        keep(stats, running_mean, running_var, tracked, C, c, mean, var, N * S, eps, momentum)


@helper
def settle_gradients(x, g, y, dims, block, m, s, q, stats, weight, bias, dweight, dbias, frozen, relu, c1, c0):
    """Parameter gradients of the block's channels from their columns' sums, and the column constants c1, c0 of dx."""
    N, C, S = dims
    first, end, width = block
    for c in range(first, end):
        j = c - first
        total_s = _gather(s, j, S, end - first, width)
        total_q = _gather(q, j, S, end - first, width)
        mc, k, b = affine(stats, weight, bias, C, c, x)
        total_s, total_q = trusted(total_s, total_q, x, g, y, N, C, S, c, mc, k, b, relu)
        a1, a0 = gradients(stats, weight, dweight, dbias, C, c, N * S, mc, total_s, total_q, frozen)
        _fill(c1, a1, j, S, end - first, width)
        _fill(c0, a0, j, S, end - first, width)
