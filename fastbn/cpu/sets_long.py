# mypy: ignore-errors
"""Layer norm of a few long sets with an affine by element (see ``sets`` and ``sets_backward`` for the formulas).

A set is cut into chunks of CHUNK elements, so that several threads can work at one set, and is swept twice: its chunks
are summed, the sums settled, and the chunks written, last one first, so that what the cache still holds is read from
there. Floors: forward two reads and one write, backward four and one, and what the affine and its gradients take.

The affine is read where it lies and its gradients are added up where they will be returned, in the lanes' type, so for
``sets_backward.ROWS`` samples at most. ``sets`` has a copy of the one and float64 sums of the others; at a million
elements those pages took longer than all else. (1, 4000000): 1.9 ms instead of 3.4, gradients 5 instead of 55. Without
an affine one set after the other is as fast or faster, also where it does not fit in the cache (1.03-1.27).

Chunks are numbered by the shape alone and their sums (``part``, float64: u's and the products' by set and chunk) added
in order, so any number of threads gives the same bits.
"""

from __future__ import annotations

import math

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.sets import output, pivot, settle, sum_set, value
from fastbn.cpu.sets_backward import gradient, spread, weighed, wide_sums
from fastbn.cpu.sets_short import centred, centred_part, known, spread3
from fastbn.cpu.simd import (
    ask,
    base,
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

CHUNK = 1 << 14  # elements
RUN = 8192  # elements whose parameter gradients stay in the first cache while sample after sample adds to them
FAR = 4096  # elements ahead whose lines are asked for


def chunks_of(L: int) -> int:
    """Chunks of a set."""
    return (L + CHUNK - 1) // CHUNK


chunks = helper(chunks_of)


@helper
def _cut(y, at, k, L):
    """Where chunk k of the set at ``at`` begins to be written: on a line of y, but for the first one."""
    if k == 0:
        return at
    i = at + least(L, k * CHUNK)
    return least(at + L, i + head(y, i))


@part
def _written(y, number, sets, L):
    """Set of the chunk that is written as ``number``, the last one first, and the ends of it in y: (t, i, end)."""
    across = chunks(L)
    number = sets * across - 1 - number
    t, k = number // across, number % across
    return t, _cut(y, t * L, k, L), _cut(y, t * L, k + 1, L)


@jit
def moments(x, part, sets, L, claim):
    """Sums of d = x - pivot and d*d of every chunk."""
    x, part, claim, across = base(x), base(part), base(claim), chunks(L)
    number = fetch_add(claim, 0, 1)
    while number < sets * across:
        t, first_one = number // across, number % across * CHUNK
        n = least(CHUNK, L - first_one)
        s, q = sum_set(x, t * L + first_one, n, n, pivot(x, t * L, L))
        put(part, 2 * number, s)
        put(part, 2 * number + 1, q)
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)


@part
def _sums_of(part, t, across):
    """Sums of set t from those of its chunks."""
    s = q = 0.0
    for number in range(t * across, (t + 1) * across):
        s += get(part, 2 * number)
        q += get(part, 2 * number + 1)
    return s, q


@jit
def settle_moments(x, part, stats, sets, L, eps):
    """Statistics of all sets."""
    x, part, stats = base(x), base(part), base(stats)
    for t in range(sets):
        s, q = _sums_of(part, t, chunks(L))
        settle(x, stats, sets, L, L, t, pivot(x, t * L, L), s, q, eps)


@part
def _write_part(x, y, weight, bias, i, n, at, c):
    """Write n < W elements from i on."""
    store_n(y, i, output(load_n(x, i, n), c[0], c[1], c[2], load_n(weight, i - at, n), load_n(bias, i - at, n)), n)


@jit
def normalise(x, y, weight, bias, stats, sets, L, streamed, claim):
    """Outputs of every chunk, last one first."""
    x, y, stats, claim, across = base(x), base(y), base(stats), base(claim), chunks(L)
    weight, bias, W = like(x, base(weight)), like(x, base(bias)), lanes(x)
    number = fetch_add(claim, 0, 1)
    while number < sets * across:
        t, i, end = _written(y, number, sets, L)
        at, c = t * L, spread3(x, known(x, stats, sets, t))
        n = least(head(y, i), end - i)
        if n > 0:
            _write_part(x, y, weight, bias, i, n, at, c)
            i += n
        while i + 2 * W <= end:
            ask(x, i + FAR)
            ask(x, i + FAR + W)
            z0 = value(x, weight, bias, i, i - at, *c)
            z1 = value(x, weight, bias, i + W, i + W - at, *c)
            write(y, i, z0, streamed)
            write(y, i + W, z1, streamed)
            i += 2 * W
        if i + W <= end:
            write(y, i, value(x, weight, bias, i, i - at, *c), streamed)
            i += W
        if i < end:
            _write_part(x, y, weight, bias, i, end - i, at, c)
        fence()
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)


@part
def _add_step(x, g, weight, dweight, dbias, i, col, c, s, q, old, streamed):
    """One vector of ``_add``."""
    v, h = centred(x, g, i, c)
    u = weighed(h, load(weight, col))
    if old is not None:
        store(dweight, col, fma(h, v, load(dweight, col)))
        store(dbias, col, load(dbias, col) + h)
    else:
        write(dweight, col, h * v, streamed)
        write(dbias, col, h, streamed)
    return s + u, fma(u, v, q)


@part
def _add_edge(x, g, weight, dweight, dbias, i, col, n, c, old):
    """``_add`` of n < W elements, none of which is touched behind the arrays' ends: sums as vectors."""
    v, h = centred_part(x, g, i, n, c)
    u = first(weighed(h, load_n(weight, col, n)), n)
    if old is not None:
        store_n(dweight, col, load_n(dweight, col, n) + h * v, n)
        store_n(dbias, col, load_n(dbias, col, n) + h, n)
    else:
        store_n(dweight, col, h * v, n)
        store_n(dbias, col, h, n)
    return u, u * v


@helper
def _add(x, g, weight, dweight, dbias, at, col, n, c, other, old, streamed):
    """Sums of u and u*xhat of a set's n elements from column ``col`` on; adds to the parameter gradients there.

    Without ``old`` writes them, past the cache if ``streamed``. Asks for the lines ``other`` elements further on.
    """
    W, zero, i, end = lanes(x), splat(x, 0.0), at + col, at + col + n
    s0 = s1 = q0 = q1 = zero
    while i + 2 * W <= end:
        ask(x, i + other)
        ask(g, i + other)
        ask(x, i + other + W)
        ask(g, i + other + W)
        s0, q0 = _add_step(x, g, weight, dweight, dbias, i, i - at, c, s0, q0, old, streamed)
        s1, q1 = _add_step(x, g, weight, dweight, dbias, i + W, i - at + W, c, s1, q1, old, streamed)
        i += 2 * W
    while i + W <= end:
        s0, q0 = _add_step(x, g, weight, dweight, dbias, i, i - at, c, s0, q0, old, streamed)
        i += W
    if i < end:
        u, v = _add_edge(x, g, weight, dweight, dbias, i, i - at, end - i, c, old)
        s1, q1 = s1 + u, q1 + v
    return total(s0 + s1), total(q0 + q1)


@part
def _all_finite(x, p, lo, hi):
    """Tell whether p[lo:hi] are finite numbers."""
    W, i, zero = lanes(x), lo, splat(x, 0.0)
    s = zero
    while i + W <= hi:
        s = fma(load(p, i), zero, s)
        i += W
    if i < hi:
        s = fma(load_n(p, i, hi - i), zero, s)
    return total(s) == 0.0


@part
def _put_sums(part, k, s, q, more):
    """Write a chunk's sums, or add to them if ``more``."""
    if more:
        s, q = s + get(part, 2 * k), q + get(part, 2 * k + 1)
    put(part, 2 * k, s)
    put(part, 2 * k + 1, q)


@jit
def sums(x, g, weight, dweight, dbias, stats, part, fine, sets, L, claim):
    """Sums of u and u*xhat of every chunk, and the parameter gradients; ``fine``: by chunk, if those are finite.

    A chunk is taken of all sets, RUN elements of one after the other, the next one's lines asked for: 0.7 of the time.
    Of a single set the gradients are written past the cache, and known to be finite if its sums are.
    """
    x, g, stats, part, claim, across = base(x), base(g), base(stats), base(part), base(claim), chunks(L)
    weight, dweight, dbias, fine = like(x, base(weight)), like(x, base(dweight)), like(x, base(dbias)), base(fine)
    streamed = sets == 1 and head(dweight, 0) == 0 and head(dbias, 0) == 0
    k = fetch_add(claim, 0, 1)
    while k < across:
        stop, good = least(L, (k + 1) * CHUNK), True
        for col in range(k * CHUNK, stop, RUN):
            n = least(RUN, stop - col)
            for t in range(sets):
                c, number = spread3(x, known(x, stats, sets, t)), t * across + k
                other = L if t + 1 < sets else RUN - t * L
                if t == 0:
                    s, q = _add(x, g, weight, dweight, dbias, 0, col, n, c, other, None, streamed)
                else:
                    s, q = _add(x, g, weight, dweight, dbias, t * L, col, n, c, other, dweight, False)
                _put_sums(part, number, s, q, col > k * CHUNK)
                good = good and (sets > 1 or (math.isfinite(s) and math.isfinite(q)))
            if sets > 1:
                good = good and _all_finite(x, dweight, col, col + n) and _all_finite(x, dbias, col, col + n)
        put(fine, k, 1 if good else 0)
        fence()
        fetch_add(claim, 1, 1)
        k = fetch_add(claim, 0, 1)


@jit
def settle_sums(x, g, weight, stats, part, sets, L):
    """(c1, c0) of set t to part[2*t], from its sums; taken again in float64 where they are not finite."""
    x, g, weight, stats, part = base(x), base(g), base(weight), base(stats), base(part)
    for t in range(sets):
        s, q = _sums_of(part, t, chunks(L))
        if not (math.isfinite(s) and math.isfinite(q)):
            c = known(x, stats, sets, t)
            s, q = wide_sums(x, g, weight, t * L, L, 0, c)
        put(part, 2 * t, -q / L)
        put(part, 2 * t + 1, -s / L)


@part
def _write_gradient(x, g, dx, weight, i, n, at, c):
    """Write n < W elements from i on."""
    store_n(dx, i, gradient(load_n(x, i, n), load_n(g, i, n), c, load_n(weight, i - at, n)), n)


@jit
def gradients(x, g, dx, weight, stats, part, sets, L, streamed, claim):
    """Input gradients of every chunk, last one first."""
    x, g, dx, stats, part, claim, across = base(x), base(g), base(dx), base(stats), base(part), base(claim), chunks(L)
    weight, W = like(x, base(weight)), lanes(x)
    number = fetch_add(claim, 0, 1)
    while number < sets * across:
        t, i, end = _written(dx, number, sets, L)
        m, k, r = known(x, stats, sets, t)
        at, c = t * L, spread(x, (m, k, r, get(part, 2 * t), get(part, 2 * t + 1)))
        n = least(head(dx, i), end - i)
        if n > 0:
            _write_gradient(x, g, dx, weight, i, n, at, c)
            i += n
        while i + 2 * W <= end:
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
        fence()
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)
