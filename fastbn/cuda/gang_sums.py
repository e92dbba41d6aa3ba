"""A gang of blocks adds up its sums: each writes its own, goes on, and adds all up when it needs them.

The scratch of a launch begins with two counters a gang, ``PAD`` numbers apart; behind them lie the sums, in ``SLOTS``
places by turns. A block may be a turn ahead when it counts, so that odd turns and even ones have counters of their own:
with one, its two counts would stand for one of each of two blocks. It may be two ahead of one that still reads: with
three places it would write there. A block that is a gang by itself keeps its sums in shared memory (``alone``).
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.channel import WARP
from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.finalize import add_pair, two_sum
from fastbn.cuda.signals import arrive, fresh, seen

int64 = types.int64
PAD = 16  # numbers from one counter to the next: lines of their own
SLOTS = 4


@device
def wait_for(partial, counter, count):
    """Wait until a counter has got so far: the first thread of a block looks, the others wait for it."""
    if cuda.threadIdx.x == 0:
        while seen(partial, counter) < count:
            pass
    cuda.syncthreads()


def scratch_size(gangs: int, blocks: int) -> int:
    """Numbers of scratch that so many gangs of so many blocks need."""
    return gangs * (2 * PAD + 2 * SLOTS * blocks)


@device
def place(gangs, gang, G, turn):
    """Where the sums of a turn lie."""
    return int64(gangs) * 2 * PAD + (int64(gang) * SLOTS + turn % SLOTS) * G * 2


@device
def counter(gang, turn):
    """The counter of a turn."""
    return (int64(gang) * 2 + (turn & 1)) * PAD


def make_ready(kind: str, alone: bool):
    """Set the counters of a gang to 0 before anybody of the grid counts."""
    zero = ARITHMETIC[kind](0)

    @device
    def ready(partial, gang, part):
        if not alone:
            if part == 0 and cuda.threadIdx.x == 0:
                partial[counter(gang, 0)] = partial[counter(gang, 1)] = zero
            cuda.cg.this_grid().sync()

    return ready


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
    """(partial, first, blocks) -> the blocks' sums from ``first`` on, as pairs, added by a warp."""
    A, warp_sum = ARITHMETIC[kind], make_warp_sum(kind)

    @device
    def add_up(partial, first, blocks):
        s = se = q = qe = A(0)
        for i in range(cuda.threadIdx.x & 31, blocks, 32):
            s, se = add_pair(s, se, fresh(partial, first + 2 * i), A(0))
            q, qe = add_pair(q, qe, fresh(partial, first + 2 * i + 1), A(0))
        return warp_sum(s, se, q, qe)

    return add_up


def make_publish(kind: str, threads: int, alone: bool):
    """(..., turn, s, q) of every thread -> the block's sums where the gang finds them; nobody waits for anybody else's.

    ``scratch``: two numbers a warp for every second turn, ``own``: two.
    """
    A, warps = ARITHMETIC[kind], threads // 32

    @device
    def publish(partial, gangs, gang, G, part, turn, s, q, scratch, own):
        lane, warp = cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5
        step = 16
        while step > 0:
            s += cuda.shfl_xor_sync(WARP, s, step)
            q += cuda.shfl_xor_sync(WARP, q, step)
            step >>= 1
        mine = (turn & 1) * 2 * warps
        if lane == 0:
            scratch[mine + 2 * warp], scratch[mine + 2 * warp + 1] = s, q
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            s = q = A(0)
            for w in range(warps):
                s += scratch[mine + 2 * w]
                q += scratch[mine + 2 * w + 1]
            if alone:
                own[2 * (turn & 1)], own[2 * (turn & 1) + 1] = s, q
            else:
                at = place(gangs, gang, G, turn) + 2 * part
                partial[at], partial[at + 1] = s, q
                arrive(partial, counter(gang, turn))

    return publish


def make_gather(kind: str, alone: bool):
    """Sums of the gang as pairs, in the first warp, once all blocks have published them; the others have nothing."""
    A, add_up = ARITHMETIC[kind], make_add_up(kind)

    @device
    def gather(partial, gangs, gang, G, turn, own):
        s = se = q = qe = A(0)
        lane = cuda.threadIdx.x
        if lane < 32:
            if alone:
                s, q = own[2 * (turn & 1)], own[2 * (turn & 1) + 1]
            else:
                while seen(partial, counter(gang, turn)) < (turn // 2 + 1) * G:
                    pass
                s, se, q, qe = add_up(partial, place(gangs, gang, G, turn), G)
        return s, se, q, qe

    return gather
