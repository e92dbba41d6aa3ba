# mypy: ignore-errors
"""Constants of the channels-first gradients, from a block's sums; see ``planes_backward`` for the formulas."""

from __future__ import annotations

from fastbn.cpu._jit import helper, part
from fastbn.cpu.finalize import gradients, trusted
from fastbn.cpu.planes import constants, total_of
from fastbn.cpu.simd import get, lanes, put, store_n
from fastbn.cpu.sweep import gradient_part


@helper
def block_gradients(x, g, y, long, table, per, stats, weight, dweight, dbias, N, C, S, lo, hi, frozen, relu):
    """Parameter gradients of a block's channels from its sums; c1 and c0 to table[3*per + j] and table[4*per + j]."""
    W = lanes(x)
    for c in range(lo, hi):
        j = c - lo
        m, k, b = constants(table, per, j)
        s, q = total_of(long, 2 * j, W), total_of(long, 2 * j + 1, W)
        s, q = trusted(s, q, x, g, y, N, C, S, c, m, k, b, relu)
        c1, c0 = gradients(stats, weight, dweight, dbias, C, c, N * S, m, s, q, frozen)
        put(table, 3 * per + j, c1)
        put(table, 4 * per + j, c0)


@part
def gradient_constants(table, per, j):
    """(m, k, b, c1, c0) of the block's channel j."""
    m, k, b = constants(table, per, j)
    return m, k, b, get(table, 3 * per + j), get(table, 4 * per + j)


@part
def write_part(x, g, y, dx, dr, i, n, c, relu):
    """Write dx and dr of n < W elements, more than none: a masked store of nothing fetches the line."""
    z, u = gradient_part(x, g, y, i, n, c, relu)
    store_n(dx, i, z, n)
    store_n(dr, i, u, n)
