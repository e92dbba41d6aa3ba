# mypy: ignore-errors
"""Sums of many short sets at a time, for ``sets_of_channels``.

One after the other, each set waits for its own sums, its root and its divisions. Here the sums of four are taken
together, and what follows from them is done for all of a batch, an array a loop.
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, part
from fastbn.cpu.finalize import invstds, moments_of
from fastbn.cpu.simd import (
    ask,
    first,
    fma,
    get,
    lanes,
    load,
    load_n,
    most,
    put,
    rounded,
    splat,
    total,
    totals,
)
from fastbn.cpu.sweep import sum_run

BATCH = 64  # sets of a batch
FAR = 4096  # elements ahead, at least, whose lines are asked for


@part
def _term(x, g, i, m):
    """First factor of the sums and x - m, see ``sweep.term``."""
    v = load(x, i) - m
    return v if g is None else load(g, i), v


@part
def _term_part(x, g, i, n, m):
    """``_term`` of n < W elements."""
    v = first(load_n(x, i, n) - m, n)
    return v if g is None else load_n(g, i, n), v


@part
def _sum_four(x, g, at, L, table, j, s, q, far):
    """Sums of u and u*(x - m) of four sets, the first of which begins at ``at``, to s[j:j+4] and q[j:j+4]."""
    W, zero, i = lanes(x), splat(x, 0.0), 0
    m0, m1 = splat(x, get(table, j)), splat(x, get(table, j + 1))
    m2, m3 = splat(x, get(table, j + 2)), splat(x, get(table, j + 3))
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
    while i < L:
        o, n = at + i, L - i
        for below in (0, L, 2 * L, 3 * L):
            ask(x if g is None else g, o + below + far)
        if n >= W:
            (u0, v0), (u1, v1) = _term(x, g, o, m0), _term(x, g, o + L, m1)
            (u2, v2), (u3, v3) = _term(x, g, o + 2 * L, m2), _term(x, g, o + 3 * L, m3)
        else:
            (u0, v0), (u1, v1) = _term_part(x, g, o, n, m0), _term_part(x, g, o + L, n, m1)
            (u2, v2), (u3, v3) = _term_part(x, g, o + 2 * L, n, m2), _term_part(x, g, o + 3 * L, n, m3)
        s0, s1, s2, s3 = s0 + u0, s1 + u1, s2 + u2, s3 + u3
        q0, q1, q2, q3 = fma(u0, v0, q0), fma(u1, v1, q1), fma(u2, v2, q2), fma(u3, v3, q3)
        i += W
    found = totals(s0, s1, s2, s3, q0, q1, q2, q3)
    for k in range(4):
        put(s, j + k, found[k])
        put(q, j + k, found[4 + k])


@helper
def sums(x, g, t, L, count, table, s, q):
    """Sums of the sets t..t + count - 1, about table[j], to s[j] and q[j].

    Asks for the next batch's lines of g, or without g of x.
    """
    zero, j, far = splat(x, 0.0), 0, most(FAR, count * L)
    while j + 4 <= count:
        _sum_four(x, g, (t + j) * L, L, table, j, s, q, far)
        j += 4
    while j < count:
        a, b = sum_run(x, g, None, None, (t + j) * L, L, 0, get(table, j), 0.0, 0.0, None, zero, zero)
        put(s, j, total(a))
        put(q, j, total(b))
        j += 1


@helper
def moments(x, t, L, count, table, s, q, stats, sets, eps):
    """Statistics of the sets t..t + count - 1; ``table``, s and q have room for as many numbers."""
    for j in range(count):
        put(table, j, rounded(x, get(x, (t + j) * L + L // 2)))
    sums(x, None, t, L, count, table, s, q)
    moments_of(x, 1, sets, L, t, t + count, table, 1, s, q, stats, eps, True)
    invstds(stats, sets, t, t + count, eps)
