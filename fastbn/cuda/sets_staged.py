"""Gradients of layer norm in one pass, samples on their way into shared memory while others are worked on.

A team, a warp or a block, walks down the samples. A thread's columns stay the same, so it keeps their sums, the
gradients of weight and bias, in registers until the end; ``sets_columns.settle`` adds up the blocks'. Its vectors of
the next ``AHEAD`` samples are being copied (``fetch``), which takes no registers: it reads back only what it copied
itself. Floor: two reads and one write; a kernel for the columns and one for the sets (``sets_columns``, ``sets_kept``)
move 5 bytes where this moves 3.

With the next sample in registers instead, where those sufficed, 4096 samples of 4096 took 95 us in float32 on an H200
(floor 47) and 79 in bfloat16 (floor 24), whose eight lanes left no room for it: it waited for each sample.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import make_slopes, make_team_sum
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.fetch import close, fetch, make_await
from fastbn.cuda.plan_sets import AHEAD, together
from fastbn.cuda.sets import SetVariant, make_pair, make_parameter
from fastbn.cuda.sets_held import make_each
from fastbn.cuda.simd import access, add, anew, fma, sub, total

int32, int64 = types.int32, types.int64
arrived = make_await(AHEAD)


def make_stage(what: SetVariant):
    """Begin to copy a thread's vectors of the sample that begins at ``first`` into a slot, if it is ``there``."""
    W, threads, team, held = what.W, what.threads, what.team, what.held

    @device
    def stage(x, g, slab, slot, first, lane, vectors, there):
        if there:
            for k in range(held):
                v = int32(lane + k * team)
                if v < vectors:
                    place = 4 * ((slot * held + k) * 2 * threads + cuda.threadIdx.x)
                    fetch(slab, place, x, first + int64(v) * W)
                    fetch(slab, place + 4 * threads, g, first + int64(v) * W)
        close()

    return stage


def make_staged(what: SetVariant):
    """(slab, slot, k) -> the k-th vector of x and of the gradient that a thread has copied."""
    threads, held, recall = what.threads, what.held, access(what.kind, what.W).recall

    @device
    def staged(slab, slot, k):
        place = 4 * ((slot * held + k) * 2 * threads + cuda.threadIdx.x)
        return recall(slab, place), recall(slab, place + 4 * threads)

    return staged


def make_columns(what: SetVariant):
    """Add a sample's vectors to a thread's sums by column, and write a block's sums: row ``blockIdx`` of partial."""
    kind, W, threads, team, held = what.kind, what.W, what.threads, what.team, what.held
    A, io, teams, staged = ARITHMETIC[kind], access(kind, W), threads // team, make_staged(what)
    scatter, decode, alone, width = io.scatter, io.decode, team == threads, team * held * W

    @device
    def add_bias(k, sums, slab, slot, by):
        return add(sums[k], decode(staged(slab, slot, k)[1]))

    @device
    def add_weight(k, sums, slab, slot, by):
        m, invstd, shift = by
        x, g = staged(slab, slot, k)
        return fma(decode(g), fma(sub(decode(x), m), invstd, shift), sums[k])

    @device
    def write(sums, red, partial, at, D, lane, vectors):
        which = cuda.threadIdx.x // team
        v = lane
        for vector in sums:
            if v < vectors:
                if alone:
                    scatter(partial, at + int64(v) * W, vector)
                else:
                    scatter(red, which * width + v * W, vector)
            v = int32(v + team)
        if not alone:
            cuda.syncthreads()
            for c in range(cuda.threadIdx.x, D, threads):
                a = A(0)
                for t in range(teams):
                    a += red[t * width + c]
                partial[at + c] = a
            cuda.syncthreads()

    return make_each(held, add_bias), make_each(held, add_weight), write


def make_start(what: SetVariant):
    """A thread's part of the weight, and zeros for its sums by column."""
    W, team, parameter, splat = what.W, what.team, make_parameter(what), access(what.kind, what.W).splat
    zero = ARITHMETIC[what.kind](0)

    @device
    def weights(k, weight, lane, vectors, unused):
        return parameter(weight, min(int32(lane + k * team), int32(vectors - 1)) * W)

    @device
    def zeros(k, a, b, c, d):
        return splat(zero)

    return make_each(what.held, weights), make_each(what.held, zeros)


def make_gradient(what: SetVariant):
    """Write the input gradient of a sample that has been copied."""
    kind, W, threads, team = what.kind, what.W, what.threads, what.team
    A, io, team_sum, slopes = ARITHMETIC[kind], access(kind, W), make_team_sum(kind, threads, team), make_slopes(kind)
    store, splat, pair, staged = io.store, io.splat, make_pair(what), make_staged(what)

    @device
    def gradient(dx, first, slab, slot, ws, by, scratch, D, lane, vectors):
        m, invstd, rest = by
        s = q = splat(A(0))
        v, k = lane, 0
        for w in ws:
            if v < vectors:
                x, g = staged(slab, slot, k)
                u, t = pair(x, g, w, m, invstd)
                s, q = add(s, u), fma(u, t, q)
            v, k = int32(v + team), k + 1
        sum_v, sum_vt = team_sum(total(s), total(q), scratch)
        c1, c0 = slopes(sum_vt - rest * invstd * sum_v, sum_v, invstd, invstd, rest, int64(D))
        v, k = lane, 0
        for w in ws:
            if v < vectors:
                x, g = staged(slab, slot, k)
                u, t = pair(x, g, w, m, invstd)
                store(dx, first + int64(v) * W, fma(invstd, u, fma(c1, t, c0)))
            v, k = int32(v + team), k + 1

    return gradient


@functools.cache
def backward(what: SetVariant):
    """Gradients of samples of one group of D channels, one value each; blocks' sums by column go to ``partial``."""
    kind, W, threads, team, held = what.kind, what.W, what.threads, what.team, what.held
    A, teams, sizes, stage = ARITHMETIC[kind], threads // team, 2 * (threads // 32), make_stage(what)
    (weights, zeros), (add_bias, add_weight, write) = make_start(what), make_columns(what)
    gradient, room, hold = make_gradient(what), threads * held * W if team < threads else 1, held * W <= 8

    @kernel("TTTAAAii", kind, threads, together(threads, held, W, True))
    def staged_backward(x, g, dx, stats, weight, partial, sets, D):
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        red = cuda.shared.array(room, A)
        which = int32(cuda.threadIdx.x // team)
        lane, vectors = int32(cuda.threadIdx.x - which * team), int32(D // W)
        i, step = int32(cuda.blockIdx.x * teams + which), int32(cuda.gridDim.x * teams)
        for k in range(AHEAD):
            stage(x, g, slab, k, int64(i + k * step) * D, lane, vectors, i + k * step < sets)
        bs, qs, slot = zeros(0, 0, 0, 0), zeros(0, 0, 0, 0), int32(0)
        if hold:
            ws = weights(weight, lane, vectors, 0)
        while i < sets:
            m, invstd, rest = stats[i], stats[sets + i], stats[3 * sets + i]
            last = int32(slot - 1 if slot > 0 else AHEAD)  # the sample before, which is done
            stage(x, g, slab, last, int64(i + AHEAD * step) * D, lane, vectors, i + AHEAD * step < sets)
            if not hold:
                ws = weights(weight, anew(lane), vectors, 0)
            arrived()
            bs = add_bias(bs, slab, slot, 0)
            qs = add_weight(qs, slab, slot, (m, invstd, -rest * invstd))
            gradient(dx, int64(i) * D, slab, slot, ws, (m, invstd, rest), scratch, D, lane, vectors)
            slot, i = int32(slot + 1 if slot < AHEAD else 0), int32(i + step)
        write(bs, red, partial, int64(cuda.blockIdx.x) * D, D, lane, vectors)
        write(qs, red, partial, int64(cuda.gridDim.x + cuda.blockIdx.x) * D, D, lane, vectors)

    return staged_backward
