"""Batch norm on channels-first arrays, a channel to a gang of blocks that keep it in shared memory: read once.

Training forward moves 2 bytes a byte of tensor, backward (``gang_backward``) 3: the floor, for every channel that the
chip can hold (29 MB on an H200). ``gangs`` of ``G`` blocks are on the GPU at once, several blocks a multiprocessor; a
gang works off channel after channel, each block ``chunk`` vectors of it, and its blocks meet once a channel
(``gang_sums``).

All of a block's share is on its way at once, by copies that need no registers (``fetch``), in ``PARTS`` groups that
are summed as they arrive; and as soon as a vector has been written, the next channel's takes its place. So reads and
writes mix all the time. A block that holds a whole channel meets nobody (``alone``).

What was tried on an H200 (bench/results/nvidia-h200-gangs.json), (64, 256, 56, 56) in float32, floor 96 us, this 129:

- loads into registers, four a thread: 138 with 2, 3 or 4 blocks a multiprocessor, begun together or one after another;
- two channels in hand, so that nobody waits for a meeting: 151. Twice the rounds, with sums half as long;
- bulk copies of whole runs (sm_90), normalised in place and sent out: 134, in backward 217 instead of 182: what is read
  next must wait until what was written has left;
- the first warp alone adds up, and a barrier of the whole grid sets the counters: 146;
- one large block a multiprocessor (``slab``): (64, 512, 28, 28) 74, here 67;
- rows in the same way, a tile of columns to a gang: 64 bytes side by side 240, 128 bytes 220, where ``persistent``,
  which reads half of it twice, takes 170.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import (
    fold,
    keep_statistics,
    make_block_sum,
    make_combine,
    make_parameters,
    make_pivot,
    make_running,
)
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.fetch import PARTS, close, fetch, none_left, one_left, three_left, two_left
from fastbn.cuda.finalize import make_again, make_resolve
from fastbn.cuda.gang_sums import make_gang_sum
from fastbn.cuda.plan_gang import TURNS
from fastbn.cuda.planes import advance, first_vector, stride
from fastbn.cuda.simd import access, add, fma, total
from fastbn.cuda.sweep import Variant, make_output, make_terms

int32, int64 = types.int32, types.int64


@device
def share(G, chunk, N, S4, threads):
    """What is a thread's: gang, part of its channels, first vector and end of its block, vectors of a group."""
    gang = int32(cuda.blockIdx.x // G)
    part = int32(cuda.blockIdx.x - gang * G)
    low = int32(part * chunk)
    step = int32((chunk + PARTS * threads - 1) // (PARTS * threads) * threads)
    return gang, part, low, int32(min(N * S4, low + chunk)), step


def make_begin(W: int, threads: int):
    """Begin to read a block's share of its first channel."""

    @device
    def begin(tensor, slab, v, low, end, step, S4, C, S, c):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, jump, past = stride(threads, S4, C, S, W)
        last = low
        for _ in range(PARTS):
            last = int32(min(end, last + step))
            while v < last:
                fetch(slab, 4 * (v - low), tensor, at)
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
    def some(slab, m, s, q, v, low, last):
        while v < last:
            raw = recall(slab, 4 * (v - low))
            u, t = terms(raw, raw, raw, m, m, m, m)
            s, q = add(s, u), fma(u, t, q)
            v = int32(v + threads)
        return s, q, v

    @device
    def sums(slab, m, v, low, end, step):
        s = q = splat(A(0))
        three_left()
        s, q, v = some(slab, m, s, q, v, low, min(end, low + step))
        two_left()
        s, q, v = some(slab, m, s, q, v, low, min(end, low + 2 * step))
        one_left()
        s, q, v = some(slab, m, s, q, v, low, min(end, low + 3 * step))
        none_left()
        s, q, v = some(slab, m, s, q, v, low, end)
        return s, q

    return sums


def make_write(what: Variant):
    """Normalise a block's share of a channel, and begin to read the next one's (``ahead`` elements on) if ``more``.

    What is not ``good`` is done again behind the loop, from a residual that may lie where the output goes.
    """
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    io, output = access(kind, W), make_output(what)
    load_last, store, recall = io.load_last, io.store, io.recall

    @device
    def write(x, res, y, slab, m, k, b, v, low, end, step, S4, C, S, c, ahead, more, good):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, jump, past = stride(threads, S4, C, S, W)
        last = low
        for _ in range(PARTS):
            last = int32(min(end, last + step))
            while v < last:
                x0 = recall(slab, 4 * (v - low))
                r0 = x0
                if residual:
                    r0 = load_last(res, at)
                if good or not residual:
                    store(y, at, output(x0, r0, m, k, b))
                if more:
                    fetch(slab, 4 * (v - low), x, at + ahead)
                r, at = advance(r, at, rest, jump, past, S4)
                v = int32(v + threads)
            close()

    return write


def make_over(what: Variant):
    """Do channels again whose sums were no good, one after another, from memory; ``bad`` has a bit for each turn."""
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    io, output, again = access(kind, W), make_output(what), make_again(kind, threads)
    load_last, store, combine, running = io.load_last, io.store, make_combine(kind), make_running(kind)

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
                    at, old, moves = int64(c), running(running_mean, running_var, c, flags), flags & 4 != 0
                    keep_statistics(stats, running_mean, running_var, at, C, found, old, keep, momentum, unbias, moves)
                k, b = combine(invstd, rest, weight, bias, c, flags)
                rewrite(x, res, y, mean, k, b, v, end, S4, C, S, c)
            c, turn = int32(c + gangs), int32(turn + 1)

    return over


@functools.cache
def train(what: Variant):
    """Training forward; moves the running statistics if ``flags`` has 4. Floor: one read and one write.

    What to do with sums that are no good is behind the loop, not in it, where it would cost registers.
    """
    kind, W, threads, A = what.kind, what.W, what.threads, ARITHMETIC[what.kind]
    begin, sums, write, over = make_begin(W, threads), make_sums(what), make_write(what), make_over(what)
    pivot, block_sum, gang_sum = make_pivot(kind), make_block_sum(kind, threads), make_gang_sum(kind, what.alone)
    resolve, parameters, running = make_resolve(kind), make_parameters(kind), make_running(kind)
    sizes, words = 2 * (threads // 32), TURNS // 32

    @kernel("TTTAAAAAAiiiiiiaaaai", kind, threads, what.layers, together=not what.alone)
    def gang_train(
        x, res, y, stats, weight, bias, running_mean, running_var, partial, N, C, S, G, gangs, chunk, eps, keep,
        momentum, unbias, flags,
    ):  # fmt: skip
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        bad = cuda.shared.array(words, int32)
        old = cuda.shared.array(2, A)  # the first thread's: in registers of all threads it would spill
        tid, n, S4 = int32(cuda.threadIdx.x), A(int64(N) * S), int32(S // W)
        gang, part, low, end, step = share(G, chunk, N, S4, threads)
        v, ahead = int32(low + tid), int64(gangs) * S
        for i in range(tid, words, threads):
            bad[i] = 0
        c, turn, fine = gang, int32(0), True
        begin(x, slab, v, low, end, step, S4, C, S, c)
        following = pivot(x, c, N, C, S)
        while c < C:
            m = following
            if tid == 0 and part == 0:
                old[0], old[1] = running(running_mean, running_var, c, flags)
            s, q = sums(slab, m, v, low, end, step)
            w, b = parameters(weight, bias, c, flags)
            if c + gangs < C:
                following = pivot(x, int32(c + gangs), N, C, S)
            s, q = block_sum(total(s), total(q), scratch)
            s, se, q, qe = gang_sum(partial, gang, G, part, turn, s, q)
            good, mean, rest, var, invstd = resolve(m, s, se, q, qe, n, eps)
            if tid == 0 and good and part == 0:
                at, found, moves = int64(c), (mean, rest, var, invstd), flags & 4 != 0
                keep_statistics(stats, running_mean, running_var, at, C, found, old, keep, momentum, unbias, moves)
            if not good:
                fine = False
                if tid == 0:
                    bad[turn >> 5] |= 1 << (turn & 31)
            k, b = fold(invstd, rest, w, b)
            write(x, res, y, slab, mean, k, b, v, low, end, step, S4, C, S, c, ahead, c + gangs < C, good)
            c, turn = int32(c + gangs), int32(turn + 1)
        if not fine:
            outputs, moving = (stats, weight, bias, running_mean, running_var), (keep, momentum, unbias)
            over(x, res, y, scratch, bad, outputs, moving, gang, gangs, part, n, eps, flags, v, end, N, S4, C, S)

    return gang_train
