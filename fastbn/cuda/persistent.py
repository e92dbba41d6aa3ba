"""Batch norm on rows (R, C) in one launch: all blocks of the grid are on the GPU at once and meet (``meeting``).

The blocks of a tile of columns take turns at its rows, sum them and keep the first ``kept`` vectors of each thread in
shared memory (26 MB over an H200); when they have met they write, last rows first (``give_out``): what the caches still
hold is read from there. Floor: one read and one write of the tensor where it fits on the chip, one read more where it
does not. The launch is a cooperative one, since blocks wait for each other, but where few rows are one block's alone:
then the grid's second axis goes over batches (ghosts) that lie behind each other. ``rows`` does the same in three
launches.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.absorb import make_absorb, make_absorb_gradients, make_ahead, make_row_only, walk
from fastbn.cuda.channel import make_combine, make_parameters
from fastbn.cuda.counted import make_counted
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.give_out import make_sweep, make_write_again, make_write_back, make_write_kept
from fastbn.cuda.meeting import make_begin, places
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
    kind, W, threads = what.kind, what.W, what.threads
    A, gather = ARITHMETIC[kind], access(kind, W).gather
    ahead, begin = make_ahead(what), make_begin(kind, threads, what.alone)
    absorb, settle = make_absorb(what), make_settle(what)
    pivot, parameters = make_counted(kind, what.masked).pivot, make_parameters(kind)
    sweep, write_kept = make_sweep(what, make_write_again(what)), make_write_kept(what)
    wide, three, both, share = TX * W, 3 * TX * W, 2 * threads * W, make_share(what)

    @kernel("TTTAAAAAAiiiiiiiaaaaiMI", kind, threads, 1)
    def rows_train(
        x, res, y, stats, weight, bias, running_mean, running_var, partial, C, R, P, turns, depth, tx_count, kept,
        eps, keep, momentum, unbias, flags, mask, tally,
    ):  # fmt: skip
        slab, constants = cuda.shared.array(0, int32), cuda.shared.array(three, A)
        red = cuda.shared.array(both, A)
        bad = cuda.shared.array(wide, int32)
        tile, width, tid = cuda.blockIdx.x, tx_count * W, cuda.threadIdx.x
        part, batch, channel = share(R, C)
        tx, ty, height, at0, active = place(tx_count, threads, tile, C, W)
        own = walk(R, C, P, part, turns, ty, height, at0 + channel, active)
        for j in range(tid, width, threads):
            c = tile * width + j
            if c < C:
                w, b = parameters(weight, bias, c, flags)
                constants[j] = pivot(x, int32(channel + c), R, C, 1, tally)
                constants[wide + j], constants[2 * wide + j] = w, b
        ready = ahead(x, x, slab, own, kept)  # behind a column's numbers: others' rows would be in their way
        begin(partial, tile, width, P, part)
        s, q = absorb(x, slab, gather(constants, tx * W), own, kept, ready, mask)
        sizes, where, which = (C, R, P, width), (tx, ty, height, tx_count), (part, batch, tile)
        outputs, moving = (stats, running_mean, running_var), (keep, momentum, unbias)
        settle(x, constants, red, bad, s, q, partial, sizes, where, which, eps, outputs, moving, flags, mask, tally)
        m, k, b = gather(constants, tx * W), gather(constants, wide + tx * W), gather(constants, 2 * wide + tx * W)
        pool = (R, C, P, part, depth, height, ty, active, partial, places(tile, width, P)[0])
        sweep((x, res, y), (m, k, b), own, kept, pool, mask)
        write_kept(res, y, slab, (m, k, b), own, kept, mask)

    return rows_train


@functools.cache
def backward(what: Variant):
    """Gradients of input, weight, bias (and residual). Floor: two reads and one write, and y and dr where they are."""
    kind, W, threads = what.kind, what.W, what.threads
    A, io, slope = ARITHMETIC[kind], access(kind, W), make_gradient(what)
    store, gather, recall = io.store, io.gather, io.recall
    ahead, begin, absorb = make_ahead(what), make_begin(kind, threads, what.alone), make_absorb_gradients(what)
    sweep = make_sweep(what, make_write_back(what))
    kept_terms = make_terms(what._replace(relu=False, residual=False))
    combine, settle, only = make_combine(kind), make_settle_gradients(what), make_row_only(what)
    values = make_counted(kind, what.masked and not what.frozen).values  # nobody counts where statistics were given
    wide, six, both, share = TX * W, 6 * TX * W, 2 * threads * W, make_share(what)

    @kernel("TTTTTAAAAAAiiiiiiiiMI", kind, threads, 1)
    def rows_backward(
        x, g, y, dx, dr, stats, weight, bias, dweight, dbias, partial, C, R, P, turns, depth, tx_count, kept, flags,
        mask, tally,
    ):  # fmt: skip
        slab, constants = cuda.shared.array(0, int32), cuda.shared.array(six, A)
        red = cuda.shared.array(both, A)
        tile, width, tid = cuda.blockIdx.x, tx_count * W, cuda.threadIdx.x
        part, batch, channel = share(R, C)
        tx, ty, height, at0, active = place(tx_count, threads, tile, C, W)
        own = walk(R, C, P, part, turns, ty, height, at0 + channel, active)
        for j in range(tid, width, threads):
            if tile * width + j < C:
                its = int64(batch) * 4 * C + tile * width + j
                m, invstd, rest = stats[its], stats[C + its], stats[3 * C + its]
                k, b = combine(invstd, rest, weight, bias, tile * width + j, flags)
                constants[j], constants[wide + j] = m, invstd
                constants[2 * wide + j], constants[3 * wide + j], constants[4 * wide + j] = k, b, rest
        ready = ahead(x, g, slab, own, kept)
        begin(partial, tile, width, P, part)
        m, invstd = gather(constants, tx * W), gather(constants, wide + tx * W)
        k, b = gather(constants, 2 * wide + tx * W), gather(constants, 3 * wide + tx * W)
        s, q = absorb(x, g, y, dr, slab, (m, invstd, k, b), own, kept, ready, mask)
        sizes, where, which, n = (C, P, width), (tx, ty, height, tx_count), (part, batch, tile), values(R, 1, tally)
        settle(constants, red, s, q, partial, sizes, where, which, n, dweight, dbias)
        m, invstd = gather(constants, tx * W), gather(constants, wide + tx * W)
        k, b = gather(constants, 2 * wide + tx * W), gather(constants, 3 * wide + tx * W)
        c1, c0 = gather(constants, 4 * wide + tx * W), gather(constants, 5 * wide + tx * W)
        pool = (R, C, P, part, depth, height, ty, active, partial, places(tile, width, P)[0])
        sweep((x, g, y, dx), (m, invstd, k, b, c1, c0), own, kept, pool, mask)
        count, first, down, at, step = own
        count, second = int32(min(count, kept)), 4 * kept * threads
        while count > 0:
            count = int32(count - 1)
            x0 = recall(slab, 4 * (count * threads + tid))
            u, t = kept_terms(x0, recall(slab, second + 4 * (count * threads + tid)), x0, m, invstd, k, b)
            store(dx, at + count * step, only(mask, int32(first + count * down), slope(u, t, k, c1, c0)))

    return rows_backward
