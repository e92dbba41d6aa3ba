"""Which kernel in one launch, if any: plan, kernel and grid of a shape, worked out once and kept."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

from fastbn.cuda import (
    bundle,
    bundle_backward,
    bundle_sums,
    gang,
    gang_backward,
    gang_sums,
    meeting,
    persistent,
    plan,
    plan_bundle,
    plan_gang,
    plan_sets,
    sets_held,
    sets_kept,
    sets_staged,
    slab,
    tuning,
)
from fastbn.cuda.arrays import ITEMSIZE
from fastbn.cuda.driver import GRANTED, SIMULATED, Kernel, Limits, current_device, run
from fastbn.cuda.plan import Dims
from fastbn.cuda.sets import SetVariant
from fastbn.cuda.sweep import Variant


class One(NamedTuple):
    """A kernel that does all of it."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    shared: int
    scratch: int  # elements that blocks meet in; 0 for none
    cut: tuple[int, ...]  # the numbers behind the arrays that describe the tensor
    cleared: bool = False  # the scratch must be 0
    masks: bool = True  # takes a mask


def fits(kernel: Kernel, blocks: int, shared: int) -> bool:
    """Tell whether so many blocks of a kernel can be on the GPU at once, as a barrier needs (0: there is none).

    A GPU that is shared out or a toolkit without the device runtime (libcudadevrt) must not end a call that three
    launches can do: the reason is a warning.
    """
    if SIMULATED:
        return True
    try:
        kernel.allow_shared(shared)
        if not blocks:
            return True
        compiled = next(iter(kernel.compiled.overloads.values()))
        room = compiled.max_cooperative_grid_blocks(kernel.threads, shared)
    except Exception as error:  # of the linker, the driver or another version of numba-cuda
        _split_instead(kernel, error)
        return False
    return bool(blocks <= room)


def _split_instead(kernel: Kernel, error: Exception) -> None:
    name = kernel.function.__name__
    warnings.warn(f"no {name} in one launch, several launches instead: {error}", RuntimeWarning, stacklevel=3)


_refused: set[tuple[Kernel, int]] = set()  # on which device


def attempt(one: One, stream: int, args: tuple[Any, ...]) -> bool:
    """Launch; False where the driver will not have all blocks of a barrier on the GPU at once, and then never again.

    It counts the multiprocessors that the process may use only then: a server that shares out the GPU (MPS) may leave
    fewer than ``fits`` was told. A refused launch has written nothing.
    """
    try:
        run(one.kernel, one.grid, stream, args, one.shared)
    except Exception as error:
        if SIMULATED or one.name not in ("persistent", "gang", "bundle"):
            raise
        _split_instead(one.kernel, error)
        _refused.add((one.kernel, current_device()))
        forget()
        return False
    return True


@functools.lru_cache(maxsize=1024)
def one_launch(
    kind: str, dims: Dims, whole: bool, relu: bool, residual: bool, backward: bool, frozen: bool,
    limits: Limits, masked: bool = False, batches: int = 1,
) -> One | None:  # fmt: skip
    """Return how one launch does it; None where it takes three. ``whole``: all tensors (and the mask) are aligned.

    ``batches`` of these dims lie behind each other: one launch for all, but for "persistent", which has one only.
    """
    plan.small_enough(dims, kind)
    tensors = 2 if backward else 1
    what = Variant(kind, 16 // ITEMSIZE[kind], 0, backward, relu, residual, frozen, masked=masked)
    if not masked and batches == 1:
        together = _gang(what, dims, plan_gang.gang(dims, kind, whole, tensors, *limits[:2]))
        if together is not None:
            return together
    most = tuning.MASKED_THREADS if masked else 1024
    threads, shared = plan.slab(dims, kind, whole, tensors, limits.shared)
    if threads:
        kernel = _slab(what._replace(threads=min(threads, most)))
        return One("slab", kernel, (dims[1],), shared, 0, dims) if fits(kernel, 0, shared) else None
    p = plan.persistent(dims, kind, whole, tensors, *limits[:2], batches, limits.capability)
    threads = 0 if p.alone else plan.again(dims, kind)
    if threads:
        return One("again", _slab(what._replace(W=1, threads=min(threads, most), kept=False)), (dims[1],), 0, 0, dims)
    if dims[2] > 1 and not masked and batches == 1:
        return _bundle(what, dims, plan_bundle.bundle(dims, kind, whole, tensors, *limits[:2]))
    return _rows(what, dims, p) if p.threads else None


def _slab(what: Variant) -> Kernel:
    found: Kernel = slab.backward(what) if what.backward else slab.train(what)
    return found


def _gang(what: Variant, dims: Dims, p: plan_gang.Gang) -> One | None:
    if not p.blocks:
        return None
    alone = p.blocks == 1
    what = what._replace(threads=p.threads, layers=p.layers, alone=alone)
    kernel, blocks = gang_backward.backward(what) if what.backward else gang.train(what), p.gangs * p.blocks
    if (kernel, current_device()) in _refused or not fits(kernel, 0 if alone else blocks, p.shared):
        return None
    size = 0 if alone else gang_sums.scratch_size(p.gangs, p.blocks)
    return One("gang", kernel, (blocks,), p.shared, size, (*dims, p.blocks, p.gangs, p.chunk), not alone, masks=False)


def _bundle(what: Variant, dims: Dims, p: plan_bundle.Bundle) -> One | None:
    if not p.channels:
        return None
    what = what._replace(threads=p.threads, layers=p.layers)
    kernel, blocks = bundle_backward.backward(what) if what.backward else bundle.train(what), p.gangs * p.blocks
    if (kernel, current_device()) in _refused or not fits(kernel, blocks, p.shared):
        return None
    cut = (*dims, p.channels, p.vectors, p.threads // p.vectors, p.blocks, p.gangs, p.chunk)
    size = bundle_sums.scratch_size(p.gangs, p.blocks, p.channels)
    return One("bundle", kernel, (blocks,), p.shared, size, cut, masks=False)


def _rows(what: Variant, dims: Dims, p: plan.Persistent) -> One | None:
    what = what._replace(threads=p.threads, alone=p.alone)
    kernel, (N, C, _) = persistent.backward(what) if what.backward else persistent.train(what), dims
    if (kernel, current_device()) in _refused or not fits(kernel, 0 if p.alone else p.across * p.parts, p.shared):
        return None
    name, cut = "alone" if p.alone else "persistent", (C, N, p.parts, p.turns, p.depth, p.tx, p.kept)
    size = 0 if p.alone else meeting.scratch_size(p.across, p.tx * what.W, p.parts)
    return One(name, kernel, (p.across, p.parts), p.shared, size, cut)


def set_variant(p: plan_sets.SetPlan, kind: str) -> SetVariant:
    """Return what the kernels of a plan are compiled for."""
    return SetVariant(kind, p.W, p.threads, p.affine, p.team, p.kept, p.held)


@functools.lru_cache(maxsize=1024)
def sets(
    d: plan_sets.Sizes, kind: str, whole: bool, given: bool, backward: bool, limits: Limits
) -> plan_sets.SetPlan:  # fmt: skip
    """Return how sets are worked off: as planned, split where a block may not have the shared memory for that."""
    tensors = 2 if backward else 1
    p = plan_sets.sets(d, kind, whole, given, tensors, limits.shared, limits.multiprocessors)
    if p.held and not fits((sets_staged.backward if backward else sets_held.train)(set_variant(p, kind)), 0, p.shared):
        p = plan_sets.sets(d, kind, whole, given, tensors, GRANTED, limits.multiprocessors)
    if not p.team or p.held:
        return p
    stage = sets_kept.backward if backward else sets_kept.train
    if fits(stage(set_variant(p, kind)), 0, p.shared):
        return p
    return p._replace(threads=tuning.THREADS, team=0, kept=False, shared=0, blocks=0)


class _Chosen:
    """How often all choices were made anew; who remembers one asks for it."""

    times = 0


chosen = _Chosen()


def forget() -> None:
    """Forget every choice; for who changes ``tuning``."""
    chosen.times += 1
    for cached in (
        one_launch,
        sets,
        plan.plan,
        plan.masked,
        plan.slab,
        plan.again,
        plan.persistent,
        plan_gang.gang,
        plan_bundle.bundle,
        plan_sets.sets,
        plan_sets.columns,
    ):
        cached.cache_clear()
