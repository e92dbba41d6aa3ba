# mypy: ignore-errors
"""Gradients of batch norm on channels-first arrays of which only some values count (see ``planes_masked``).

Floor: two reads of the valid values and one write of all (and y, dr where they exist).
"""

from __future__ import annotations

import math

from fastbn.cpu._jit import helper, jit
from fastbn.cpu.ahead import ahead
from fastbn.cpu.finalize import gradients, wide_term
from fastbn.cpu.planes import RUN, SLAB, block_channels, constants, put_away, sum_channel, tabulate, total_of
from fastbn.cpu.planes_gradients import gradient_constants, write_part
from fastbn.cpu.planes_masked import pass_over_all
from fastbn.cpu.simd import (
    base,
    blend,
    clear,
    empty,
    fence,
    fetch_add,
    head,
    lanes,
    least,
    like,
    most,
    put,
    splat,
    split,
    store_n,
)
from fastbn.cpu.simd import first as first_lanes
from fastbn.cpu.sweep import gradient_part, gradient_run, gradient_seam, write


@helper
def _wide_sums(x, g, y, first, begin, size, N, C, S, c, m, k, b, relu):
    """As ``finalize.wide_gradient_sums``."""
    s = q = 0.0
    for r in range(N):
        for p in range(first[r], first[r + 1]):
            at = (r * C + c) * S + begin[p]
            for i in range(at, at + size[p]):
                u, v = wide_term(x, g, y, i, m, k, b, relu)
                s += u
                q += u * v
    return s, q


@helper
def _gradients(
    x, g, y, long, table, per, stats, weight, dweight, dbias, first, begin, size, M, N, C, S, lo, hi, frozen, relu
):
    """As ``planes_backward``."""
    W = lanes(x)
    for c in range(lo, hi):
        j = c - lo
        m, k, b = constants(table, per, j)
        s, q = total_of(long, 2 * j, W), total_of(long, 2 * j + 1, W)
        if not (math.isfinite(s) and math.isfinite(q)):
            wide_s, wide_q = _wide_sums(x, g, y, first, begin, size, N, C, S, c, m, k, b, relu)
            s, q = s if math.isfinite(s) else wide_s, q if math.isfinite(q) else wide_q
        c1, c0 = gradients(stats, weight, dweight, dbias, C, c, M, m, s, q, frozen)
        put(table, 3 * per + j, c1)
        put(table, 4 * per + j, c0)


@helper
def _reach(x, g, y, dx, dr, i, pos, at, end, c, d, relu, streamed):
    """As ``planes_masked``: up to pos the last values of a piece with constants c, then zeros up to the piece."""
    W, zero, n = lanes(x), splat(x, 0.0), pos - i
    if pos < at:
        if n > 0:
            z, u = gradient_part(x, g, y, i, n, c, relu)
            if i + W <= at:
                write(dx, i, first_lanes(z, n), streamed)
                write(dr, i, first_lanes(u, n), streamed and head(dr, i) == 0)
                i += W
            else:
                store_n(dx, i, z, n)
                store_n(dr, i, u, n)
                i = pos
        h = least(head(dx, i), at - i) if streamed else 0
        if h > 0:
            store_n(dx, i, zero, h)
            store_n(dr, i, zero, h)
            i += h
        alike = streamed and head(dr, i) == 0
        while i + W <= at:
            write(dx, i, zero, streamed)
            write(dr, i, zero, alike)
            i += W
        n = at - i
        if n > 0 and i + W <= end:
            z, u = gradient_part(x, g, y, i, W, d, relu)
            write(dx, i, blend(n, zero, z), streamed)
            write(dr, i, blend(n, zero, u), alike)
            i += W
        elif n > 0:
            store_n(dx, i, zero, n)
            store_n(dr, i, zero, n)
            i = at
    elif n > 0 and i + W <= end:
        gradient_seam(x, g, y, dx, dr, i, n, c, d, relu, streamed)
        i += W
    elif n > 0:
        write_part(x, g, y, dx, dr, i, n, c, relu)
        i = at
    h = least(head(dx, i), end - i) if streamed else 0
    if h > 0:
        write_part(x, g, y, dx, dr, i, h, d, relu)
        i += h
    return i


@helper
def _gradient_row(x, g, y, dx, dr, table, per, first, begin, size, r, C, S, lo, hi, other, relu, streamed):
    """Row r: write dx and dr of the channels lo..hi - 1; ask for the lines ``other`` elements further on."""
    i = pos = (r * C + lo) * S
    c = gradient_constants(table, per, 0)
    for ch in range(lo, hi):
        d, run = gradient_constants(table, per, ch - lo), (r * C + ch) * S
        for p in range(first[r], first[r + 1]):
            at, end = run + begin[p], run + begin[p] + size[p]
            pass_over_all(x, g, y, pos, at - pos)
            i = _reach(x, g, y, dx, dr, i, pos, at, end, c, d, relu, streamed)
            i = gradient_run(x, g, y, dx, dr, i, end, d, relu, streamed, other)
            c, pos = d, end
    end = (r * C + hi) * S
    _reach(x, g, y, dx, dr, i, pos, end, end, c, c, relu, streamed)


@jit
def backward(
    x, g, y, dx, dr, weight, bias, dweight, dbias, stats, first, begin, size, M, N, C, S, frozen, relu, streamed, claim
):
    """Gradients, as ``planes_backward.backward``."""
    x, g, y, dx, dr = split(base(x)), split(base(g)), split(base(y)), split(base(dx)), split(base(dr))
    per, every = block_channels(N, C, S, lanes(x), SLAB), most(1, RUN // S)
    room = 2 * lanes(x) * per
    scratch, sums = empty(room + 5 * per, weight), empty(room, stats)
    weight, bias, dweight, dbias = base(weight), base(bias), base(dweight), base(dbias)
    stats, claim, long = base(stats), base(claim), base(sums)
    short, table = like(x, base(scratch)), base(scratch) + room
    lo = fetch_add(claim, 0, per)
    while lo < C:
        hi = least(lo + per, C)
        clear(short, room)
        clear(long, room)
        tabulate(x, stats, weight, bias, table, per, C, lo, hi)
        for r in range(N):
            for c in range(lo, hi):
                m, k, b = constants(table, per, c - lo)
                run, end = (r * C + c) * S, 0
                for p in range(first[r], first[r + 1]):
                    pass_over_all(x, g, y, run + end, begin[p] - end)
                    at, end = run + begin[p], begin[p] + size[p]
                    far = ahead(size[p], C * S, r + 1 < N)
                    sum_channel(x, g, y, None, at, size[p], far, m, k, b, relu, short, long, c - lo)
                if end > 0:
                    pass_over_all(x, g, y, run + end, S - end)
            if (r + 1) % every == 0 or r == N - 1:
                put_away(short, long, 2 * (hi - lo))
        _gradients(
            x, g, y, long, table, per, stats, weight, dweight, dbias, first, begin, size, M, N, C, S, lo, hi,
            frozen, relu,
        )  # fmt: skip
        following = fetch_add(claim, 0, per)
        other = ((following if following < C else lo) - lo) * S
        for r in range(N - 1, -1, -1):
            _gradient_row(
                x, g, y, dx, dr, table, per, first, begin, size, r, C, S, lo, hi, other,
                relu, streamed,
            )  # fmt: skip
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = following
    return scratch.size + sums.size
