"""Batch norm on channels-first arrays of short or odd runs, several channels to a gang of blocks at once: read once.

Training forward moves 2 bytes a byte of tensor, backward (``bundle_backward``) 3: the floor. A bundle is ``K``
neighbouring channels whose run of K*S elements is a whole number ``V`` of vectors (7 x 7 in float32: 4 channels, 49
vectors), so that N runs of a bundle are a matrix of vectors. As in ``gang``, gangs of ``G`` blocks are on the GPU at
once, work off bundle after bundle, each block ``chunk`` rows of it, which it keeps in shared memory, and meet once a
bundle, for all its channels.

A thread stays in one column of vectors, ``threads // V`` rows from one of its rows to the next: its first ``count``
lanes belong to channel ``first`` of the bundle, the others to the next one. It reads back only what it kept itself.
Numbers of channels lie in shared memory: pivots of all turns from the beginning, in backward the statistics of the next
bundle from this one's meeting on. Where a thread works is found out ``anew`` in every turn, which takes no registers.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.bundle_copies import make_begin, make_steps, make_sums
from fastbn.cuda.bundle_sums import make_bundle_sums
from fastbn.cuda.channel import fold, keep_statistics, make_combine, make_parameters, make_pivot, make_running
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.fetch import PARTS, close, fetch
from fastbn.cuda.finalize import make_again, make_resolve
from fastbn.cuda.plan_bundle import MOST, OWN
from fastbn.cuda.simd import access, anew
from fastbn.cuda.sweep import Variant, make_output

int32, int64, uint8 = types.int32, types.int64, types.uint8


@device
def place(part, chunk, bundle, N, C, S, K, V, height, W):
    """Where a thread works: (first row, their end, its vector's offset there, channel of its first lanes, their count).

    Threads that are left over have no rows.
    """
    tid = anew(int32(cuda.threadIdx.x))
    ty = int32(tid // V)
    column = int32((tid - ty * V) * W)
    first = int32(column // S)
    count = int32(min(W, (first + 1) * S - column))
    part = anew(part)
    end, r = min(N, int32((part + 1) * chunk)), int32(part * chunk + ty)
    if ty >= height:
        r = end
    return r, end, (int64(r) * C + bundle * K) * S + column, first, count


def make_spread(what: Variant):
    """(table, at, first, count) -> a thread's vector of numbers that lie by channel from ``at`` on."""
    W, step = what.W, access(what.kind, what.W).step

    @device
    def spread(table, at, first, count):
        other = first + 1 if count < W else first
        return step(table[at + first], table[at + other], count)

    return spread


def make_write(what: Variant):
    """Normalise a thread's rows of a bundle from what it kept, ``rows_together`` at once, if they are ``good``.

    And begin to copy the next bundle's (``ahead`` elements on) if there are ``more``.
    """
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    A, io, output, four = ARITHMETIC[kind], access(kind, W), make_output(what), rows_together(what) == 4
    load_last, store, recall, splat, encode = io.load_last, io.store, io.recall, io.splat, io.encode

    @device
    def put(x, y, slab, other, m, k, b, r, end, place, at, ahead, more, good):
        if r < end:
            if good:
                store(y, at, output(recall(slab, place), other, m, k, b))
            if more:
                fetch(slab, place, x, at + ahead)

    @device
    def rest_of(res, r, end, height, at, step):
        r0 = r1 = r2 = r3 = encode(splat(A(0)))
        if residual:
            if r < end:
                r0 = load_last(res, at)
            if r + height < end:
                r1 = load_last(res, at + step)
        if four:
            if r + 2 * height < end:
                r2 = load_last(res, at + 2 * step)
            if r + 3 * height < end:
                r3 = load_last(res, at + 3 * step)
        return r0, r1, r2, r3

    @device
    def write(x, res, y, slab, m, k, b, r, end, height, at, step, ahead, more, good, steps):
        place = int32(4 * cuda.threadIdx.x)
        for _ in range(PARTS):
            for _ in range(steps):
                r0, r1, r2, r3 = rest_of(res, r, end, height, at, step)
                for other in (r0, r1, r2, r3) if four else (r0, r1) if residual else (r0,):
                    put(x, y, slab, other, m, k, b, r, end, place, at, ahead, more, good)
                    r, place = int32(r + height), int32(place + 4 * threads)
                    at += step
            close()

    return write


def make_over(what: Variant):
    """Do channels again whose sums were no good, one after another; ``bad`` says which.

    Where there is a residual, all channels of their bundle, of which nothing was written.
    """
    kind, threads, residual, A = what.kind, what.threads, what.residual, ARITHMETIC[what.kind]
    one, output = access(kind, 1), make_output(what._replace(W=1))
    load_last, store = one.load_last, one.store
    again, combine, running = make_again(kind, threads), make_combine(kind), make_running(kind)

    @device
    def write(x, res, y, m, k, b, part, chunk, c, N, C, S):
        low = part * chunk
        count = (min(N, low + chunk) - low) * S
        for e in range(cuda.threadIdx.x, count, threads):
            n = e // S
            at = (int64(low + n) * C + c) * S + (e - n * S)
            x0 = load_last(x, at)
            r0 = x0
            if residual:
                r0 = load_last(res, at)
            store(y, at, output(x0, r0, m, k, b))

    @device
    def over(x, res, y, red, bad, outputs, moving, gang, gangs, part, chunk, eps, flags, N, C, S, K):
        stats, weight, bias, running_mean, running_var = outputs
        keep, momentum, unbias = moving
        bundle, turn = gang, int32(0)
        while bundle * K < C:
            all_of_it = False
            for j in range(K):
                all_of_it |= residual and bad[turn * K + j] != 0
            for j in range(K):
                if all_of_it or bad[turn * K + j] != 0:
                    c = anew(int32(bundle * K + j))
                    found = again(x, x, A(int64(anew(N)) * S), c, N, C, S, eps, red)
                    mean, rest, _, invstd = found
                    if cuda.threadIdx.x == 0 and part == 0 and bad[turn * K + j] != 0:
                        at, old, moves = int64(c), running(running_mean, running_var, c, flags), flags & 4 != 0
                        keep_statistics(
                            stats, running_mean, running_var, at, C, found, old, keep, momentum, unbias, moves
                        )
                    k, b = combine(invstd, rest, weight, bias, c, flags)
                    write(x, res, y, mean, k, b, anew(part), chunk, c, N, C, S)
            bundle, turn = int32(bundle + gangs), int32(turn + 1)

    return over


def make_settle(what: Variant):
    """From a gang's sums to the constants (m, k, b) of a bundle's channels; the first part writes statistics."""
    kind, warps, residual = what.kind, what.threads // 32, what.residual
    resolve, parameters, running = make_resolve(kind), make_parameters(kind), make_running(kind)
    collect = make_bundle_sums(kind, what.W, what.threads).collect

    @device
    def settle(table, pivots, bad, own, partial, place, first, n, eps, outputs, moving, flags, C, K):
        stats, weight, bias, running_mean, running_var = outputs
        keep, momentum, unbias = moving
        gang, G, part, turn = place
        if residual and cuda.threadIdx.x == 0:
            bad[OWN + 2 - (turn & 1)] = 0
        for j in range(anew(int32(cuda.threadIdx.x)) >> 5, K, warps):
            w, b = parameters(weight, bias, first + j, flags)
            old = running(running_mean, running_var, first + j, flags)
            s, se, q, qe = collect(own, partial, gang, G, turn, j, K)
            if cuda.threadIdx.x & 31 == 0:
                good, mean, rest, var, invstd = resolve(pivots[turn * K + j], s, se, q, qe, n, eps)
                if good and part == 0:
                    found, moves = (mean, rest, var, invstd), flags & 4 != 0
                    c = int64(first + j)
                    keep_statistics(stats, running_mean, running_var, c, C, found, old, keep, momentum, unbias, moves)
                bad[turn * K + j] = 0 if good else 1
                if not good:
                    bad[OWN] = bad[OWN + 1 + (turn & 1)] = 1
                k, b = fold(invstd, rest, w, b)
                table[j], table[MOST + j], table[2 * MOST + j] = mean, k, b

    return settle


def rows_together(what: Variant) -> int:
    """Rows of a residual that a thread asks for at once: what its registers hold."""
    return (4 if what.W < 8 else 2) if what.residual else 1


@functools.cache
def train(what: Variant):
    """Training forward; moves the running statistics if ``flags`` has 4. Floor: one read and one write."""
    kind, W, threads, residual, A = what.kind, what.W, what.threads, what.residual, ARITHMETIC[what.kind]
    write, over, spread, together = make_write(what), make_over(what), make_spread(what), rows_together(what)
    begin, steps_of, sums_of = make_begin(threads, together, 1), make_steps(together), make_sums(what, together)
    settle, pivot, sums = make_settle(what), make_pivot(kind), make_bundle_sums(kind, W, threads)
    (ready, publish, _), both, pair, size = sums, 4 * threads, 2 * MOST, 3 * MOST
    flags_size = OWN + 16  # so that what lies behind is aligned

    @kernel("TTTAAAAAAiiiiiiiiiaaaai", kind, threads, what.layers)
    def bundle_train(
        x, res, y, stats, weight, bias, running_mean, running_var, partial, N, C, S, K, V, height, G, gangs, chunk,
        eps, keep, momentum, unbias, flags,
    ):  # fmt: skip
        slab = cuda.shared.array(0, int32)
        red = cuda.shared.array(both, A)
        own = cuda.shared.array(pair, A)
        table = cuda.shared.array(size, A)  # m, k, b
        pivots = cuda.shared.array(OWN, A)
        bad = cuda.shared.array(flags_size, uint8)  # channels whose sums are no good; whether any; in even, odd turns
        gang = int32(cuda.blockIdx.x // G)
        part, n = int32(cuda.blockIdx.x - gang * G), A(int64(N) * S)
        step, ahead, steps = int64(height) * C * S, int64(gangs) * K * S, steps_of(chunk, height)
        ready(partial, gang, G, part, K)
        r, end, at, _, _ = place(part, chunk, gang, N, C, S, K, V, height, W)
        begin(x, x, slab, 0, r, end, height, at, step, steps)
        for i in range(cuda.threadIdx.x, OWN, threads):  # of all turns at once: in the loop it would cost registers
            c = int32((gang + i // K * gangs) * K + i % K)
            if c < C:
                pivots[i] = pivot(x, c, N, C, S)
        bad[OWN] = bad[OWN + 1] = 0
        outputs, moving = (stats, weight, bias, running_mean, running_var), (keep, momentum, unbias)
        cuda.syncthreads()
        bundle, turn = gang, int32(0)
        while bundle * K < C:
            r, end, at, first, count = place(part, chunk, bundle, N, C, S, K, V, height, W)
            s, q = sums_of(slab, spread(pivots, turn * K, first, count), r, end, height, steps)
            publish(red, own, partial, gang, G, part, turn, s, q, count, S, V, height, K)
            which = (gang, G, part, turn)
            settle(table, pivots, bad, own, partial, which, bundle * K, n, eps, outputs, moving, flags, C, K)
            cuda.syncthreads()
            r, end, at, first, count = place(part, chunk, bundle, N, C, S, K, V, height, W)
            m, k = spread(table, 0, first, count), spread(table, MOST, first, count)
            b, more = spread(table, 2 * MOST, first, count), (bundle + gangs) * K < C
            good = not residual or bad[OWN + 1 + (turn & 1)] == 0  # a residual may lie where the output goes: leave it
            write(x, res, y, slab, m, k, b, r, end, height, at, step, ahead, more, good, steps)
            bundle, turn = int32(bundle + gangs), int32(turn + 1)
        cuda.syncthreads()
        if bad[OWN] != 0:
            over(x, res, y, red, bad, outputs, moving, gang, gangs, part, chunk, eps, flags, N, C, S, K)

    return bundle_train
