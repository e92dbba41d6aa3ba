"""Batch norm on channels-first arrays (N, C, S), split: sums, finalize, apply. Always right, whatever the shape.

A block works on one channel and one of its P parts: vectors part*chunk, ..., where vector v of a channel lies W*v
elements into its N runs of S. Floor of the sums: one read a tensor; of apply: one read and one write a tensor, part of
the read from L2, since apply goes through the blocks backwards. What fits in shared memory is better off in ``slab``.

``partial`` holds the sums: s at [part*C + c], q at [(P + part)*C + c]; adding them up in this order is ``finalize``'s
job, so that results depend on the shape alone.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import make_affine, make_block_sum, make_pivot, make_pivot_at, make_slopes
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.simd import access, add, fma, pick, total
from fastbn.cuda.sweep import Variant, make_gradient, make_output, make_terms

int32, int64 = types.int32, types.int64


@device
def first_vector(v, S4, C, S, W, c):
    """Position of vector v of channel c: (vector within its run, offset of its first element)."""
    n = v // S4
    r = v - n * S4
    return int32(r), (int64(n) * C + c) * S + int64(r) * W


@device
def stride(threads, S4, C, S, W):
    """How a thread moves on by a whole block: (runs step in vectors, step, extra step past a run's end)."""
    runs = threads // S4
    rest = threads - runs * S4
    return int32(rest), int64(runs) * C * S + int64(rest) * W, int64(C - 1) * S


@device
def advance(r, at, rest, step, past, S4):
    """Move on by a whole block of threads."""
    r = int32(r + rest)
    at += step
    if r >= S4:
        r = int32(r - S4)
        at += past
    return r, at


@functools.cache
def sums(what: Variant):
    """Sums of u and u*t over one part of one channel (see ``sweep.make_terms``)."""
    kind, W, threads, backward = what.kind, what.W, what.threads, what.backward
    by_output, sizes = what.relu and what.residual, 2 * (what.threads // 32)
    A, io, terms = ARITHMETIC[kind], access(kind, W), make_terms(what)
    load, splat = io.load, io.splat
    pivot, affine, block_sum = make_pivot(kind), make_affine(kind, False), make_block_sum(kind, threads)
    pivot_at, masked, valid = make_pivot_at(kind), what.masked, io.valid

    @kernel("TTTAAAAiiiiiiMI", kind, threads, 4 if W < 8 else 3)
    def planes_sums(x, g, y, stats, weight, bias, partial, N, C, S, P, chunk, flags, mask, tally):
        scratch = cuda.shared.array(sizes, A)
        c, part = cuda.blockIdx.x, cuda.blockIdx.y
        m = invstd = k = b = A(0)
        if backward:
            m, invstd, k, b, _ = affine(stats, stats, weight, bias, c, C, A(0), flags)
        elif masked:
            m = pivot_at(x, c, C, S, tally)
        else:
            m = pivot(x, c, N, C, S)
        S4 = int32(S // W)
        end = int32(min(N * S4, (part + 1) * chunk))
        v = int32(part * chunk + cuda.threadIdx.x)
        r, at = first_vector(v, S4, C, S, W, c)
        rest, step, past = stride(threads, S4, C, S, W)
        s0 = s1 = q0 = q1 = splat(A(0))
        while v + threads < end:
            r1, at1 = advance(r, at, rest, step, past, S4)
            x0, x1 = load(x, at), load(x, at1)
            g0, g1, y0, y1 = x0, x1, x0, x1
            if backward:
                g0, g1 = load(g, at), load(g, at1)
                if by_output:
                    y0, y1 = load(y, at), load(y, at1)
            u0, t0 = terms(x0, g0, y0, m, invstd, k, b)
            u1, t1 = terms(x1, g1, y1, m, invstd, k, b)
            if masked:
                v0, v1 = valid(mask, int64(v) * W), valid(mask, int64(v + threads) * W)
                u0, t0, u1, t1 = pick(v0, u0), pick(v0, t0), pick(v1, u1), pick(v1, t1)
            s0, s1, q0, q1 = add(s0, u0), add(s1, u1), fma(u0, t0, q0), fma(u1, t1, q1)
            r, at = advance(r1, at1, rest, step, past, S4)
            v = int32(v + 2 * threads)
        if v < end:
            x0 = load(x, at)
            g0 = y0 = x0
            if backward:
                g0 = load(g, at)
                if by_output:
                    y0 = load(y, at)
            u0, t0 = terms(x0, g0, y0, m, invstd, k, b)
            if masked:
                v0 = valid(mask, int64(v) * W)
                u0, t0 = pick(v0, u0), pick(v0, t0)
            s0, q0 = add(s0, u0), fma(u0, t0, q0)
        s, q = block_sum(total(add(s0, s1)), total(add(q0, q1)), scratch)
        if cuda.threadIdx.x == 0:
            partial[int64(part) * C + c] = s
            partial[int64(P + part) * C + c] = q

    return planes_sums


@functools.cache
def normalise(what: Variant):
    """Output of one part of one channel, last block first."""
    kind, W, threads, residual, given = what.kind, what.W, what.threads, what.residual, what.given
    io, output, affine = access(kind, W), make_output(what), make_affine(kind, given)
    load, store, valid, masked = io.load_last, io.store, io.valid, what.masked

    @kernel("TTTAAAAaiiiiiM", kind, threads, 4)
    def planes_normalise(x, res, y, stats, more, weight, bias, eps, N, C, S, chunk, flags, mask):
        c = int32(cuda.gridDim.x - 1 - cuda.blockIdx.x)
        part = int32(cuda.gridDim.y - 1 - cuda.blockIdx.y)
        m, _, k, b, _ = affine(stats, more, weight, bias, c, C, eps, flags)
        S4 = int32(S // W)
        end = int32(min(N * S4, (part + 1) * chunk))
        v = int32(part * chunk + cuda.threadIdx.x)
        r, at = first_vector(v, S4, C, S, W, c)
        rest, step, past = stride(threads, S4, C, S, W)
        while v + threads < end:
            r1, at1 = advance(r, at, rest, step, past, S4)
            x0, x1 = load(x, at), load(x, at1)
            r0, r2 = x0, x1
            if residual:
                r0, r2 = load(res, at), load(res, at1)
            z0, z1 = output(x0, r0, m, k, b), output(x1, r2, m, k, b)
            if masked:
                z0 = pick(valid(mask, int64(v) * W), z0)
                z1 = pick(valid(mask, int64(v + threads) * W), z1)
            store(y, at, z0)
            store(y, at1, z1)
            r, at = advance(r1, at1, rest, step, past, S4)
            v = int32(v + 2 * threads)
        if v < end:
            x0 = load(x, at)
            r0 = x0
            if residual:
                r0 = load(res, at)
            z0 = output(x0, r0, m, k, b)
            if masked:
                z0 = pick(valid(mask, int64(v) * W), z0)
            store(y, at, z0)

    return planes_normalise


@functools.cache
def gradient(what: Variant):
    """Input gradient (and the residual's) of one part of one channel, last block first."""
    kind, W, threads = what.kind, what.W, what.threads
    by_output, frozen = what.relu and what.residual, what.frozen
    A, io, terms, slope = ARITHMETIC[kind], access(kind, W), make_terms(what), make_gradient(what)
    load, store, affine, slopes = io.load_last, io.store, make_affine(kind, False), make_slopes(kind)
    valid, masked = io.valid, what.masked

    @kernel("TTTTTAAAAAiiiiiMI", kind, threads, 3)
    def planes_gradient(x, g, y, dx, dr, stats, weight, bias, dweight, dbias, N, C, S, chunk, flags, mask, tally):
        c = int32(cuda.gridDim.x - 1 - cuda.blockIdx.x)
        part = int32(cuda.gridDim.y - 1 - cuda.blockIdx.y)
        m, invstd, k, b, rest_m = affine(stats, stats, weight, bias, c, C, A(0), flags)
        c1 = c0 = A(0)
        if not frozen:
            if masked:
                c1, c0 = slopes(dweight[c], dbias[c], invstd, k, rest_m, int64(tally[0]))
            else:
                c1, c0 = slopes(dweight[c], dbias[c], invstd, k, rest_m, int64(N) * S)
        S4 = int32(S // W)
        end = int32(min(N * S4, (part + 1) * chunk))
        v = int32(part * chunk + cuda.threadIdx.x)
        r, at = first_vector(v, S4, C, S, W, c)
        rest, step, past = stride(threads, S4, C, S, W)
        while v < end:
            x0, g0 = load(x, at), load(g, at)
            y0 = x0
            if by_output:
                y0 = load(y, at)
            u, t = terms(x0, g0, y0, m, invstd, k, b)
            d = slope(u, t, k, c1, c0)
            if masked:
                v0 = valid(mask, int64(v) * W)
                u, d = pick(v0, u), pick(v0, d)
            if by_output:
                store(dr, at, u)
            store(dx, at, d)
            r, at = advance(r, at, rest, step, past, S4)
            v = int32(v + threads)

    return planes_gradient
