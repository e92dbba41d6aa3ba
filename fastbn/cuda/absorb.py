"""A thread's rows in the one-launch kernel (``persistent``): summed, and the first of them kept on the chip.

Blocks take rows by turns, so that all of them read one window of memory that moves. Rows that are not kept are
written by whoever takes them: blocks of one share each ended 17 us apart where all took 168 on an H200.
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.channel import WARP
from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.fetch import close, fetch, make_await
from fastbn.cuda.signals import ticket
from fastbn.cuda.simd import access, add, anew, fma, pick
from fastbn.cuda.sweep import Variant, make_gradient, make_output, make_terms

int32, int64 = types.int32, types.int64
AHEAD = 12  # vectors of a thread that are on their way while blocks wait for each other: 3 us of an H200's reading
arrived = make_await(0)


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
    """Begin to read a thread's first rows to where they are kept; returns how many."""
    backward, threads = what.backward, what.threads
    most = AHEAD // 2 if backward else AHEAD

    @device
    def ahead(x, g, slab, own, kept):
        n, _, _, at, step = own
        ready = min(n, min(kept, int32(most)))
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
        arrived()
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


def make_sweep(what: Variant, again):
    """Write the rows that are not kept, last first: ``again`` does so for some rows of a thread.

    With a ``depth`` the tile's warps of one number take so many rows of each of their threads at once, which lie below
    each other, until none are left; the first without asking, and each time for the next while they write. Else, and
    where a tile is one block's, a thread writes what it has summed.
    """
    alone = what.alone

    @device
    def sweep(tensors, constants, own, kept, pool, mask):
        n, first, down, at, step = own
        R, C, P, part, depth, height, ty, active, partial, tickets = pool
        r, rows_back, count = int32(first + int64(n - 1) * down), int32(-down), int32(n - kept)
        origin, at, back = at, at + (n - 1) * step, -step
        if alone:
            again(tensors, constants, at, back, r, rows_back, count, mask)
        else:
            low, each, turn, coming = int32(int64(kept) * down), int32(depth * height), int32(part), int32(0)
            rows, under, mine = int32(R - low), int32(R - height + ty), int32(tickets + (cuda.threadIdx.x >> 5))
            if depth > 0:
                rows_back, back = int32(-height), -int64(height) * C
            going = depth == 0 or int64(turn) * each < rows
            while going:
                if depth > 0:
                    if cuda.threadIdx.x & 31 == 0:
                        coming = ticket(partial, anew(mine))
                    r = int32(under - int64(turn) * each)
                    count = int32(depth) if active else int32(0)
                    room = int32(r - low - each + height)
                    while count > 0 and room < 0:
                        count, room = int32(count - 1), int32(room + height)
                    at = origin + (int64(r) - first) * C
                again(tensors, constants, at, back, r, rows_back, count, mask)
                going = False
                if depth > 0:
                    turn = int32(cuda.shfl_sync(WARP, coming, 0) + P)
                    going = int64(turn) * each < rows

    return sweep


def make_write_again(what: Variant):
    """Write the outputs of rows that are read again, last first: four, or eight where nothing is added to them."""
    io, residual, output, only = access(what.kind, what.W), what.residual, make_output(what), make_row_only(what)
    load_last, store = io.load_last, io.store

    @device
    def four(x, res, y, m, k, b, at, back, r, rows_back, mask):
        x0, x1 = load_last(x, at), load_last(x, at + back)
        x2, x3 = load_last(x, at + 2 * back), load_last(x, at + 3 * back)
        r0, r1, r2, r3 = x0, x1, x2, x3
        if residual:
            r0, r1 = load_last(res, at), load_last(res, at + back)
            r2, r3 = load_last(res, at + 2 * back), load_last(res, at + 3 * back)
        for raw, other in ((x0, r0), (x1, r1), (x2, r2), (x3, r3)):
            store(y, at, only(mask, r, output(raw, other, m, k, b)))
            at, r = at + back, int32(r + rows_back)

    @device
    def eight(x, y, m, k, b, at, back, r, rows_back, mask):
        half = at + 4 * back
        x0, x1, x2 = load_last(x, at), load_last(x, at + back), load_last(x, at + 2 * back)
        x3, x4, x5 = load_last(x, half - back), load_last(x, half), load_last(x, half + back)
        x6, x7 = load_last(x, half + 2 * back), load_last(x, half + 3 * back)
        for raw in (x0, x1, x2, x3, x4, x5, x6, x7):
            store(y, at, only(mask, r, output(raw, raw, m, k, b)))
            at, r = at + back, int32(r + rows_back)

    @device
    def again(tensors, constants, at, back, r, rows_back, count, mask):
        x, res, y = tensors
        m, k, b = constants
        while not residual and count >= 8:
            eight(x, y, m, k, b, at, back, r, rows_back, mask)
            at, r, count = at + 8 * back, int32(r + 8 * rows_back), int32(count - 8)
        while count >= 4:
            four(x, res, y, m, k, b, at, back, r, rows_back, mask)
            at, r, count = at + 4 * back, int32(r + 4 * rows_back), int32(count - 4)
        while count > 0:
            x0 = load_last(x, at)
            r0 = x0
            if residual:
                r0 = load_last(res, at)
            store(y, at, only(mask, r, output(x0, r0, m, k, b)))
            at, r, count = at + back, int32(r + rows_back), int32(count - 1)

    return again


def make_write_kept(what: Variant):
    """Write the outputs of the rows that are kept, last first."""
    kind, W, threads, residual = what.kind, what.W, what.threads, what.residual
    io, output, only = access(kind, W), make_output(what), make_row_only(what)
    load_last, store, recall = io.load_last, io.store, io.recall

    @device
    def write_kept(res, y, slab, constants, own, kept, mask):
        n, first, down, at, step = own
        m, k, b = constants
        count = int32(min(n, kept))
        at, r, place = at + (count - 1) * step, int32(first + (count - 1) * down), 4 * cuda.threadIdx.x
        while count >= 2:
            x0, x1 = recall(slab, place + 4 * (count - 1) * threads), recall(slab, place + 4 * (count - 2) * threads)
            r0, r1 = x0, x1
            if residual:
                r0, r1 = load_last(res, at), load_last(res, at - step)
            store(y, at, only(mask, r, output(x0, r0, m, k, b)))
            store(y, at - step, only(mask, r - down, output(x1, r1, m, k, b)))
            at, r, count = at - 2 * step, int32(r - 2 * down), int32(count - 2)
        if count > 0:
            x0 = recall(slab, place)
            r0 = x0
            if residual:
                r0 = load_last(res, at)
            store(y, at, only(mask, r, output(x0, r0, m, k, b)))

    return write_kept


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
        arrived()
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


def make_write_back(what: Variant):
    """Write the gradients of rows that are read again, last first, four at once, or two where y is read, too."""
    by_output, io = what.relu and what.residual, access(what.kind, what.W)
    terms, slope, only = make_terms(what), make_gradient(what), make_row_only(what)
    load_last, store = io.load_last, io.store

    @device
    def put(dx, raw, its, out, constants, at, r, mask):
        m, invstd, k, b, c1, c0 = constants
        u, t = terms(raw, its, out, m, invstd, k, b)
        store(dx, at, only(mask, r, slope(u, t, k, c1, c0)))

    @device
    def again(tensors, constants, at, back, r, rows_back, count, mask):
        x, g, y, dx = tensors
        while not by_output and count >= 4:
            x0, x1, x2 = load_last(x, at), load_last(x, at + back), load_last(x, at + 2 * back)
            g0, g1, g2 = load_last(g, at), load_last(g, at + back), load_last(g, at + 2 * back)
            x3, g3 = load_last(x, at + 3 * back), load_last(g, at + 3 * back)
            for raw, its in ((x0, g0), (x1, g1), (x2, g2), (x3, g3)):
                put(dx, raw, its, raw, constants, at, r, mask)
                at, r, count = at + back, int32(r + rows_back), int32(count - 1)
        while count >= 2:
            x0, x1 = load_last(x, at), load_last(x, at + back)
            g0, g1 = load_last(g, at), load_last(g, at + back)
            y0, y1 = x0, x1
            if by_output:
                y0, y1 = load_last(y, at), load_last(y, at + back)
            for raw, its, out in ((x0, g0, y0), (x1, g1, y1)):
                put(dx, raw, its, out, constants, at, r, mask)
                at, r, count = at + back, int32(r + rows_back), int32(count - 1)
        if count > 0:
            x0, g0 = load_last(x, at), load_last(g, at)
            y0 = x0
            if by_output:
                y0 = load_last(y, at)
            put(dx, x0, g0, y0, constants, at, r, mask)

    return again
