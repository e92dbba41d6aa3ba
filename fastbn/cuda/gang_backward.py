"""Gradients of batch norm on channels-first arrays, a channel to a gang of blocks: ``gang`` the other way round."""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import make_affine, make_block_sum, make_slopes
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.fetch import PARTS, close, fetch, none_left, one_left, three_left, two_left
from fastbn.cuda.finalize import gradients
from fastbn.cuda.gang import share
from fastbn.cuda.gang_sums import make_gang_sum
from fastbn.cuda.planes import advance, first_vector, stride
from fastbn.cuda.simd import access, add, fma, total
from fastbn.cuda.sweep import Variant, make_gradient, make_terms

int32, int64 = types.int32, types.int64


def make_begin(W: int, threads: int):
    """Begin to read a block's share of x and of the gradient in its first channel."""

    @device
    def begin(x, g, slab, second, v, low, end, step, S4, C, S, c):
        r, at = first_vector(v, S4, C, S, W, c)
        rest, jump, past = stride(threads, S4, C, S, W)
        last = low
        for _ in range(PARTS):
            last = int32(min(end, last + step))
            while v < last:
                fetch(slab, 4 * (v - low), x, at)
                fetch(slab, second + 4 * (v - low), g, at)
                r, at = advance(r, at, rest, jump, past, S4)
                v = int32(v + threads)
            close()

    return begin


def make_sums(what: Variant):
    """Sum what has arrived, group by group; where a ReLU decides, what it lets through takes the gradient's place."""
    kind, W, threads, by_output = what.kind, what.W, what.threads, what.relu and what.residual
    A, io, terms, gated = ARITHMETIC[kind], access(kind, W), make_terms(what), what.relu
    load, store, splat, keep_raw, encode, recall = io.load, io.store, io.splat, io.keep, io.encode, io.recall

    @device
    def some(y, dr, slab, second, constants, s, q, v, low, last, r, at, strides, S4):
        m, invstd, k, b = constants
        rest, jump, past = strides
        while v < last:
            place = 4 * (v - low)
            x0, g0 = recall(slab, place), recall(slab, second + place)
            y0 = x0
            if by_output:
                y0 = load(y, at)
            u, t = terms(x0, g0, y0, m, invstd, k, b)
            if by_output:
                store(dr, at, u)
                r, at = advance(r, at, rest, jump, past, S4)
            if gated:
                keep_raw(slab, second + place, encode(u))
            s, q = add(s, u), fma(u, t, q)
            v = int32(v + threads)
        return s, q, v, r, at

    @device
    def sums(y, dr, slab, second, constants, v, low, end, step, S4, C, S, c):
        s = q = splat(A(0))
        r, at = first_vector(v, S4, C, S, W, c)
        strides = stride(threads, S4, C, S, W)
        three_left()
        last = min(end, low + step)
        s, q, v, r, at = some(y, dr, slab, second, constants, s, q, v, low, last, r, at, strides, S4)
        two_left()
        last = min(end, low + 2 * step)
        s, q, v, r, at = some(y, dr, slab, second, constants, s, q, v, low, last, r, at, strides, S4)
        one_left()
        last = min(end, low + 3 * step)
        s, q, v, r, at = some(y, dr, slab, second, constants, s, q, v, low, last, r, at, strides, S4)
        none_left()
        s, q, v, r, at = some(y, dr, slab, second, constants, s, q, v, low, end, r, at, strides, S4)
        return s, q

    return sums


def make_write(what: Variant):
    """Write a block's share of the input's gradient, and begin to read the next channel's tensors if ``more``."""
    kind, W, threads, slope = what.kind, what.W, what.threads, make_gradient(what)
    io, terms = access(kind, W), make_terms(what._replace(relu=False, residual=False))
    store, recall = io.store, io.recall

    @device
    def write(x, g, dx, slab, second, constants, v, low, end, step, S4, C, S, c, ahead, more):
        m, invstd, k, c1, c0 = constants
        r, at = first_vector(v, S4, C, S, W, c)
        rest, jump, past = stride(threads, S4, C, S, W)
        last = low
        for _ in range(PARTS):
            last = int32(min(end, last + step))
            while v < last:
                place = 4 * (v - low)
                x0 = recall(slab, place)
                u, t = terms(x0, recall(slab, second + place), x0, m, invstd, k, k)
                store(dx, at, slope(u, t, k, c1, c0))
                if more:
                    fetch(slab, place, x, at + ahead)
                    fetch(slab, second + place, g, at + ahead)
                r, at = advance(r, at, rest, jump, past, S4)
                v = int32(v + threads)
            close()

    return write


@functools.cache
def backward(what: Variant):
    """Gradients of input, weight, bias (and residual). Floor: two reads and one write, and y and dr where they are."""
    kind, W, threads, A = what.kind, what.W, what.threads, ARITHMETIC[what.kind]
    begin, sums, write = make_begin(W, threads), make_sums(what), make_write(what)
    affine, slopes, block_sum = make_affine(kind, False), make_slopes(kind), make_block_sum(kind, threads)
    gang_sum, sizes = make_gang_sum(kind, what.alone, True), 2 * (threads // 32)

    @kernel("TTTTTAAAAAAiiiiiii", kind, threads, what.layers, together=not what.alone)
    def gang_backward(x, g, y, dx, dr, stats, weight, bias, dweight, dbias, partial, N, C, S, G, gangs, chunk, flags):
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        tid, n, S4, second = int32(cuda.threadIdx.x), int64(N) * S, int32(S // W), int32(4 * chunk)
        gang, part, low, end, step = share(G, chunk, N, S4, threads)
        v, ahead = int32(low + tid), int64(gangs) * S
        c, turn = gang, int32(0)
        begin(x, g, slab, second, v, low, end, step, S4, C, S, c)
        following = affine(stats, stats, weight, bias, c, C, A(0), flags)
        while c < C:
            m, invstd, k, b, rest = following
            s, q = sums(y, dr, slab, second, (m, invstd, k, b), v, low, end, step, S4, C, S, c)
            if c + gangs < C:
                following = affine(stats, stats, weight, bias, int32(c + gangs), C, A(0), flags)
            s, q = block_sum(total(s), total(q), scratch)
            s, se, q, qe = gang_sum(partial, gang, G, part, turn, s, q)
            db, dw = gradients(s, se, q, qe, rest * invstd)
            if tid == 0 and part == 0:
                dweight[c], dbias[c] = dw, db
            c1, c0 = slopes(dw, db, invstd, k, rest, n)
            constants = (m, invstd, k, c1, c0)
            write(x, g, dx, slab, second, constants, v, low, end, step, S4, C, S, c, ahead, c + gangs < C)
            c, turn = int32(c + gangs), int32(turn + 1)

    return gang_backward
