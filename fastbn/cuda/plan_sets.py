"""Which kernel for which sets (layer, group, instance norm), and how its grid is cut; from numbers alone."""

from __future__ import annotations

import functools
from typing import NamedTuple

from fastbn.cuda import plan, tuning
from fastbn.cuda.arrays import ITEMSIZE
from fastbn.errors import ArgumentValueError

WARP = 32


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


class ColumnPlan(NamedTuple):
    """How the sums over samples are cut."""

    W: int
    across: int
    tx: int
    parts: int
    chunk: int
    many: int  # channels of a block that adds up the parts


def affine_of(d: Sizes, given: bool) -> str:
    """Name where parameters lie, as ``sets`` does."""
    if d.D == 1:
        return "one"
    return "each" if d.S == 1 and given else "run"


@functools.lru_cache(maxsize=1024)
def sets(d: Sizes, kind: str, aligned: bool, given: bool, tensors: int, limit: int) -> SetPlan:
    """Choose kernel and cut. ``given``: there are parameters; ``tensors`` are kept, in ``limit`` bytes a block."""
    if max(d.n, d.sets, d.C * d.S) >= plan.LARGEST:
        raise ArgumentValueError("x", "less than 2**31 sets and 2**31 values a sample", f"{tuple(d)}")
    affine, lanes = affine_of(d, given), 16 // ITEMSIZE[kind]
    whole = aligned and d.n % lanes == 0 and (affine != "run" or not given or d.S % lanes == 0)
    W = lanes if whole else 1
    split = plan.planes((1, d.sets, d.n), W)
    vectors = d.n // W
    if vectors <= tuning.WARP_VECTORS:
        threads, team = tuning.THREADS, WARP
    else:
        threads = team = next(threads for least, threads in tuning.SLAB if vectors >= least)
    teams = threads // team
    shared = tensors * vectors * 16 * teams if whole else 0
    large = d.sets * d.n * ITEMSIZE[kind] > tuning.SMALL
    fits = shared <= limit - tuning.RESERVE and (whole or d.n <= tuning.READ_AGAIN)
    if not fits or (large and d.sets < tuning.SLAB_CHANNELS):
        return SetPlan(affine, W, tuning.THREADS, 0, False, 0, 0, split)
    return SetPlan(affine, W, threads, team, whole, shared, -(-d.sets // teams), split)


@functools.lru_cache(maxsize=1024)
def columns(d: Sizes, kind: str, aligned: bool) -> ColumnPlan:
    """Cut the samples for the sums of weight and bias gradients."""
    lanes, V = 16 // ITEMSIZE[kind], d.C * d.S
    p = plan.rows((d.B, V, 1), lanes if aligned and d.n % lanes == 0 else 1, 1)
    return ColumnPlan(p.W, p.across, p.tx, p.parts, p.chunk, 32 if d.S == 1 else 1)
