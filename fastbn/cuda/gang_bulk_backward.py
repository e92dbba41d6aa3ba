"""Gradients of batch norm on channels-first arrays by gangs of blocks with bulk copies: ``gang_bulk`` backwards."""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.bulk import arrived, begin, expect, show
from fastbn.cuda.channel import make_combine, make_slopes
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.gang_bulk import make_gather, make_runs, share
from fastbn.cuda.planes import advance, first_vector, stride
from fastbn.cuda.simd import access, add, fma, total
from fastbn.cuda.sweep import Variant, make_gradient, make_terms

int32, int64 = types.int32, types.int64


def make_sums(what: Variant):
    """Sum a thread's vectors, two at once; where a ReLU decides, what it lets through takes the gradient's place."""
    kind, W, threads, by_output = what.kind, what.W, what.threads, what.relu and what.residual
    A, io, terms, gated = ARITHMETIC[kind], access(kind, W), make_terms(what), what.relu
    load, store, splat, keep_raw, encode, recall = io.load, io.store, io.splat, io.keep, io.encode, io.recall

    @device
    def one(slab, second, place, its, m, invstd, k, b):
        u, t = terms(recall(slab, place), recall(slab, second + place), its, m, invstd, k, b)
        if gated:
            keep_raw(slab, second + place, encode(u))
        return u, t

    @device
    def sums(y, dr, slab, second, constants, low, count, S4, C, S, c):
        m, invstd, k, b = constants
        s = q = splat(A(0))
        v = int32(cuda.threadIdx.x)
        if by_output:
            r, at = first_vector(int32(low + v), S4, C, S, W, c)
            rest, jump, past = stride(threads, S4, C, S, W)
            while v < count:
                u, t = one(slab, second, 4 * v, load(y, at), m, invstd, k, b)
                store(dr, at, u)
                s, q = add(s, u), fma(u, t, q)
                r, at = advance(r, at, rest, jump, past, S4)
                v = int32(v + threads)
        else:
            while v < count:
                u, t = one(slab, second, 4 * v, recall(slab, 4 * v), m, invstd, k, b)
                s, q = add(s, u), fma(u, t, q)
                v = int32(v + threads)
        return s, q

    return sums


def make_write(what: Variant):
    """The input's gradient takes the place of x."""
    kind, W, threads, slope = what.kind, what.W, what.threads, make_gradient(what)
    io, terms = access(kind, W), make_terms(what._replace(relu=False, residual=False))
    keep_raw, recall, encode = io.keep, io.recall, io.encode

    @device
    def write(slab, second, m, invstd, k, c1, c0, count):
        v = int32(cuda.threadIdx.x)
        while v + threads < count:
            a, b = 4 * v, 4 * (v + threads)
            x0, x1, g0, g1 = recall(slab, a), recall(slab, b), recall(slab, second + a), recall(slab, second + b)
            u, t = terms(x0, g0, x0, m, invstd, k, k)
            keep_raw(slab, a, encode(slope(u, t, k, c1, c0)))
            u, t = terms(x1, g1, x1, m, invstd, k, k)
            keep_raw(slab, b, encode(slope(u, t, k, c1, c0)))
            v = int32(v + 2 * threads)
        if v < count:
            x0 = recall(slab, 4 * v)
            u, t = terms(x0, recall(slab, second + 4 * v), x0, m, invstd, k, k)
            keep_raw(slab, 4 * v, encode(slope(u, t, k, c1, c0)))

    return write


@functools.cache
def backward(what: Variant):
    """Gradients of input, weight, bias (and residual). Floor: two reads and one write, and y and dr where they are."""
    kind, W, threads, A = what.kind, what.W, what.threads, ARITHMETIC[what.kind]
    (bring_all, send_all), sums, write = make_runs(W, threads), make_sums(what), make_write(what)
    combine, gather, slopes, sizes = make_combine(kind), make_gather(kind, threads), make_slopes(kind), threads // 16

    @kernel("TTTTTAAAAAAiiiiiii", kind, threads, what.layers, together=True)
    def bulk_backward(x, g, y, dx, dr, stats, weight, bias, dweight, dbias, partial, N, C, S, G, gangs, chunk, flags):
        slab = cuda.shared.array(0, int32)
        barrier = cuda.shared.array(1, int64)
        scratch = cuda.shared.array(sizes, A)
        found = cuda.shared.array(2, A)
        tid, n, S4, second = int32(cuda.threadIdx.x), int64(N) * S, int32(S // W), int32(4 * chunk)
        gang, part, low, count = share(G, chunk, N, S4)
        size = int32(32 * count)
        if tid == 0:
            begin(barrier)
            expect(barrier, size)
        cuda.syncthreads()
        c, turn = gang, int32(0)
        bring_all(x, slab, int32(0), barrier, low, count, S4, C, S, c)
        bring_all(g, slab, second, barrier, low, count, S4, C, S, c)
        while c < C:
            m, invstd, rest = stats[c], stats[C + c], stats[3 * C + c]
            k, b = combine(invstd, rest, weight, bias, c, flags)
            while not arrived(barrier, turn, size):
                pass
            s, q = sums(y, dr, slab, second, (m, invstd, k, b), low, count, S4, C, S, c)
            s, se, q, qe = gather(partial, gangs, gang, G, part, turn, total(s), total(q), scratch)
            if tid == 0:
                db = s + se
                dw = (q + qe) - rest * invstd * db
                if part == 0:
                    dweight[c], dbias[c] = dw, db
                found[0], found[1] = slopes(dw, db, invstd, k, rest, n)
            cuda.syncthreads()
            write(slab, second, m, invstd, k, found[0], found[1], count)
            show()
            if tid == 0 and c + gangs < C:
                expect(barrier, size)
            cuda.syncthreads()
            send_all(dx, slab, low, count, S4, C, S, c)
            c, turn = int32(c + gangs), int32(turn + 1)
            if c < C:
                bring_all(x, slab, int32(0), barrier, low, count, S4, C, S, c)
                bring_all(g, slab, second, barrier, low, count, S4, C, S, c)

    return bulk_backward
