"""How the blocks that share a tile of rows put their sums together; all of them are on the GPU at once.

They meet twice: each writes its sums by column, the blocks of the first columns add one up each (a warp a column) and
say what comes of it (``signals``), and all hear that. Were every block to add up all columns, 132 blocks would read
36 MB for a tile of 256: 6 us. The first meeting is the whole grid's (``cuda.cg``), in front of which each column's
place is set to 0: a launch of its own to do so would cost 5 us.

The scratch of a launch begins with the places of all columns; behind them lie the sums of each tile, (2, width, P).
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.finalize import add_pair
from fastbn.cuda.gang_sums import make_warp_sum
from fastbn.cuda.signals import SAID, fresh
from fastbn.cuda.simd import access

int64 = types.int64
PLACE = 2 * SAID  # up to four numbers of a column are said


def scratch_size(across: int, width: int, parts: int) -> int:
    """Numbers of scratch that so many tiles need."""
    return across * width * (PLACE + 2 * parts)


@device
def places(across, tile, width, P):
    """Where the sums of a tile begin, and the places of its columns."""
    return int64(across) * width * PLACE + int64(tile) * 2 * width * P, int64(tile) * width * PLACE


def make_lay_out(kind: str, W: int, threads: int):
    """Lay the sums of all threads out by row and column of the tile, in shared memory."""
    scatter, half = access(kind, W).scatter, threads * W

    @device
    def lay_out(s, q, red, width, tx, ty, height):
        if ty < height:
            scatter(red, ty * width + tx * W, s)
            scatter(red, half + ty * width + tx * W, q)
        cuda.syncthreads()

    return lay_out


def make_down(kind: str, W: int, threads: int):
    """Add up one column of what was laid out."""
    A, half = ARITHMETIC[kind], threads * W

    @device
    def down(red, j, width, height):
        a = b = A(0)
        for i in range(height):
            a += red[i * width + j]
            b += red[half + i * width + j]
        return a, b

    return down


def make_publish(kind: str, W: int, threads: int):
    """Add up the sums of a block's rows, column by column, write them as this part's, and wait for all others'."""
    lay_out, down, zero = make_lay_out(kind, W, threads), make_down(kind, W, threads), ARITHMETIC[kind](0)
    warps = threads // 32

    @device
    def publish(s, q, red, partial, first, said, P, part, width, tx, ty, height):
        lay_out(s, q, red, width, tx, ty, height)
        for j in range(cuda.threadIdx.x, width, threads):
            a, b = down(red, j, width, height)
            partial[first + int64(j) * P + part] = a
            partial[first + int64(width + j) * P + part] = b
        for j in range(part + P * (cuda.threadIdx.x >> 5), width, P * warps):
            if cuda.threadIdx.x & 31 < PLACE:
                partial[said + j * PLACE + (cuda.threadIdx.x & 31)] = zero
        cuda.cg.this_grid().sync()

    return publish


def make_column(kind: str):
    """Add up what all parts wrote of one column, by a warp; the same bits in every lane."""
    A, warp_sum = ARITHMETIC[kind], make_warp_sum(kind)

    @device
    def column(partial, first, j, P, width):
        s = se = q = qe = A(0)
        i = cuda.threadIdx.x & 31
        while i < P:
            s, se = add_pair(s, se, fresh(partial, first + int64(j) * P + i), A(0))
            q, qe = add_pair(q, qe, fresh(partial, first + int64(width + j) * P + i), A(0))
            i += 32
        return warp_sum(s, se, q, qe)

    return column
