# mypy: ignore-errors
"""Gradients of weight and bias of sets whose affine varies inside of a set (see ``sets_backward``).

They are added in an order that the shape alone decides. By element: ``sums`` is (blocks, 2, G*L); each block of samples
adds up its own, ROWS samples at a time in the lanes' type, then in float64. By run: ``sums`` is (2, sets*L/S), one
number a run.
"""

from __future__ import annotations

import math

from fastbn.cpu._jit import jit, part
from fastbn.cpu.simd import base, clear, get, lanes, load, put, widen_add

ROWS = 64  # samples whose parameter gradients are added in the lanes' type


@part
def put_away(short, sums, block, period):
    """Add a block's parameter gradients to its float64 ones and clear them."""
    W = lanes(short)
    for half in range(2):
        a, b = half * (period + W), (2 * block + half) * period
        i = 0
        while i + W <= period:
            widen_add(sums, b + i, load(short, a + i))
            i += W
        for j in range(i, period):
            put(sums, b + j, get(sums, b + j) + get(short, a + j))
    clear(short, 2 * (period + W))


@jit
def merge(sums, dweight, dbias, each):
    """Add the blocks' parameter gradients by element, in order, to the first ones; those of channels, and if finite."""
    size, period = sums.size, dweight.size * each
    sums, fine = base(sums), True
    for at in range(2 * period, size, 2 * period):
        for j in range(2 * period):
            put(sums, j, get(sums, j) + get(sums, at + j))
    for c in range(dweight.size):
        s = q = 0.0
        for j in range(c * each, c * each + each):
            q += get(sums, j)
            s += get(sums, period + j)
        dweight[c], dbias[c] = q, s
        fine = fine and math.isfinite(q) and math.isfinite(s)
    return fine


@jit
def wide_parameters(x, g, stats, sums, sets, L, G):
    """Parameter gradients by element in float64, (2, G*L), where float32 sums were not finite."""
    x, g, stats, sums = base(x), base(g), base(stats), base(sums)
    for t in range(sets):
        for j in range(L):
            col, h = t % G * L + j, get(g, t * L + j)
            xhat = (get(x, t * L + j) - get(stats, t)) * get(stats, sets + t)
            put(sums, col, get(sums, col) + h * xhat)
            put(sums, G * L + col, get(sums, G * L + col) + h)
