# mypy: ignore-errors
"""Layer norm, four sets at a time (see ``sets`` and ``sets_backward`` for the formulas and the arrays).

One set after the other, each waits for its own sums: 55 ns for 64 elements. Here the sums of four are taken together,
so the parameter gradients are fetched and stored once for all four, and then the four are written. While they are
summed half of the next four's lines are asked for, while they are written the others. Gradients take 0.8-0.9 of the
time up to 2048 elements, and less where what is fetched and stored is no longer in the first cache: (1525, 4096) 0.73,
(381, 16384) 0.65 (Intel). At 32768 the four and the next four are more than the second cache holds, 1.1.

Forward the square roots and divisions of four short sets overlap: 0.7-0.8 of the time; long ones are ``sets``'.
Rejected there: statistics of 64 sets an array a loop, as ``sets_of_channels`` takes them: 0.65 at 16 elements, 0.8 at
32 to 48, but from 64 on 1.07-1.2 where the tensor lies in no cache, as all are summed before one is written.
"""

from __future__ import annotations

import math

import numpy as np

from fastbn.cpu import tuning
from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.ahead import ask_two
from fastbn.cpu.elements import by_element, place, room
from fastbn.cpu.sets import block_sets, constants, output_part, settle, sum_set, value, write_seam
from fastbn.cpu.sets_backward import (
    add_to,
    early,
    late,
    sum_elements,
    weighed,
    wide_sums,
    write_set,
)
from fastbn.cpu.sets_parameters import ROWS, put_away
from fastbn.cpu.simd import (
    ask,
    base,
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
    load_or_splat,
    put,
    rounded,
    splat,
    store_n,
    totals,
)
from fastbn.cpu.sweep import write

FAR = 4096  # elements ahead whose lines are asked for
IN_A_ROW = 64  # numbers that are added in float32
SHORT = 400  # bytes of a set up to which four are taken at a time forward, and without an affine
SHORT_HALF = 512  # the same for half types forward: (131072, 256) takes 0.8 of the time, in float32 112 elements 1.2
# The same backward with an affine, half types counted as float32, as what is added up is: four, the next four and that
# lie in the second cache. Half of it where that has 1 MB, as AMD's; not measured there.
LONG = 1 << (16 if tuning.CORE_CACHE else 15)


@part
def spread3(x, c):
    """Constants of a set as vectors."""
    return splat(x, c[0]), splat(x, c[1]), splat(x, c[2])


@part
def centred(x, g, i, c):
    """Centred x and g of one vector, c = (m, k, r) as vectors."""
    return fma(load(x, i) - c[0], c[1], c[2]), load(g, i)


@part
def centred_part(x, g, i, n, c):
    """``centred`` of n < W elements."""
    return first(fma(load_n(x, i, n) - c[0], c[1], c[2]), n), load_n(g, i, n)


@part
def add_four(dw, db, i, a, b, c, d):
    """Add to dw and db what four sets, each a pair (xhat, g), have at column i."""
    add_to(dw, i, fma(a[1], a[0], b[1] * b[0]) + fma(c[1], c[0], d[1] * d[0]))
    add_to(db, i, (a[1] + b[1]) + (c[1] + d[1]))


@part
def ask_four_sets(x, g, i, L):
    """Ask for a line of each tensor in four sets."""
    ask_two(x, g, i)
    ask_two(x, g, i + L)
    ask_two(x, g, i + 2 * L)
    ask_two(x, g, i + 3 * L)


@part
def pairs(s0, s1, s2, s3, q0, q1, q2, q3):
    """(s, q) of four sets from their vectors."""
    found = totals(s0, s1, s2, s3, q0, q1, q2, q3)
    return (found[0], found[4]), (found[1], found[5]), (found[2], found[6]), (found[3], found[7])


@part
def sum_four(x, g, w, dw, db, at, L, col, stop, c, a, far):
    """``sum_elements`` of the columns col..stop of four sets that lie one behind the other: (s, q) of each.

    Asks for lines from ``a`` on, one for two that are read; or for all that lie ``far`` elements further on.
    """
    W, zero, i = lanes(x), splat(x, 0.0), col
    c0, c1, c2, c3 = spread3(x, c[0]), spread3(x, c[1]), spread3(x, c[2]), spread3(x, c[3])
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
    while i < stop:
        j, n, v = at + i, stop - i, load_or_splat(x, w, i)
        if far is not None:
            ask_four_sets(x, g, j + far, L)
        elif L >= 4 * W:
            ask_two(x, g, a + 2 * i)
            ask_two(x, g, a + 2 * i + W)
        if n >= W:
            e0, e1 = centred(x, g, j, c0), centred(x, g, j + L, c1)
            e2, e3 = centred(x, g, j + 2 * L, c2), centred(x, g, j + 3 * L, c3)
        else:
            e0, e1 = centred_part(x, g, j, n, c0), centred_part(x, g, j + L, n, c1)
            e2, e3 = centred_part(x, g, j + 2 * L, n, c2), centred_part(x, g, j + 3 * L, n, c3)
        add_four(dw, db, i, e0, e1, e2, e3)
        u0, u1, u2, u3 = weighed(e0[1], v), weighed(e1[1], v), weighed(e2[1], v), weighed(e3[1], v)
        s0, s1, s2, s3 = s0 + u0, s1 + u1, s2 + u2, s3 + u3
        q0, q1, q2, q3 = fma(u0, e0[0], q0), fma(u1, e1[0], q1), fma(u2, e2[0], q2), fma(u3, e3[0], q3)
        i += W
    return pairs(s0, s1, s2, s3, q0, q1, q2, q3)


@part
def known(x, stats, sets, t):
    """(m, k, r) of set t."""
    return constants(x, get(stats, t), get(stats, sets + t))


@part
def known_four(x, stats, sets, t):
    """``known`` of the sets t..t + 3."""
    return (
        known(x, stats, sets, t), known(x, stats, sets, t + 1),
        known(x, stats, sets, t + 2), known(x, stats, sets, t + 3),
    )  # fmt: skip


@part
def keep(table, k, c):
    """Write a set's constants to table[5*k]."""
    put(table, 5 * k, c[0])
    put(table, 5 * k + 1, c[1])
    put(table, 5 * k + 2, c[2])


@part
def kept(table, k):
    """What ``keep`` wrote."""
    return get(table, 5 * k), get(table, 5 * k + 1), get(table, 5 * k + 2)


@part
def note(x, g, w, table, k, at, L, c, found):
    """Write constants and means of a set, from its sums, to table[5*k]; sums that are not finite are taken again."""
    s, q = found
    if not (math.isfinite(s) and math.isfinite(q)):
        s, q = wide_sums(x, g, w, at, L, 0, c)
    keep(table, k, c)
    put(table, 5 * k + 3, -q / L)
    put(table, 5 * k + 4, -s / L)


@part
def noted(table, k):
    """What ``note`` wrote."""
    m, invstd, r = kept(table, k)
    return m, invstd, r, get(table, 5 * k + 3), get(table, 5 * k + 4)


@helper
def note_one(x, g, w, short, stats, sets, t, L, table):
    """Constants and means of set t."""
    c, at = known(x, stats, sets, t), t * L
    if w is None:
        found = sum_elements(x, g, None, None, None, at, L, 0, c, early(at, 4 * L))
    else:
        found = sum_elements(x, g, w, short, short + (L + lanes(x)), at, L, 0, c, early(at, 4 * L))
    note(x, g, w, table, 0, at, L, c, found)


@helper
def note_four(x, g, w, short, stats, sets, t, L, table):
    """Constants and means of the sets t..t + 3."""
    c, at, step = known_four(x, stats, sets, t), t * L, IN_A_ROW * lanes(x)
    a, s0, s1, s2, s3, q0, q1, q2, q3 = early(at, 4 * L), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for o in range(0, L, step):
        stop = least(L, o + step)
        if w is None:
            e0, e1, e2, e3 = sum_four(x, g, None, None, None, at, L, o, stop, c, a, None)
        else:
            e0, e1, e2, e3 = sum_four(x, g, w, short, short + (L + lanes(x)), at, L, o, stop, c, a, None)
        s0, s1, s2, s3 = s0 + e0[0], s1 + e1[0], s2 + e2[0], s3 + e3[0]
        q0, q1, q2, q3 = q0 + e0[1], q1 + e1[1], q2 + e2[1], q3 + e3[1]
    note(x, g, w, table, 0, at, L, c[0], (s0, q0))
    note(x, g, w, table, 1, at + L, L, c[1], (s1, q1))
    note(x, g, w, table, 2, at + 2 * L, L, c[2], (s2, q2))
    note(x, g, w, table, 3, at + 3 * L, L, c[3], (s3, q3))


@jit
def backward(x, g, dx, weight, stats, sums, kind, sets, L, each, per, streamed, claim):
    """As ``sets_backward.backward`` with G = 1 and weights by element, or none. Floor: two reads and one write."""
    notes, scratch = empty(20, stats), np.zeros(2 * (L + 32), kind.dtype)
    x, g, dx, weight, stats, claim = base(x), base(g), base(dx), base(weight), base(stats), base(claim)
    weights = empty(room(x, L), kind)
    weight = by_element(x, weight, each, L, None, place(base(weights), dx, L))
    table, short, half, sums = base(notes), like(x, base(scratch)), sums.size // 2, base(sums)
    whole, p = lanes(x) <= L, (0.0, 0.0, 0.0, 0.0, 0.0)  # p: constants of the set before
    lo = fetch_add(claim, 0, per)
    while lo < sets:
        t, end = lo, least(lo + per, sets)
        while t < end:
            count = 4 if t + 4 <= end else 1
            if count == 4:
                note_four(x, g, weight, short, stats, sets, t, L, table)
            else:
                note_one(x, g, weight, short, stats, sets, t, L, table)
            for k in range(count):
                d, joined, followed = noted(table, k), t + k > lo and whole, t + k + 1 < end and whole
                a = late(t * L, 4 * L) + k * L // 2
                write_set(x, g, dx, weight, (t + k) * L, L, None, L, p, d, joined, followed, streamed, a)
                p = d
            t += count
            if weight is not None and ((t - lo) % ROWS == 0 or t == end):
                put_away(short, sums, half, lo // per * (L // each), L, each)
        fence()
        fetch_add(claim, 1, end - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size + notes.size + weights.size  # keeps them alive


@part
def pivot(x, at, L):
    """A number of the set, exactly its value if it is constant."""
    return rounded(x, get(x, at + L // 2))


@part
def moments_of_four(x, at, L, a):
    """Sums of d = x - a[k] and of d*d over the sets at + k*L."""
    W, zero, i = lanes(x), splat(x, 0.0), 0
    a0, a1, a2, a3 = splat(x, a[0]), splat(x, a[1]), splat(x, a[2]), splat(x, a[3])
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
    while i < L:
        j, n = at + i, L - i
        for far in (0, L, 2 * L, 3 * L):
            ask(x, j + far + FAR)
        if n >= W:
            d0, d1 = load(x, j) - a0, load(x, j + L) - a1
            d2, d3 = load(x, j + 2 * L) - a2, load(x, j + 3 * L) - a3
        else:
            d0, d1 = first(load_n(x, j, n) - a0, n), first(load_n(x, j + L, n) - a1, n)
            d2, d3 = first(load_n(x, j + 2 * L, n) - a2, n), first(load_n(x, j + 3 * L, n) - a3, n)
        s0, s1, s2, s3 = s0 + d0, s1 + d1, s2 + d2, s3 + d3
        q0, q1, q2, q3 = fma(d0, d0, q0), fma(d1, d1, q1), fma(d2, d2, q2), fma(d3, d3, q3)
        i += W
    return pairs(s0, s1, s2, s3, q0, q1, q2, q3)


@helper
def settle_four(x, stats, sets, L, t, eps, table):
    """Statistics and constants of the sets t..t + 3."""
    at = t * L
    a = pivot(x, at, L), pivot(x, at + L, L), pivot(x, at + 2 * L, L), pivot(x, at + 3 * L, L)
    f0, f1, f2, f3 = moments_of_four(x, at, L, a)
    keep(table, 0, settle(x, stats, sets, L, L, t, a[0], f0[0], f0[1], eps))
    keep(table, 1, settle(x, stats, sets, L, L, t + 1, a[1], f1[0], f1[1], eps))
    keep(table, 2, settle(x, stats, sets, L, L, t + 2, a[2], f2[0], f2[1], eps))
    keep(table, 3, settle(x, stats, sets, L, L, t + 3, a[3], f3[0], f3[1], eps))


@helper
def settle_one(x, stats, sets, L, t, eps, table):
    """Statistics and constants of set t."""
    a = pivot(x, t * L, L)
    s, q = sum_set(x, t * L, L, L, a)
    keep(table, 0, settle(x, stats, sets, L, L, t, a, s, q, eps))


@part
def normalise_set(x, y, w, b, at, L, p, c, joined, followed, streamed):
    """Write a set in whole lines, as ``sets_backward.write_set``."""
    W, i, (m, k, r) = lanes(x), at, spread3(x, c)
    n = least(head(y, at), L) if W <= L else 0
    if n > 0:
        if joined:
            col = L - (W - n)
            weight, bias = load_or_splat(x, w, col), load_or_splat(x, b, col)
            write_seam(x, y, at - (W - n), W - n, p, c, weight, bias, streamed)
        else:
            store_n(y, at, output_part(x, at, n, c, load_or_splat(x, w, 0), load_or_splat(x, b, 0)), n)
        i += n
    while i + 2 * W <= at + L:
        z0, z1 = value(x, w, b, i, i - at, m, k, r), value(x, w, b, i + W, i + W - at, m, k, r)
        write(y, i, z0, streamed)
        write(y, i + W, z1, streamed)
        i += 2 * W
    if i + W <= at + L:
        write(y, i, value(x, w, b, i, i - at, m, k, r), streamed)
        i += W
    n = at + L - i
    if n > 0 and not followed:
        store_n(y, i, output_part(x, i, n, c, load_or_splat(x, w, L - n), load_or_splat(x, b, L - n)), n)


@jit
def train(x, y, weight, bias, stats, kind, sets, L, each, eps, streamed, claim):
    """As ``sets.train`` with G = 1 and weights by element, or none. Floor: one read and one write."""
    notes = empty(20, stats)
    x, y, weight, bias, stats, claim = base(x), base(y), base(weight), base(bias), base(stats), base(claim)
    table, per, whole, p = base(notes), block_sets(sets, L), lanes(x) <= L, (0.0, 0.0, 0.0)
    scratch = empty(2 * room(x, L), kind)
    weight = by_element(x, weight, each, L, None, place(base(scratch), y, L))
    bias = by_element(x, bias, each, L, None, place(base(scratch) + room(x, L), y, L))
    lo = fetch_add(claim, 0, per)
    while lo < sets:
        t, end = lo, least(lo + per, sets)
        while t < end:
            count = 4 if t + 4 <= end else 1
            if count == 4:
                settle_four(x, stats, sets, L, t, eps, table)
            else:
                settle_one(x, stats, sets, L, t, eps, table)
            for k in range(count):
                c, joined, followed = kept(table, k), t + k > lo and whole, t + k + 1 < end and whole
                normalise_set(x, y, weight, bias, (t + k) * L, L, p, c, joined, followed, streamed)
                p = c
            t += count
        fence()
        fetch_add(claim, 1, end - lo)
        lo = fetch_add(claim, 0, per)
    return notes.size + scratch.size
