# mypy: ignore-errors
"""Gradients of sets of contiguous values whose affine varies inside of a set (see ``sets`` for the shapes).

With u = weight*g and xhat = (x - m)*k + r: dx = k*(u + c1*xhat + c0), c1 = -mean(u*xhat), c0 = -mean(u) over the set
(Wu & He 2018, Ba et al. 2016); dweight = sum(g*xhat), dbias = sum(g) over the sets that share a weight. While a set is
written the lines of the next one are asked for, NEAR elements ahead at least: (8192, 768) takes 2.2 copies instead of
2.5, as with 2048; with 4096 2.6.

Parameter gradients are added in an order that the shape alone decides. By element: ``sums`` is (blocks, 2, G*L); each
block of samples adds up its own, ROWS samples at a time in the lanes' type, then in float64. By run: ``sums`` is
(2, sets*L/S), one number a run.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.core.extending import overload

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.ahead import ahead
from fastbn.cpu.elements import by_element, place, room
from fastbn.cpu.finalize import trusted
from fastbn.cpu.sets import NEAR, RUN, across, constants, inner
from fastbn.cpu.simd import (
    ask,
    base,
    blend,
    clear,
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
    widen_add,
)
from fastbn.cpu.sweep import sum_run, write

ROWS = 64  # samples whose parameter gradients are added in the lanes' type


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
def sum_elements(x, g, w, dw, db, at, L, col, c):
    """Sums of u and u*xhat over a set; adds g*xhat and g to dw and db (None without an affine)."""
    W, zero = lanes(x), splat(x, 0.0)
    c = (splat(x, c[0]), splat(x, c[1]), splat(x, c[2]))
    s = q = 0.0
    for o in range(0, L, RUN):
        i, end = at + o, at + min(L, o + RUN)
        s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
        while i + 4 * W <= end:
            j = col + i - at
            s0, q0 = sum_step(x, g, w, dw, db, i, j, c, s0, q0)
            s1, q1 = sum_step(x, g, w, dw, db, i + W, j + W, c, s1, q1)
            s2, q2 = sum_step(x, g, w, dw, db, i + 2 * W, j + 2 * W, c, s2, q2)
            s3, q3 = sum_step(x, g, w, dw, db, i + 3 * W, j + 3 * W, c, s3, q3)
            i += 4 * W
        while i + W <= end:
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


@part
def sum_runs(x, g, w, sums, sets, t, L, S, period, mean, c):
    """Sums of u and u*xhat over set t; writes the parameter gradients of its runs."""
    zero, s, q, runs = splat(x, 0.0), 0.0, 0.0, sets * (L // S)
    for j in range(L // S):
        run = t * (L // S) + j
        at, gs, gq, far = run * S, 0.0, 0.0, ahead(S, S, True)
        for o in range(0, S, RUN):
            a, b = sum_run(x, g, None, None, at + o, min(RUN, S - o), far, c[0], 0.0, 0.0, None, zero, zero)
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
            s, q = sum_elements(x, g, None, None, None, at, L, col, c)
        else:
            s, q = sum_elements(x, g, w, short, short + (period + lanes(x)), at, L, col, c)
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
def write_run(x, g, dx, w, i, end, col, c, other, streamed):
    """Write whole vectors from i on that end by ``end``; ask for the lines that lie ``other`` elements ahead."""
    W, c = lanes(x), spread(x, c)
    while i + 2 * W <= end:  # two are read before one is written, see ``sweep.normalise_run``
        ask(x, i + other)
        ask(x, i + other + W)
        ask(g, i + other)
        ask(g, i + other + W)
        z0 = gradient(load(x, i), load(g, i), c, load_or_splat(x, w, col))
        z1 = gradient(load(x, i + W), load(g, i + W), c, load_or_splat(x, w, col + W))
        write(dx, i, z0, streamed)
        write(dx, i + W, z1, streamed)
        i += 2 * W
        col += 2 * W
    if i + W <= end:
        ask(x, i + other)
        ask(g, i + other)
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
def write_set(x, g, dx, weight, at, L, S, period, p, c, joined, followed, streamed):
    """Write a set in whole lines: the lanes behind its last one are left to the next set if it is ``followed``.

    With lines on seams written in two parts (65536, 100) took 3.7 times as long, and (65536, 64) 2.8 times where the
    array does not begin on a line.
    """
    W, col, length, v = lanes(x), at % period, L if S is None else S, spread(x, c)
    i = begin_set(x, g, dx, weight, at, L, S, period, p, c, joined, streamed)
    for run in range(0, L, length):
        end = at + run + length
        i = write_run(x, g, dx, inner(weight, col + run, S), i, end, col + i - at, c, max(L, NEAR), streamed)
        n = end - i
        if n > 0 and not (followed and run + length == L):
            w = across(x, weight, col + (run if S is not None else L - n), S, n, period)
            if run + length < L:
                write(dx, i, gradient(load(x, i), load(g, i), v, w), streamed)
                i += W
            else:
                store_n(dx, i, gradient(load_n(x, i, n), load_n(g, i, n), v, w), n)


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
def backward(x, g, dx, weight, stats, sums, kind, sets, L, G, each, S, per, streamed, claim):
    """Gradients. Floor: two reads and one write.

    ``per``: samples of a block, as ``sums`` was made for.
    """
    x, g, dx, weight, stats, claim = base(x), base(g), base(dx), base(weight), base(stats), base(claim)
    period, sums = G * L, base(sums)
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
            write_set(x, g, dx, weight, t * L, L, S, period, p, d, joined, followed, streamed)
            p = d
            done = (t + 1) // G
            if singly and (t + 1) % G == 0 and ((done - lo) % ROWS == 0 or done == hi):
                put_away(short, sums, lo // per, period)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size + weights.size  # keeps the scratch alive


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
