# mypy: ignore-errors
"""Sets of contiguous values normalised by their own statistics, with an affine that varies inside of a set: forward.

Layer norm: an affine per element. Group norm: an affine per run of S elements, one channel's. While a set is written
from the cache the next one is read and summed, and lines further ahead are asked for, so that a set is read from
memory once and written once.

Set number t holds the L elements from t*L on and belongs to group t % G; ``stats`` is float64 of 3*sets: means,
invstds, biased variances. ``weight`` and ``bias`` are both None, or

- by element (``S`` None): one number for ``each`` elements, G*L/each, given to every one of them in scratch memory;
- by run: one number per channel, G*L/S; S is at least W.

``kind`` is an empty array of the lanes' type.

y = ((x - m)*k + r)*weight + bias with m the mean in the lanes' type, k = invstd and r = (m - mean)*k, the mean's
rounding remainder. Weight times k was not merged into one vector: that is one more row to write for each set.

Measured, (8192, 768) float32 with affine, in streaming copies: reading ahead as far as here 0.9-1.05; by what the CPU
guesses itself 1.2-1.4; two sets ahead instead of one 1.05; one set summed, then written, not interleaved 2.0. Sets of
4096 and more take 1.4 (Intel), as x comes from the second cache twice. Rejected there: 2048 columns of four sets side
by side, so that their affine comes from it once, 0.97-1.05 (below 4096 1.05-1.1).
"""

from __future__ import annotations

import math

from numba import types
from numba.core.extending import overload

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.ahead import ask_four
from fastbn.cpu.elements import by_element, place, room
from fastbn.cpu.finalize import near, wide_sums
from fastbn.cpu.simd import (
    ask,
    base,
    blend,
    empty,
    fence,
    fetch_add,
    fma,
    get,
    head,
    lanes,
    load,
    load_n,
    load_or_splat,
    prefetch,
    put,
    rounded,
    splat,
    store_n,
    total,
)
from fastbn.cpu.sweep import sum_part, sum_run, write

RUN = 4096  # elements that are summed in the lanes' type
BLOCK = (1 << 16, 1 << 18)  # elements of a block: a sixteenth of all within these
NEAR, CACHE = 1024, 10240  # elements asked for ahead: what two sets and an affine leave of CACHE, NEAR to RUN, into the
# second cache, and NEAR of them into the first: (8192, 768) takes 1.05 copies, 1.4-1.6 without the second cache


@helper
def block_sets(sets, L):
    """Sets of a block, from the shape alone."""
    return max(1, min(BLOCK[1], max(BLOCK[0], sets * L // 16)) // L)


@helper
def reach(L):
    """How many elements ahead lines are asked for."""
    return min(RUN, max(NEAR, CACHE - 3 * L))


@part
def pivot(x, at, L):
    """A number near the set's mean, and exactly its value if it is constant."""
    W = lanes(x)
    if L < W:
        return rounded(x, get(x, at))
    return rounded(x, total(load(x, at)) / (2 * W) + total(load(x, at + L - W)) / (2 * W))


@part
def sum_set(x, at, L, S, start):
    """Sums of d = x - start and d*d over a set, run by run as in ``write_and_sum_set``."""
    zero = splat(x, 0.0)
    a, b, count, s, q = zero, zero, 0, 0.0, 0.0
    for run in range(at, at + L, S):
        for i in range(run, run + S, RUN):
            n = min(RUN, run + S - i)
            a, b = sum_run(x, None, None, None, i, n, 0, start, 0.0, 0.0, None, a, b)
            count += n
            if count >= RUN:
                s, q, a, b, count = s + total(a), q + total(b), zero, zero, 0
    return s + total(a), q + total(b)


@helper
def _sum_again(x, sets, L, S, t, start, s, eps):
    """Statistics of set t whose first pivot was far off, or whose squares left float32's range."""
    mean = start + s / L
    if math.isfinite(mean):
        start = rounded(x, mean)
        s, q = sum_set(x, t * L, L, S, start)
        mean, var, fine = near(start, s, q, L, eps)
        if fine:
            return mean, var
    return wide_sums(x, 1, sets, L, t)


@part
def constants(x, mean, invstd):
    """(m, k, r) of xhat = (x - m)*k + r."""
    m = rounded(x, mean)
    return m, invstd, (m - mean) * invstd


@part
def settle(x, stats, sets, L, S, t, start, s, q, eps):
    """Statistics of set t from its sums about ``start``; returns its constants."""
    mean, var, fine = near(start, s, q, L, eps)
    if not fine:
        mean, var = _sum_again(x, sets, L, S, t, start, s, eps)
    invstd = 1.0 / math.sqrt(var + eps)
    put(stats, t, mean)
    put(stats, sets + t, invstd)
    put(stats, 2 * sets + t, var)
    return constants(x, mean, invstd)


@part
def output(v, m, k, r, w, b):
    """((v - m)*k + r)*w + b; w and b may both be None."""
    z = fma(v - m, k, r)
    if w is not None:
        z = fma(z, w, b)
    return z


@part
def value(x, w, b, i, col, m, k, r):
    """``output`` of the vector at i, whose weight, an array or a number, lies at ``col``."""
    return output(load(x, i), m, k, r, load_or_splat(x, w, col), load_or_splat(x, b, col))


@part
def output_part(x, i, n, c, w, b):
    """``output`` of n < W elements from i on; w and b as vectors."""
    return output(load_n(x, i, n), splat(x, c[0]), splat(x, c[1]), splat(x, c[2]), w, b)


@part
def write_seam(x, y, i, n, c, d, w, b, streamed):
    """Write the vector whose first n lanes belong to the set with constants c, the others to that with d."""
    m, k = blend(n, splat(x, c[0]), splat(x, d[0])), blend(n, splat(x, c[1]), splat(x, d[1]))
    write(y, i, output(load(x, i), m, k, blend(n, splat(x, c[2]), splat(x, d[2])), w, b), streamed)


@part
def write_and_sum(x, y, w, b, i, end, col, c, streamed, far, at, n, start, s, q):
    """Write the whole vectors from i on that end by ``end``; add n elements from ``at`` on to the vectors s and q.

    ``col``: where the weight of element i lies, for weights by element. Sums are added as in ``sweep.sum_run``. Every
    line is asked for, where sets begin inside of a line too: (65536, 128) took 1.7 times as long with a few left out.
    Four are read before one is written, see ``sweep.normalise_run``.
    """
    W, stop = lanes(x), at + n
    m, k, r, start, zero = splat(x, c[0]), splat(x, c[1]), splat(x, c[2]), splat(x, start), splat(x, 0.0)
    s1 = s2 = s3 = q1 = q2 = q3 = zero
    while at + 4 * W <= stop and i + 4 * W <= end:
        ask_four(x, at + far)
        for o in (0, W, 2 * W, 3 * W):
            prefetch(x, at + NEAR + o)
        v0, v1 = load(x, at) - start, load(x, at + W) - start
        v2, v3 = load(x, at + 2 * W) - start, load(x, at + 3 * W) - start
        s, s1, s2, s3 = s + v0, s1 + v1, s2 + v2, s3 + v3
        q, q1, q2, q3 = fma(v0, v0, q), fma(v1, v1, q1), fma(v2, v2, q2), fma(v3, v3, q3)
        z0, z1 = value(x, w, b, i, col, m, k, r), value(x, w, b, i + W, col + W, m, k, r)
        z2, z3 = value(x, w, b, i + 2 * W, col + 2 * W, m, k, r), value(x, w, b, i + 3 * W, col + 3 * W, m, k, r)
        write(y, i, z0, streamed)
        write(y, i + W, z1, streamed)
        write(y, i + 2 * W, z2, streamed)
        write(y, i + 3 * W, z3, streamed)
        i += 4 * W
        at += 4 * W
        col += 4 * W
    while i + W <= end:
        write(y, i, value(x, w, b, i, col, m, k, r), streamed)
        i += W
        col += W
    while at + 4 * W <= stop:
        ask_four(x, at + far)
        for o in (0, W, 2 * W, 3 * W):
            prefetch(x, at + NEAR + o)
        v0, v1 = load(x, at) - start, load(x, at + W) - start
        v2, v3 = load(x, at + 2 * W) - start, load(x, at + 3 * W) - start
        s, s1, s2, s3 = s + v0, s1 + v1, s2 + v2, s3 + v3
        q, q1, q2, q3 = fma(v0, v0, q), fma(v1, v1, q1), fma(v2, v2, q2), fma(v3, v3, q3)
        at += 4 * W
    while at + W <= stop:
        ask(x, at + far)
        prefetch(x, at + NEAR)
        v0 = load(x, at) - start
        s, q = s + v0, fma(v0, v0, q)
        at += W
    if at < stop:
        s1, q1 = sum_part(x, None, None, at, stop - at, start, start, start, None, s1, q1)
    return i, (s + s1) + (s2 + s3), (q + q1) + (q2 + q3)


def inner(w, col, S):
    """What ``write_and_sum`` takes as the weight of the run at column ``col``: the array or the channel's number."""
    raise NotImplementedError("in kernels only")


@overload(inner)
def _inner(w, col, S):  # not "if S is None": its two sides have no type in common
    if isinstance(S, types.NoneType):
        return lambda w, col, S: w
    return lambda w, col, S: get(w, col // S)


def across(x, w, col, S, n, period):
    """Vector of the weights from column ``col`` on, n of them the channel's, the others the next one's."""
    raise NotImplementedError("in kernels only")


@overload(across, jit_options={"forceinline": True})
def _across(x, w, col, S, n, period):
    if isinstance(S, types.NoneType):
        return lambda x, w, col, S, n, period: load_or_splat(x, w, col)

    def by_run(x, w, col, S, n, period):
        c = col // S
        return blend(n, splat(x, get(w, c)), splat(x, get(w, (c + 1) % (period // S))))

    return by_run


@part
def begin(x, y, weight, bias, at, L, S, col, c, period):
    """Write the elements of a set in front of the first whole line; returns where that begins."""
    n = min(head(y, at), L) if lanes(x) <= L else 0
    if n > 0:  # a masked store of nothing costs 100 ns
        w, b = across(x, weight, col, S, n, period), across(x, bias, col, S, n, period)
        store_n(y, at, output_part(x, at, n, c, w, b), n)
    return at + n


@part
def finish(x, y, weight, bias, i, end, col, S, c, d, together, period, streamed):
    """Write the last lanes of a set, with the first ones of the next set if it follows; returns where that ends."""
    n = end - i
    if n > 0:
        w, b = across(x, weight, col - n, S, n, period), across(x, bias, col - n, S, n, period)
        if together:
            write_seam(x, y, i, n, c, d, w, b, streamed)
            return i + lanes(x)
        store_n(y, i, output_part(x, i, n, c, w, b), n)
    return i


@part
def write_and_sum_set(x, y, weight, bias, i, at, col, c, streamed, far, other, L, S, start, ahead, period):
    """Write the set at ``at`` from i on up to its last whole vector; return sums of the one at ``other``, if ahead."""
    W, length, zero = lanes(x), L if S is None else S, splat(x, 0.0)
    a, b, count, s, q = zero, zero, 0, 0.0, 0.0
    for run in range(0, L, length):
        w, v = inner(weight, col + run, S), inner(bias, col + run, S)
        for o in range(run, run + length, RUN):
            n = min(RUN, run + length - o)
            m = n if ahead else 0
            i, a, b = write_and_sum(
                x, y, w, v, i, at + o + n, col + i - at, c, streamed, far, other + o, m, start, a, b
            )
            count += n
            if count >= RUN:
                s, q, a, b, count = s + total(a), q + total(b), zero, zero, 0
        n = at + run + length - i
        if S is not None and n > 0 and run + length < L:
            ws, vs = across(x, weight, col + run, S, n, period), across(x, bias, col + run, S, n, period)
            write_seam(x, y, i, n, c, c, ws, vs, streamed)
            i += W
    return i, s + total(a), q + total(b)


@jit
def train(x, y, weight, bias, stats, kind, sets, L, G, each, S, eps, streamed, claim):
    """Normalise all sets. Floor: one read and one write."""
    x, y, weight, bias, stats, claim = base(x), base(y), base(weight), base(bias), base(stats), base(claim)
    far, per, period, length = reach(L), block_sets(sets, L), G * L, L if S is None else S
    t = fetch_add(claim, 0, per)
    if t >= sets:
        return 0
    wide = room(x, period) if S is None and weight is not None else 0
    scratch = empty(2 * wide, kind)
    weight = by_element(x, weight, each, period, S, place(base(scratch), y, L))
    bias = by_element(x, bias, each, period, S, place(base(scratch) + wide, y, L))
    lo, hi = t, min(t + per, sets)
    start = pivot(x, t * L, L)
    s, q = sum_set(x, t * L, L, length, start)
    c = settle(x, stats, sets, L, length, t, start, s, q, eps)
    i, together = t * L, False
    while t < sets:
        at, col = t * L, t % G * L
        if not together:
            i = begin(x, y, weight, bias, at, L, S, col, c, period)
        following = t + 1 if t + 1 < hi else min(fetch_add(claim, 0, per), sets)
        ahead, together = following < sets, t + 1 < hi and lanes(x) <= L
        other = following * L if ahead else at
        start = pivot(x, other, L)
        i, s, q = write_and_sum_set(x, y, weight, bias, i, at, col, c, streamed, far, other, L, S, start, ahead, period)
        d = settle(x, stats, sets, L, length, following, start, s, q, eps) if ahead else c
        i = finish(x, y, weight, bias, i, at + L, col + L, S, c, d, together, period, streamed)
        if t + 1 == hi:
            fence()
            fetch_add(claim, 1, hi - lo)
            lo, hi = following, min(following + per, sets)
        t, c = following, d
    return scratch.size  # keeps it alive
