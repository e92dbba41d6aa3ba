"""How the blocks that share a tile of rows put their sums together; all of them are on the GPU at once.

They meet twice: each says its sums by column (``signals``), the blocks of the first columns add one up each (a warp a
column) and say what comes of it, and all hear that. Were every block to add up all columns, 132 blocks would read
36 MB for a tile of 256: 6 us. What is said needs memory that was 0: the blocks set it so and wait for each other
(``cuda.cg``) when they begin, while their first rows are on the way: behind the rows nothing would be. A launch of its
own for the zeros costs 5 us.

The scratch of a launch, tile by tile: the tickets of its warps, the places of its columns, the sums, part by part of a
column, so that a warp that waits for a column reads neighbours.
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda import tuning
from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.finalize import add_pair
from fastbn.cuda.gang_sums import make_warp_sum
from fastbn.cuda.signals import SAID, hear, say

int32, int64 = types.int32, types.int64
PLACE = 2 * SAID  # up to four numbers of a column are said
TICKETS = 32  # numbers of a tile in which rows are given out: one for each warp of a block
TERMS = 16  # sums that are added up one after the other, at most, of the rows of a block


def scratch_size(across: int, width: int, parts: int) -> int:
    """Numbers of scratch that so many tiles need."""
    return across * (TICKETS + width * (PLACE + SAID * parts))


@device
def places(tile, width, P):
    """Where the tickets of a tile are, the places of its columns, the sums of its blocks, and where those end."""
    tickets = int64(tile) * (TICKETS + width * (PLACE + SAID * P))
    said = tickets + TICKETS
    sums = said + width * PLACE
    return tickets, said, sums, sums + int64(width) * P * SAID


def make_begin(kind: str, threads: int, alone: bool):
    """Set a tile's scratch to 0, each block its share; whoever goes on may speak. A barrier of the block, too."""
    zero, early = ARITHMETIC[kind](0), tuning.PERSISTENT_EARLY

    @device
    def begin(partial, tile, width, P, part):
        if alone:
            cuda.syncthreads()
        else:
            tickets, _, sums, end = places(tile, width, P)
            last = end if early else sums
            i = tickets + part * threads + cuda.threadIdx.x
            while i < last:
                partial[i] = zero
                i += P * threads
            if early:
                cuda.cg.this_grid().sync()
            else:
                cuda.syncthreads()

    return begin


def make_lay_out(kind: str, W: int, threads: int):
    """Lay the sums of all threads out in shared memory, lane by lane, and add some rows up each, all threads at once.

    Neighbours in a warp write and read neighbouring numbers. What some rows add up to lies where the first of them did:
    nobody else reads that. Returns how many rows that is, and how many such sums a column has.
    """
    A, half = ARITHMETIC[kind], threads * W

    @device
    def lay_out(s, q, red, where):
        tx, ty, height, tx_count = where
        for k in range(W):
            red[k * threads + cuda.threadIdx.x] = s[k]
            red[half + k * threads + cuda.threadIdx.x] = q[k]
        cuda.syncthreads()
        rows, terms = int32(W), int32((height + W - 1) // W)
        while terms > TERMS:
            rows, terms = int32(2 * rows), int32((terms + 1) // 2)
        share, k = int32(ty // W), int32(ty % W)
        if ty < height:
            while share * rows < height:
                at = k * threads + share * rows * tx_count + tx
                a = b = A(0)
                for _ in range(share * rows, min((share + 1) * rows, height)):
                    a += red[at]
                    b += red[half + at]
                    at += tx_count
                at = k * threads + share * rows * tx_count + tx
                red[at], red[half + at] = a, b
                following = share * W + k + height
                share, k = int32(following // W), int32(following % W)
        cuda.syncthreads()
        return rows, terms

    return lay_out


def make_down(kind: str, W: int, threads: int):
    """Add up what was laid out of the lane ``k`` of a thread's vectors: a column of the tile."""
    A, half = ARITHMETIC[kind], threads * W

    @device
    def down(red, k, laid, where):
        (rows, terms), (tx, _, _, tx_count) = laid, where
        at, a, b = k * threads + tx, A(0), A(0)
        for _ in range(terms):
            a += red[at]
            b += red[half + at]
            at += rows * tx_count
        return a, b

    return down


def make_publish(kind: str, W: int, threads: int):
    """Add up the sums of a block's rows, column by column, and say them as this part's."""
    lay_out, down, early = make_lay_out(kind, W, threads), make_down(kind, W, threads), tuning.PERSISTENT_EARLY

    @device
    def publish(s, q, red, partial, sums, P, part, where):
        tx, ty, height, _ = where
        laid = lay_out(s, q, red, where)
        k = ty
        while k < W and ty < height:
            a, b = down(red, k, laid, where)
            say(partial, sums + (int64(tx * W + k) * P + part) * SAID, a, b, 1)
            k = int32(k + height)
        if early:
            cuda.syncthreads()  # no lane shall wait for one of its warp that has yet to speak
        else:
            cuda.cg.this_grid().sync()

    return publish


def make_ask(kind: str):
    """Wait for what five parts say, 32 of them apart, or two in float64, whose numbers fill twice the registers.

    All are asked for at once, the last one instead of those that are not there: memory answers in half a microsecond.
    """

    @device
    def two(partial, first, i, last):
        here, second = first + SAID * min(i, last), first + SAID * min(i + 32, last)
        t0, s0, q0 = hear(partial, here, 1)
        t1, s1, q1 = hear(partial, second, 1)
        while not t0 & t1:
            t0, s0, q0 = hear(partial, here, 1)
            t1, s1, q1 = hear(partial, second, 1)
        return (s0, q0), (s1, q1)

    @device
    def five(partial, first, i, last):
        here, second, third = (
            first + SAID * min(i, last),
            first + SAID * min(i + 32, last),
            first + SAID * min(i + 64, last),
        )
        fourth, fifth = first + SAID * min(i + 96, last), first + SAID * min(i + 128, last)
        there = False
        while not there:
            t0, s0, q0 = hear(partial, here, 1)
            t1, s1, q1 = hear(partial, second, 1)
            t2, s2, q2 = hear(partial, third, 1)
            t3, s3, q3 = hear(partial, fourth, 1)
            t4, s4, q4 = hear(partial, fifth, 1)
            there = t0 & t1 & t2 & t3 & t4
        return (s0, q0), (s1, q1), (s2, q2), (s3, q3), (s4, q4)

    return two if kind == "f64" else five


def make_column(kind: str):
    """Wait for what all parts say of one column and add it up, by a warp; the same bits in every lane."""
    A, warp_sum, ask = ARITHMETIC[kind], make_warp_sum(kind), make_ask(kind)

    @device
    def column(partial, sums, j, P):
        s = se = q = qe = A(0)
        i = lane = cuda.threadIdx.x & 31
        while i - lane < P:
            for a, b in ask(partial, sums + int64(j) * P * SAID, i, P - 1):
                if i < P:
                    s, se = add_pair(s, se, a, A(0))
                    q, qe = add_pair(q, qe, b, A(0))
                i += 32
        return warp_sum(s, se, q, qe)

    return column


def make_results(kind: str):
    """Wait for the four numbers that are said of a column, the last of them 0."""
    zero = ARITHMETIC[kind](0)

    @device
    def results(partial, at):
        there = False
        a = b = c = zero
        while not there:
            first, a, b = hear(partial, at, 1)
            second, c, _ = hear(partial, at + SAID, 1)
            there = first & second
        return a, b, c

    return results
