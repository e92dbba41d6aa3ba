"""Batch norm on channels-first arrays, a channel to a gang of blocks that keep it in shared memory: read once.

Training forward moves 2 bytes a byte of tensor, backward (``gang_backward``) 3: the floor, for every channel that the
chip can hold (14 MB on an H200). ``gangs`` of ``G`` blocks are on the GPU at once, several blocks a multiprocessor; a
gang works off channel after channel, each block ``chunk`` vectors of it, and its blocks meet once a channel
(``gang_sums``); a block that holds a whole channel meets nobody (``alone``).

A block's share is read by copies that need no registers (``fetch``), in ``PARTS`` groups that are summed as they
arrive; where it has written, it begins to read the next channel. So reads and writes mix. With a ``lag`` of 1 it has
two channels in hand: it sums one, says so, and writes the one before, whose sums have come together meanwhile.

What was tried on an H200, (64, 256, 56, 56) in float32, floor 96 us:

- one channel in hand, loads into registers, four a thread: 138 us with 2, 3 or 4 blocks a multiprocessor, begun
  together or one after another; a quarter of the time a block waited for its gang;
- the same with copies, the next channel's behind what is written: 129 us;
- the same with bulk copies of whole runs (sm_90), normalised in place and sent out: 134 us, in backward 217 instead of
  188: what is read next must wait until what was written has left;
- one large block a multiprocessor (``slab``): (64, 512, 28, 28) 74 us, with copies 67.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import make_combine, make_keep, make_pivot
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.fetch import close, fetch, make_await
from fastbn.cuda.finalize import make_again, make_resolve
from fastbn.cuda.gang_sums import make_gather, make_publish, make_ready
from fastbn.cuda.plan_gang import TURNS
from fastbn.cuda.planes import advance, first_vector, stride
from fastbn.cuda.simd import access, add, fma, total
from fastbn.cuda.sweep import Variant, make_output, make_terms

int32, int64 = types.int32, types.int64
three_left, two_left, one_left, none_left = (make_await(n) for n in (3, 2, 1, 0))
PARTS = 4  # groups of copies a channel


@device
def share(G, chunk, N, S4, threads):
    """What is a thread's: gang, part of its channels, first and last vector of its block, vectors of a group."""
    gang = int32(cuda.blockIdx.x // G)
    part = int32(cuda.blockIdx.x - gang * G)
    low = int32(part * chunk)
    step = int32((chunk + PARTS * threads - 1) // (PARTS * threads) * threads)
    return gang, part, low, int32(min(N * S4, low + chunk)), step


def make_begin(W: int, threads: int):
    """Begin to read a block's share of a channel, to ``base`` of the slab."""

    @device
    def begin(tensor, slab, base, v, low, end, step, S4, C, S, c):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, jump, past = stride(threads, S4, C, S, W)
        last = low
        for _ in range(PARTS):
            last = int32(min(end, last + step))
            while v < last:
                fetch(slab, base + 4 * (v - low), tensor, at)
                r, at = advance(r, at, rest, jump, past, S4)
                v = int32(v + threads)
            close()

    return begin


def make_sums(what: Variant):
    """Sum what has arrived, group by group."""
    kind, W, threads = what.kind, what.W, what.threads
    A, io, terms = ARITHMETIC[kind], access(kind, W), make_terms(what)
    recall, splat = io.recall, io.splat

    @device
    def some(slab, base, m, s, q, v, low, last):
        while v < last:
            raw = recall(slab, base + 4 * (v - low))
            u, t = terms(raw, raw, raw, m, m, m, m)
            s, q = add(s, u), fma(u, t, q)
            v = int32(v + threads)
        return s, q, v

    @device
    def sums(slab, base, m, v, low, end, step):
        s = q = splat(A(0))
        three_left()
        s, q, v = some(slab, base, m, s, q, v, low, min(end, low + step))
        two_left()
        s, q, v = some(slab, base, m, s, q, v, low, min(end, low + 2 * step))
        one_left()
        s, q, v = some(slab, base, m, s, q, v, low, min(end, low + 3 * step))
        none_left()
        s, q, v = some(slab, base, m, s, q, v, low, end)
        return s, q

    return sums


def make_write(what: Variant):
    """Normalise a block's share of a channel, and begin to read another one's (``ahead`` elements on) if ``more``."""
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    io, output = access(kind, W), make_output(what)
    load_last, store, recall = io.load_last, io.store, io.recall

    @device
    def write(x, res, y, slab, base, m, k, b, v, low, end, step, S4, C, S, c, ahead, more):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, jump, past = stride(threads, S4, C, S, W)
        last = low
        for _ in range(PARTS):
            last = int32(min(end, last + step))
            while v < last:
                place = base + 4 * (v - low)
                x0 = recall(slab, place)
                r0 = x0
                if residual:
                    r0 = load_last(res, at)
                store(y, at, output(x0, r0, m, k, b))
                if more:
                    fetch(slab, place, x, at + ahead)
                r, at = advance(r, at, rest, jump, past, S4)
                v = int32(v + threads)
            close()

    return write


def make_over(what: Variant):
    """Do channels again whose sums were no good, one after another, from memory; ``bad`` has a bit for each turn."""
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    io, output, again = access(kind, W), make_output(what), make_again(kind, threads)
    load_last, store, combine, keep_statistics = io.load_last, io.store, make_combine(kind), make_keep(kind)

    @device
    def rewrite(x, res, y, m, k, b, v, end, S4, C, S, c):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, jump, past = stride(threads, S4, C, S, W)
        while v < end:
            x0 = load_last(x, at)
            r0 = x0
            if residual:
                r0 = load_last(res, at)
            store(y, at, output(x0, r0, m, k, b))
            r, at = advance(r, at, rest, jump, past, S4)
            v = int32(v + threads)

    @device
    def over(x, res, y, scratch, bad, outputs, moving, gang, gangs, part, n, eps, flags, v, end, N, S4, C, S):
        stats, weight, bias, running_mean, running_var = outputs
        keep, momentum, unbias = moving
        cuda.syncthreads()
        c, turn = gang, int32(0)
        while c < C:
            if bad[turn >> 5] >> (turn & 31) & 1:
                found = again(x, x, n, c, N, C, S, eps, scratch)
                mean, rest, _, invstd = found
                if cuda.threadIdx.x == 0 and part == 0:
                    moves = flags & 4 != 0
                    keep_statistics(stats, running_mean, running_var, int64(c), C, found, keep, momentum, unbias, moves)
                k, b = combine(invstd, rest, weight, bias, c, flags)
                rewrite(x, res, y, mean, k, b, v, end, S4, C, S, c)
            c, turn = int32(c + gangs), int32(turn + 1)

    return over


def make_settle(what: Variant):
    """From the gang's sums to (mean, k, b, are they good) in ``found``: the first thread's work."""
    kind = what.kind
    A, resolve, combine, keep_statistics = ARITHMETIC[kind], make_resolve(kind), make_combine(kind), make_keep(kind)

    @device
    def settle(pivot, sums, found, n, eps, c, C, outputs, moving, flags, first):
        stats, weight, bias, running_mean, running_var = outputs
        keep, momentum, unbias = moving
        s, se, q, qe = sums
        good, mean, rest, var, invstd = resolve(pivot, s, se, q, qe, n, eps)
        if good and first:
            told, moves = (mean, rest, var, invstd), flags & 4 != 0
            keep_statistics(stats, running_mean, running_var, int64(c), C, told, keep, momentum, unbias, moves)
        k, b = combine(invstd, rest, weight, bias, c, flags)
        found[0], found[1], found[2], found[3] = mean, k, b, A(1) if good else A(0)

    return settle


@functools.cache
def train(what: Variant):
    """Training forward; moves the running statistics if ``flags`` has 4. Floor: one read and one write.

    What to do with sums that are no good is behind the loop, not in it, where it would cost registers.
    """
    kind, W, threads, alone, A = what.kind, what.W, what.threads, what.alone, ARITHMETIC[what.kind]
    begin, sums, write, over = make_begin(W, threads), make_sums(what), make_write(what), make_over(what)
    publish, gather, ready = make_publish(kind, threads, alone), make_gather(kind, alone), make_ready(kind, alone)
    pivot, settle, sizes, words = make_pivot(kind), make_settle(what), 4 * (threads // 32), TURNS // 32

    @kernel("TTTAAAAAAiiiiiiiaaaai", kind, threads, what.layers)
    def gang_train(
        x, res, y, stats, weight, bias, running_mean, running_var, partial, N, C, S, G, gangs, chunk, lag, eps, keep,
        momentum, unbias, flags,
    ):  # fmt: skip
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        own = cuda.shared.array(4, A)
        found = cuda.shared.array(4, A)
        bad = cuda.shared.array(words, int32)
        tid, n, S4, half = int32(cuda.threadIdx.x), A(int64(N) * S), int32(S // W), int32(4 * chunk)
        gang, part, low, end, step = share(G, chunk, N, S4, threads)
        v, on = int32(low + tid), int32((lag + 1) * gangs)
        for i in range(tid, words, threads):
            bad[i] = 0
        begin(x, slab, int32(0), v, low, end, step, S4, C, S, gang)
        if lag > 0 and gang + gangs < C:
            begin(x, slab, half, v, low, end, step, S4, C, S, int32(gang + gangs))
        ready(partial, gang, part)
        outputs, moving = (stats, weight, bias, running_mean, running_var), (keep, momentum, unbias)
        c, turn, fine, m, before = gang, int32(0), True, A(0), A(0)
        while c < C + lag * gangs:
            if c < C:
                m = pivot(x, c, N, C, S)
                s, q = sums(slab, (turn & lag) * half, m, v, low, end, step)
                publish(partial, gangs, gang, G, part, turn, total(s), total(q), scratch, own)
            if turn >= lag:
                last, done = int32(c - lag * gangs), int32(turn - lag)
                told = gather(partial, gangs, gang, G, done, own)
                if tid == 0:
                    settle(before if lag > 0 else m, told, found, n, eps, last, C, outputs, moving, flags, part == 0)
                cuda.syncthreads()
                mean, k, b = found[0], found[1], found[2]
                if found[3] == A(0):
                    fine = False
                    if tid == 0:
                        bad[done >> 5] |= 1 << (done & 31)
                base, more = (done & lag) * half, last + on < C
                write(x, res, y, slab, base, mean, k, b, v, low, end, step, S4, C, S, last, int64(on) * S, more)
            c, turn, before = int32(c + gangs), int32(turn + 1), m
        if not fine:
            over(x, res, y, scratch, bad, outputs, moving, gang, gangs, part, n, eps, flags, v, end, N, S4, C, S)

    return gang_train
