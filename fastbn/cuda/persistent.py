"""Batch norm on rows (R, C) in one launch: all blocks of the grid are on the GPU at once and meet at one barrier.

A block has a tile of columns and ``chunk`` rows of it, sums them and keeps the first ``kept`` vectors of each thread in
shared memory (26 MB over an H200); behind the barrier every block adds up the sums of its columns, in the order of the
parts, and writes its rows last first: what the caches still hold is read from there. Floor: one read and one write of
the tensor where it fits on the chip, one read more where it does not. The launch is a cooperative one, since blocks
wait for each other, but where few rows are one block's alone: then the grid's second axis goes over batches (ghosts)
that lie behind each other. ``rows`` does the same in three launches.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.absorb import make_absorb, make_absorb_gradients, make_row_only, make_write, make_write_back
from fastbn.cuda.channel import make_combine
from fastbn.cuda.counted import make_counted
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.rows import TX, place
from fastbn.cuda.settle import make_settle, make_settle_gradients
from fastbn.cuda.simd import access
from fastbn.cuda.sweep import Variant, make_gradient, make_terms

int32, int64 = types.int32, types.int64


def make_share(what: Variant):
    """(R, C) -> which part of the rows a block has, of which batch, and the place in memory where that begins.

    The latter as the channel that its first one would be if all batches were one tensor's.
    """
    alone = what.alone

    @device
    def share(R, C):
        if alone:
            own = cuda.blockIdx.y
            return int32(0), int32(own), int32(own * R * C)
        else:
            return int32(cuda.blockIdx.y), int32(0), int32(0)

    return share


@functools.cache
def train(what: Variant):
    """Training forward; moves the running statistics if ``flags`` has 4."""
    kind, W, threads, write = what.kind, what.W, what.threads, make_write(what)
    A, splat, gather = ARITHMETIC[kind], access(kind, W).splat, access(kind, W).gather
    absorb, settle, pivot = make_absorb(what), make_settle(what), make_counted(kind, what.masked).pivot
    wide, three, both, share = TX * W, 3 * TX * W, 2 * threads * W, make_share(what)

    @kernel("TTTAAAAAAiiiiiiaaaaiMI", kind, threads, 1)
    def rows_train(
        x, res, y, stats, weight, bias, running_mean, running_var, partial, C, R, P, chunk, tx_count, kept, eps, keep,
        momentum, unbias, flags, mask, tally,
    ):  # fmt: skip
        slab, constants = cuda.shared.array(0, int32), cuda.shared.array(three, A)
        red = cuda.shared.array(both, A)
        bad = cuda.shared.array(wide, int32)
        tile, width, tid = cuda.blockIdx.x, tx_count * W, cuda.threadIdx.x
        part, batch, channel = share(R, C)
        for j in range(tid, width, threads):
            if tile * width + j < C:
                constants[j] = pivot(x, int32(channel + tile * width + j), R, C, 1, tally)
        cuda.syncthreads()
        tx, ty, height, at0, active = place(tx_count, threads, tile, C, W)
        end, r = int32(min(R, (part + 1) * chunk)), int32(part * chunk + ty)
        at, step = int64(r) * C + at0 + channel, int64(height) * C
        s = q = splat(A(0))
        count = int32(0)
        if active:
            s, q, count, at = absorb(x, slab, gather(constants, tx * W), at, step, r, end, height, kept, mask)
        sizes, where, own = (C, R, P, width), (tx, ty, height), (part, batch, tile)
        outputs, params, moving = (stats, running_mean, running_var), (weight, bias), (keep, momentum, unbias)
        settle(
            x, constants, red, bad, s, q, partial, sizes, where, own, eps, outputs, params, moving, flags, mask, tally
        )
        if active:
            m, k, b = gather(constants, tx * W), gather(constants, wide + tx * W), gather(constants, 2 * wide + tx * W)
            r = int32(r + count * height)
            write(x, res, y, slab, (m, k, b), at, -step, r, int32(-height), count, kept, mask)

    return rows_train


@functools.cache
def backward(what: Variant):
    """Gradients of input, weight, bias (and residual). Floor: two reads and one write, and y and dr where they are."""
    kind, W, threads = what.kind, what.W, what.threads
    by_output = what.relu and what.residual
    A, io, terms, slope = ARITHMETIC[kind], access(kind, W), make_terms(what), make_gradient(what)
    load_last, store, splat, gather, recall = io.load_last, io.store, io.splat, io.gather, io.recall
    absorb, write_back = make_absorb_gradients(what), make_write_back(what)
    kept_terms = make_terms(what._replace(relu=False, residual=False))
    combine, settle, only = make_combine(kind), make_settle_gradients(what), make_row_only(what)
    values = make_counted(kind, what.masked and not what.frozen).values  # nobody counts where statistics were given
    wide, six, both, share = TX * W, 6 * TX * W, 2 * threads * W, make_share(what)

    @kernel("TTTTTAAAAAAiiiiiiiMI", kind, threads, 1)
    def rows_backward(
        x, g, y, dx, dr, stats, weight, bias, dweight, dbias, partial, C, R, P, chunk, tx_count, kept, flags, mask,
        tally,
    ):  # fmt: skip
        slab, constants = cuda.shared.array(0, int32), cuda.shared.array(six, A)
        red = cuda.shared.array(both, A)
        tile, width, tid = cuda.blockIdx.x, tx_count * W, cuda.threadIdx.x
        part, batch, channel = share(R, C)
        for j in range(tid, width, threads):
            if tile * width + j < C:
                own = int64(batch) * 4 * C + tile * width + j
                m, invstd, rest = stats[own], stats[C + own], stats[3 * C + own]
                k, b = combine(invstd, rest, weight, bias, tile * width + j, flags)
                constants[j], constants[wide + j] = m, invstd
                constants[2 * wide + j], constants[3 * wide + j] = k, b
        cuda.syncthreads()
        tx, ty, height, at0, active = place(tx_count, threads, tile, C, W)
        end, r = int32(min(R, (part + 1) * chunk)), int32(part * chunk + ty)
        at, step, second = int64(r) * C + at0 + channel, int64(height) * C, 4 * kept * threads
        s, q, count = splat(A(0)), splat(A(0)), int32(0)
        if active:
            m, invstd = gather(constants, tx * W), gather(constants, wide + tx * W)
            k, b = gather(constants, 2 * wide + tx * W), gather(constants, 3 * wide + tx * W)
            s, q, count, at = absorb(x, g, y, dr, slab, (m, invstd, k, b), at, step, r, end, height, kept, mask)
        sizes, where, own, n = (C, P, width), (tx, ty, height), (part, batch, tile), values(R, 1, tally)
        settle(constants, red, s, q, partial, sizes, where, own, n, stats, dweight, dbias)
        if active:
            m, invstd = gather(constants, tx * W), gather(constants, wide + tx * W)
            k, b = gather(constants, 2 * wide + tx * W), gather(constants, 3 * wide + tx * W)
            c1, c0 = gather(constants, 4 * wide + tx * W), gather(constants, 5 * wide + tx * W)
            r, back, rows_back = int32(r + count * height), -step, int32(-height)
            at, r, count = write_back(x, g, y, dx, (m, invstd, k, b, c1, c0), at, back, r, rows_back, count, kept, mask)
            while count > 0:
                count, r = int32(count - 1), int32(r + rows_back)
                at += back
                if count < kept:
                    x0 = recall(slab, 4 * (count * threads + tid))
                    u, t = kept_terms(x0, recall(slab, second + 4 * (count * threads + tid)), x0, m, invstd, k, b)
                else:
                    x0, g0 = load_last(x, at), load_last(g, at)
                    y0 = x0
                    if by_output:
                        y0 = load_last(y, at)
                    u, t = terms(x0, g0, y0, m, invstd, k, b)
                store(dx, at, only(mask, r, slope(u, t, k, c1, c0)))

    return rows_backward
