# mypy: ignore-errors
"""Gradients of layer norm of long sets: the two sweeps of ``sets_long``, whose floor is four reads and one write."""

from __future__ import annotations

import math

import numpy as np

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.ahead import ask_two
from fastbn.cpu.sets_backward import gradient, spread, sum_elements, weighed, wide_sums
from fastbn.cpu.sets_four import IN_A_ROW, centred, centred_part, known, known_four, spread3, sum_four
from fastbn.cpu.sets_long import CHUNK, before, chunks, cut, sums_of
from fastbn.cpu.sets_parameters import ROWS, put_away
from fastbn.cpu.simd import (
    aligned,
    base,
    clear,
    empty,
    fence,
    fetch_add,
    first,
    fma,
    get,
    head,
    lanes,
    least,
    like,
    load,
    load_n,
    put,
    splat,
    store,
    store_n,
    total,
)
from fastbn.cpu.sweep import write


@helper
def _behind(t, n, sets, L):
    """How far from a chunk of set t the one lies that is summed after it and n - 1 others."""
    return n * L if t + n < sets else CHUNK - t * L


@part
def _add_sums(part, number, found):
    """Add sums to those of chunk ``number``."""
    put(part, 2 * number, get(part, 2 * number) + found[0])
    put(part, 2 * number + 1, get(part, 2 * number + 1) + found[1])


@helper
def _sum_four(x, g, w, short, stats, part, sets, t, L, k, n):
    """``sum_four`` of n columns of chunk k in the sets t..t + 3."""
    c, step, across = known_four(x, stats, sets, t), IN_A_ROW * lanes(x), chunks(L)
    at, far, more = t * L + k * CHUNK, _behind(t, 4, sets, L), short + (CHUNK + lanes(x))
    for o in range(0, n, step):
        e0, e1, e2, e3 = sum_four(x, g, w, short, more, at, L, o, least(n, o + step), c, at, far)
        _add_sums(part, t * across + k, e0)
        _add_sums(part, (t + 1) * across + k, e1)
        _add_sums(part, (t + 2) * across + k, e2)
        _add_sums(part, (t + 3) * across + k, e3)


@helper
def _sum_one(x, g, w, short, stats, part, sets, t, L, k, n):
    """The same of set t."""
    at, more = t * L + k * CHUNK, short + (CHUNK + lanes(x))
    found = sum_elements(x, g, w, short, more, at, n, 0, known(x, stats, sets, t), at + _behind(t, 1, sets, L))
    _add_sums(part, t * chunks(L) + k, found)


@helper
def _padded(x, p, n, to):
    """The n elements at p where a whole vector may be read of the last ones: there, or copied to ``to``."""
    W = lanes(x)
    if n % W == 0:
        return p
    for j in range(0, n, W):
        store(to, j, load_n(p, j, least(W, n - j)))
    return to


@helper
def _sum_first(x, g, w, dweight, dbias, stats, part, sets, L, k, n, streamed):
    """The same of the first of a few sets, whose parameter gradients are written, not added."""
    W, c, i, at, far = lanes(x), spread3(x, known(x, stats, sets, 0)), 0, k * CHUNK, _behind(0, 1, sets, L)
    while i < n:
        s = q = splat(x, 0.0)
        stop = least(n, i + IN_A_ROW * W)
        while i + W <= stop:
            ask_two(x, g, at + i + far)
            v, h = centred(x, g, at + i, c)
            u = weighed(h, load(w, i))
            write(dweight, i, h * v, streamed)
            write(dbias, i, h, streamed)
            s, q, i = s + u, fma(u, v, q), i + W
        if i < stop:
            v, h = centred_part(x, g, at + i, n - i, c)
            u = first(weighed(h, load_n(w, i, n - i)), n - i)
            store_n(dweight, i, h * v, n - i)
            store_n(dbias, i, h, n - i)
            s, q, i = s + u, fma(u, v, q), n
        _add_sums(part, k, (total(s), total(q)))
    return math.isfinite(get(part, 2 * k)) and math.isfinite(get(part, 2 * k + 1))


@helper
def _sum_chunk(x, g, w, short, wide, stats, part, sets, L, k, n):
    """Sums of n columns of chunk k in all sets; ``wide`` has those of parameter gradients if sets are many."""
    t = 0
    if sets < 4:
        _sum_first(x, g, w, short, short + (CHUNK + lanes(x)), stats, part, sets, L, k, n, False)
        t = 1
    while t < sets:
        if t + 4 <= sets:
            _sum_four(x, g, w, short, stats, part, sets, t, L, k, n)
            t += 4
        else:
            _sum_one(x, g, w, short, stats, part, sets, t, L, k, n)
            t += 1
        if sets > ROWS and (t % ROWS == 0 or t == sets):
            put_away(short, wide, CHUNK, 0, CHUNK, 1)


@part
def _hand_over(x, p, d, n, streamed):
    """Move n sums from p to d and leave zeros; tells whether they are finite."""
    W, i, zero = lanes(x), 0, splat(x, 0.0)
    bad = zero
    while i + W <= n:
        v = load(p, i)
        bad = fma(v, zero, bad)
        write(d, i, v, streamed)
        store(p, i, zero)
        i += W
    if i < n:
        v = load_n(p, i, n - i)
        bad = fma(v, zero, bad)
        store_n(d, i, v, n - i)
        store(p, i, zero)
    return total(bad) == 0.0


@helper
def _give(x, short, wide, dweight, dbias, n, many, streamed):
    """Write n parameter gradients and clear their sums; tells whether they are finite."""
    more = short + (CHUNK + lanes(x))
    if many:
        for j in range(n):
            put(short, j, get(wide, j))
            put(more, j, get(wide, CHUNK + j))
        clear(wide, 2 * CHUNK)
    fine = _hand_over(x, short, dweight, n, streamed)
    return _hand_over(x, more, dbias, n, streamed) and fine


@jit
def sums(x, g, weight, dweight, dbias, stats, part, fine, kind, sets, L, streamed, claim):
    """Sums of u and u*xhat of every chunk, and the parameter gradients; ``fine``: by chunk, if those are finite."""
    x, g, stats, part, claim, across = base(x), base(g), base(stats), base(part), base(claim), chunks(L)
    weight, dweight, dbias, fine = like(x, base(weight)), like(x, base(dweight)), like(x, base(dbias)), base(fine)
    W, many, streamed = lanes(x), sets > ROWS, streamed and head(dweight, 0) == 0 and head(dbias, 0) == 0
    room = CHUNK + W if sets > 1 else 0
    scratch, wider = empty(3 * room + W, kind), np.zeros(2 * CHUNK if many else 0)
    short, wide = like(x, aligned(scratch)), base(wider)
    w = short + 2 * room
    clear(short, 2 * room)
    k = fetch_add(claim, 0, 1)
    while k < across:
        n = least(CHUNK, L - k * CHUNK)
        dw, db = dweight + k * CHUNK, dbias + k * CHUNK
        if sets == 1:
            good = _sum_first(x, g, weight + k * CHUNK, dw, db, stats, part, sets, L, k, n, streamed)
        else:
            _sum_chunk(x, g, _padded(x, weight + k * CHUNK, n, w), short, wide, stats, part, sets, L, k, n)
            good = _give(x, short, wide, dw, db, n, many, streamed)
        put(fine, k, 1 if good else 0)
        fence()
        fetch_add(claim, 1, 1)
        k = fetch_add(claim, 0, 1)
    return scratch.size + wider.size  # keeps them alive


@jit
def settle_sums(x, g, weight, stats, part, sets, L):
    """(c1, c0) of set t to part[2*t], from its sums; taken again in float64 where they are not finite."""
    x, g, weight, stats, part = base(x), base(g), base(weight), base(stats), base(part)
    for t in range(sets):
        s, q = sums_of(part, t, chunks(L))
        if not (math.isfinite(s) and math.isfinite(q)):
            c = known(x, stats, sets, t)
            s, q = wide_sums(x, g, weight, t * L, L, 0, c)
        put(part, 2 * t, -q / L)
        put(part, 2 * t + 1, -s / L)


@part
def _write_gradient(x, g, dx, weight, i, n, at, c):
    """Write n < W elements from i on."""
    store_n(dx, i, gradient(load_n(x, i, n), load_n(g, i, n), c, load_n(weight, i - at, n)), n)


@part
def _gradients(x, g, dx, weight, i, end, at, c, other, streamed):
    """Write the elements i..end of the set at ``at``; ask for the lines that lie ``other`` elements further on."""
    W, n = lanes(x), least(head(dx, i), end - i)
    if n > 0:
        _write_gradient(x, g, dx, weight, i, n, at, c)
        i += n
    while i + 2 * W <= end:
        ask_two(x, g, i + other)
        ask_two(x, g, i + other + W)
        z0 = gradient(load(x, i), load(g, i), c, load(weight, i - at))
        z1 = gradient(load(x, i + W), load(g, i + W), c, load(weight, i + W - at))
        write(dx, i, z0, streamed)
        write(dx, i + W, z1, streamed)
        i += 2 * W
    if i + W <= end:
        write(dx, i, gradient(load(x, i), load(g, i), c, load(weight, i - at)), streamed)
        i += W
    if i < end:
        _write_gradient(x, g, dx, weight, i, end - i, at, c)


@jit
def gradients(x, g, dx, weight, stats, part, sets, L, streamed, claim):
    """Input gradients of every chunk, last one first."""
    x, g, dx, stats, part, claim, across = base(x), base(g), base(dx), base(stats), base(part), base(claim), chunks(L)
    weight = like(x, base(weight))
    number = fetch_add(claim, 0, 1)
    while number < across:
        k = across - 1 - number
        for back in range(sets):
            t = sets - 1 - back
            m, invstd, r = known(x, stats, sets, t)
            at, c = t * L, spread(x, (m, invstd, r, get(part, 2 * t), get(part, 2 * t + 1)))
            other = before(t, sets, L)
            _gradients(x, g, dx, weight, cut(dx, at, k, L), cut(dx, at, k + 1, L), at, c, other, streamed)
        fence()
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)
