"""From the sums of a block's threads to the constants of a tile's columns, in the one-launch kernel for rows.

A tile that is one block's (``alone``) is settled by it, a thread a column; else its blocks meet (``meeting``), and each
has some columns to settle, a warp each. Statistics, and the gradients of weight and bias, are written on the way.
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.channel import fold, keep_statistics, make_running, make_slopes
from fastbn.cuda.counted import make_counted
from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.finalize import gradients, make_again, make_resolve
from fastbn.cuda.meeting import (
    PLACE,
    make_column,
    make_down,
    make_lay_out,
    make_publish,
    make_results,
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
        tx, ty, height, _ = where
        part, batch, tile = own
        n, some, tid = A(values(R, 1, tally)), int32(0), cuda.threadIdx.x
        if alone:
            laid = lay_out(s, q, red, where)
            k = ty
            while k < W and ty < height:
                a, b = down(red, k, laid, where)
                j, k = tx * W + k, int32(k + height)
                bad[j] = 0
                c = tile * width + j
                if c < C:
                    old = running(outputs[1], outputs[2], c, flags)
                    sums, m, told = (a, A(0), b, A(0)), constants[j], (partial, int64(0))
                    if not statistics(m, c, C, batch, n, eps, sums, told, old, True, outputs, moving, flags, tally):
                        bad[j] = some = int32(1)
        else:
            _, said, theirs, _ = places(tile, width, P)
            publish(s, q, red, partial, theirs, P, part, where)
            j = int32(part + P * (tid >> 5))
            while j < width:
                bad[j] = 0
                c, lead = tile * width + j, tid & 31 == 0
                if c < C:
                    old = running(outputs[1], outputs[2], c, flags)
                    sums, m, told = column(partial, theirs, j, P), constants[j], (partial, said + j * PLACE)
                    if not statistics(m, c, C, batch, n, eps, sums, told, old, lead, outputs, moving, flags, tally):
                        bad[j] = some = int32(1)
                j = int32(j + P * warps)
        return some

    return look


def make_settle(what: Variant):
    """From the threads' sums to the constants (m, k, b) of the tile's columns.

    Where k and b will lie are weight and bias until then.
    """
    kind, threads, alone, look = what.kind, what.threads, what.alone, make_look(what)
    A, wide, results = ARITHMETIC[kind], TX * what.W, make_results(kind)
    values = make_counted(kind, what.masked).values
    again, (put, _), running = make_again(kind, threads, 0, what.masked), make_statistics(what), make_running(kind)

    @device
    def settle(x, constants, red, bad, s, q, partial, sizes, where, own, eps, outputs, moving, flags, mask, tally):
        C, R, P, width = sizes
        part, batch, tile = own
        _, said, _, _ = places(tile, width, P)
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
        stats = outputs[0]
        for j in range(cuda.threadIdx.x, width, threads):
            c = tile * width + j
            if c < C:
                w, b = constants[wide + j], constants[2 * wide + j]
                if alone:
                    at = int64(batch) * 4 * C + c
                    mean, invstd, rest = stats[at], stats[at + C], stats[at + 3 * C]
                else:
                    mean, invstd, rest = results(partial, said + j * PLACE)
                constants[j] = mean
                constants[wide + j], constants[2 * wide + j] = fold(invstd, rest, w, b)
        cuda.syncthreads()

    return settle


def make_settle_gradients(what: Variant):
    """From the threads' sums to the slopes (c1, c0) of the tile's columns; writes gradients of weight and bias.

    Where c1 will lie is the rounding remainder of the mean until then.
    """
    kind, W, threads, alone = what.kind, what.W, what.threads, what.alone
    A, wide, warps, slopes = ARITHMETIC[kind], TX * W, what.threads // 32, make_slopes(kind)
    lay_out, down, column = make_lay_out(kind, W, threads), make_down(kind, W, threads), make_column(kind)
    publish = make_publish(kind, W, threads)

    @device
    def settle(constants, red, s, q, partial, sizes, where, own, n, dweight, dbias):
        C, P, width = sizes
        tx, ty, height, _ = where
        part, batch, tile = own
        tid, start = cuda.threadIdx.x, int64(batch) * C
        _, said, sums, _ = places(tile, width, P)
        if alone:
            laid = lay_out(s, q, red, where)
            k = ty
            while k < W and ty < height:
                db, dw = down(red, k, laid, where)
                j, k = tx * W + k, int32(k + height)
                c = tile * width + j
                if c < C:
                    slope = constants[4 * wide + j] * constants[wide + j]
                    dbias[start + c], dweight[start + c] = gradients(db, A(0), dw, A(0), slope)
        else:
            publish(s, q, red, partial, sums, P, part, where)
            j = int32(part + P * (tid >> 5))
            while j < width:
                c = tile * width + j
                if c < C:
                    sd, se, qd, qe = column(partial, sums, j, P)
                    if tid & 31 == 0:
                        db, dw = gradients(sd, se, qd, qe, constants[4 * wide + j] * constants[wide + j])
                        say(partial, said + j * PLACE, dw, db, 1)
                        dbias[c], dweight[c] = db, dw
                j = int32(j + P * warps)
        cuda.syncthreads()  # no lane shall wait for one of its warp that has yet to speak
        for j in range(tid, width, threads):
            c = tile * width + j
            if c < C:
                rest = constants[4 * wide + j]
                if alone:
                    dw, db = dweight[start + c], dbias[start + c]
                else:
                    dw, db = heard(partial, said + j * PLACE, 1)
                c1, c0 = slopes(dw, db, constants[wide + j], constants[2 * wide + j], rest, n)
                constants[4 * wide + j], constants[5 * wide + j] = c1, c0
        cuda.syncthreads()

    return settle
