"""Batch norm on rows (R, C), and on channels-first arrays whose runs are short or odd, split: sums, finalize, apply.

Both are a matrix of R rows and V columns; column v belongs to channel (v // S) % C. V is C*S, or a multiple of it where
one row would not be a whole number of 128-bit vectors. A tile is TX vectors wide and threads // TX rows high, a block
goes down ``chunk`` rows. Per-column constants are worked out once a block, by all threads, in shared memory.

Floor of the sums: one read a tensor; of apply: one read and one write a tensor, part of the read from L2, since apply
goes through the blocks backwards. ``partial`` is (2, P, V), added up in the order of its rows by ``finalize``. A mask
has one byte a row, so that S = 1 there.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import make_affine, make_pivot, make_pivot_at, make_slopes
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.simd import access, add, fma, pick
from fastbn.cuda.sweep import Variant, make_gradient, make_output, make_terms

int32, int64 = types.int32, types.int64
TX = 32  # most vectors side by side in a tile


@device
def place(tx_count, threads, tile, V, W):
    """Where a thread works: (vector in the tile, row in the tile, rows of a tile, column, is there such a column)."""
    ty = cuda.threadIdx.x // tx_count
    tx = cuda.threadIdx.x - ty * tx_count
    height = threads // tx_count
    column = (tile * tx_count + tx) * W
    return int32(tx), int32(ty), int32(height), int32(column), ty < height and column < V


def make_reduce(kind: str, W: int, threads: int):
    """Add up the sums of a tile's rows, column by column, and write them as this part's."""
    A, scatter, half = ARITHMETIC[kind], access(kind, W).scatter, threads * W

    @device
    def reduce(s, q, red, partial, part, P, V, tile, width, tx, ty, height):
        if ty < height:
            scatter(red, ty * width + tx * W, s)
            scatter(red, half + ty * width + tx * W, q)
        cuda.syncthreads()
        for j in range(cuda.threadIdx.x, width, threads):
            v = tile * width + j
            if v < V:
                a = b = A(0)
                for i in range(height):
                    a += red[i * width + j]
                    b += red[half + i * width + j]
                partial[int64(part) * V + v] = a
                partial[int64(P + part) * V + v] = b

    return reduce


@functools.cache
def sums(what: Variant):
    """Sums of u and u*t by column over one part of the rows (see ``sweep.make_terms``)."""
    kind, W, threads, backward = what.kind, what.W, what.threads, what.backward
    by_output = what.relu and what.residual
    A, io, terms = ARITHMETIC[kind], access(kind, W), make_terms(what)
    load, splat, gather, pivot = io.load, io.splat, io.gather, make_pivot(kind)
    affine, reduce = make_affine(kind, False), make_reduce(kind, W, threads)
    wide, four, both = TX * W, 4 * TX * W, 2 * threads * W
    pivot_at, masked = make_pivot_at(kind), what.masked

    @kernel("TTTAAAAiiiiiiiiiMI", kind, threads, 4 if not backward else 3 if W < 8 else 2)
    def rows_sums(x, g, y, stats, weight, bias, partial, N, C, S, R, V, P, chunk, tx_count, flags, mask, tally):
        constants = cuda.shared.array(four, A)
        red = cuda.shared.array(both, A)
        tile, part, width = cuda.blockIdx.x, cuda.blockIdx.y, tx_count * W
        for j in range(cuda.threadIdx.x, width, threads):
            v = tile * width + j
            if v < V:
                c = (v // S) % C
                if backward:
                    m, invstd, k, b, _ = affine(stats, stats, weight, bias, c, C, A(0), flags)
                    constants[j], constants[wide + j] = m, invstd
                    constants[2 * wide + j], constants[3 * wide + j] = k, b
                elif masked:
                    constants[j] = pivot_at(x, c, C, S, tally)
                else:
                    constants[j] = pivot(x, c, N, C, S)
        cuda.syncthreads()
        tx, ty, height, column, active = place(tx_count, threads, tile, V, W)
        s0 = s1 = q0 = q1 = splat(A(0))
        if active:
            m = invstd = k = b = gather(constants, tx * W)
            if backward:
                invstd, k = gather(constants, wide + tx * W), gather(constants, 2 * wide + tx * W)
                b = gather(constants, 3 * wide + tx * W)
            end = int32(min(R, (part + 1) * chunk))
            r = int32(part * chunk + ty)
            at, step = int64(r) * V + column, int64(height) * V
            while r + height < end:
                x0, x1 = load(x, at), load(x, at + step)
                g0, g1, y0, y1 = x0, x1, x0, x1
                if backward:
                    g0, g1 = load(g, at), load(g, at + step)
                    if by_output:
                        y0, y1 = load(y, at), load(y, at + step)
                u0, t0 = terms(x0, g0, y0, m, invstd, k, b)
                u1, t1 = terms(x1, g1, y1, m, invstd, k, b)
                if masked:
                    v0, v1 = mask[r], mask[r + height]
                    u0, t0, u1, t1 = pick(v0, u0), pick(v0, t0), pick(v1, u1), pick(v1, t1)
                s0, s1, q0, q1 = add(s0, u0), add(s1, u1), fma(u0, t0, q0), fma(u1, t1, q1)
                at += 2 * step
                r = int32(r + 2 * height)
            if r < end:
                x0 = load(x, at)
                g0 = y0 = x0
                if backward:
                    g0 = load(g, at)
                    if by_output:
                        y0 = load(y, at)
                u0, t0 = terms(x0, g0, y0, m, invstd, k, b)
                if masked:
                    u0, t0 = pick(mask[r], u0), pick(mask[r], t0)
                s0, q0 = add(s0, u0), fma(u0, t0, q0)
        reduce(add(s0, s1), add(q0, q1), red, partial, part, P, V, tile, width, tx, ty, height)

    return rows_sums


@functools.cache
def normalise(what: Variant):
    """Output of one part of the rows, last block first."""
    kind, W, threads, residual, given = what.kind, what.W, what.threads, what.residual, what.given
    A, io, output, affine = ARITHMETIC[kind], access(kind, W), make_output(what), make_affine(kind, given)
    load, store, gather, masked = io.load_last, io.store, io.gather, what.masked
    wide, three = TX * W, 3 * TX * W

    @kernel("TTTAAAAaiiiiiiiM", kind, threads, 3 if W < 8 else 2)
    def rows_normalise(x, res, y, stats, more, weight, bias, eps, C, S, R, V, chunk, tx_count, flags, mask):
        constants = cuda.shared.array(three, A)
        tile, width = cuda.gridDim.x - 1 - cuda.blockIdx.x, tx_count * W
        part = cuda.gridDim.y - 1 - cuda.blockIdx.y
        for j in range(cuda.threadIdx.x, width, threads):
            v = tile * width + j
            if v < V:
                m, _, k, b, _ = affine(stats, more, weight, bias, (v // S) % C, C, eps, flags)
                constants[j], constants[wide + j], constants[2 * wide + j] = m, k, b
        cuda.syncthreads()
        tx, ty, height, column, active = place(tx_count, threads, tile, V, W)
        if active:
            m, k = gather(constants, tx * W), gather(constants, wide + tx * W)
            b = gather(constants, 2 * wide + tx * W)
            end = int32(min(R, (part + 1) * chunk))
            r = int32(part * chunk + ty)
            at, step = int64(r) * V + column, int64(height) * V
            while r + height < end:
                x0, x1 = load(x, at), load(x, at + step)
                r0, r1 = x0, x1
                if residual:
                    r0, r1 = load(res, at), load(res, at + step)
                z0, z1 = output(x0, r0, m, k, b), output(x1, r1, m, k, b)
                if masked:
                    z0, z1 = pick(mask[r], z0), pick(mask[r + height], z1)
                store(y, at, z0)
                store(y, at + step, z1)
                at += 2 * step
                r = int32(r + 2 * height)
            if r < end:
                x0 = load(x, at)
                r0 = x0
                if residual:
                    r0 = load(res, at)
                z0 = output(x0, r0, m, k, b)
                if masked:
                    z0 = pick(mask[r], z0)
                store(y, at, z0)

    return rows_normalise


@functools.cache
def gradient(what: Variant):
    """Input gradient (and the residual's) of one part of the rows, last block first."""
    kind, W, threads = what.kind, what.W, what.threads
    by_output, frozen = what.relu and what.residual, what.frozen
    A, io, terms, slope = ARITHMETIC[kind], access(kind, W), make_terms(what), make_gradient(what)
    load, store, gather = io.load_last, io.store, io.gather
    affine, slopes = make_affine(kind, False), make_slopes(kind)
    wide, six = TX * W, 6 * TX * W

    masked = what.masked

    @kernel("TTTTTAAAAAiiiiiiiiMI", kind, threads, 2)
    def rows_gradient(
        x, g, y, dx, dr, stats, weight, bias, dweight, dbias, N, C, S, R, V, chunk, tx_count, flags, mask,
        tally,
    ):  # fmt: skip
        constants = cuda.shared.array(six, A)
        tile, width = cuda.gridDim.x - 1 - cuda.blockIdx.x, tx_count * W
        part = cuda.gridDim.y - 1 - cuda.blockIdx.y
        for j in range(cuda.threadIdx.x, width, threads):
            v = tile * width + j
            if v < V:
                c = (v // S) % C
                m, invstd, k, b, rest = affine(stats, stats, weight, bias, c, C, A(0), flags)
                constants[j], constants[wide + j] = m, invstd
                constants[2 * wide + j], constants[3 * wide + j] = k, b
                if not frozen:
                    n = int64(N) * S
                    if masked:
                        n = int64(tally[0])
                    c1, c0 = slopes(dweight[c], dbias[c], invstd, k, rest, n)
                    constants[4 * wide + j], constants[5 * wide + j] = c1, c0
        cuda.syncthreads()
        tx, ty, height, column, active = place(tx_count, threads, tile, V, W)
        if active:
            m, invstd = gather(constants, tx * W), gather(constants, wide + tx * W)
            k, b = gather(constants, 2 * wide + tx * W), gather(constants, 3 * wide + tx * W)
            c1, c0 = gather(constants, 4 * wide + tx * W), gather(constants, 5 * wide + tx * W)
            end = int32(min(R, (part + 1) * chunk))
            r = int32(part * chunk + ty)
            at, step = int64(r) * V + column, int64(height) * V
            while r < end:
                x0, g0 = load(x, at), load(g, at)
                y0 = x0
                if by_output:
                    y0 = load(y, at)
                u, t = terms(x0, g0, y0, m, invstd, k, b)
                d = slope(u, t, k, c1, c0)
                if masked:
                    u, d = pick(mask[r], u), pick(mask[r], d)
                if by_output:
                    store(dr, at, u)
                store(dx, at, d)
                at += step
                r = int32(r + height)

    return rows_gradient
