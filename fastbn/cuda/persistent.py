"""Batch norm on rows (R, C) in one launch: all blocks of the grid are on the GPU at once and meet at one barrier.

A block has a tile of columns and ``chunk`` rows of it, sums them and keeps the first ``kept`` vectors of each thread in
shared memory (26 MB over an H200); behind the barrier every block adds up the sums of its columns, in the order of the
parts, and writes its rows last first: what the caches still hold is read from there. Floor: one read and one write of
the tensor where it fits on the chip, one read more where it does not. The launch is a cooperative one, since blocks
wait for each other; ``rows`` does the same in three launches.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import make_affine, make_combine, make_keep, make_pivot, make_slopes
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.finalize import add_pair, make_again, make_resolve
from fastbn.cuda.rows import TX, place
from fastbn.cuda.simd import access, add, fma
from fastbn.cuda.sweep import Variant, make_gradient, make_output, make_terms

int32, int64 = types.int32, types.int64


def make_publish(kind: str, W: int, threads: int):
    """Add up the rows of the block, column by column, and write the sums where the other blocks find them."""
    A, scatter, half = ARITHMETIC[kind], access(kind, W).scatter, threads * W

    @device
    def publish(s, q, red, partial, part, P, V, tile, width, tx, ty, height):
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
        cuda.cg.this_grid().sync()

    return publish


def make_collect(kind: str, W: int, threads: int):
    """Behind the barrier: the sums of all parts, added slot by slot into ``red``; returns the number of slots."""
    wide_kind = "f64" if kind == "f64" else "f32"
    A, L, half = ARITHMETIC[kind], 2 if kind == "f64" else 4, threads * W
    io = access(wide_kind, L)
    recall, decode, splat, scatter = io.recall, io.decode, io.splat, io.scatter

    @device
    def collect(red, partial, P, V, tile, width):
        groups = width // L
        slots = threads // groups
        slot = cuda.threadIdx.x // groups
        at = (cuda.threadIdx.x - slot * groups) * L
        s = q = splat(A(0))
        if slot < slots and tile * width + at < V:
            p = slot
            while p < P:
                s = add(s, decode(recall(partial, int64(p) * V + tile * width + at)))
                q = add(q, decode(recall(partial, int64(P + p) * V + tile * width + at)))
                p += slots
        if slot < slots:
            scatter(red, slot * width + at, s)
            scatter(red, half + slot * width + at, q)
        cuda.syncthreads()
        return slots

    @device
    def column(red, j, width, slots):
        s = se = q = qe = A(0)
        for i in range(slots):
            s, se = add_pair(s, se, red[i * width + j], A(0))
            q, qe = add_pair(q, qe, red[half + i * width + j], A(0))
        return s, se, q, qe

    return collect, column


@functools.cache
def train(what: Variant):
    """Training forward; moves the running statistics if ``flags`` has 4."""
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    A, io, output, terms = ARITHMETIC[kind], access(kind, W), make_output(what), make_terms(what)
    load, load_last, store, splat, gather = io.load, io.load_last, io.store, io.splat, io.gather
    keep_raw, recall, pivot, resolve = io.keep, io.recall, make_pivot(kind), make_resolve(kind)
    again, combine, keep_statistics = make_again(kind, threads), make_combine(kind), make_keep(kind)
    publish, (collect, column) = make_publish(kind, W, threads), make_collect(kind, W, threads)
    wide, three, both = TX * W, 3 * TX * W, 2 * threads * W

    @device
    def settle(constants, stats, weight, bias, running_mean, running_var, c, C, j, found, moving, flags, first):
        mean, rest, _, invstd = found
        k, b = combine(invstd, rest, weight, bias, c, flags)
        constants[j], constants[wide + j], constants[2 * wide + j] = mean, k, b
        if first:
            keep, momentum, unbias = moving
            keep_statistics(stats, running_mean, running_var, c, C, found, keep, momentum, unbias, flags & 4 != 0)

    @kernel("TTTAAAAAAiiiiiiaaaai", kind, threads, 1)
    def rows_train(
        x, res, y, stats, weight, bias, running_mean, running_var, partial, C, R, P, chunk, tx_count, kept, eps, keep,
        momentum, unbias, flags,
    ):  # fmt: skip
        slab = cuda.shared.array(0, int32)
        constants = cuda.shared.array(three, A)
        red = cuda.shared.array(both, A)
        bad = cuda.shared.array(wide, int32)
        tile, part, width, tid = cuda.blockIdx.x, cuda.blockIdx.y, tx_count * W, cuda.threadIdx.x
        for j in range(tid, width, threads):
            bad[j] = 0
            if tile * width + j < C:
                constants[j] = pivot(x, tile * width + j, R, C, 1)
        cuda.syncthreads()
        tx, ty, height, at0, active = place(tx_count, threads, tile, C, W)
        end, r = int32(min(R, (part + 1) * chunk)), int32(part * chunk + ty)
        at, step = int64(r) * C + at0, int64(height) * C
        s = q = splat(A(0))
        count = int32(0)
        if active:
            m = gather(constants, tx * W)
            while r + height < end:
                x0, x1 = load(x, at), load(x, at + step)
                if count < kept:
                    keep_raw(slab, 4 * (count * threads + tid), x0)
                if count + 1 < kept:
                    keep_raw(slab, 4 * ((count + 1) * threads + tid), x1)
                u0, t0 = terms(x0, x0, x0, m, m, m, m)
                u1, t1 = terms(x1, x1, x1, m, m, m, m)
                s, q = add(add(s, u0), u1), fma(u1, t1, fma(u0, t0, q))
                at += 2 * step
                r, count = int32(r + 2 * height), int32(count + 2)
            if r < end:
                x0 = load(x, at)
                if count < kept:
                    keep_raw(slab, 4 * (count * threads + tid), x0)
                u0, t0 = terms(x0, x0, x0, m, m, m, m)
                s, q = add(s, u0), fma(u0, t0, q)
                at += step
                count = int32(count + 1)
        publish(s, q, red, partial, part, P, C, tile, width, tx, ty, height)
        slots = collect(red, partial, P, C, tile, width)
        moving = (keep, momentum, unbias)
        for j in range(tid, width, threads):
            c = tile * width + j
            if c < C:
                sd, se, qd, qe = column(red, j, width, slots)
                good, mean, rest, var, invstd = resolve(constants[j], sd, se, qd, qe, A(R), eps)
                found = (mean, rest, var, invstd)
                if good:
                    settle(
                        constants, stats, weight, bias, running_mean, running_var, c, C, j, found, moving, flags,
                        part == 0,
                    )  # fmt: skip
                else:
                    bad[j] = 1
        cuda.syncthreads()
        for j in range(width):
            if bad[j] != 0:
                c = tile * width + j
                found = again(x, c, R, C, 1, eps, red)
                if tid == 0:
                    settle(
                        constants, stats, weight, bias, running_mean, running_var, c, C, j, found, moving, flags,
                        part == 0,
                    )  # fmt: skip
        cuda.syncthreads()
        if active:
            m, k, b = gather(constants, tx * W), gather(constants, wide + tx * W), gather(constants, 2 * wide + tx * W)
            while count > 0:
                count = int32(count - 1)
                at -= step
                x0 = recall(slab, 4 * (count * threads + tid)) if count < kept else load_last(x, at)
                r0 = x0
                if residual:
                    r0 = load_last(res, at)
                store(y, at, output(x0, r0, m, k, b))

    return rows_train


@functools.cache
def backward(what: Variant):
    """Gradients of input, weight, bias (and residual). Floor: two reads and one write, and y and dr where they are."""
    kind, W, threads = what.kind, what.W, what.threads
    by_output = what.relu and what.residual
    A, io, terms, slope = ARITHMETIC[kind], access(kind, W), make_terms(what), make_gradient(what)
    load, load_last, store, splat, gather = io.load, io.load_last, io.store, io.splat, io.gather
    keep_raw, recall, encode = io.keep, io.recall, io.encode
    kept_terms = make_terms(what._replace(relu=False, residual=False))
    affine, slopes = make_affine(kind, False), make_slopes(kind)
    publish, (collect, column) = make_publish(kind, W, threads), make_collect(kind, W, threads)
    wide, six, both = TX * W, 6 * TX * W, 2 * threads * W

    @kernel("TTTTTAAAAAAiiiiiii", kind, threads, 1)
    def rows_backward(
        x, g, y, dx, dr, stats, weight, bias, dweight, dbias, partial, C, R, P, chunk, tx_count, kept, flags
    ):
        slab = cuda.shared.array(0, int32)
        constants = cuda.shared.array(six, A)
        red = cuda.shared.array(both, A)
        tile, part, width, tid = cuda.blockIdx.x, cuda.blockIdx.y, tx_count * W, cuda.threadIdx.x
        for j in range(tid, width, threads):
            if tile * width + j < C:
                m, invstd, k, b, _ = affine(stats, stats, weight, bias, tile * width + j, C, A(0), flags)
                constants[j], constants[wide + j] = m, invstd
                constants[2 * wide + j], constants[3 * wide + j] = k, b
        cuda.syncthreads()
        tx, ty, height, at0, active = place(tx_count, threads, tile, C, W)
        end, r = int32(min(R, (part + 1) * chunk)), int32(part * chunk + ty)
        at, step = int64(r) * C + at0, int64(height) * C
        second = 4 * kept * threads
        s = q = splat(A(0))
        count = int32(0)
        if active:
            m, invstd = gather(constants, tx * W), gather(constants, wide + tx * W)
            k, b = gather(constants, 2 * wide + tx * W), gather(constants, 3 * wide + tx * W)
            while r < end:
                x0, g0 = load(x, at), load_last(g, at)
                y0 = x0
                if by_output:
                    y0 = load(y, at)
                u0, t0 = terms(x0, g0, y0, m, invstd, k, b)
                if by_output:
                    store(dr, at, u0)
                if count < kept:
                    keep_raw(slab, 4 * (count * threads + tid), x0)
                    keep_raw(slab, second + 4 * (count * threads + tid), encode(u0))
                s, q = add(s, u0), fma(u0, t0, q)
                at += step
                r, count = int32(r + height), int32(count + 1)
        publish(s, q, red, partial, part, P, C, tile, width, tx, ty, height)
        slots = collect(red, partial, P, C, tile, width)
        for j in range(tid, width, threads):
            c = tile * width + j
            if c < C:
                sd, se, qd, qe = column(red, j, width, slots)
                _, invstd_c, k_c, _, rest = affine(stats, stats, weight, bias, c, C, A(0), flags)
                db = sd + se
                dw = (qd + qe) - rest * invstd_c * db
                c1_c, c0_c = slopes(dw, db, invstd_c, k_c, rest, int64(R))
                constants[4 * wide + j], constants[5 * wide + j] = c1_c, c0_c
                if part == 0:
                    dweight[c], dbias[c] = dw, db
        cuda.syncthreads()
        if active:
            m, invstd = gather(constants, tx * W), gather(constants, wide + tx * W)
            k, b = gather(constants, 2 * wide + tx * W), gather(constants, 3 * wide + tx * W)
            c1, c0 = gather(constants, 4 * wide + tx * W), gather(constants, 5 * wide + tx * W)
            while count > 0:
                count = int32(count - 1)
                at -= step
                if count < kept:
                    x0 = recall(slab, 4 * (count * threads + tid))
                    u0, t0 = kept_terms(x0, recall(slab, second + 4 * (count * threads + tid)), x0, m, invstd, k, b)
                else:
                    x0, g0 = load_last(x, at), load_last(g, at)
                    y0 = x0
                    if by_output:
                        y0 = load_last(y, at)
                    u0, t0 = terms(x0, g0, y0, m, invstd, k, b)
                store(dx, at, slope(u0, t0, k, c1, c0))

    return rows_backward
