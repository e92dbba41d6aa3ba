# mypy: ignore-errors
"""Batch norm on channels-first arrays of which only some values count, in long pieces: ``planes``, where they lie.

The pieces of sample r are first[r] <= i < first[r + 1], the same for every channel: begin[i] and size[i], in elements
of a run. What lies between does not count, and is zero where a result is written. ``some`` are two vectors of pieces,
as they lie in channel 0.

Floor: a read of the valid values and one write of all. Packed first, normalised and put back it took twice as long. The
gaps are read over (``pass_over``) and lines on a seam of values and zeros are written whole (``_reach``); without
either it was 0.85 of the time of packing instead of 0.5.
"""

from __future__ import annotations

import math

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu._raw import pass_over
from fastbn.cpu.ahead import ahead
from fastbn.cpu.finalize import keep, near
from fastbn.cpu.planes import (
    RUN,
    SHARED,
    SLAB,
    block_channels,
    constants,
    put_away,
    sum_channel,
    tabulate,
    total_of,
    write_and_sum,
)
from fastbn.cpu.simd import (
    base,
    blend,
    clear,
    empty,
    fence,
    fetch_add,
    get,
    head,
    lanes,
    least,
    like,
    load,
    most,
    put,
    rounded,
    splat,
    split,
    store_n,
    total,
)
from fastbn.cpu.simd import first as first_lanes
from fastbn.cpu.sweep import normalise_part, normalise_run, normalise_seam, output, write

LINES = min(SHARED, 3 * SLAB)  # lines of a block: with gaps in them stretches must be longer, 0.7-0.95


@helper
def _begin(x, stats, some, C, S, lo, hi, short, long):
    """As ``planes``: pivots of a block's channels into stats[2*C + c]; sums to zero."""
    W = lanes(x)
    clear(short, 2 * W * (hi - lo))
    clear(long, 2 * W * (hi - lo))
    for c in range(lo, hi):
        a, b = total(load(x, some[0] + c * S)) / W, total(load(x, some[1] + c * S)) / W
        put(stats, 2 * C + c, rounded(x, 0.5 * a + 0.5 * b))


@helper
def _about(x, a, first, begin, size, N, C, S, c):
    """Sums of x - a and (x - a)**2 over channel c, in float64."""
    s = q = 0.0
    for r in range(N):
        for p in range(first[r], first[r + 1]):
            at = (r * C + c) * S + begin[p]
            for i in range(at, at + size[p]):
                d = get(x, i) - a
                s += d
                q += d * d
    return s, q


@helper
def _wide_sums(x, start, first, begin, size, M, N, C, S, c):
    """As ``finalize.wide_sums``; ``start`` is one of the channel's values."""
    s, _ = _about(x, start, first, begin, size, N, C, S, c)
    mean = start + s / M
    if not math.isfinite(mean):
        s, _ = _about(x, 0.0, first, begin, size, N, C, S, c)
        return s / M, math.nan
    s, q = _about(x, mean, first, begin, size, N, C, S, c)
    var = (q - s * s / M) / M
    return mean + s / M, 0.0 if var < 0.0 else var


@helper
def _settle(
    x, long, stats, running_mean, running_var, tracked, first, begin, size, some, M, N, C, S, lo, hi, eps, momentum
):
    """As ``planes``: statistics of a block's channels from its sums."""
    W = lanes(x)
    for c in range(lo, hi):
        s, q = total_of(long, 2 * (c - lo), W), total_of(long, 2 * (c - lo) + 1, W)
        mean, var, fine = near(get(stats, 2 * C + c), s, q, M, eps)
        if not fine:
            mean, var = _wide_sums(x, get(x, some[0] + c * S), first, begin, size, M, N, C, S, c)
        put(stats, c, mean)
        put(stats, 2 * C + c, var)
    keep(stats, running_mean, running_var, tracked, C, lo, hi, M, eps, momentum)


@part
def pass_over_all(x, g, y, i, n):
    """Read over a gap of three tensors."""
    pass_over(x, i, n)
    pass_over(g, i, n)
    pass_over(y, i, n)


@helper
def _sum_pivoted(x, stats, first, begin, size, r, C, S, lo, hi, j, short, long):
    """Add the pieces of row r of the block's channels from the j-th on to their sums about the pivots."""
    for c in range(lo + j, hi):
        start, run, end = get(stats, 2 * C + c), (r * C + c) * S, 0
        for p in range(first[r], first[r + 1]):
            pass_over(x, run + end, begin[p] - end)
            end = begin[p] + size[p]
            sum_channel(
                x, None, None, None, run + begin[p], size[p], 0, start, 0.0, 0.0, None, short, long, c - lo
            )  # fmt: skip
        if end > 0:
            pass_over(x, run + end, S - end)


@helper
def _reach(x, residual, y, i, pos, at, end, c, d, relu, streamed):
    """Write from i on up to the first line that is all of the piece at..end with constants d; returns where that is.

    Up to pos they are the last values of a piece with constants c, then zeros up to the piece. Lines on a seam are
    written whole: two ordinary stores, each of a part, made it 1.2-2 times as long.
    """
    W, zero, n = lanes(x), splat(x, 0.0), pos - i
    if pos < at:
        if n > 0:
            z = first_lanes(normalise_part(x, residual, y, i, n, c, relu), n)
            if i + W <= at:
                write(y, i, z, streamed)
                i += W
            else:
                store_n(y, i, z, n)
                i = pos
        h = least(head(y, i), at - i) if streamed else 0
        if h > 0:
            store_n(y, i, zero, h)
            i += h
        while i + W <= at:
            write(y, i, zero, streamed)
            i += W
        n = at - i
        if n > 0 and i + W <= end:
            v = load(x, i) - splat(x, d[0])
            write(y, i, blend(n, zero, output(v, load(residual, i), splat(x, d[1]), splat(x, d[2]), relu)), streamed)
            i += W
        elif n > 0:
            store_n(y, i, zero, n)
            i = at
    elif n > 0 and i + W <= end:
        normalise_seam(x, residual, y, i, n, c, d, relu, streamed)
        i += W
    elif n > 0:
        store_n(y, i, normalise_part(x, residual, y, i, n, c, relu), n)
        i = at
    h = least(head(y, i), end - i) if streamed else 0
    if h > 0:
        store_n(y, i, normalise_part(x, residual, y, i, h, d, relu), h)
        i += h
    return i


@helper
def _train_row(
    x, residual, y, table, per, stats, first, begin, size, r, N, C, S, old, old_hi, lo, hi,
    relu, streamed, short, long,
):  # fmt: skip
    """Row r: write the channels old..old_hi - 1, one stretch, while summing lo..hi - 1."""
    i = pos = (r * C + old) * S
    c, other = constants(table, per, 0), (lo - old) * S
    for j in range(old_hi - old):
        d, run, summed = constants(table, per, j), (r * C + old + j) * S, lo + j < hi
        for p in range(first[r], first[r + 1]):
            at, n = run + begin[p], size[p]
            pass_over_all(x, residual, None, pos, at - pos)
            if summed:
                pass_over(x, pos + other, at - pos)
            i = _reach(x, residual, y, i, pos, at, at + n, c, d, relu, streamed)
            if summed:
                start = get(stats, 2 * C + lo + j)
                far = ahead(n, C * S, r + 1 < N)
                i = write_and_sum(
                    x, residual, y, at, i, d, relu, streamed, other, far, start, short, long, j, n
                )  # fmt: skip
            else:
                i = normalise_run(x, residual, y, i, at + n, d, relu, streamed)
            c, pos = d, at + n
    end = (r * C + old_hi) * S
    _reach(x, residual, y, i, pos, end, end, c, c, relu, streamed)
    _sum_pivoted(x, stats, first, begin, size, r, C, S, lo, hi, most(0, old_hi - old), short, long)


@jit
def train(
    x, residual, y, weight, bias, running_mean, running_var, stats, first, begin, size, some, M, N, C, S, eps,
    momentum, relu, streamed, claim,
):  # fmt: skip
    """Training forward, as ``planes.train``."""
    tracked = running_mean.size > 0
    x, y, residual = split(base(x)), split(base(y)), split(base(residual))
    per, every = block_channels(N, C, S, lanes(x), LINES), most(1, RUN // S)
    room = 2 * lanes(x) * per
    scratch, sums = empty(room + 3 * per, weight), empty(room, stats)
    weight, bias, stats, claim = base(weight), base(bias), base(stats), base(claim)
    running_mean, running_var = base(running_mean), base(running_var)
    short, long, table = like(x, base(scratch)), base(sums), base(scratch) + room
    old = old_hi = 0
    lo = fetch_add(claim, 0, per)
    while lo < C or old < old_hi:
        lo = least(lo, C)
        hi = least(lo + per, C)
        _begin(x, stats, some, C, S, lo, hi, short, long)
        for r in range(N):
            _train_row(
                x, residual, y, table, per, stats, first, begin, size, r, N, C, S, old, old_hi, lo, hi,
                relu, streamed, short, long,
            )  # fmt: skip
            if (r + 1) % every == 0 or r == N - 1:
                put_away(short, long, 2 * (hi - lo))
        _settle(
            x, long, stats, running_mean, running_var, tracked, first, begin, size, some, M, N, C, S, lo, hi,
            eps, momentum,
        )  # fmt: skip
        tabulate(x, stats, weight, bias, table, per, C, lo, hi)
        if old < old_hi:
            fence()
            fetch_add(claim, 1, old_hi - old)
        old, old_hi = lo, hi
        if lo < C:
            lo = fetch_add(claim, 0, per)
    return scratch.size + sums.size


@jit
def moments(x, stats, kind, first, begin, size, some, M, N, C, S, eps, claim):
    """Statistics alone, as ``planes.moments``."""
    x = split(base(x))
    per, every = block_channels(N, C, S, lanes(x), LINES), most(1, RUN // S)
    room = 2 * lanes(x) * per
    scratch, sums = empty(room, kind), empty(room, stats)
    stats, claim = base(stats), base(claim)
    short, long = like(x, base(scratch)), base(sums)
    lo = fetch_add(claim, 0, per)
    while lo < C:
        hi = least(lo + per, C)
        _begin(x, stats, some, C, S, lo, hi, short, long)
        for r in range(N):
            _sum_pivoted(x, stats, first, begin, size, r, C, S, lo, hi, 0, short, long)
            if (r + 1) % every == 0 or r == N - 1:
                put_away(short, long, 2 * (hi - lo))
        _settle(x, long, stats, stats, stats, False, first, begin, size, some, M, N, C, S, lo, hi, eps, 0.0)
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size + sums.size


@jit
def infer(x, residual, y, weight, bias, stats, first, begin, size, N, C, S, relu, streamed, claim):
    """Normalise by the statistics in ``stats``; rows of runs are handed out."""
    x, y, residual = split(base(x)), split(base(y)), split(base(residual))
    scratch = empty(3 * C, weight)
    weight, bias, stats, claim, table = base(weight), base(bias), base(stats), base(claim), base(scratch)
    tabulate(x, stats, weight, bias, table, C, C, 0, C)
    r = fetch_add(claim, 0, 1)
    while r < N:
        _train_row(
            x, residual, y, table, C, stats, first, begin, size, r, N, C, S, 0, C, C, C,
            relu, streamed, like(x, table), stats,
        )  # fmt: skip
        fence()
        fetch_add(claim, 1, 1)
        r = fetch_add(claim, 0, 1)
    return scratch.size
