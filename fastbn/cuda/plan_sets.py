"""Which kernel for which sets (layer, group, instance norm), and how its grid is cut; from numbers alone."""

from __future__ import annotations

import functools
from typing import NamedTuple

from fastbn.cuda import plan, tuning
from fastbn.cuda.arrays import ITEMSIZE
from fastbn.errors import ArgumentValueError

WARP = 32
AHEAD = 2  # samples that are on their way while gradients of one are worked out


class Sizes(NamedTuple):
    """Samples, groups, channels, values behind the channel axis; a set is C/G channels of S values."""

    B: int
    G: int
    C: int
    S: int

    @property
    def D(self) -> int:  # noqa: D102
        return self.C // max(self.G, 1)  # instance norm without channels has no groups

    @property
    def sets(self) -> int:  # noqa: D102
        return self.B * self.G

    @property
    def n(self) -> int:
        """Elements of a set."""
        return self.D * self.S


class SetPlan(NamedTuple):
    """How sets are worked off; ``team`` is 0 where a set does not fit on the chip and is split."""

    affine: str
    W: int
    threads: int
    team: int
    kept: bool
    shared: int
    blocks: int  # of the kernels in one launch
    split: plan.Plan
    held: int = 0  # vectors of a set in each thread's registers, 0 if they are not held there


class ColumnPlan(NamedTuple):
    """How the sums over samples are cut."""

    W: int
    across: int
    tx: int
    parts: int
    chunk: int
    many: int  # channels of a block that adds up the parts


def together(threads: int, held: int, W: int, backward: bool) -> int:
    """Blocks a multiprocessor whose registers must suffice: 64 a thread, in backward 80, or 128 beyond eight sums."""
    return max(1, (1024 if not backward else 768 if words(held, W) <= 8 else 512) // threads)


def words(held: int, W: int) -> int:
    """Registers that a thread's vectors of the arithmetic type take."""
    return held * max(W, 4)


def team_of(vectors: int, W: int, backward: bool) -> tuple[int, int, int]:
    """Threads, team and vectors a thread to hold a set in registers, with the fewest idle; zeros if it is too large."""
    most, numbers = 2 if W == 2 else 4, [4, 3, 2, 1]
    if backward:  # two sums a lane
        numbers = [4, 2, 1]
        most = 1 if W == 8 and vectors <= tuning.HELD_HALVES else 4 if W < 8 and vectors > 1024 else 2
    if vectors <= tuning.HELD_WARP * most:
        return tuning.THREADS, WARP, next(h for h in numbers[::-1] if vectors <= tuning.HELD_WARP * h)
    sizes = [(max(2, -(-vectors // (WARP * h))) * WARP, h) for h in numbers if h <= most]
    threads, held = min(sizes, key=lambda size: size[0] * size[1])
    return (threads, threads, held) if threads <= (512 if backward else 1024) else (0, 0, 0)


def affine_of(d: Sizes, given: bool) -> str:
    """Name where parameters lie, as ``sets`` does."""
    if d.D == 1:
        return "one"
    return "each" if d.S == 1 and given else "run"


@functools.lru_cache(maxsize=1024)
def sets(
    d: Sizes, kind: str, aligned: bool, given: bool, tensors: int, limit: int, multiprocessors: int
) -> SetPlan:  # fmt: skip
    """Choose kernel and cut. ``given``: there are parameters; ``tensors`` are kept, in ``limit`` bytes a block."""
    if max(d.n, d.sets, d.C * d.S) >= plan.LARGEST:
        raise ArgumentValueError("x", "less than 2**31 sets and 2**31 values a sample", f"{tuple(d)}")
    affine, lanes = affine_of(d, given), 16 // ITEMSIZE[kind]
    whole = aligned and d.n % lanes == 0 and (affine != "run" or not given or d.S % lanes == 0)
    W = lanes if whole else 1
    split = plan.planes((1, d.sets, d.n), W)
    vectors, large = d.n // W, d.sets * d.n * ITEMSIZE[kind] > tuning.SMALL
    few = large and d.sets < tuning.SLAB_CHANNELS
    if whole and not few and tuning.HELD:
        p = _held(SetPlan(affine, W, 0, 0, False, 0, 0, split), d, given, tensors > 1, limit, multiprocessors)
        if p.held:
            return p
    if vectors <= tuning.WARP_VECTORS:
        threads, team = tuning.THREADS, WARP
    else:
        threads = team = next(threads for least, threads in tuning.SLAB if vectors >= least)
    teams = threads // team
    shared = tensors * vectors * 16 * teams if whole else 0
    fits = shared <= limit - tuning.RESERVE and (whole or d.n <= tuning.READ_AGAIN)
    if not fits or few:
        return SetPlan(affine, W, tuning.THREADS, 0, False, 0, 0, split)
    return SetPlan(affine, W, threads, team, whole, shared, -(-d.sets // teams), split)


def _held(p: SetPlan, d: Sizes, given: bool, backward: bool, limit: int, multiprocessors: int) -> SetPlan:
    """Return the plan with sets in registers (in backward staged in shared memory), or as it was."""
    if backward and (p.affine != "each" or d.G > 1):
        return p  # columns of a thread that go on with the next sample belong to one group
    threads, team, held = team_of(d.n // p.W, p.W, backward)
    if not held:
        return p
    teams = threads // team
    blocks, shared = -(-d.sets // teams), (AHEAD + 1) * 2 * held * threads * 16 if backward else 0
    own = tuning.RESERVE + (4 * threads * words(held, p.W) if team < threads else 0)  # a block adds up its warps' sums
    if shared > limit - own:
        return p
    if backward:  # four samples a team at least, where that leaves no multiprocessor idle
        least = max(min(blocks, multiprocessors), -(-blocks // 4))
        blocks = min(least, multiprocessors * together(threads, held, p.W, True))
    return p._replace(threads=threads, team=team, held=held, shared=shared, blocks=blocks)


@functools.lru_cache(maxsize=1024)
def columns(d: Sizes, kind: str, aligned: bool) -> ColumnPlan:
    """Cut the samples for the sums of weight and bias gradients."""
    lanes, V = 16 // ITEMSIZE[kind], d.C * d.S
    p = plan.rows((d.B, V, 1), lanes if aligned and d.n % lanes == 0 else 1, 1)
    return ColumnPlan(p.W, p.across, p.tx, p.parts, p.chunk, 32 if d.S == 1 else 1)
