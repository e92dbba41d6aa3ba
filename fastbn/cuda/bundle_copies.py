"""How a block of a bundle's gang brings its rows into shared memory: all on their way at once, in groups.

A thread begins to copy its rows of a bundle in ``PARTS`` groups (``fetch``) and sums them as they arrive; where it has
written a row, the next bundle's takes its place. With loads into registers, four rows at a time, a thread waited for
memory four times a bundle, and in backward seven times: of the 28 us that 7 x 7 took in float32 on an H200, 12.
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.fetch import PARTS, close, fetch, none_left, one_left, three_left, two_left
from fastbn.cuda.simd import access, add, fma
from fastbn.cuda.sweep import Variant, make_terms

int32 = types.int32


def make_steps(together: int):
    """(chunk, height) -> steps of ``together`` rows that a group has."""

    @device
    def steps(chunk, height):
        rows = int32((chunk + height - 1) // height)
        return int32((rows + PARTS * together - 1) // (PARTS * together))

    return steps


def make_begin(threads: int, together: int, tensors: int):
    """Begin to copy a thread's rows of one tensor or two; the second one's lie ``second`` further."""
    two = tensors == 2

    @device
    def begin(x, g, slab, second, r, end, height, at, step, steps):
        k = int32(4 * cuda.threadIdx.x)
        for _ in range(PARTS):
            for _ in range(steps * together):
                if r < end:
                    fetch(slab, k, x, at)
                    if two:
                        fetch(slab, second + k, g, at)
                r, k = int32(r + height), int32(k + 4 * threads)
                at += step
            close()

    return begin


def make_sums(what: Variant, together: int):
    """Sums by lane of a thread's rows, group by group as they arrive."""
    kind, W, threads = what.kind, what.W, what.threads
    io, terms, zero = access(kind, W), make_terms(what), ARITHMETIC[kind](0)
    recall, splat = io.recall, io.splat

    @device
    def some(slab, m, s, q, r, end, height, k, steps):
        for _ in range(steps * together):
            if r < end:
                raw = recall(slab, k)
                u, t = terms(raw, raw, raw, m, m, m, m)
                s, q = add(s, u), fma(u, t, q)
            r, k = int32(r + height), int32(k + 4 * threads)
        return s, q, r, k

    @device
    def sums(slab, m, r, end, height, steps):
        s, q, k = splat(zero), splat(zero), int32(4 * cuda.threadIdx.x)
        three_left()
        s, q, r, k = some(slab, m, s, q, r, end, height, k, steps)
        two_left()
        s, q, r, k = some(slab, m, s, q, r, end, height, k, steps)
        one_left()
        s, q, r, k = some(slab, m, s, q, r, end, height, k, steps)
        none_left()
        s, q, r, k = some(slab, m, s, q, r, end, height, k, steps)
        return s, q

    return sums


def make_sums_gradients(what: Variant, together: int):
    """Sums by lane of a thread's gradients, and the residual's gradient written.

    Where a ReLU decides, what it lets through takes the gradient's place. The rows of y are asked for before those of
    x and the gradient are waited for, ``together`` at once.
    """
    kind, W, threads, by_output = what.kind, what.W, what.threads, what.relu and what.residual
    io, terms, A, gated = access(kind, W), make_terms(what), ARITHMETIC[what.kind], what.relu
    load, store, splat, keep_raw, encode, recall = io.load, io.store, io.splat, io.keep, io.encode, io.recall

    @device
    def take(slab, second, k, its, at, m, scale, b, dr):
        raw, own = recall(slab, k), recall(slab, second + k)
        u, t = terms(raw, own, its, m, A(1), scale, b)
        if by_output:
            store(dr, at, u)
        if gated:
            keep_raw(slab, second + k, encode(u))
        return u, t

    @device
    def some(y, dr, slab, second, constants, s, q, r, end, height, at, step, k, steps):
        m, scale, b = constants
        nothing = encode(splat(A(0)))
        for _ in range(steps):
            y0 = y1 = nothing
            if by_output:
                if r < end:
                    y0 = load(y, at)
                if r + height < end:
                    y1 = load(y, at + step)
            for its in (y0, y1) if together == 2 else (y0,):
                if r < end:
                    u, t = take(slab, second, k, its, at, m, scale, b, dr)
                    s, q = add(s, u), fma(u, t, q)
                r, k = int32(r + height), int32(k + 4 * threads)
                at += step
        return s, q, r, at, k

    @device
    def sums(y, dr, slab, second, constants, r, end, height, at, step, steps):
        s, q, k = splat(A(0)), splat(A(0)), int32(4 * cuda.threadIdx.x)
        three_left()
        s, q, r, at, k = some(y, dr, slab, second, constants, s, q, r, end, height, at, step, k, steps)
        two_left()
        s, q, r, at, k = some(y, dr, slab, second, constants, s, q, r, end, height, at, step, k, steps)
        one_left()
        s, q, r, at, k = some(y, dr, slab, second, constants, s, q, r, end, height, at, step, k, steps)
        none_left()
        s, q, r, at, k = some(y, dr, slab, second, constants, s, q, r, end, height, at, step, k, steps)
        return s, q

    return sums
