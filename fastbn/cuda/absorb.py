"""A thread's rows in the one-launch kernel (``persistent``): summed, and the first of them kept on the chip."""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.simd import access, add, fma, pick
from fastbn.cuda.sweep import Variant, make_gradient, make_terms

int32 = types.int32


def make_row_only(what: Variant):
    """(mask, row, a) -> a, with zeros in a row that the mask excludes."""
    masked = what.masked

    @device
    def only(mask, r, a):
        if masked:
            return pick(mask[r], a)
        else:
            return a

    return only


def make_absorb(what: Variant):
    """Sum a thread's rows and keep the first of them; returns the sums, how many rows, and where they end.

    Four rows at once: 512 threads with two would have 16 KB on their way a multiprocessor, less than it takes to keep
    4.8 TB/s busy over the memory's latency (32 KB and more).
    """
    kind, W, threads = what.kind, what.W, what.threads
    io, terms = access(kind, W), make_terms(what)
    load, splat, keep_raw, zero, only = io.load, io.splat, io.keep, ARITHMETIC[kind](0), make_row_only(what)

    @device
    def absorb(x, slab, m, at, step, r, end, height, kept, mask):
        tid, count = cuda.threadIdx.x, int32(0)
        s = q = splat(zero)
        while r + 3 * height < end:
            x0, x1, x2, x3 = load(x, at), load(x, at + step), load(x, at + 2 * step), load(x, at + 3 * step)
            for raw in (x0, x1, x2, x3):
                if count < kept:
                    keep_raw(slab, 4 * (count * threads + tid), raw)
                u, t = terms(raw, raw, raw, m, m, m, m)
                u, t = only(mask, r, u), only(mask, r, t)
                s, q = add(s, u), fma(u, t, q)
                r, count = int32(r + height), int32(count + 1)
            at += 4 * step
        while r < end:
            x0 = load(x, at)
            if count < kept:
                keep_raw(slab, 4 * (count * threads + tid), x0)
            u, t = terms(x0, x0, x0, m, m, m, m)
            u, t = only(mask, r, u), only(mask, r, t)
            s, q = add(s, u), fma(u, t, q)
            at += step
            r, count = int32(r + height), int32(count + 1)
        return s, q, count, at

    return absorb


def make_absorb_gradients(what: Variant):
    """Sum a thread's rows, two at once, write the residual's gradient, and keep the first rows; as ``make_absorb``."""
    kind, W, threads, by_output = what.kind, what.W, what.threads, what.relu and what.residual
    io, terms, zero, only = access(kind, W), make_terms(what), ARITHMETIC[kind](0), make_row_only(what)
    load, load_last, store, splat, keep_raw, encode = io.load, io.load_last, io.store, io.splat, io.keep, io.encode

    @device
    def take(raw, own, its, slab, at, r, count, kept, mask, constants, dr):
        m, invstd, k, b = constants
        place, second = 4 * (count * threads + cuda.threadIdx.x), 4 * kept * threads
        u, t = terms(raw, own, its, m, invstd, k, b)
        u, t = only(mask, r, u), only(mask, r, t)
        if by_output:
            store(dr, at, u)
        if count < kept:
            keep_raw(slab, place, raw)
            keep_raw(slab, second + place, encode(u))
        return u, t

    @device
    def absorb(x, g, y, dr, slab, constants, at, step, r, end, height, kept, mask):
        count = int32(0)
        s = q = splat(zero)
        while r + height < end:
            x0, x1, g0, g1 = load(x, at), load(x, at + step), load_last(g, at), load_last(g, at + step)
            y0, y1 = x0, x1
            if by_output:
                y0, y1 = load(y, at), load(y, at + step)
            for raw, own, its in ((x0, g0, y0), (x1, g1, y1)):
                u, t = take(raw, own, its, slab, at, r, count, kept, mask, constants, dr)
                s, q = add(s, u), fma(u, t, q)
                at += step
                r, count = int32(r + height), int32(count + 1)
        if r < end:
            x0, g0 = load(x, at), load_last(g, at)
            y0 = x0
            if by_output:
                y0 = load(y, at)
            u, t = take(x0, g0, y0, slab, at, r, count, kept, mask, constants, dr)
            s, q = add(s, u), fma(u, t, q)
            at += step
            count = int32(count + 1)
        return s, q, count, at

    return absorb


def make_write_back(what: Variant):
    """Write the gradients of rows that are not kept, last first, two at once; returns place, row and rows left."""
    by_output, io = what.relu and what.residual, access(what.kind, what.W)
    terms, slope, only = make_terms(what), make_gradient(what), make_row_only(what)
    load_last, store = io.load_last, io.store

    @device
    def write_back(x, g, y, dx, constants, at, back, r, rows_back, count, kept, mask):
        m, invstd, k, b, c1, c0 = constants
        while count - 2 >= kept:
            at += back
            x0, x1 = load_last(x, at), load_last(x, at + back)
            g0, g1 = load_last(g, at), load_last(g, at + back)
            y0, y1 = x0, x1
            if by_output:
                y0, y1 = load_last(y, at), load_last(y, at + back)
            for raw, own, its in ((x0, g0, y0), (x1, g1, y1)):
                r = int32(r + rows_back)
                u, t = terms(raw, own, its, m, invstd, k, b)
                store(dx, at, only(mask, r, slope(u, t, k, c1, c0)))
                at += back
            at -= back
            count = int32(count - 2)
        return at, r, count

    return write_back
