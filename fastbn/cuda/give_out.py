"""A thread's rows in the one-launch kernel (``persistent``): written, those that are not kept by whoever takes them.

Of one share each, blocks ended 17 us apart where all took 168 on an H200.
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.absorb import make_row_only
from fastbn.cuda.channel import WARP
from fastbn.cuda.driver import cuda, device, types
from fastbn.cuda.signals import ticket
from fastbn.cuda.simd import access, anew
from fastbn.cuda.sweep import Variant, make_gradient, make_output, make_terms

int32, int64 = types.int32, types.int64


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
