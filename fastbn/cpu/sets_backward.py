# mypy: ignore-errors
"""Gradients of sets of contiguous values whose affine varies inside of a set (see ``sets`` for the shapes).

With u = weight*g and xhat = (x - m)*k + r: dx = k*(u + c1*xhat + c0), c1 = -mean(u*xhat), c0 = -mean(u) over the set
(Wu & He 2018, Ba et al. 2016); dweight = sum(g*xhat), dbias = sum(g) over the sets that share a weight.

While a set is summed, half of the next one's lines are asked for, while it is written the others, NEAR elements ahead
at least: memory is never idle. All of them while it is written, as it was before, takes 1.12 to 1.18 times as long
(Intel; group norm of (32, 64, 56, 56): 2.1 copies instead of 1.8). Rejected: x's while it is summed and g's while it is
written, 1.02-1.05.
Parameter gradients: see ``sets_parameters``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.core.extending import overload

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.ahead import ask_two
from fastbn.cpu.elements import by_element, place, room
from fastbn.cpu.finalize import trusted
from fastbn.cpu.sets import NEAR, RUN, across, constants, inner
from fastbn.cpu.sets_parameters import ROWS, put_away
from fastbn.cpu.simd import (
    base,
    blend,
    empty,
    fence,
    fetch_add,
    first,
    fma,
    get,
    head,
    lanes,
    like,
    load,
    load_n,
    load_or_splat,
    put,
    splat,
    store,
    store_n,
    total,
)
from fastbn.cpu.sweep import sum_run, write

# Elements of a set up to which lines of the next one are asked for while it is summed; those of longer ones would be
# gone again before they are wanted: (47, 131072) without an affine took 1.3 times as long.
APART = 1 << 16


@part
def weighed(g, w):
    """w*g; g where there is no weight."""
    if w is not None:
        return g * w
    return g


@part
def add_to(dw, i, v):
    """dw[i:i+W] += v; nothing for None."""
    if dw is not None:
        store(dw, i, load(dw, i) + v)


@part
def sum_step(x, g, w, dw, db, i, col, c, s, q):
    """One vector of ``sum_elements``."""
    v, h = fma(load(x, i) - c[0], c[1], c[2]), load(g, i)
    u = weighed(h, load_or_splat(x, w, col))
    add_to(dw, col, h * v)
    add_to(db, col, h)
    return s + u, fma(u, v, q)


@part
def sum_elements(x, g, w, dw, db, at, L, col, c, a):
    """Sums of u and u*xhat over a set; adds g*xhat and g to dw and db (None without an affine).

    Asks for lines from ``a`` on, one for two that are read.
    """
    W, zero = lanes(x), splat(x, 0.0)
    c = (splat(x, c[0]), splat(x, c[1]), splat(x, c[2]))
    s = q = 0.0
    for o in range(0, L, RUN):
        i, end = at + o, at + min(L, o + RUN)
        s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
        while i + 4 * W <= end:
            j = col + i - at
            ask_two(x, g, a)
            ask_two(x, g, a + W)
            a += 2 * W
            s0, q0 = sum_step(x, g, w, dw, db, i, j, c, s0, q0)
            s1, q1 = sum_step(x, g, w, dw, db, i + W, j + W, c, s1, q1)
            s2, q2 = sum_step(x, g, w, dw, db, i + 2 * W, j + 2 * W, c, s2, q2)
            s3, q3 = sum_step(x, g, w, dw, db, i + 3 * W, j + 3 * W, c, s3, q3)
            i += 4 * W
        while i + W <= end:
            ask_two(x, g, a)
            a += W
            s0, q0 = sum_step(x, g, w, dw, db, i, col + i - at, c, s0, q0)
            i += W
        if i < end:
            n, j = end - i, col + i - at
            v, h = first(fma(load_n(x, i, n) - c[0], c[1], c[2]), n), load_n(g, i, n)
            u = first(weighed(h, load_or_splat(x, w, j)), n)
            add_to(dw, j, h * v)
            add_to(db, j, h)
            s1, q1 = s1 + u, fma(u, v, q1)
        s, q = s + total((s0 + s1) + (s2 + s3)), q + total((q0 + q1) + (q2 + q3))
    return s, q


@helper
def early(at, L):
    """Where the lines begin that are asked for while the L elements at ``at`` are summed."""
    return at + max(L, NEAR) if L <= APART else at


@helper
def late(at, L):
    """The same for while they are written."""
    return at + max(L, NEAR) + (L // 2 if L <= APART else 0)


@part
def sum_runs(x, g, w, sums, sets, t, L, S, period, mean, c):
    """Sums of u and u*xhat over set t; writes the parameter gradients of its runs."""
    zero, s, q, runs = splat(x, 0.0), 0.0, 0.0, sets * (L // S)
    for j in range(L // S):
        run = t * (L // S) + j
        at, gs, gq = run * S, 0.0, 0.0
        for o in range(0, S, RUN):
            n, half = min(RUN, S - o), early(t * L, L) + (j * S + o) // 2
            a, b = sum_run(x, g, None, None, at + o, n, 0, c[0], 0.0, 0.0, None, zero, zero, half)
            gs, gq = gs + total(a), gq + total(b)
        gs, gq = trusted(gs, gq, x, g, None, 1, runs, S, run, c[0], 0.0, 0.0, None)
        dweight = (gq - (mean - c[0]) * gs) * c[1]
        put(sums, run, dweight)
        put(sums, runs + run, gs)
        weight = get(w, run % (period // S))
        s, q = s + weight * gs, q + weight * dweight
    return s, q


@helper
def wide_sums(x, g, w, at, L, col, c):
    """``sum_elements`` in float64, for sets whose products left float32's range."""
    s = q = 0.0
    for i in range(L):
        u = get(g, at + i)
        if w is not None:
            u *= get(w, col + i)
        s += u
        q += u * ((get(x, at + i) - c[0]) * c[1] + c[2])
    return s, q


def set_sums(x, g, w, sums, short, sets, t, L, S, period, mean, c):
    """Sums of u and u*xhat over set t; adds to, or writes, what its parameter gradients are made of."""
    raise NotImplementedError("in kernels only")


@overload(set_sums, jit_options={"forceinline": True})
def _set_sums(x, g, w, sums, short, sets, t, L, S, period, mean, c):
    if not isinstance(S, types.NoneType):
        return lambda x, g, w, sums, short, sets, t, L, S, period, mean, c: sum_runs(
            x, g, w, sums, sets, t, L, S, period, mean, c
        )
    plain = isinstance(w, types.NoneType)

    def of_elements(x, g, w, sums, short, sets, t, L, S, period, mean, c):
        at, col = t * L, t * L % period
        if plain:
            s, q = sum_elements(x, g, None, None, None, at, L, col, c, early(at, L))
        else:
            s, q = sum_elements(x, g, w, short, short + (period + lanes(x)), at, L, col, c, early(at, L))
        if not (math.isfinite(s) and math.isfinite(q)):
            s, q = wide_sums(x, g, w, at, L, col, c)
        return s, q

    return of_elements


@part
def gradient(v, h, c, w):
    """k*(w*h + c1*xhat + c0) with c = (m, k, r, c1, c0) as vectors and v = x."""
    xhat = fma(v - c[0], c[1], c[2])
    rest = fma(c[3], xhat, c[4])
    if w is not None:
        return fma(h, w, rest) * c[1]
    return (h + rest) * c[1]


@part
def spread(x, c):
    """The constants of a set as vectors."""
    return splat(x, c[0]), splat(x, c[1]), splat(x, c[2]), splat(x, c[3]), splat(x, c[4])


@part
def write_run(x, g, dx, w, i, end, col, c, a, streamed):
    """Write whole vectors from i on that end by ``end``; ask for lines from ``a`` on, one for two that are read."""
    W, c = lanes(x), spread(x, c)
    while i + 2 * W <= end:  # two are read before one is written, see ``sweep.normalise_run``
        ask_two(x, g, a)
        a += W
        z0 = gradient(load(x, i), load(g, i), c, load_or_splat(x, w, col))
        z1 = gradient(load(x, i + W), load(g, i + W), c, load_or_splat(x, w, col + W))
        write(dx, i, z0, streamed)
        write(dx, i + W, z1, streamed)
        i += 2 * W
        col += 2 * W
    if i + W <= end:
        ask_two(x, g, a)
        write(dx, i, gradient(load(x, i), load(g, i), c, load_or_splat(x, w, col)), streamed)
        i += W
    return i


@part
def write_seam(x, g, dx, i, n, p, c, w, streamed):
    """Write the vector whose first n lanes belong to the set with constants p, the others to that with c."""
    v = (
        blend(n, splat(x, p[0]), splat(x, c[0])), blend(n, splat(x, p[1]), splat(x, c[1])),
        blend(n, splat(x, p[2]), splat(x, c[2])), blend(n, splat(x, p[3]), splat(x, c[3])),
        blend(n, splat(x, p[4]), splat(x, c[4])),
    )  # fmt: skip
    write(dx, i, gradient(load(x, i), load(g, i), v, w), streamed)


@part
def begin_set(x, g, dx, weight, at, L, S, period, p, c, joined, streamed):
    """Write what lies before a set's first line, with the last lanes of the set before it if ``joined``."""
    n = min(head(dx, at), L) if lanes(x) <= L else 0
    if n > 0 and joined:
        before = lanes(x) - n
        w = across(x, weight, (at - L) % period + L - before, S, before, period)
        write_seam(x, g, dx, at - before, before, p, c, w, streamed)
    elif n > 0:  # a masked store of nothing costs 100 ns
        w = across(x, weight, at % period, S, n, period)
        store_n(dx, at, gradient(load_n(x, at, n), load_n(g, at, n), spread(x, c), w), n)
    return at + n


@part
def write_set(x, g, dx, weight, at, L, S, period, p, c, joined, followed, streamed, a):
    """Write a set in whole lines: the lanes behind its last one are left to the next set if it is ``followed``.

    Asks for lines from ``a`` on.

    With lines on seams written in two parts (65536, 100) took 3.7 times as long, and (65536, 64) 2.8 times where the
    array does not begin on a line.
    """
    W, col, length, v = lanes(x), at % period, L if S is None else S, spread(x, c)
    i = begin_set(x, g, dx, weight, at, L, S, period, p, c, joined, streamed)
    for run in range(0, L, length):
        end = at + run + length
        there = a + (i - at) // 2
        i = write_run(x, g, dx, inner(weight, col + run, S), i, end, col + i - at, c, there, streamed)
        n = end - i
        if n > 0 and not (followed and run + length == L):
            w = across(x, weight, col + (run if S is not None else L - n), S, n, period)
            if run + length < L:
                write(dx, i, gradient(load(x, i), load(g, i), v, w), streamed)
                i += W
            else:
                store_n(dx, i, gradient(load_n(x, i, n), load_n(g, i, n), v, w), n)


@jit
def backward(x, g, dx, weight, stats, sums, kind, sets, L, G, each, S, per, streamed, claim):
    """Gradients. Floor: two reads and one write.

    ``per``: samples of a block, as ``sums`` was made for.
    """
    x, g, dx, weight, stats, claim = base(x), base(g), base(dx), base(weight), base(stats), base(claim)
    period, half, sums = G * L, sums.size // 2, base(sums)
    singly = S is None and weight is not None
    scratch = np.zeros(2 * (period + lanes(x)) if singly else 1, kind.dtype)
    short = like(x, base(scratch))
    weights = empty(room(x, period) if singly else 0, kind)
    weight = by_element(x, weight, each, period, S, place(base(weights), dx, L))
    samples = sets // G
    lo = fetch_add(claim, 0, per)
    p = (0.0, 0.0, 0.0, 0.0, 0.0)  # constants of the set before
    while lo < samples:
        hi = min(lo + per, samples)
        for t in range(lo * G, hi * G):
            joined, followed = t > lo * G and lanes(x) <= L, t + 1 < hi * G and lanes(x) <= L
            mean, invstd = get(stats, t), get(stats, sets + t)
            c = constants(x, mean, invstd)
            s, q = set_sums(x, g, weight, sums, short, sets, t, L, S, period, mean, c)
            d = (c[0], c[1], c[2], -q / L, -s / L)
            a = late(t * L, L)
            write_set(x, g, dx, weight, t * L, L, S, period, p, d, joined, followed, streamed, a)
            p = d
            done = (t + 1) // G
            if singly and (t + 1) % G == 0 and ((done - lo) % ROWS == 0 or done == hi):
                put_away(short, sums, half, lo // per * (period // each), period, each)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size + weights.size  # keeps the scratch alive
