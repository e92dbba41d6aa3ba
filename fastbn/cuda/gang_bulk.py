"""Batch norm on channels-first arrays by gangs of blocks (see ``gang``), with bulk copies: sm_90 and newer.

A block's share of a channel is some runs, or parts of runs, of N; a thread begins the copies of its runs. All arrive
in shared memory, are summed, normalised in place and sent out, and the next channel's runs take their places. No
addresses in global memory are worked out and no loads wait: with a copy of 16 bytes by each thread (``gang``) a vector
took 60 instructions, and a multiprocessor was busy with those for most of the time.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.bulk import arrived, begin, bring, expect, send, sent, show
from fastbn.cuda.channel import WARP, make_combine, make_keep, make_pivot
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.finalize import add_pair, make_resolve
from fastbn.cuda.gang import make_over
from fastbn.cuda.gang_sums import PAD, make_warp_sum
from fastbn.cuda.plan_gang import TURNS
from fastbn.cuda.planes import advance, first_vector, stride
from fastbn.cuda.signals import arrive, fresh, seen
from fastbn.cuda.simd import access, add, fma, total
from fastbn.cuda.sweep import Variant, make_output, make_terms

int32, int64 = types.int32, types.int64


@device
def share(G, chunk, N, S4):
    """What is a block's: gang, part of its channels, first vector, how many."""
    gang = int32(cuda.blockIdx.x // G)
    part = int32(cuda.blockIdx.x - gang * G)
    low = int32(part * chunk)
    return gang, part, low, int32(min(N * S4, low + chunk) - low)


def make_runs(W: int, threads: int):
    """Begin the copies of a thread's runs: in, or out and then the next channel's in."""

    @device
    def run_of(n, low, count, S4):
        """First vector of a run in the block's share, and how many."""
        first = int32(max(n * S4 - low, 0))
        return first, int32(min((n + 1) * S4 - low, count) - first)

    @device
    def bring_all(tensor, slab, base, barrier, low, count, S4, C, S, c):
        n = int32(low // S4 + cuda.threadIdx.x)
        while n * S4 < low + count:
            first, some = run_of(n, low, count, S4)
            at = (int64(n) * C + c) * S + int64(low + first - n * S4) * W
            bring(slab, base + 4 * first, tensor, at, int32(16 * some), barrier)
            n = int32(n + threads)

    @device
    def send_all(tensor, slab, low, count, S4, C, S, c):
        n = int32(low // S4 + cuda.threadIdx.x)
        while n * S4 < low + count:
            first, some = run_of(n, low, count, S4)
            at = (int64(n) * C + c) * S + int64(low + first - n * S4) * W
            send(tensor, at, slab, 4 * first, int32(16 * some))
            n = int32(n + threads)
        sent()

    return bring_all, send_all


def make_sums(what: Variant):
    """Sum a thread's vectors, four at once."""
    kind, W, threads = what.kind, what.W, what.threads
    A, io, terms = ARITHMETIC[kind], access(kind, W), make_terms(what)
    recall, splat = io.recall, io.splat

    @device
    def sums(slab, m, count):
        s = q = splat(A(0))
        v = int32(cuda.threadIdx.x)
        while v + 3 * threads < count:
            x0, x1 = recall(slab, 4 * v), recall(slab, 4 * (v + threads))
            x2, x3 = recall(slab, 4 * (v + 2 * threads)), recall(slab, 4 * (v + 3 * threads))
            for raw in (x0, x1, x2, x3):
                u, t = terms(raw, raw, raw, m, m, m, m)
                s, q = add(s, u), fma(u, t, q)
            v = int32(v + 4 * threads)
        while v < count:
            raw = recall(slab, 4 * v)
            u, t = terms(raw, raw, raw, m, m, m, m)
            s, q = add(s, u), fma(u, t, q)
            v = int32(v + threads)
        return s, q

    return sums


def make_gather(kind: str, threads: int):
    """Sums of the gang, as pairs, in the first warp; the other threads get nothing that means anything.

    ``turn`` counts the calls of a launch from 0; sums lie as in ``gang_sums``.
    """
    A, warps, warp_sum = ARITHMETIC[kind], threads // 32, make_warp_sum(kind)

    @device
    def more(partial, at, s, se, q, qe):
        s, se = add_pair(s, se, fresh(partial, at), A(0))
        q, qe = add_pair(q, qe, fresh(partial, at + 1), A(0))
        return s, se, q, qe

    @device
    def gather(partial, gangs, gang, G, part, turn, s, q, scratch):
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        step = 16
        while step > 0:
            s += cuda.shfl_xor_sync(WARP, s, step)
            q += cuda.shfl_xor_sync(WARP, q, step)
            step >>= 1
        if lane == 0:
            scratch[2 * warp], scratch[2 * warp + 1] = s, q
        cuda.syncthreads()
        se = qe = A(0)
        if warp == 0:
            s = q = A(0)
            for w in range(warps):
                s += scratch[2 * w]
                q += scratch[2 * w + 1]
            if G > 1:
                first = int64(gangs) * PAD + (int64(gang) * 2 + (turn & 1)) * 2 * G
                counter = int64(gang) * PAD
                if lane == 0:
                    partial[first + 2 * part], partial[first + 2 * part + 1] = s, q
                    arrive(partial, counter)
                while seen(partial, counter) < (turn + 1) * G:
                    pass
                s = q = A(0)
                if lane < G:
                    s, q = fresh(partial, first + 2 * lane), fresh(partial, first + 2 * lane + 1)
                for i in range(lane + 32, G, 32):
                    s, se, q, qe = more(partial, first + 2 * i, s, se, q, qe)
                s, se, q, qe = warp_sum(s, se, q, qe)
        return s, se, q, qe

    return gather


def make_write(what: Variant):
    """Normalise a thread's vectors in place."""
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    io, output = access(kind, W), make_output(what)
    load_last, keep_raw, recall, encode = io.load_last, io.keep, io.recall, io.encode

    @device
    def write(res, slab, m, k, b, low, count, S4, C, S, c):
        v = int32(cuda.threadIdx.x)
        if residual:
            r, at = first_vector(int32(low + v), S4, C, S, W, c)
            rest, jump, past = stride(threads, S4, C, S, W)
            while v < count:
                x0, r0 = recall(slab, 4 * v), load_last(res, at)
                keep_raw(slab, 4 * v, encode(output(x0, r0, m, k, b)))
                r, at = advance(r, at, rest, jump, past, S4)
                v = int32(v + threads)
        else:
            while v + threads < count:
                x0, x1 = recall(slab, 4 * v), recall(slab, 4 * (v + threads))
                keep_raw(slab, 4 * v, encode(output(x0, x0, m, k, b)))
                keep_raw(slab, 4 * (v + threads), encode(output(x1, x1, m, k, b)))
                v = int32(v + 2 * threads)
            if v < count:
                x0 = recall(slab, 4 * v)
                keep_raw(slab, 4 * v, encode(output(x0, x0, m, k, b)))

    return write


def make_settle(what: Variant):
    """From the gang's sums to (mean, k, b, good) in ``found``; by the first warp, the first block of a gang writes."""
    kind = what.kind
    A, resolve, combine, keep_statistics = ARITHMETIC[kind], make_resolve(kind), make_combine(kind), make_keep(kind)

    @device
    def settle(pivot, sums, found, n, eps, c, C, outputs, moving, flags, first):
        stats, weight, bias, running_mean, running_var = outputs
        keep, momentum, unbias = moving
        s, se, q, qe = sums
        good, mean, rest, var, invstd = resolve(pivot, s, se, q, qe, n, eps)
        if cuda.threadIdx.x == 0:
            if good and first:
                told, moves = (mean, rest, var, invstd), flags & 4 != 0
                keep_statistics(stats, running_mean, running_var, int64(c), C, told, keep, momentum, unbias, moves)
            k, b = combine(invstd, rest, weight, bias, c, flags)
            found[0], found[1], found[2], found[3] = mean, k, b, A(1) if good else A(0)

    return settle


@functools.cache
def train(what: Variant):
    """Training forward; moves the running statistics if ``flags`` has 4. Floor: one read and one write."""
    kind, W, threads, A = what.kind, what.W, what.threads, ARITHMETIC[what.kind]
    (bring_all, send_all), over = make_runs(W, threads), make_over(what)
    sums, gather, settle, write = make_sums(what), make_gather(kind, threads), make_settle(what), make_write(what)
    pivot, sizes, words = make_pivot(kind), 2 * (threads // 32), TURNS // 32

    @kernel("TTTAAAAAAiiiiiiaaaai", kind, threads, what.layers, together=True)
    def bulk_train(
        x, res, y, stats, weight, bias, running_mean, running_var, partial, N, C, S, G, gangs, chunk, eps, keep,
        momentum, unbias, flags,
    ):  # fmt: skip
        slab = cuda.shared.array(0, int32)
        barrier = cuda.shared.array(1, int64)
        scratch = cuda.shared.array(sizes, A)
        found = cuda.shared.array(4, A)
        bad = cuda.shared.array(words, int32)
        tid, n, S4 = int32(cuda.threadIdx.x), A(int64(N) * S), int32(S // W)
        gang, part, low, count = share(G, chunk, N, S4)
        for i in range(tid, words, threads):
            bad[i] = 0
        if tid == 0:
            begin(barrier)
            expect(barrier, int32(16 * count))
        cuda.syncthreads()
        c, turn, fine = gang, int32(0), True
        bring_all(x, slab, int32(0), barrier, low, count, S4, C, S, c)
        outputs, moving = (stats, weight, bias, running_mean, running_var), (keep, momentum, unbias)
        while c < C:
            m = pivot(x, c, N, C, S)
            while not arrived(barrier, turn, int32(16 * count)):
                pass
            s, q = sums(slab, m, count)
            told = gather(partial, gangs, gang, G, part, turn, total(s), total(q), scratch)
            if tid < 32:
                settle(m, told, found, n, eps, c, C, outputs, moving, flags, part == 0)
            cuda.syncthreads()
            good = found[3] != A(0)
            if good:
                write(res, slab, found[0], found[1], found[2], low, count, S4, C, S, c)
            else:  # nothing is sent, which could arrive behind what is written later
                fine = False
                if tid == 0:
                    bad[turn >> 5] |= 1 << (turn & 31)
            show()
            if tid == 0 and c + gangs < C:
                expect(barrier, int32(16 * count))
            cuda.syncthreads()
            if good:
                send_all(y, slab, low, count, S4, C, S, c)
            c, turn = int32(c + gangs), int32(turn + 1)
            if c < C:
                bring_all(x, slab, int32(0), barrier, low, count, S4, C, S, c)
        if not fine:
            v, end = int32(low + tid), int32(low + count)
            over(x, res, y, scratch, bad, outputs, moving, gang, gangs, part, n, eps, flags, v, end, N, S4, C, S)

    return bulk_train
