"""Batch norm on channels-first arrays, a channel to a gang of blocks that keep it in shared memory: read once.

Training forward moves 2 bytes a byte of tensor, backward 3: the floor, for every channel that the chip can hold (29 MB
on an H200). ``gangs`` of ``G`` blocks are on the GPU at once, several blocks a multiprocessor; a gang works off channel
after channel, each block ``chunk`` vectors of it, and its blocks meet once a channel (``gang_sums``). While one block
of a multiprocessor waits or writes, others read: with one large block a multiprocessor (``slab``) all read together,
meet together and write together, and 64 x 512 x 28 x 28 in float32 takes 1.5 times the floor.

A thread reads back only what it kept itself. ``wait`` nanoseconds lie between the starts of a multiprocessor's blocks.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import make_block_sum, make_combine, make_keep, make_pivot, make_slopes
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.finalize import make_again, make_resolve
from fastbn.cuda.gang_sums import make_gang_sum
from fastbn.cuda.plan_gang import TURNS
from fastbn.cuda.planes import advance, first_vector, stride
from fastbn.cuda.simd import access, add, fma, total
from fastbn.cuda.sweep import Variant, make_gradient, make_output, make_terms

int32, int64, uint32 = types.int32, types.int64, types.uint32


@device
def stagger(wait, apart):
    """Let the blocks of a multiprocessor begin one after another."""
    layer = cuda.blockIdx.x // apart
    if wait > 0 and layer > 0:
        cuda.nanosleep(uint32(wait * layer))


def make_read(what: Variant):
    """Read and keep a block's vectors of a channel, four at once; returns the thread's sums."""
    kind, W, threads = what.kind, what.W, what.threads
    A, io, terms = ARITHMETIC[kind], access(kind, W), make_terms(what)
    load, splat, keep_raw = io.load, io.splat, io.keep

    @device
    def read(x, slab, m, v, low, end, S4, C, S, c):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, step, past = stride(threads, S4, C, S, W)
        s = q = splat(A(0))
        k = int32(4 * (v - low))
        while v + 3 * threads < end:
            r, at1 = advance(r, at, rest, step, past, S4)
            r, at2 = advance(r, at1, rest, step, past, S4)
            r, at3 = advance(r, at2, rest, step, past, S4)
            x0, x1, x2, x3 = load(x, at), load(x, at1), load(x, at2), load(x, at3)
            for raw in (x0, x1, x2, x3):
                keep_raw(slab, k, raw)
                u, t = terms(raw, raw, raw, m, m, m, m)
                s, q = add(s, u), fma(u, t, q)
                k = int32(k + 4 * threads)
            r, at = advance(r, at3, rest, step, past, S4)
            v = int32(v + 4 * threads)
        while v < end:
            x0 = load(x, at)
            keep_raw(slab, k, x0)
            u, t = terms(x0, x0, x0, m, m, m, m)
            s, q = add(s, u), fma(u, t, q)
            r, at = advance(r, at, rest, step, past, S4)
            v, k = int32(v + threads), int32(k + 4 * threads)
        return s, q

    return read


def make_write(what: Variant):
    """Normalise a block's vectors of a channel, from what it kept or, ``kept`` False, from memory."""
    kind, W, threads, residual, kept = what.kind, what.W, what.threads, what.residual, what.kept
    io, output = access(kind, W), make_output(what)
    load_last, store, recall = io.load_last, io.store, io.recall

    @device
    def write(x, res, y, slab, m, k, b, v, low, end, S4, C, S, c):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, step, past = stride(threads, S4, C, S, W)
        while v < end:
            if kept:  # noqa: SIM108  (the two have different types where vectors are scalars)
                x0 = recall(slab, 4 * (v - low))
            else:
                x0 = load_last(x, at)
            r0 = x0
            if residual:
                r0 = load_last(res, at)
            store(y, at, output(x0, r0, m, k, b))
            r, at = advance(r, at, rest, step, past, S4)
            v = int32(v + threads)

    return write


def make_over(what: Variant):
    """Do channels again whose sums were no good, one after another; ``bad`` has a bit for each turn."""
    kind, threads = what.kind, what.threads
    again, write = make_again(kind, threads), make_write(what._replace(kept=False))
    combine, keep_statistics = make_combine(kind), make_keep(kind)

    @device
    def over(
        x, res, y, slab, scratch, bad, outputs, moving, gang, gangs, part, n, eps, flags, v, low, end, N, S4, C, S
    ):
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
                write(x, res, y, slab, mean, k, b, v, low, end, S4, C, S, c)
            c, turn = int32(c + gangs), int32(turn + 1)

    return over


@functools.cache
def train(what: Variant):
    """Training forward; moves the running statistics if ``flags`` has 4. Floor: one read and one write.

    What to do with sums that are no good is behind the loop, not in it, where it would cost registers.
    """
    kind, W, threads, A = what.kind, what.W, what.threads, ARITHMETIC[what.kind]
    read, write, over = make_read(what), make_write(what), make_over(what)
    pivot, block_sum, gang_sum = make_pivot(kind), make_block_sum(kind, threads), make_gang_sum(kind)
    resolve, combine, keep_statistics = make_resolve(kind), make_combine(kind), make_keep(kind)
    sizes, words = 2 * (threads // 32), TURNS // 32

    @kernel("TTTAAAAAAiiiiiiiiaaaai", kind, threads, what.layers, together=True)
    def gang_train(
        x, res, y, stats, weight, bias, running_mean, running_var, partial, N, C, S, G, gangs, chunk, wait, apart, eps,
        keep, momentum, unbias, flags,
    ):  # fmt: skip
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        bad = cuda.shared.array(words, int32)
        tid, gang = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x // G)
        part, n, S4 = int32(cuda.blockIdx.x - gang * G), A(int64(N) * S), int32(S // W)
        low = int32(part * chunk)
        v, end = int32(low + tid), int32(min(N * S4, low + chunk))
        for i in range(tid, words, threads):
            bad[i] = 0
        stagger(wait, apart)
        c, turn, fine = gang, int32(0), True
        while c < C:
            m = pivot(x, c, N, C, S)
            s, q = read(x, slab, m, v, low, end, S4, C, S, c)
            s, q = block_sum(total(s), total(q), scratch)
            s, se, q, qe = gang_sum(partial, gangs, gang, G, part, turn, s, q)
            good, mean, rest, var, invstd = resolve(m, s, se, q, qe, n, eps)
            if tid == 0 and good and part == 0:
                found, moves = (mean, rest, var, invstd), flags & 4 != 0
                keep_statistics(stats, running_mean, running_var, int64(c), C, found, keep, momentum, unbias, moves)
            if not good:
                fine = False
                if tid == 0:
                    bad[turn >> 5] |= 1 << (turn & 31)
            k, b = combine(invstd, rest, weight, bias, c, flags)
            write(x, res, y, slab, mean, k, b, v, low, end, S4, C, S, c)
            c, turn = int32(c + gangs), int32(turn + 1)
        if not fine:
            outputs, moving = (stats, weight, bias, running_mean, running_var), (keep, momentum, unbias)
            over(
                x,
                res,
                y,
                slab,
                scratch,
                bad,
                outputs,
                moving,
                gang,
                gangs,
                part,
                n,
                eps,
                flags,
                v,
                low,
                end,
                N,
                S4,
                C,
                S,
            )

    return gang_train


def make_read_gradients(what: Variant):
    """Read and keep a block's vectors of x and of the gradient, two at once, and write the residual's gradient."""
    kind, W, threads, by_output = what.kind, what.W, what.threads, what.relu and what.residual
    A, io, terms = ARITHMETIC[kind], access(kind, W), make_terms(what)
    load, load_last, store, splat, keep_raw, encode = io.load, io.load_last, io.store, io.splat, io.keep, io.encode

    @device
    def take(raw, own, its, slab, k, second, at, constants, dr):
        m, invstd, scale, b = constants
        u, t = terms(raw, own, its, m, invstd, scale, b)
        if by_output:
            store(dr, at, u)
        keep_raw(slab, k, raw)
        keep_raw(slab, second + k, encode(u))
        return u, t

    @device
    def read(x, g, y, dr, slab, second, constants, v, low, end, S4, C, S, c):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, step, past = stride(threads, S4, C, S, W)
        s = q = splat(A(0))
        k = int32(4 * (v - low))
        while v + threads < end:
            r, at1 = advance(r, at, rest, step, past, S4)
            x0, x1, g0, g1 = load(x, at), load(x, at1), load_last(g, at), load_last(g, at1)
            y0, y1 = x0, x1
            if by_output:
                y0, y1 = load(y, at), load(y, at1)
            for raw, own, its, place in ((x0, g0, y0, at), (x1, g1, y1, at1)):
                u, t = take(raw, own, its, slab, k, second, place, constants, dr)
                s, q = add(s, u), fma(u, t, q)
                k = int32(k + 4 * threads)
            r, at = advance(r, at1, rest, step, past, S4)
            v = int32(v + 2 * threads)
        if v < end:
            x0, g0 = load(x, at), load_last(g, at)
            y0 = x0
            if by_output:
                y0 = load(y, at)
            u, t = take(x0, g0, y0, slab, k, second, at, constants, dr)
            s, q = add(s, u), fma(u, t, q)
        return s, q

    return read


@functools.cache
def backward(what: Variant):
    """Gradients of input, weight, bias (and residual). Floor: two reads and one write, and y and dr where they are."""
    kind, W, threads = what.kind, what.W, what.threads
    A, io, slope, read = ARITHMETIC[kind], access(kind, W), make_gradient(what), make_read_gradients(what)
    terms, store, recall = make_terms(what._replace(relu=False, residual=False)), io.store, io.recall
    combine, block_sum, gang_sum = make_combine(kind), make_block_sum(kind, threads), make_gang_sum(kind)
    slopes, sizes = make_slopes(kind), 2 * (threads // 32)

    @kernel("TTTTTAAAAAAiiiiiiiii", kind, threads, what.layers, together=True)
    def gang_backward(
        x, g, y, dx, dr, stats, weight, bias, dweight, dbias, partial, N, C, S, G, gangs, chunk, wait, apart, flags
    ):
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        tid, gang = int32(cuda.threadIdx.x), int32(cuda.blockIdx.x // G)
        part, n, S4 = int32(cuda.blockIdx.x - gang * G), int64(N) * S, int32(S // W)
        low, second = int32(part * chunk), int32(4 * chunk)
        first, end = int32(low + tid), int32(min(N * S4, low + chunk))
        rest_step, step, past = stride(threads, S4, C, S, W)
        stagger(wait, apart)
        c, turn = gang, int32(0)
        while c < C:
            m, invstd, rest = stats[c], stats[C + c], stats[3 * C + c]
            k, b = combine(invstd, rest, weight, bias, c, flags)
            s, q = read(x, g, y, dr, slab, second, (m, invstd, k, b), first, low, end, S4, C, S, c)
            s, q = block_sum(total(s), total(q), scratch)
            s, se, q, qe = gang_sum(partial, gangs, gang, G, part, turn, s, q)
            db = s + se
            dw = (q + qe) - rest * invstd * db
            if tid == 0 and part == 0:
                dweight[c], dbias[c] = dw, db
            c1, c0 = slopes(dw, db, invstd, k, rest, n)
            v, (r, at) = first, first_vector(first, S4, C, S, W, c)
            while v < end:
                x0 = recall(slab, 4 * (v - low))
                u, t = terms(x0, recall(slab, second + 4 * (v - low)), x0, m, invstd, k, b)
                store(dx, at, slope(u, t, k, c1, c0))
                r, at = advance(r, at, rest_step, step, past, S4)
                v = int32(v + threads)
            c, turn = int32(c + gangs), int32(turn + 1)

    return gang_backward
