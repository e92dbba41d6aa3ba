# mypy: ignore-errors
"""Gradients of batch norm on channels-first arrays (see ``planes`` for the shapes, blocks and sums).

With u the gradient in front of the activation: dx = k*(u + c1*(x - m) + c0), c1 and c0 from the channel's sums of u and
u*(x - m). A block of channels is read and summed, then written from the cache, last row first, while the lines of the
next block's x are asked for.
"""

from __future__ import annotations

from fastbn.cpu import planes_joined, tuning
from fastbn.cpu._jit import helper, jit
from fastbn.cpu.ahead import ahead
from fastbn.cpu.planes import RUN, SLAB, block_channels, constants, put_away, sum_channel, tabulate
from fastbn.cpu.planes_gradients import block_gradients, gradient_constants, write_part
from fastbn.cpu.simd import (
    base,
    clear,
    empty,
    fence,
    fetch_add,
    head,
    lanes,
    least,
    like,
    most,
    signs,
    split,
)
from fastbn.cpu.sweep import gradient_run, gradient_seam

JOINED, joined = tuning.CORE_CACHE > 0, planes_joined.backward


@helper
def gradient_row(x, g, y, dx, dr, table, per, r, C, S, lo, hi, following, relu, streamed):
    """Row r: write dx and dr of the channels lo..hi - 1, one stretch; ask for those from ``following`` on."""
    W, at = lanes(x), (r * C + lo) * S
    i, c = at + least(head(dx, at), S), gradient_constants(table, per, 0)
    if i > at:
        write_part(x, g, y, dx, dr, at, i - at, c, relu)
    for ch in range(lo, hi):
        end = at + S
        i = gradient_run(x, g, y, dx, dr, i, end, c, relu, streamed, (following - lo) * S)
        if ch + 1 < hi:
            d = gradient_constants(table, per, ch + 1 - lo)
            if i < end:
                gradient_seam(x, g, y, dx, dr, i, end - i, c, d, relu, streamed)
                i += W
            c = d
        elif i < end:
            write_part(x, g, y, dx, dr, i, end - i, c, relu)
        at = end


@jit
def backward(x, g, y, dx, dr, early, weight, bias, dweight, dbias, stats, N, C, S, frozen, relu, streamed, claim):
    """Gradients. Floor: two reads and one write (and y, dr where they exist).

    The residual's gradient is written to dr with dx, or where its runs are whole lines to ``early`` with the sums, when
    memory has nothing else to write: 0.92-0.95 of the time. The other one is None.

    Where blocks lie in the core's own cache ``planes_joined`` does it.

    Tried and rejected elsewhere: writing one block while summing the next, as ``train`` does. Four streams to read at
    once (two from memory, two from the cache) took 2.1-2.9 copies, one after the other 2.1-2.4; blocks of one channel
    whose two slabs fit in the cache next to the core, 2.8 at S = 3136 and 3.5 at S = 784: what counts is how long the
    stretches are that are read from memory. With the lines of x asked for a block earlier, so that sums
    read one stream from memory, 1.0-1.14x. One core reads 35 GB/s and the cache gives it 100: x and g once, dx written
    and x and g again from the cache take 2.0 copies at 45 GB/s a copy.
    """
    if JOINED:
        return joined(
            x, g, y, dx, dr, early, weight, bias, dweight, dbias, stats, N, C, S, frozen, relu, streamed, claim
        )
    x, g = split(base(x)), split(base(g))
    y = signs(split(base(y)), x)
    dx, dr, early = split(base(dx)), split(base(dr)), split(base(early))
    W = lanes(x)
    per, every = block_channels(N, C, S, W, SLAB), most(1, RUN // S)
    size = 2 * W * per
    scratch, sums = empty(size + 5 * per, weight), empty(size, stats)
    weight, bias, dweight, dbias = base(weight), base(bias), base(dweight), base(dbias)
    stats, claim, long = base(stats), base(claim), base(sums)
    short, table = like(x, base(scratch)), base(scratch) + size
    lo = fetch_add(claim, 0, per)
    while lo < C:
        hi = least(lo + per, C)
        clear(short, 2 * W * (hi - lo))
        clear(long, 2 * W * (hi - lo))
        tabulate(x, stats, weight, bias, table, per, C, lo, hi)
        for r in range(N):
            far = ahead(S, C * S, r + 1 < N)
            for c in range(lo, hi):
                m, k, b = constants(table, per, c - lo)
                sum_channel(x, g, y, early, (r * C + c) * S, S, far, m, k, b, relu, short, long, c - lo)
            if (r + 1) % every == 0 or r == N - 1:
                put_away(short, long, 2 * (hi - lo))
        block_gradients(x, g, y, long, table, per, stats, weight, dweight, dbias, N, C, S, lo, hi, frozen, relu)
        following = fetch_add(claim, 0, per)
        next_lo = following if following < C else lo
        for r in range(N - 1, -1, -1):
            gradient_row(x, g, y, dx, dr, table, per, r, C, S, lo, hi, next_lo, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = following
    return scratch.size + sums.size
