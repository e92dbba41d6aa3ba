# mypy: ignore-errors
"""Gradients of batch norm on channels-first arrays, one block written while the next is summed, as in ``planes.train``.

For blocks in a core's own cache (``tuning.CORE_CACHE``); else ``planes_backward``, one after the other. Floor: two
reads and one write (and y, dr where they exist). What a core writes past its cache and what it reads then overlap: a C
program of both took 0.82-0.9 of the time joined, also where one channel is more than the cache holds. Behind a residual
and a ReLU (N = 32) 0.83 at S = 196 and 12544, 0.94 at 784, 1.0-1.03 at 3136, where two blocks of three tensors are more
than 2 MB. Rejected there: blocks of 0.75 or 1.33 times as many lines (1.0-1.1), y's lines not asked for (1.01-1.03).
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, part
from fastbn.cpu.ahead import ahead, ask_four
from fastbn.cpu.planes import (
    RUN,
    SLAB,
    block_channels,
    constants,
    keep_sums,
    put_away,
    sum_channel,
    sums_of,
    tabulate,
)
from fastbn.cpu.planes_gradients import block_gradients, gradient_constants, write_part
from fastbn.cpu.simd import (
    base,
    clear,
    empty,
    fence,
    fetch_add,
    fma,
    head,
    lanes,
    least,
    like,
    load,
    most,
    signs,
    splat,
    split,
    stream,
)
from fastbn.cpu.sweep import gradient_at, gradient_run, gradient_seam, sum_rest, term, write

LINES = SLAB * 7 // 8  # lines of a block: two of them, and x and the gradient of each; with SLAB 1.02-1.06
LINES_TOO = SLAB * 7 // 12  # the same with y


@part
def _two(x, g, y, dx, dr, early, i, m, k, b, c1, c0, relu, streamed, alike, at, start, scale, shift):
    """Write two vectors of dx and dr from i on; return u and v of those from ``at`` on, u goes to ``early``.

    All is read before it is written.
    """
    W = lanes(x)
    z0, w0 = gradient_at(x, g, y, i, m, k, b, c1, c0, relu)
    z1, w1 = gradient_at(x, g, y, i + W, m, k, b, c1, c0, relu)
    v0, v1 = load(x, at) - start, load(x, at + W) - start
    u0 = term(load(g, at), v0, load(y, at), scale, shift, relu)
    u1 = term(load(g, at + W), v1, load(y, at + W), scale, shift, relu)
    stream(early, at, u0)
    stream(early, at + W, u1)
    write(dr, i, w0, alike)
    write(dx, i, z0, streamed)
    write(dr, i + W, w1, alike)
    write(dx, i + W, z1, streamed)
    return u0, u1, v0, v1


@part
def gradient_and_sum_run(x, g, y, dx, dr, early, i, end, c, relu, streamed, at, n, far, d, s, q):
    """``gradient_run`` from i to end by c, and ``sum_run`` of n elements from ``at`` by d = (m, k, b)."""
    W, stop, zero = lanes(x), at + n, splat(x, 0.0)
    m, k, b, c1, c0 = splat(x, c[0]), splat(x, c[1]), splat(x, c[2]), splat(x, c[3]), splat(x, c[4])
    start, scale, shift = splat(x, d[0]), splat(x, d[1]), splat(x, d[2])
    alike = streamed and head(dr, i) == 0  # dr may lie otherwise than dx
    s1 = s2 = s3 = q1 = q2 = q3 = zero
    while at + 4 * W <= stop and i + 4 * W <= end:
        ask_four(x, at + far)
        ask_four(g, at + far)
        if y is not None:
            ask_four(y, at + far)
        u0, u1, v0, v1 = _two(
            x, g, y, dx, dr, early, i, m, k, b, c1, c0, relu, streamed, alike, at, start, scale, shift
        )
        s, s1, q, q1 = s + u0, s1 + u1, fma(u0, v0, q), fma(u1, v1, q1)
        at, i = at + 2 * W, i + 2 * W
        u2, u3, v2, v3 = _two(
            x, g, y, dx, dr, early, i, m, k, b, c1, c0, relu, streamed, alike, at, start, scale, shift
        )
        s2, s3, q2, q3 = s2 + u2, s3 + u3, fma(u2, v2, q2), fma(u3, v3, q3)
        at, i = at + 2 * W, i + 2 * W
    i = gradient_run(x, g, y, dx, dr, i, end, c, relu, streamed, 0)
    s, q = sum_rest(x, g, y, early, at, stop, start, scale, shift, relu, (s, s1, s2, s3), (q, q1, q2, q3))
    return i, s, q


@part
def _write_and_sum(x, g, y, dx, dr, early, at, i, c, relu, streamed, other, far, d, short, long, j, S):
    """Write the run at ``at`` from i on and add the ``other`` one to the sums of the next block's channel j."""
    for o in range(at, at + S, RUN):
        n = least(RUN, at + S - o)
        s, q = sums_of(short, j)
        i, s, q = gradient_and_sum_run(x, g, y, dx, dr, early, i, o + n, c, relu, streamed, o + other, n, far, d, s, q)
        keep_sums(short, long, j, S, s, q)
    return i


@helper
def _row(
    x, g, y, dx, dr, early, written, table, per, r, back, N, C, S, old, old_hi, lo, hi, relu, streamed, short, long
):
    """Write the channels old..old_hi - 1 of row ``back``, one stretch, while summing lo..hi - 1 of row r."""
    W, at, far = lanes(x), (back * C + old) * S, ahead(S, C * S, r + 1 < N)
    i, c, other = at, gradient_constants(written, per, 0), ((r - back) * C + lo - old) * S
    if old < old_hi:
        i += least(head(dx, at), S)
        if i > at:  # a masked store of nothing fetches the line
            write_part(x, g, y, dx, dr, at, i - at, c, relu)
    for j in range(old_hi - old):
        end = at + S
        if lo + j < hi:
            d = constants(table, per, j)
            i = _write_and_sum(x, g, y, dx, dr, early, at, i, c, relu, streamed, other, far, d, short, long, j, S)
        else:
            i = gradient_run(x, g, y, dx, dr, i, end, c, relu, streamed, 0)
        if old + j + 1 < old_hi:
            following = gradient_constants(written, per, j + 1)
            if i < end:
                gradient_seam(x, g, y, dx, dr, i, end - i, c, following, relu, streamed)
                i += W
            c = following
        at = end
    if old < old_hi and i < at:
        write_part(x, g, y, dx, dr, i, at - i, c, relu)
    for j in range(most(0, old_hi - old), hi - lo):
        m, k, b = constants(table, per, j)
        sum_channel(x, g, y, early, (r * C + lo + j) * S, S, far, m, k, b, relu, short, long, j)


@helper
def backward(x, g, y, dx, dr, early, weight, bias, dweight, dbias, stats, N, C, S, frozen, relu, streamed, claim):
    """See ``planes_backward.backward``. Rows are written last one first: what the cache got last."""
    x, g = split(base(x)), split(base(g))
    y = signs(split(base(y)), x)
    dx, dr, early = split(base(dx)), split(base(dr)), split(base(early))
    W = lanes(x)
    lines = LINES if y is None else LINES_TOO
    per, every = block_channels(N, C, S, W, lines), most(1, RUN // S)
    size = 2 * W * per
    scratch, sums = empty(size + 10 * per, weight), empty(size, stats)
    weight, bias, dweight, dbias = base(weight), base(bias), base(dweight), base(dbias)
    stats, claim, long = base(stats), base(claim), base(sums)
    short, table = like(x, base(scratch)), base(scratch) + size
    written = table + 5 * per
    old = old_hi = 0
    lo = fetch_add(claim, 0, per)
    while lo < C or old < old_hi:
        lo = least(lo, C)
        hi = least(lo + per, C)
        clear(short, 2 * W * (hi - lo))
        clear(long, 2 * W * (hi - lo))
        tabulate(x, stats, weight, bias, table, per, C, lo, hi)
        for r in range(N):
            back = N - 1 - r
            _row(
                x, g, y, dx, dr, early, written, table, per, r, back, N, C, S, old, old_hi, lo, hi, relu, streamed,
                short, long,
            )  # fmt: skip
            if (r + 1) % every == 0 or r == N - 1:
                put_away(short, long, 2 * (hi - lo))
        block_gradients(x, g, y, long, table, per, stats, weight, dweight, dbias, N, C, S, lo, hi, frozen, relu)
        if old < old_hi:
            fence()
            fetch_add(claim, 1, old_hi - old)
        table, written, old, old_hi = written, table, lo, hi
        if lo < C:
            lo = fetch_add(claim, 0, per)
    return scratch.size + sums.size
