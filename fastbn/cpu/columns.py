"""Column constants of the rows kernels: spread a channel's numbers over its columns, gather its columns' sums.

A block of columns v0 <= v < v1 holds the whole channels c0 <= c < c1; its column number j = v - v0 belongs to channel
c0 + (j // S) % (c1 - c0). Either the block is one of many in a matrix that is not widened, or it is the whole matrix.
``dims`` is (N, C, S), ``block`` is (c0, c1, width).
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, part
from fastbn.cpu.finalize import affine, finite_sums, gradients_of, keep, moments_of
from fastbn.cpu.simd import get, head, lanes, least, load, load_n, put, rounded, splat, store, store_n


@part
def phase(y, i, V):
    """How many places column constants are moved so that they begin a line where y + i does, row by row of V columns.

    ``band_normalise`` writes whole lines. Constants at other addresses are two lines a load each, 1.1x in all.
    """
    if y is None:
        return 0
    W = lanes(y)
    return (W - head(y, i)) % W if V % W == 0 else 0


@part
def fill(values, c, S, number):
    """Give the first S columns of channel c (counted from the block's first) one number; ascending c only.

    Whole vectors: what they write past these columns belongs to the next channels or is spare.
    """
    if S == 1:
        put(values, c, number)
    else:
        for j in range(c * S, c * S + S, lanes(values)):
            store(values, j, splat(values, number))


@part
def repeat(values, period, width):
    """Copy the first ``period`` columns over those behind them; what a vector writes too much is overwritten, or spare.

    Masked stores instead take 5 % of a small call's kernel.
    """
    W = lanes(values)
    for start in range(period, width, period):
        for i in range(0, least(period, width - start), W):
            store(values, start + i, load(values, i))


@part
def _fold(sums, period, width):
    """Add all columns to the first ``period`` ones, in order."""
    W = lanes(sums)
    for start in range(period, width, period):
        i, n = 0, least(period, width - start)
        while i + W <= n:
            store(sums, i, load(sums, i) + load(sums, start + i))
            i += W
        if i < n:
            store_n(sums, i, load_n(sums, i, n - i) + load_n(sums, start + i, n - i), n - i)


@part
def _gather(sums, count, S):
    """Put the sum of each channel's S columns into sums[:count]."""
    for c in range(count):
        s = get(sums, c * S)
        for j in range(c * S + 1, c * S + S):
            s += get(sums, j)
        put(sums, c, s)


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
        n = least(W, c1 - c)
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
            fill(m, c - c0, S, _run_pivot(x, N, C, S, c))
    else:
        _row_pivots(x, N, C, c0, c1, m)
    repeat(m, (c1 - c0) * S, width)


@part
def _scatter(values, count, S, columns):
    """Give the S columns of each channel its number."""
    if S == 1:
        for j in range(count):
            put(columns, j, get(values, j))
    else:
        for j in range(count):
            fill(columns, j, S, get(values, j))


@helper
def spread_affine(x, stats, weight, bias, dims, block, m, k, b):
    """(m, k, b) = the affine map of each column's channel (see ``finalize.affine``), and of one more vector's.

    An array a loop where S is 1, as in ``finalize.invstds``, would take inference of (16, 1048576) 1.0-1.1x.
    """
    _, C, S = dims
    c0, c1, width = block
    for c in range(c0, c1):
        mc, kc, bc = affine(stats, weight, bias, C, c, x)
        fill(m, c - c0, S, mc)
        fill(k, c - c0, S, kc)
        fill(b, c - c0, S, bc)
    period, width = (c1 - c0) * S, width + lanes(x)
    repeat(m, period, width)
    repeat(k, period, width)
    repeat(b, period, width)


@helper
def settle_moments(x, dims, block, m, s, q, stats, running_mean, running_var, tracked, eps, momentum, masked):
    """Statistics of the block's channels from their columns' sums about m; returns whether they are right.

    ``masked``: x is not where the values lie, so channels whose sums cannot be trusted cannot be summed again.
    """
    N, C, S = dims
    c0, c1, width = block
    _fold(s, (c1 - c0) * S, width)
    _fold(q, (c1 - c0) * S, width)
    if S > 1:
        _gather(s, c1 - c0, S)
        _gather(q, c1 - c0, S)
    if not moments_of(x, N, C, S, c0, c1, m, S, s, q, stats, eps, not masked):
        return False
    keep(stats, running_mean, running_var, tracked, C, c0, c1, N * S, eps, momentum)
    return True


@helper
def settle_gradients(x, g, y, dims, block, m, s, q, stats, weight, bias, dweight, dbias, frozen, relu, c1, c0, masked):
    """Parameter gradients of the block's channels from their columns' sums, and the column constants c1, c0 of dx.

    Returns whether all is right; for ``masked`` see ``settle_moments``.
    """
    N, C, S = dims
    first, end, width = block
    period = (end - first) * S
    _fold(s, period, width)
    _fold(q, period, width)
    if S > 1:
        _gather(s, end - first, S)
        _gather(q, end - first, S)
    n = end - first
    fine = finite_sums(x, g, y, N, C, S, first, n, s, q, stats, weight, bias, relu, not masked)
    gradients_of(x, stats, dweight, dbias, C, first, n, N * S, s, q, frozen)
    _scatter(q, n, S, c1)
    _scatter(s, n, S, c0)
    repeat(c1, period, width + lanes(x))
    repeat(c0, period, width + lanes(x))
    return fine
