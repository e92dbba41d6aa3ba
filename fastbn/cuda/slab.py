"""Batch norm on channels-first arrays, a channel to a block that keeps it in shared memory: one read, one write.

Training forward moves 2 bytes a byte of tensor, backward 3: the floor. No block waits for another, so any grid runs:
its second axis goes over batches (ghosts) that lie behind each other and have statistics of their own, 4*C each.
Each thread reads back only what it kept itself; small tensors whose runs are no whole vectors are read again instead,
from the caches (not ``kept``). For channels of up to a block's shared memory (227 KB on sm_90), in
backward half of that, and enough channels to go round the multiprocessors; else ``planes``.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import (
    fold,
    keep_statistics,
    make_block_sum,
    make_combine,
    make_parameters,
    make_running,
    make_slopes,
)
from fastbn.cuda.counted import make_counted
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.finalize import gradients, make_again, make_resolve
from fastbn.cuda.planes import advance, first_vector, stride
from fastbn.cuda.simd import access, add, fma, total
from fastbn.cuda.sweep import Variant, make_gradient, make_only, make_output, make_terms

int32, int64 = types.int32, types.int64


@device
def batch_channel(N, C):
    """The channel of a block as if all batches were one tensor's first; 32 bits, since registers are scarce."""
    return int32(cuda.blockIdx.x + cuda.blockIdx.y * N * C)


@device
def batch_stats(C):
    """Where a block's statistics begin."""
    return int64(cuda.blockIdx.y) * 4 * C + cuda.blockIdx.x


def together(what: Variant) -> int:
    """Blocks that registers must allow on a multiprocessor: 1024 threads of them, so that one loads while one writes.

    Under a mask that many would spill.
    """
    return 1 if what.masked else 1024 // what.threads


def make_write(what: Variant):
    """Normalise a channel, from what was kept of it or read again."""
    W, threads, residual, kept = what.W, what.threads, what.residual, what.kept
    io, output, only = access(what.kind, W), make_output(what), make_only(what)
    load_last, store, recall = io.load_last, io.store, io.recall

    @device
    def write(x, res, y, slab, mask, m, k, b, end, S4, C, S, c):
        v = int32(cuda.threadIdx.x)
        r, at = first_vector(v, S4, C, S, W, c)
        rest_step, step, past = stride(threads, S4, C, S, W)
        while v < end:
            if kept:  # noqa: SIM108  (the two have different types where vectors are scalars)
                x0 = recall(slab, 4 * v)
            else:
                x0 = load_last(x, at)
            r0 = x0
            if residual:
                r0 = load_last(res, at)
            store(y, at, only(mask, v, output(x0, r0, m, k, b)))
            r, at = advance(r, at, rest_step, step, past, S4)
            v = int32(v + threads)

    return write


@functools.cache
def train(what: Variant):
    """Training forward; moves the running statistics if ``flags`` has 4 (one batch). Floor: one read and one write."""
    kind, W, threads, write = what.kind, what.W, what.threads, make_write(what)
    A, io, terms = ARITHMETIC[kind], access(kind, W), make_terms(what)
    load, splat, keep_raw = io.load, io.splat, io.keep
    block_sum, resolve, only = make_block_sum(kind, threads), make_resolve(kind, what.masked), make_only(what)
    again, parameters, running = make_again(kind, threads, 0, what.masked), make_parameters(kind), make_running(kind)
    sizes, kept, (pivot, values, moving) = 2 * (threads // 32), what.kept, make_counted(kind, what.masked)
    # The weight and the bias: float64 and masks would spill, and of the smallest blocks fewer would fit.
    early = kind != "f64" and not what.masked and threads > 128

    @kernel("TTTAAAAAiiiaaaaiMI", kind, threads, together(what))
    def slab_train(
        x, res, y, stats, weight, bias, running_mean, running_var, N, C, S, eps, keep, momentum, unbias, flags, mask,
        tally,
    ):  # fmt: skip
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        c, tid, w, b = batch_channel(N, C), cuda.threadIdx.x, A(1), A(0)
        if early:
            w, b = parameters(weight, bias, cuda.blockIdx.x, flags)
        m = pivot(x, c, N, C, S, tally)
        S4 = int32(S // W)
        end, v = int32(N * S4), int32(tid)
        r, at = first_vector(v, S4, C, S, W, c)
        rest_step, step, past = stride(threads, S4, C, S, W)
        s = q = splat(A(0))
        while v + 3 * threads < end:
            r, at1 = advance(r, at, rest_step, step, past, S4)
            r, at2 = advance(r, at1, rest_step, step, past, S4)
            r, at3 = advance(r, at2, rest_step, step, past, S4)
            x0, x1, x2, x3 = load(x, at), load(x, at1), load(x, at2), load(x, at3)
            if kept:
                keep_raw(slab, 4 * v, x0)
                keep_raw(slab, 4 * (v + threads), x1)
                keep_raw(slab, 4 * (v + 2 * threads), x2)
                keep_raw(slab, 4 * (v + 3 * threads), x3)
            for raw in (x0, x1, x2, x3):
                u, t = terms(raw, raw, raw, m, m, m, m)
                u, t = only(mask, v, u), only(mask, v, t)
                s, q = add(s, u), fma(u, t, q)
                v = int32(v + threads)
            r, at = advance(r, at3, rest_step, step, past, S4)
        while v < end:
            x0 = load(x, at)
            if kept:
                keep_raw(slab, 4 * v, x0)
            u, t = terms(x0, x0, x0, m, m, m, m)
            u, t = only(mask, v, u), only(mask, v, t)
            s, q = add(s, u), fma(u, t, q)
            r, at = advance(r, at, rest_step, step, past, S4)
            v = int32(v + threads)
        sum_d, sum_d2 = block_sum(total(s), total(q), scratch)
        n = A(values(N, S, tally))
        good, mean, rest, var, invstd = resolve(m, sum_d, A(0), sum_d2, A(0), n, eps)
        if not good:
            mean, rest, var, invstd = again(x, mask, n, c, N, C, S, eps, scratch)
        if tid == 0:
            found, (moves, unbias) = (mean, rest, var, invstd), moving(unbias, flags, tally)
            place, old = batch_stats(C), running(running_mean, running_var, cuda.blockIdx.x, flags)
            keep_statistics(stats, running_mean, running_var, place, C, found, old, keep, momentum, unbias, moves)
        if not early:
            w, b = parameters(weight, bias, cuda.blockIdx.x, flags)
        k, b = fold(invstd, rest, w, b)
        write(x, res, y, slab, mask, mean, k, b, end, S4, C, S, c)

    return slab_train


def make_second(what: Variant):
    """The pair (u, t) of a vector for the second time: from what was kept of it, or read again."""
    io, kept, by_output = access(what.kind, what.W), what.kept, what.relu and what.residual
    recall, load_last = io.recall, io.load_last
    terms = make_terms(what._replace(relu=False, residual=False) if kept else what)

    @device
    def second(x, g, y, slab, half, v, at, m, invstd, k, b):
        if kept:
            x0 = recall(slab, 4 * v)
            return terms(x0, recall(slab, half + 4 * v), x0, m, invstd, k, b)
        else:
            x0, g0 = load_last(x, at), load_last(g, at)
            y0 = x0
            if by_output:
                y0 = load_last(y, at)
            return terms(x0, g0, y0, m, invstd, k, b)

    return second


@functools.cache
def backward(what: Variant):
    """Gradients of input, weight, bias (and residual). Floor: two reads and one write, and y and dr where they are."""
    kind, W, threads, by_output = what.kind, what.W, what.threads, what.relu and what.residual
    A, io, terms, slope = ARITHMETIC[kind], access(kind, W), make_terms(what), make_gradient(what)
    load, load_last, store, splat, keep_raw = io.load, io.load_last, io.store, io.splat, io.keep
    encode, again = io.encode, make_second(what)
    combine, block_sum, slopes = make_combine(kind), make_block_sum(kind, threads), make_slopes(kind)
    sizes, kept, only = 2 * (threads // 32), what.kept, make_only(what)
    values = make_counted(kind, what.masked and not what.frozen).values  # nobody counts where statistics were given

    @kernel("TTTTTAAAAAiiiiMI", kind, threads, together(what))
    def slab_backward(x, g, y, dx, dr, stats, weight, bias, dweight, dbias, N, C, S, flags, mask, tally):
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        c, own, tid = batch_channel(N, C), batch_stats(C), cuda.threadIdx.x
        m, invstd, rest = stats[own], stats[C + own], stats[3 * C + own]
        k, b = combine(invstd, rest, weight, bias, cuda.blockIdx.x, flags)
        S4 = int32(S // W)
        end, v = int32(N * S4), int32(tid)
        r, at = first_vector(v, S4, C, S, W, c)
        rest_step, step, past = stride(threads, S4, C, S, W)
        s = q = splat(A(0))
        second = 4 * end
        while v + threads < end:
            r, at1 = advance(r, at, rest_step, step, past, S4)
            x0, x1, g0, g1 = load(x, at), load(x, at1), load_last(g, at), load_last(g, at1)
            y0, y1 = x0, x1
            if by_output:
                y0, y1 = load(y, at), load(y, at1)
            u0, t0 = terms(x0, g0, y0, m, invstd, k, b)
            u1, t1 = terms(x1, g1, y1, m, invstd, k, b)
            u0, t0 = only(mask, v, u0), only(mask, v, t0)
            u1, t1 = only(mask, v + threads, u1), only(mask, v + threads, t1)
            if by_output:
                store(dr, at, u0)
                store(dr, at1, u1)
            if kept:
                keep_raw(slab, 4 * v, x0)
                keep_raw(slab, 4 * (v + threads), x1)
                keep_raw(slab, second + 4 * v, encode(u0))
                keep_raw(slab, second + 4 * (v + threads), encode(u1))
            s, q = add(add(s, u0), u1), fma(u1, t1, fma(u0, t0, q))
            r, at = advance(r, at1, rest_step, step, past, S4)
            v = int32(v + 2 * threads)
        if v < end:
            x0, g0 = load(x, at), load_last(g, at)
            y0 = x0
            if by_output:
                y0 = load(y, at)
            u0, t0 = terms(x0, g0, y0, m, invstd, k, b)
            u0, t0 = only(mask, v, u0), only(mask, v, t0)
            if by_output:
                store(dr, at, u0)
            if kept:
                keep_raw(slab, 4 * v, x0)
                keep_raw(slab, second + 4 * v, encode(u0))
            s, q = add(s, u0), fma(u0, t0, q)
        db, dw = block_sum(total(s), total(q), scratch)
        db, dw = gradients(db, A(0), dw, A(0), rest * invstd)
        if tid == 0:
            own = int64(cuda.blockIdx.y) * C + cuda.blockIdx.x
            dweight[own], dbias[own] = dw, db
        c1, c0 = slopes(dw, db, invstd, k, rest, values(N, S, tally))
        v, (r, at) = int32(tid), first_vector(int32(tid), S4, C, S, W, c)
        while v < end:
            u, t = again(x, g, y, slab, second, v, at, m, invstd, k, b)
            store(dx, at, only(mask, v, slope(u, t, k, c1, c0)))
            r, at = advance(r, at, rest_step, step, past, S4)
            v = int32(v + threads)

    return slab_backward
