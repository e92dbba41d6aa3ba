"""A gang of blocks adds up its sums: each writes its own, waits for the others', and adds all in the same order.

The scratch of a launch is the places for the blocks' sums (``signals``), all 0 at first (``clear``), of two turns by
turns: a block that is a turn ahead does not write what another still reads, and none can be two ahead.

Forward, and in backward where a gang is large, one warp asks for all sums, adds them up and tells its block. In
backward of few blocks every warp does so for itself and goes on without waiting for the others. On an H200, (64, 256,
56, 56) in float32: forward 130 us by one warp and 144 by all, backward 216 and 200; (64, 64, 112, 112), 50 blocks and
more: 136 and 152, 226 and 240. A whole grid's barrier (``cuda.cg``) instead of ``clear``: 8 to 10 us more.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda import tuning
from fastbn.cuda.channel import WARP
from fastbn.cuda.driver import ARITHMETIC, SIMULATED, cuda, device, kernel, types
from fastbn.cuda.finalize import add_pair, two_sum
from fastbn.cuda.signals import SAID, hear, say

int64 = types.int64
NAP = 200  # nanoseconds between two looks at what another block has to say: looking, too, takes of the memory's time

if SIMULATED:

    def nap() -> None:
        """``hear`` lets others run."""

else:

    @device
    def nap():
        """Do nothing for a while."""
        cuda.nanosleep(NAP)


def scratch_size(gangs: int, blocks: int) -> int:
    """Numbers of scratch that so many gangs of so many blocks need."""
    return gangs * 2 * blocks * SAID


def make_warp_sum(kind: str):
    """Sum two pairs over a warp: no operation here tells its operands apart, so every lane ends with the same bits."""

    @device
    def warp_sum(s, se, q, qe):
        step = 16
        while step > 0:
            s, error = two_sum(s, cuda.shfl_xor_sync(WARP, s, step))
            se = (se + cuda.shfl_xor_sync(WARP, se, step)) + error
            q, error = two_sum(q, cuda.shfl_xor_sync(WARP, q, step))
            qe = (qe + cuda.shfl_xor_sync(WARP, qe, step)) + error
            step >>= 1
        return s, se, q, qe

    return warp_sum


def make_add_up(kind: str):
    """(partial, first, blocks, tag) -> the blocks' sums from ``first`` on, as pairs, waited for and added by a warp."""
    A, warp_sum = ARITHMETIC[kind], make_warp_sum(kind)

    @device
    def patiently(partial, index, tag):
        there, a, b = hear(partial, index, tag)
        while not there:
            nap()
            there, a, b = hear(partial, index, tag)
        return a, b

    @device
    def add_up(partial, first, blocks, tag):
        s = se = q = qe = A(0)
        i = cuda.threadIdx.x & 31
        while i < blocks:
            a, b = patiently(partial, first + SAID * i, tag)
            s, se = add_pair(s, se, a, A(0))
            q, qe = add_pair(q, qe, b, A(0))
            i += 32
        return warp_sum(s, se, q, qe)

    return add_up


def make_gang_sum(kind: str, alone: bool, backward: bool = False):
    """(partial, gang, blocks, part, turn, s, q) -> sums of the gang as pairs, the same bits in every thread.

    ``s``, ``q``: the block's, in every thread of it; ``turn`` counts the calls of a launch from 0. A block that is
    ``alone`` is a gang by itself.
    """
    A, add_up, few = ARITHMETIC[kind], make_add_up(kind), tuning.GANG_FEW if backward else 0

    @device
    def gang_sum(partial, gang, blocks, part, turn, s, q):
        if alone:
            return s, A(0), q, A(0)
        else:
            told, first = cuda.shared.array(4, A), (int64(gang) * 2 + (turn & 1)) * SAID * blocks
            if cuda.threadIdx.x == 0:
                say(partial, first + SAID * part, s, q, turn + 1)
            if few and blocks <= few:
                return add_up(partial, first, blocks, turn + 1)
            if cuda.threadIdx.x < 32:
                s, se, q, qe = add_up(partial, first, blocks, turn + 1)
                if cuda.threadIdx.x == 0:
                    told[0], told[1], told[2], told[3] = s, se, q, qe
            cuda.syncthreads()
            return told[0], told[1], told[2], told[3]

    return gang_sum


@functools.cache
def clear(kind: str, threads: int):
    """Kernel that sets the scratch of a launch to 0."""
    A = ARITHMETIC[kind]

    @kernel("Ai", kind, threads)
    def gang_clear(partial, count):
        i = cuda.blockIdx.x * threads + cuda.threadIdx.x
        if i < count:
            partial[i] = A(0)

    return gang_clear
