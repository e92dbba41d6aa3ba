# mypy: ignore-errors
"""Gradients of weight and bias of sets whose affine varies inside of a set (see ``sets_backward``).

They are added in an order that the shape alone decides, to ``sums``, float64 of (2, parts, channels). By run a part is
a sample, with one number a run. By element a part is a block of samples: ROWS at a time are added by element in the
lanes' type, then by channel in float64.
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.simd import (
    base,
    clear,
    first,
    get,
    lanes,
    least,
    load,
    load_n,
    put,
    splat,
    total,
    where_positive,
    widen_add,
)

ROWS = 64  # samples whose parameter gradients are added in the lanes' type


@part
def channel_sum(short, i, n):
    """Sum of n numbers in float64; a whole vector may be read of the last ones."""
    W, end, s = lanes(short), i + n, 0.0
    while i + W <= end:
        s += total(load(short, i))
        i += W
    if i < end:
        s += total(first(load(short, i), end - i))
    return s


@helper
def put_away(short, sums, half, at, period, each):
    """Add the sums of ``period`` elements to those of their channels from ``at`` and half + at on, and clear them."""
    W = lanes(short)
    for a, b in ((0, at), (period + W, half + at)):
        i = 0
        while each == 1 and i + W <= period:
            widen_add(sums, b + i, load(short, a + i))
            i += W
        for c in range(i, period // each):
            put(sums, b + c, get(sums, b + c) + channel_sum(short, a + c * each, each))
    clear(short, 2 * (period + W))


@part
def _count(v, least, most, one, found):
    """Add one in the lanes whose number is not within least and most, NaN for example."""
    return found + (where_positive(v - most, one) + where_positive(least - v, one))


@jit
def beyond(g, limit):
    """Tell whether a number is larger than ``limit`` either way, or none. Floor: one read."""
    n, g = g.size, base(g)
    W, i, low, high, one = lanes(g), 0, splat(g, -limit), splat(g, limit), splat(g, 1.0)
    a = b = splat(g, 0.0)
    while i + 2 * W <= n:
        a, b = _count(load(g, i), low, high, one, a), _count(load(g, i + W), low, high, one, b)
        i += 2 * W
    while i < n:
        a = _count(load_n(g, i, least(W, n - i)), low, high, one, a)
        i += W
    return total(a + b) != 0.0


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
