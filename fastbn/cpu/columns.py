"""Column constants of the rows kernels: spread a channel's numbers over its columns, gather its columns' sums.

A block of columns v0 <= v < v1 holds the whole channels c0 <= c < c1; its column number j = v - v0 belongs to channel
c0 + (j // S) % (c1 - c0). Either the block is one of many in a matrix that is not widened, or it is the whole matrix.
``dims`` is (N, C, S), ``block`` is (c0, c1, width).
"""

from __future__ import annotations

import math

from fastbn.cpu._jit import jit
from fastbn.cpu.finalize import affine, gradients, keep, pivot, pivot_offsets, resolve, wide_gradient_sums
from fastbn.cpu.simd import get, put, rounded


@jit
def _fill(values, number, c, S, period, width):
    """Give every column of one channel (counted from the block's first) the same number."""
    for run in range(c * S, width, period * S):
        for j in range(run, run + S):
            put(values, j, number)


@jit
def _gather(sums, c, S, period, width):
    """Add the columns of one channel, in order."""
    s = 0.0
    for run in range(c * S, width, period * S):
        for j in range(run, run + S):
            s += get(sums, j)
    return s


@jit
def spread_pivots(x, dims, block, m):
    """M = the pivot of each column's channel."""
    N, C, S = dims
    c0, c1, width = block
    offsets = pivot_offsets(N, C, S)
    for c in range(c0, c1):
        _fill(m, rounded(x, pivot(x, c * S, offsets)), c - c0, S, c1 - c0, width)


@jit
def spread_affine(x, stats, weight, bias, dims, block, m, k, b):
    """(m, k, b) = the affine map of each column's channel (see ``finalize.affine``)."""
    _, C, S = dims
    c0, c1, width = block
    for c in range(c0, c1):
        mc, kc, bc = affine(stats, weight, bias, C, c, x)
        _fill(m, mc, c - c0, S, c1 - c0, width)
        _fill(k, kc, c - c0, S, c1 - c0, width)
        _fill(b, bc, c - c0, S, c1 - c0, width)


@jit
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


@jit
def settle_gradients(x, g, y, dims, block, m, s, q, stats, weight, bias, dweight, dbias, frozen, relu, c1, c0):
    """Parameter gradients of the block's channels from their columns' sums, and the column constants c1, c0 of dx."""
    N, C, S = dims
    first, end, width = block
    for c in range(first, end):
        j = c - first
        total_s = _gather(s, j, S, end - first, width)
        total_q = _gather(q, j, S, end - first, width)
        mc, k, b = affine(stats, weight, bias, C, c, x)
        if not math.isfinite(total_s + total_q):
            total_s, total_q = wide_gradient_sums(x, g, y, N, C, S, c, mc, k, b, relu)
        a1, a0 = gradients(stats, weight, dweight, dbias, C, c, N * S, mc, total_s, total_q, frozen)
        _fill(c1, a1, j, S, end - first, width)
        _fill(c0, a0, j, S, end - first, width)
