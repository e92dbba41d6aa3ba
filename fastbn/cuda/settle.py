"""From the sums of a block's threads to the constants of a tile's columns, in the one-launch kernel for rows.

A tile that is one block's (``alone``) is settled by it, a thread a column; else its blocks meet (``meeting``), and each
has some columns to settle, a warp each. Statistics, and the gradients of weight and bias, are written on the way.
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.channel import fold, keep_statistics, make_parameters, make_running, make_slopes
from fastbn.cuda.counted import make_counted
from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.finalize import gradients, make_again, make_resolve
from fastbn.cuda.meeting import (
    PLACE,
    make_column,
    make_down,
    make_lay_out,
    make_publish,
    places,
)
from fastbn.cuda.rows import TX
from fastbn.cuda.signals import SAID, heard, say
from fastbn.cuda.sweep import Variant

int32, int64 = types.int32, types.int64


def make_statistics(what: Variant):
    """(constants, ..., j, sums) -> True where they are good: then the statistics of column j are written, and said.

    ``told``: where to say them, unless the tile is the block's alone.
    """
    kind, alone, none = what.kind, what.alone, ARITHMETIC[what.kind](0)
    resolve, moves_by = make_resolve(kind, what.masked), make_counted(kind, what.masked).moving

    @device
    def put(found, told, old, c, C, batch, outputs, moving, flags, tally):
        if not alone:
            mean, rest, _, invstd = found
            say(told[0], told[1], mean, invstd, 1)
            say(told[0], told[1] + SAID, rest, none, 1)
        stats, running_mean, running_var = outputs
        keep, momentum, unbias = moving
        moves, unbias = moves_by(unbias, flags, tally)
        at = int64(batch) * 4 * C + c  # running statistics move where there is one batch
        keep_statistics(stats, running_mean, running_var, at, C, found, old, keep, momentum, unbias, moves)

    @device
    def statistics(pivot, c, C, batch, n, eps, sums, told, old, first, outputs, moving, flags, tally):
        s, se, q, qe = sums
        good, mean, rest, var, invstd = resolve(pivot, s, se, q, qe, n, eps)
        if good and first:
            put((mean, rest, var, invstd), told, old, c, C, batch, outputs, moving, flags, tally)
        return good

    return put, statistics


def make_look(what: Variant):
    """Write the statistics of a block's columns; whether some of the thread's had sums that were no good (``bad``)."""
    kind, W, threads, alone = what.kind, what.W, what.threads, what.alone
    A, warps, publish = ARITHMETIC[kind], what.threads // 32, make_publish(kind, W, threads)
    lay_out, down, column = make_lay_out(kind, W, threads), make_down(kind, W, threads), make_column(kind)
    values, (_, statistics), running = make_counted(kind, what.masked).values, make_statistics(what), make_running(kind)

    @device
    def look(x, constants, red, bad, s, q, partial, sizes, where, own, eps, outputs, moving, flags, tally):
        C, R, P, width = sizes
        tx, ty, height = where
        part, batch, tile = own
        n, some, tid = A(values(R, 1, tally)), int32(0), cuda.threadIdx.x
        if alone:
            lay_out(s, q, red, width, tx, ty, height)
            for j in range(tid, width, threads):
                bad[j] = 0
                c = tile * width + j
                if c < C:
                    old = running(outputs[1], outputs[2], c, flags)
                    a, b = down(red, j, width, height)
                    sums, m, told = (a, A(0), b, A(0)), constants[j], (partial, int64(0))
                    if not statistics(m, c, C, batch, n, eps, sums, told, old, True, outputs, moving, flags, tally):
                        bad[j] = some = int32(1)
        else:
            first, said = places(cuda.gridDim.x, tile, width, P)
            publish(s, q, red, partial, first, said, P, part, width, tx, ty, height)
            for j in range(part + P * (tid >> 5), width, P * warps):
                bad[j] = 0
                c, lead = tile * width + j, tid & 31 == 0
                if c < C:
                    old = running(outputs[1], outputs[2], c, flags)
                    sums, m, told = column(partial, first, j, P, width), constants[j], (partial, said + j * PLACE)
                    if not statistics(m, c, C, batch, n, eps, sums, told, old, lead, outputs, moving, flags, tally):
                        bad[j] = some = int32(1)
        return some

    return look


def make_settle(what: Variant):
    """From the threads' sums to the constants (m, k, b) of the tile's columns."""
    kind, threads, alone, look = what.kind, what.threads, what.alone, make_look(what)
    A, wide, parameters = ARITHMETIC[kind], TX * what.W, make_parameters(kind)
    values = make_counted(kind, what.masked).values
    again, (put, _), running = make_again(kind, threads, 0, what.masked), make_statistics(what), make_running(kind)

    @device
    def settle(
        x, constants, red, bad, s, q, partial, sizes, where, own, eps, outputs, params, moving, flags, mask, tally
    ):
        C, R, P, width = sizes
        part, batch, tile = own
        _, said = places(cuda.gridDim.x, tile, width, P)
        some = look(x, constants, red, bad, s, q, partial, sizes, where, own, eps, outputs, moving, flags, tally)
        if cuda.syncthreads_or(some):
            for j in range(part, width, P):
                if bad[j] != 0:
                    n, c = A(values(R, 1, tally)), tile * width + j
                    found = again(x, mask, n, int32(batch * R * C + c), R, C, 1, eps, red)
                    if cuda.threadIdx.x == 0:
                        old = running(outputs[1], outputs[2], c, flags)
                        told = (partial, said + j * PLACE)
                        put(found, told, old, c, C, batch, outputs, moving, flags, tally)
        if alone:
            cuda.syncthreads()
        stats, weight, bias = outputs[0], params[0], params[1]
        for j in range(cuda.threadIdx.x, width, threads):
            c = tile * width + j
            if c < C:
                w, b = parameters(weight, bias, c, flags)
                if alone:
                    at = int64(batch) * 4 * C + c
                    mean, invstd, rest = stats[at], stats[at + C], stats[at + 3 * C]
                else:
                    mean, invstd = heard(partial, said + j * PLACE, 1)
                    rest, _ = heard(partial, said + j * PLACE + SAID, 1)
                constants[j] = mean
                constants[wide + j], constants[2 * wide + j] = fold(invstd, rest, w, b)
        cuda.syncthreads()

    return settle


def make_settle_gradients(what: Variant):
    """From the threads' sums to the slopes (c1, c0) of the tile's columns; writes gradients of weight and bias."""
    kind, W, threads, alone = what.kind, what.W, what.threads, what.alone
    A, wide, warps, slopes = ARITHMETIC[kind], TX * W, what.threads // 32, make_slopes(kind)
    lay_out, down, column = make_lay_out(kind, W, threads), make_down(kind, W, threads), make_column(kind)
    publish = make_publish(kind, W, threads)

    @device
    def settle(constants, red, s, q, partial, sizes, where, own, n, stats, dweight, dbias):
        C, P, width = sizes
        tx, ty, height = where
        part, batch, tile = own
        tid, start, base = cuda.threadIdx.x, int64(batch) * C, int64(batch) * 4 * C
        first, said = places(cuda.gridDim.x, tile, width, P)
        if alone:
            lay_out(s, q, red, width, tx, ty, height)
            for j in range(tid, width, threads):
                c = tile * width + j
                if c < C:
                    slope = stats[base + 3 * C + c] * constants[wide + j]
                    db, dw = down(red, j, width, height)
                    dbias[start + c], dweight[start + c] = gradients(db, A(0), dw, A(0), slope)
        else:
            publish(s, q, red, partial, first, said, P, part, width, tx, ty, height)
            for j in range(part + P * (tid >> 5), width, P * warps):
                c = tile * width + j
                if c < C:
                    sd, se, qd, qe = column(partial, first, j, P, width)
                    if tid & 31 == 0:
                        db, dw = gradients(sd, se, qd, qe, stats[3 * C + c] * constants[wide + j])
                        say(partial, said + j * PLACE, dw, db, 1)
                        dbias[c], dweight[c] = db, dw
            cuda.syncthreads()  # no lane shall wait for one of its warp that has yet to speak
        for j in range(tid, width, threads):
            c = tile * width + j
            if c < C:
                rest = stats[base + 3 * C + c]
                if alone:
                    dw, db = dweight[start + c], dbias[start + c]
                else:
                    dw, db = heard(partial, said + j * PLACE, 1)
                c1, c0 = slopes(dw, db, constants[wide + j], constants[2 * wide + j], rest, n)
                constants[4 * wide + j], constants[5 * wide + j] = c1, c0
        cuda.syncthreads()

    return settle
