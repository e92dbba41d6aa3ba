"""Batch norm on channels-first arrays (N, C, S): a channel is N runs of S contiguous elements.

A block of channels is read from memory once, stays in the cache while means, centred second moments and outputs are
computed, and is written once with streaming stores, while the next block is read. Blocks are numbered by the shape
alone and handed out by an atomic counter (``claim``: next channel, channels done), so any number of threads gives the
same bits.

All arrays are flat; N*C*S elements for tensors, C for parameters, ``stats`` is float64 of 3*C: the means, then the
invstds, then the biased variances. Absent optional tensors and ``relu`` are None.

A channel's sums are kept as vectors, float32 ones (``short``) for at most RUN elements, then added to float64 ones
(``long``); the lanes are added once a channel.
"""

from __future__ import annotations

from fastbn.cpu import tuning
from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.ahead import ahead
from fastbn.cpu.finalize import affine, keep, resolve
from fastbn.cpu.simd import (
    base,
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
    split,
    store,
    store_n,
    total,
    widen_add,
)
from fastbn.cpu.sweep import normalise_and_sum_run, normalise_part, normalise_run, normalise_seam, sum_run

BLOCK = 1 << 16  # elements: below, claiming a block costs more than it is worth
# Lines of a block. Longer stretches read faster (C*S apart), up to what the shared cache holds four times, two blocks a
# thread. Twice as many lines: training 1.05x, with two threads 1.15-1.25x the time; half as many: float16 1.2x.
SHARED = 50_000
# Or a sixth of the core's own cache, which then holds x and the gradient of one block and x of the next. Gradients take
# 1.03-1.15 with half or twice as much, 1.5 out of the shared cache.
SLAB = tuning.CORE_CACHE // (6 * 64) or SHARED
STRETCH = 32  # lines that must lie side by side, else SHARED: in twelve, training of (256, 256, 14, 14) takes 1.8x
RUN = 4096  # elements of a channel that are summed in float32: 64 additions a lane


@helper
def block_channels(N, C, S, W, lines):
    """Channels of a block, from the shape and the lanes alone: an eighth of all, but within BLOCK and ``lines``.

    As many fewer as make its runs whole lines: a line that two blocks share is written in two parts. Training takes
    0.95-0.99 at S = 196 and 49, gradients of (64, 256, 14, 14) 0.91.
    """
    if most(1, lines * W // (N * S)) * S < STRETCH * W:
        lines = SHARED
    channels, whole = most(1, least(lines * W, most(BLOCK, N * S * (C // 8))) // (N * S)), 1
    while whole * S % W != 0:
        whole *= 2
    return channels - channels % whole if channels > whole else channels


@helper
def _pivot(x, N, C, S, c):
    """Mean of two vectors of channel c, added so that equal numbers give exactly themselves. Needs S >= W."""
    W = lanes(x)
    a, b = ((N // 4) * C + c) * S, ((3 * N // 4) * C + c + 1) * S - W
    return rounded(x, 0.5 * (total(load(x, a)) / W) + 0.5 * (total(load(x, b)) / W))


@part
def put_away(short, long, count):
    """Add ``count`` float32 vectors to the float64 ones and clear them."""
    W = lanes(short)
    for i in range(0, count * W, W):
        widen_add(long, i, load(short, i))
    clear(short, count * W)


@helper
def total_of(long, vector, W):
    """Sum of the lanes of one float64 vector."""
    s = 0.0
    for i in range(vector * W, (vector + 1) * W):
        s += get(long, i)
    return s


@part
def sums_of(short, j):
    """Return the two vectors that the block's channel j has been summed to."""
    at, W = 2 * j * lanes(short), lanes(short)
    return load(short, at), load(short, at + W)


@part
def keep_sums(short, long, j, S, s, q):
    """Keep what ``sums_of`` returns; those of long runs join the float64 ones at once."""
    at, W = 2 * j * lanes(short), lanes(short)
    store(short, at, s)
    store(short, at + W, q)
    if S >= RUN:
        put_away(short + at, long + at, 2)


@part
def sum_channel(x, g, y, dr, at, S, far, m, k, b, relu, short, long, j):
    """Add a run to the sums of the block's channel j; RUN elements at a time; asks for lines ``far`` ahead."""
    for i in range(0, S, RUN):
        s, q = sums_of(short, j)
        s, q = sum_run(x, g, y, dr, at + i, least(RUN, S - i), far, m, k, b, relu, s, q)
        keep_sums(short, long, j, S, s, q)


@helper
def tabulate(x, stats, weight, bias, table, per, C, lo, hi):
    """Write m, k and b of a block's channels to table[j], table[per + j] and table[2*per + j].

    Each is needed once a run; worked out every time they cost 5 % at S = 196, 15 % of float16 inference at S = 49.
    """
    for c in range(lo, hi):
        m, k, b = affine(stats, weight, bias, C, c, x)
        put(table, c - lo, m)
        put(table, per + c - lo, k)
        put(table, 2 * per + c - lo, b)


@part
def constants(table, per, j):
    """(m, k, b) of the block's channel j."""
    return get(table, j), get(table, per + j), get(table, 2 * per + j)


@helper
def _settle(x, long, stats, running_mean, running_var, tracked, N, C, S, lo, hi, eps, momentum):
    """Statistics of a block's channels from its sums; stats[2*C + c] holds the pivots until then."""
    W = lanes(x)
    for c in range(lo, hi):
        s, q = total_of(long, 2 * (c - lo), W), total_of(long, 2 * (c - lo) + 1, W)
        mean, var = resolve(x, N, C, S, c, get(stats, 2 * C + c), s, q, eps)
        put(stats, c, mean)
        put(stats, 2 * C + c, var)
    keep(stats, running_mean, running_var, tracked, C, lo, hi, N * S, eps, momentum)


@helper
def _begin(x, stats, N, C, S, lo, hi, short, long):
    """Pivots of a block's channels into stats[2*C + c]; sums to zero."""
    W = lanes(x)
    clear(short, 2 * W * (hi - lo))
    clear(long, 2 * W * (hi - lo))
    for c in range(lo, hi):
        put(stats, 2 * C + c, _pivot(x, N, C, S, c))


@jit
def moments(x, stats, kind, N, C, S, eps, claim):
    """Statistics alone; ``kind`` is an empty array of the arithmetic type. Floor: one read."""
    x = split(base(x))
    per = block_channels(N, C, S, lanes(x), SLAB)
    size = 2 * lanes(x) * per
    scratch, sums = empty(size, kind), empty(size, stats)
    stats, claim = base(stats), base(claim)
    short, long = like(x, base(scratch)), base(sums)
    every = most(1, RUN // S)
    lo = fetch_add(claim, 0, per)
    while lo < C:
        hi = least(lo + per, C)
        _begin(x, stats, N, C, S, lo, hi, short, long)
        for r in range(N):
            for c in range(lo, hi):
                start, far = get(stats, 2 * C + c), ahead(S, C * S, r + 1 < N)
                sum_channel(x, None, None, None, (r * C + c) * S, S, far, start, 0.0, 0.0, None, short, long, c - lo)
            if (r + 1) % every == 0 or r == N - 1:
                put_away(short, long, 2 * (hi - lo))
        _settle(x, long, stats, stats, stats, False, N, C, S, lo, hi, eps, 0.0)
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size + sums.size  # keeps the scratch alive: Numba frees an array after its last use


@part
def write_head(x, residual, y, at, S, c, relu):
    """Write a run's elements in front of its first whole line; returns where that begins."""
    n = least(head(y, at), S)
    if n > 0:  # a masked store of nothing fetches the line, 100 ns
        store_n(y, at, normalise_part(x, residual, y, at, n, c, relu), n)
    return at + n


@part
def write_and_sum(x, residual, y, at, i, c, relu, streamed, other, far, start, short, long, j, S):
    """Write the run at ``at`` from i on and add the ``other`` one to the sums of the block's channel j; returns i."""
    for o in range(at, at + S, RUN):
        n = least(RUN, at + S - o)
        s, q = sums_of(short, j)
        i, s, q = normalise_and_sum_run(x, residual, y, i, o + n, c, relu, streamed, o + other, n, far, start, s, q)
        keep_sums(short, long, j, S, s, q)
    return i


@helper
def _train_row(x, residual, y, table, per, stats, r, back, N, C, S, old, old_hi, lo, hi, relu, streamed, short, long):
    """Write the channels old..old_hi - 1 of row ``back``, one stretch, while summing lo..hi - 1 of row r."""
    at, far = (back * C + old) * S, ahead(S, C * S, r + 1 < N)
    i, c = at, constants(table, per, 0)
    other = ((r - back) * C + lo - old) * S
    if old < old_hi:
        i = write_head(x, residual, y, at, S, c, relu)
    for j in range(old_hi - old):
        end = at + S
        if lo + j < hi:
            start = get(stats, 2 * C + lo + j)
            i = write_and_sum(x, residual, y, at, i, c, relu, streamed, other, far, start, short, long, j, S)
        else:
            i = normalise_run(x, residual, y, i, end, c, relu, streamed)
        if old + j + 1 < old_hi:
            d = constants(table, per, j + 1)
            if i < end:
                normalise_seam(x, residual, y, i, end - i, c, d, relu, streamed)
                i += lanes(x)
            c = d
        at = end
    if old < old_hi and i < at:
        store_n(y, i, normalise_part(x, residual, y, i, at - i, c, relu), at - i)
    for j in range(most(0, old_hi - old), hi - lo):
        start = get(stats, 2 * C + lo + j)
        sum_channel(x, None, None, None, (r * C + lo + j) * S, S, far, start, 0.0, 0.0, None, short, long, j)


@jit
def train(
    x, residual, y, weight, bias, running_mean, running_var, stats, N, C, S, eps, momentum, relu, streamed, claim
):
    """Training forward; running_mean and running_var have C or 0 elements. Floor: one read and one write.

    Every thread claims block after block and writes one while it sums the next.
    """
    tracked = running_mean.size > 0
    x, y, residual = split(base(x)), split(base(y)), split(base(residual))
    per, every = block_channels(N, C, S, lanes(x), SLAB), most(1, RUN // S)
    size = 2 * lanes(x) * per
    scratch, sums = empty(size + 3 * per, weight), empty(size, stats)
    weight, bias, stats = base(weight), base(bias), base(stats)
    running_mean, running_var, claim = base(running_mean), base(running_var), base(claim)
    short, long, table = like(x, base(scratch)), base(sums), base(scratch) + size
    old = old_hi = 0
    lo = fetch_add(claim, 0, per)
    while lo < C or old < old_hi:
        lo = least(lo, C)
        hi = least(lo + per, C)
        _begin(x, stats, N, C, S, lo, hi, short, long)
        for r in range(N):
            back = N - 1 - r if tuning.CORE_CACHE else r  # what the near cache got last: 0.92 where a channel is 1.6 MB
            _train_row(
                x, residual, y, table, per, stats, r, back, N, C, S, old, old_hi, lo, hi, relu, streamed, short, long
            )
            if (r + 1) % every == 0 or r == N - 1:
                put_away(short, long, 2 * (hi - lo))
        _settle(x, long, stats, running_mean, running_var, tracked, N, C, S, lo, hi, eps, momentum)
        tabulate(x, stats, weight, bias, table, per, C, lo, hi)
        if old < old_hi:
            fence()
            fetch_add(claim, 1, old_hi - old)
        old, old_hi = lo, hi
        if lo < C:
            lo = fetch_add(claim, 0, per)
    return scratch.size + sums.size


@helper
def write_runs(x, residual, y, table, per, j, lo, hi, S, relu, streamed):
    """Write the runs lo..hi - 1, one stretch, with ``constants`` of the block's channels j % per and so on."""
    at, c = lo * S, constants(table, per, j)
    i = write_head(x, residual, y, at, S, c, relu)
    for run in range(lo, hi):
        end = (run + 1) * S
        i = normalise_run(x, residual, y, i, end, c, relu, streamed)
        if run + 1 < hi:
            d = constants(table, per, (j + run + 1 - lo) % per)
            if i < end:
                normalise_seam(x, residual, y, i, end - i, c, d, relu, streamed)
                i += lanes(x)
            c = d
        elif i < end:
            store_n(y, i, normalise_part(x, residual, y, i, end - i, c, relu), end - i)


@jit
def infer(x, residual, y, weight, bias, stats, N, C, S, relu, streamed, claim):
    """Inference with the statistics in ``stats``. Floor: one read, one write. Blocks are stretches of runs (n, c)."""
    x, y, residual = split(base(x)), split(base(y)), split(base(residual))
    scratch = empty(3 * C, weight)
    weight, bias, stats, claim, table = base(weight), base(bias), base(stats), base(claim), base(scratch)
    per = most(1, BLOCK // S)
    tabulate(x, stats, weight, bias, table, C, C, 0, C)
    lo = fetch_add(claim, 0, per)
    while lo < N * C:
        hi = least(lo + per, N * C)
        write_runs(x, residual, y, table, C, lo % C, lo, hi, S, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return scratch.size
