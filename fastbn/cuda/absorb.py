"""A thread's rows in the one-launch kernel (``persistent``): summed, and the first of them kept on the chip.

Blocks take rows by turns, so that all of them read one window of memory that moves: plain loops over two tensors that
are read and one that is written took 148 us on an H200, of a stretch to each block 155. ``give_out`` writes them.
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.fetch import close, fetch, none_left
from fastbn.cuda.simd import access, add, fma, pick
from fastbn.cuda.sweep import Variant, make_terms

int32, int64 = types.int32, types.int64
AHEAD = 12  # vectors of a thread that are on their way while blocks wait for each other: 3 us of an H200's reading


@device
def walk(R, C, P, part, turns, ty, height, at0, active):
    """A thread's rows: how many, the first, how far apart; the place of the first, and how far apart they are there.

    All threads have ``turns``, some one more.
    """
    down, first = P * height, part * height + ty
    n = int32(0)
    if active:
        n = int32(turns + 1) if int64(turns) * down + first < R else int32(turns)
    return n, int32(first), int32(down), int64(first) * C + at0, int64(down) * C


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


def make_ahead(what: Variant):
    """Begin to read a thread's first rows to where they are kept; returns how many.

    Not by the first warp of a block that meets others: a thread of it fences for the grid's barrier, and would wait for
    its copies. Such a barrier behind the copies of gangs cost 10 us more than the launch it replaced (H200).
    """
    backward, threads, met = what.backward, what.threads, not what.alone
    most = AHEAD // 2 if backward else AHEAD

    @device
    def ahead(x, g, slab, own, kept):
        n, _, _, at, step = own
        ready = min(n, min(kept, int32(most)))
        if met and cuda.threadIdx.x < 32:
            ready = int32(0)
        for i in range(ready):
            place = 4 * (i * threads + cuda.threadIdx.x)
            fetch(slab, place, x, at + i * step)
            if backward:
                fetch(slab, 4 * kept * threads + place, g, at + i * step)
        close()
        return int32(ready)

    return ahead


def make_absorb(what: Variant):
    """Sum a thread's rows and keep the first of them, of which some are ``ready``.

    Eight rows at once: with four, 512 threads have 32 KB on their way a multiprocessor, and waited for them a quarter
    of the time on an H200.
    """
    kind, W, threads = what.kind, what.W, what.threads
    io, terms = access(kind, W), make_terms(what)
    load, splat, keep_raw, recall = io.load, io.splat, io.keep, io.recall
    zero, only = ARITHMETIC[kind](0), make_row_only(what)

    @device
    def take(raw, m, s, q, r, mask):
        u, t = terms(raw, raw, raw, m, m, m, m)
        u, t = only(mask, r, u), only(mask, r, t)
        return add(s, u), fma(u, t, q)

    @device
    def hold(raw, slab, count, kept):
        if count < kept:
            keep_raw(slab, 4 * (count * threads + cuda.threadIdx.x), raw)

    @device
    def absorb(x, slab, m, own, kept, ready, mask):
        n, r, down, at, step = own
        count = int32(0)
        s = q = splat(zero)
        none_left()
        while count < ready:
            s, q = take(recall(slab, 4 * (count * threads + cuda.threadIdx.x)), m, s, q, r, mask)
            r, count = int32(r + down), int32(count + 1)
        at += ready * step
        while count + 8 <= n:
            x0, x1, x2, x3 = load(x, at), load(x, at + step), load(x, at + 2 * step), load(x, at + 3 * step)
            half = at + 4 * step
            x4, x5, x6, x7 = load(x, half), load(x, half + step), load(x, half + 2 * step), load(x, half + 3 * step)
            for raw in (x0, x1, x2, x3, x4, x5, x6, x7):
                hold(raw, slab, count, kept)
                s, q = take(raw, m, s, q, r, mask)
                r, count = int32(r + down), int32(count + 1)
            at += 8 * step
        while count + 2 <= n:
            x0, x1 = load(x, at), load(x, at + step)
            for raw in (x0, x1):
                hold(raw, slab, count, kept)
                s, q = take(raw, m, s, q, r, mask)
                r, count = int32(r + down), int32(count + 1)
            at += 2 * step
        if count < n:
            x0 = load(x, at)
            hold(x0, slab, count, kept)
            s, q = take(x0, m, s, q, r, mask)
        return s, q

    return absorb


def make_absorb_gradients(what: Variant):
    """Sum a thread's rows, four at once, write the residual's gradient, and keep the first rows; as ``make_absorb``."""
    kind, W, threads, by_output = what.kind, what.W, what.threads, what.relu and what.residual
    io, terms, zero, only = access(kind, W), make_terms(what), ARITHMETIC[kind](0), make_row_only(what)
    load, load_last, store, splat, keep_raw, encode = io.load, io.load_last, io.store, io.splat, io.keep, io.encode
    recall = io.recall

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
    def absorb(x, g, y, dr, slab, constants, own, kept, ready, mask):
        n, r, down, at, step = own
        count = int32(0)
        s = q = splat(zero)
        none_left()
        while count < ready:
            place = 4 * (count * threads + cuda.threadIdx.x)
            x0, g0 = recall(slab, place), recall(slab, 4 * kept * threads + place)
            y0 = load(y, at) if by_output else x0
            u, t = take(x0, g0, y0, slab, at, r, count, kept, mask, constants, dr)
            s, q = add(s, u), fma(u, t, q)
            at, r, count = at + step, int32(r + down), int32(count + 1)
        while not by_output and count + 4 <= n:
            x0, x1, x2, x3 = load(x, at), load(x, at + step), load(x, at + 2 * step), load(x, at + 3 * step)
            g0, g1 = load_last(g, at), load_last(g, at + step)
            g2, g3 = load_last(g, at + 2 * step), load_last(g, at + 3 * step)
            for raw, its in ((x0, g0), (x1, g1), (x2, g2), (x3, g3)):
                u, t = take(raw, its, raw, slab, at, r, count, kept, mask, constants, dr)
                s, q = add(s, u), fma(u, t, q)
                at, r, count = at + step, int32(r + down), int32(count + 1)
        while count + 2 <= n:
            x0, x1, g0, g1 = load(x, at), load(x, at + step), load_last(g, at), load_last(g, at + step)
            y0, y1 = x0, x1
            if by_output:
                y0, y1 = load(y, at), load(y, at + step)
            for raw, its, out in ((x0, g0, y0), (x1, g1, y1)):
                u, t = take(raw, its, out, slab, at, r, count, kept, mask, constants, dr)
                s, q = add(s, u), fma(u, t, q)
                at, r, count = at + step, int32(r + down), int32(count + 1)
        if count < n:
            x0, g0 = load(x, at), load_last(g, at)
            y0 = load(y, at) if by_output else x0
            u, t = take(x0, g0, y0, slab, at, r, count, kept, mask, constants, dr)
            s, q = add(s, u), fma(u, t, q)
        return s, q

    return absorb
