"""A thread's rows in the one-launch kernel (``persistent``): summed, and the first of them kept on the chip."""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.simd import access, add, fma, pick
from fastbn.cuda.sweep import Variant, make_gradient, make_output, make_terms

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

    Eight rows at once: with four, 512 threads have 32 KB on their way a multiprocessor, and waited for them a quarter
    of the time on an H200.
    """
    kind, W, threads = what.kind, what.W, what.threads
    io, terms = access(kind, W), make_terms(what)
    load, splat, keep_raw, zero, only = io.load, io.splat, io.keep, ARITHMETIC[kind](0), make_row_only(what)

    @device
    def take(raw, slab, m, s, q, count, r, kept, mask):
        if count < kept:
            keep_raw(slab, 4 * (count * threads + cuda.threadIdx.x), raw)
        u, t = terms(raw, raw, raw, m, m, m, m)
        u, t = only(mask, r, u), only(mask, r, t)
        return add(s, u), fma(u, t, q)

    @device
    def absorb(x, slab, m, at, step, r, end, height, kept, mask):
        count = int32(0)
        s = q = splat(zero)
        while r + 7 * height < end:
            x0, x1, x2, x3 = load(x, at), load(x, at + step), load(x, at + 2 * step), load(x, at + 3 * step)
            half = at + 4 * step
            x4, x5, x6, x7 = load(x, half), load(x, half + step), load(x, half + 2 * step), load(x, half + 3 * step)
            for raw in (x0, x1, x2, x3, x4, x5, x6, x7):
                s, q = take(raw, slab, m, s, q, count, r, kept, mask)
                r, count = int32(r + height), int32(count + 1)
            at += 8 * step
        while r + height < end:
            x0, x1 = load(x, at), load(x, at + step)
            for raw in (x0, x1):
                s, q = take(raw, slab, m, s, q, count, r, kept, mask)
                r, count = int32(r + height), int32(count + 1)
            at += 2 * step
        if r < end:
            s, q = take(load(x, at), slab, m, s, q, count, r, kept, mask)
            at += step
            count = int32(count + 1)
        return s, q, count, at

    return absorb


def make_write_again(what: Variant):
    """Write the outputs of rows that are read again, last first: four, or eight where nothing is added to them."""
    io, residual, output, only = access(what.kind, what.W), what.residual, make_output(what), make_row_only(what)
    load_last, store = io.load_last, io.store

    @device
    def again(x, res, y, m, k, b, at, back, r, rows_back, mask):
        """Four rows that are read again."""
        x0, x1 = load_last(x, at), load_last(x, at + back)
        x2, x3 = load_last(x, at + 2 * back), load_last(x, at + 3 * back)
        r0, r1, r2, r3 = x0, x1, x2, x3
        if residual:
            r0, r1 = load_last(res, at), load_last(res, at + back)
            r2, r3 = load_last(res, at + 2 * back), load_last(res, at + 3 * back)
        for raw, other in ((x0, r0), (x1, r1), (x2, r2), (x3, r3)):
            r = int32(r + rows_back)
            store(y, at, only(mask, r, output(raw, other, m, k, b)))
            at += back

    @device
    def twice(x, y, m, k, b, at, back, r, rows_back, mask):
        """Eight rows that are read again, without a residual."""
        half = at + 4 * back
        x0, x1, x2, x3 = (
            load_last(x, at),
            load_last(x, at + back),
            load_last(x, at + 2 * back),
            load_last(x, half - back),
        )
        x4, x5, x6 = load_last(x, half), load_last(x, half + back), load_last(x, half + 2 * back)
        x7 = load_last(x, half + 3 * back)
        for raw in (x0, x1, x2, x3, x4, x5, x6, x7):
            r = int32(r + rows_back)
            store(y, at, only(mask, r, output(raw, raw, m, k, b)))
            at += back

    return again, twice


def make_write(what: Variant):
    """Write the outputs of a thread's rows, last first: those to be read again, then those that are kept."""
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    io, output, only = access(kind, W), make_output(what), make_row_only(what)
    load_last, store, recall, (again, twice) = io.load_last, io.store, io.recall, make_write_again(what)

    @device
    def one(x, res, y, slab, m, k, b, at, r, count, kept, mask):
        x0 = recall(slab, 4 * (count * threads + cuda.threadIdx.x)) if count < kept else load_last(x, at)
        r0 = x0
        if residual:
            r0 = load_last(res, at)
        store(y, at, only(mask, r, output(x0, r0, m, k, b)))

    @device
    def pair(res, y, slab, m, k, b, at, back, r, rows_back, count, mask):
        """Two rows that are kept."""
        place = 4 * (count * threads + cuda.threadIdx.x)
        x0, x1 = recall(slab, place), recall(slab, place - 4 * threads)
        r0, r1 = x0, x1
        if residual:
            r0, r1 = load_last(res, at), load_last(res, at + back)
        store(y, at, only(mask, r, output(x0, r0, m, k, b)))
        store(y, at + back, only(mask, r + rows_back, output(x1, r1, m, k, b)))

    @device
    def write(x, res, y, slab, constants, at, back, r, rows_back, count, kept, mask):
        m, k, b = constants
        at += back
        while not residual and count - 8 >= kept:
            twice(x, y, m, k, b, at, back, r, rows_back, mask)
            at, r, count = at + 8 * back, int32(r + 8 * rows_back), int32(count - 8)
        while count - 4 >= kept:
            again(x, res, y, m, k, b, at, back, r, rows_back, mask)
            at, r, count = at + 4 * back, int32(r + 4 * rows_back), int32(count - 4)
        while count > kept:
            count, r = int32(count - 1), int32(r + rows_back)
            one(x, res, y, slab, m, k, b, at, r, count, kept, mask)
            at += back
        while count >= 2:
            pair(res, y, slab, m, k, b, at, back, r + rows_back, rows_back, count - 1, mask)
            at, r, count = at + 2 * back, int32(r + 2 * rows_back), int32(count - 2)
        if count > 0:
            one(x, res, y, slab, m, k, b, at, r + rows_back, count - 1, kept, mask)

    return write


def make_absorb_gradients(what: Variant):
    """Sum a thread's rows, four at once, write the residual's gradient, and keep the first rows; as ``make_absorb``."""
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
        while not by_output and r + 3 * height < end:
            x0, x1, x2, x3 = load(x, at), load(x, at + step), load(x, at + 2 * step), load(x, at + 3 * step)
            g0, g1 = load_last(g, at), load_last(g, at + step)
            g2, g3 = load_last(g, at + 2 * step), load_last(g, at + 3 * step)
            for raw, own in ((x0, g0), (x1, g1), (x2, g2), (x3, g3)):
                u, t = take(raw, own, raw, slab, at, r, count, kept, mask, constants, dr)
                s, q = add(s, u), fma(u, t, q)
                at += step
                r, count = int32(r + height), int32(count + 1)
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
    """Write the gradients of rows that are not kept, last first, four at once; returns place, row and rows left."""
    by_output, io = what.relu and what.residual, access(what.kind, what.W)
    terms, slope, only = make_terms(what), make_gradient(what), make_row_only(what)
    load_last, store = io.load_last, io.store

    @device
    def write_back(x, g, y, dx, constants, at, back, r, rows_back, count, kept, mask):
        m, invstd, k, b, c1, c0 = constants
        while not by_output and count - 4 >= kept:
            at += back
            x0, x1, x2 = load_last(x, at), load_last(x, at + back), load_last(x, at + 2 * back)
            g0, g1, g2 = load_last(g, at), load_last(g, at + back), load_last(g, at + 2 * back)
            x3, g3 = load_last(x, at + 3 * back), load_last(g, at + 3 * back)
            for raw, own in ((x0, g0), (x1, g1), (x2, g2), (x3, g3)):
                r = int32(r + rows_back)
                u, t = terms(raw, own, raw, m, invstd, k, b)
                store(dx, at, only(mask, r, slope(u, t, k, c1, c0)))
                at += back
            at -= back
            count = int32(count - 4)
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
