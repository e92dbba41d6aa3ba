# mypy: ignore-errors
"""Instance norm of short sets, each one channel of one sample: batch norm of (1, sets, L), BATCH sets at a time.

One after the other, each set waits for its own sums, its root and its divisions. Here the sums of four are taken
together, and what follows from them for all of a batch, an array a loop. (32, 512, 7, 7) takes 0.5 of the time that the
kernels of planes take, its gradients 0.55; from about 200 elements on ``sets`` is faster, which sums the next set while
it writes one. Rejected: asking for the next batch's lines while one is written, forward: nothing gained.
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.finalize import finite_sums, gradients_of, invstds, moments_of
from fastbn.cpu.planes import tabulate, write_runs
from fastbn.cpu.planes_backward import gradient_row
from fastbn.cpu.sets import block_sets
from fastbn.cpu.simd import (
    ask,
    base,
    empty,
    fence,
    fetch_add,
    first,
    fma,
    get,
    lanes,
    least,
    load,
    load_n,
    put,
    put_totals,
    rounded,
    splat,
    total,
)
from fastbn.cpu.sweep import sum_run

BATCH = 64  # sets whose statistics are worked out together
LONG = 128  # elements of a set from which others do it


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
def _sum_four(x, g, at, L, table, j, s, q, a):
    """Sums of u and u*(x - m) of four sets, the first of which begins at ``at``, to s[j:j+4] and q[j:j+4].

    Asks for lines from ``a`` on, one for two that are read.
    """
    W, zero, i = lanes(x), splat(x, 0.0), 0
    m0, m1 = splat(x, get(table, j)), splat(x, get(table, j + 1))
    m2, m3 = splat(x, get(table, j + 2)), splat(x, get(table, j + 3))
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
    while i < L:
        o, n = at + i, L - i
        ask(x, a + 2 * i)
        ask(x, a + 2 * i + W)
        if g is not None:
            ask(g, a + 2 * i)
            ask(g, a + 2 * i + W)
        if n >= W:
            (u0, v0), (u1, v1) = _term(x, g, o, m0), _term(x, g, o + L, m1)
            (u2, v2), (u3, v3) = _term(x, g, o + 2 * L, m2), _term(x, g, o + 3 * L, m3)
        else:
            (u0, v0), (u1, v1) = _term_part(x, g, o, n, m0), _term_part(x, g, o + L, n, m1)
            (u2, v2), (u3, v3) = _term_part(x, g, o + 2 * L, n, m2), _term_part(x, g, o + 3 * L, n, m3)
        s0, s1, s2, s3 = s0 + u0, s1 + u1, s2 + u2, s3 + u3
        q0, q1, q2, q3 = fma(u0, v0, q0), fma(u1, v1, q1), fma(u2, v2, q2), fma(u3, v3, q3)
        i += W
    put_totals(s, q, j, s0, s1, s2, s3, q0, q1, q2, q3)


@helper
def _sums(x, g, t, L, count, table, s, q, ahead):
    """Sums of the sets t..t + count - 1, about table[j]; asks for half of the lines of as many behind them."""
    zero, j, behind = splat(x, 0.0), 0, (t + count) * L if ahead else t * L
    while j + 4 <= count:
        _sum_four(x, g, (t + j) * L, L, table, j, s, q, behind + j * L // 2)
        j += 4
    while j < count:
        a, b = sum_run(x, g, None, None, (t + j) * L, L, 0, get(table, j), 0.0, 0.0, None, zero, zero)
        put(s, j, total(a))
        put(q, j, total(b))
        j += 1


@part
def _count(t, end, G):
    """Sets of a batch: channels of one sample."""
    return least(least(BATCH, end - t), G - t % G)


@jit
def train(x, y, weight, bias, stats, kind, sets, L, G, each, S, eps, streamed, claim):
    """As ``sets.train`` for sets of one channel, L = each = S. Floor: one read and one write."""
    sums, constants = empty(2 * BATCH, stats), empty(3 * BATCH, kind)
    x, y, weight, bias, stats, claim = base(x), base(y), base(weight), base(bias), base(stats), base(claim)
    s, table, per = base(sums), base(constants), block_sets(sets, L)
    q, lo = s + BATCH, fetch_add(claim, 0, per)
    while lo < sets:
        t, end = lo, least(lo + per, sets)
        while t < end:
            count, here = _count(t, end, G), t % G - t  # weight of set t: number ``here`` + t
            for j in range(count):
                put(table, j, rounded(x, get(x, (t + j) * L + L // 2)))
            _sums(x, None, t, L, count, table, s, q, t + 2 * count <= end)
            moments_of(x, 1, sets, L, t, t + count, table, 1, s, q, stats, eps, True)
            invstds(stats, sets, t, t + count, eps)
            tabulate(x, stats, weight + here, bias + here, table, BATCH, sets, t, t + count)
            write_runs(x, None, y, table, BATCH, 0, t, t + count, L, None, streamed)
            t += count
        fence()
        fetch_add(claim, 1, end - lo)
        lo = fetch_add(claim, 0, per)
    return sums.size + constants.size  # keeps them alive


@jit
def backward(x, g, dx, weight, stats, parts, kind, sets, L, G, each, S, per, streamed, claim):
    """As ``sets_backward.backward``, with parameter gradients of every set. Floor: two reads and one write."""
    sums, constants = empty(2 * BATCH, stats), empty(5 * BATCH, kind)
    x, g, dx, weight, stats, claim = base(x), base(g), base(dx), base(weight), base(stats), base(claim)
    s, table, parts, samples = base(sums), base(constants), base(parts), sets // G
    q, lo = s + BATCH, fetch_add(claim, 0, per)
    while lo < samples:
        hi = least(lo + per, samples)
        t, end = lo * G, hi * G
        while t < end:
            count = _count(t, end, G)
            w = weight + (t % G - t)
            tabulate(x, stats, w, w, table, BATCH, sets, t, t + count)
            _sums(x, g, t, L, count, table, s, q, t + 2 * count <= end)
            finite_sums(x, g, None, 1, sets, L, t, count, s, q, stats, w, w, None, True)
            gradients_of(x, stats, parts, parts + sets, sets, t, count, L, s, q, False)
            for j in range(count):
                put(table, 3 * BATCH + j, get(q, j))
            for j in range(count):
                put(table, 4 * BATCH + j, get(s, j))
            gradient_row(x, g, None, dx, None, table, BATCH, 0, sets, L, t, t + count, t + count, None, streamed)
            t += count
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return sums.size + constants.size
