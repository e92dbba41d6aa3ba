"""From sets of values to the launches of layer, group and instance norm; as ``launch`` does for batch norm.

``stats`` is an arithmetic vector of 4*sets: mean, invstd, biased variance, rounding remainder of the mean.
"""

from __future__ import annotations

from typing import Any

from fastbn.cuda import choice, finalize, launch, sets, sets_columns, sets_held, sets_kept, sets_staged, tuning
from fastbn.cuda.arrays import WIDE, Flat
from fastbn.cuda.driver import check, device_properties, run
from fastbn.cuda.plan_sets import SetPlan, Sizes, columns


def _plan(x: Flat, d: Sizes, backward: bool, params: tuple[Flat | None, ...], *others: Flat) -> SetPlan:
    given = any(p is not None for p in params)
    return choice.sets(d, x.kind, launch.aligned(x, *others, *params), given, backward, device_properties())


def _four(d: Sizes) -> tuple[int, int, int, int]:
    return d.sets, d.G, d.D, d.S


def train(x: Flat, out: Flat, weight: Flat | None, bias: Flat | None, d: Sizes, eps: float) -> Flat:
    """Normalise into ``out``; returns ``stats``. Parameters are by channel."""
    check()
    p, stream, flags = _plan(x, d, False, (weight, bias), out), x.owner.stream(), launch.flags_of(weight, bias)
    what = choice.set_variant(p, x.kind)
    if p.team:
        stats: Flat = x.owner.vector(4 * d.sets)
        args = (x, out, stats, weight, bias, *_four(d), eps, flags)
        run((sets_held if p.held else sets_kept).train(what), (p.blocks,), stream, args, p.shared)
        return stats
    dims = (1, d.sets, d.n)
    stats = launch.statistics_of(x, p.split, (None, None), dims, launch.moving(dims, eps, 0.0), stream)
    grid = (d.sets, p.split.apply_parts)
    run(sets.normalise(what), grid, stream, (x, out, stats, weight, bias, *_four(d), p.split.apply_chunk, flags))
    return stats


def backward(
    x: Flat, grad: Flat, out: Flat, weight: Flat | None, stats: Flat, dweight: Flat | None, dbias: Flat | None, d: Sizes
) -> None:
    """Input gradient into ``out`` (which may be grad), parameter gradients into ``dweight`` and ``dbias`` (or None)."""
    check()
    p, stream, flags = _plan(x, d, True, (weight,), grad, out), x.owner.stream(), launch.flags_of(weight, None)
    affine, what = dweight is not None or dbias is not None, choice.set_variant(p, x.kind)
    if p.held:
        partial = x.owner.scratch(2 * p.blocks * d.C)
        args: Any = (x, grad, out, stats, weight, partial, d.sets, d.C)
        run(sets_staged.backward(what), (p.blocks,), stream, args, p.shared)
        settle(x, partial, dweight, dbias, (d.C, p.blocks, 1, tuning.HELD_MANY), stream)
        return
    if affine and p.affine != "one":
        _by_column(x, grad, stats, dweight, dbias, d, stream)  # before out is written: it may be grad
    by_set = x.owner.scratch(2 * d.sets)
    if p.team:
        args = (x, grad, out, stats, weight, by_set, *_four(d), flags)
        run(sets_kept.backward(what), (p.blocks,), stream, args, p.shared)
    else:
        _split(x, grad, out, weight, stats, by_set, d, p, stream)
    if affine and p.affine == "one":
        settle(x, by_set, dweight, dbias, (d.C, d.B, 1, 32), stream)


def _split(
    x: Flat, grad: Flat, out: Flat, weight: Flat | None, stats: Flat, by_set: Flat, d: Sizes, p: SetPlan, stream: int
) -> None:
    s, what, flags = p.split, choice.set_variant(p, x.kind), launch.flags_of(weight, None)
    partial = x.owner.scratch(2 * s.parts * d.sets)
    sum_v, sum_vt = by_set.part(0, d.sets), by_set.part(d.sets, d.sets)
    args: Any = (x, grad, stats, weight, partial, *_four(d), s.parts, s.chunk, flags)
    run(sets.sums(what), (d.sets, s.parts), stream, args)
    settle = (partial, stats, sum_vt, sum_v, d.sets, s.parts, 1, s.group)
    run(finalize.settle_backward(WIDE[x.kind], tuning.THREADS), (-(-d.sets // s.group),), stream, settle)
    args = (x, grad, out, stats, weight, sum_vt, sum_v, *_four(d), s.apply_chunk, flags)
    run(sets.gradient(what), (d.sets, s.apply_parts), stream, args)


def settle(
    x: Flat, partial: Flat, dweight: Flat | None, dbias: Flat | None, cut: tuple[int, int, int, int], stream: int
) -> None:
    """Add up rows of sums; ``cut`` is (channels, rows, columns a channel, channels a block)."""
    spare = None if dweight is not None and dbias is not None else x.owner.scratch(cut[0])
    args = (partial, dweight or spare, dbias or spare, *cut)
    run(sets_columns.settle(WIDE[x.kind], tuning.THREADS), (-(-cut[0] // cut[3]),), stream, args)


def _by_column(
    x: Flat, grad: Flat, stats: Flat, dweight: Flat | None, dbias: Flat | None, d: Sizes, stream: int
) -> None:
    c, V = columns(d, x.kind, launch.aligned(x, grad)), d.C * d.S
    partial = x.owner.scratch(2 * c.parts * V)
    args = (x, grad, stats, partial, d.B, d.G, V, d.n, c.parts, c.chunk, c.tx)
    run(sets_columns.sums(x.kind, c.W, tuning.THREADS), (c.across, c.parts), stream, args)
    settle(x, partial, dweight, dbias, (d.C, c.parts, d.S, c.many), stream)


def move(stats: Flat, running_mean: Flat, running_var: Flat, samples: int, momentum: float, unbias: float) -> None:
    """Move the running statistics of instance norm by the means over samples."""
    C = running_mean.size
    args = (stats, running_mean, running_var, samples, C, 1.0 - momentum, momentum, unbias)
    kernel = sets_columns.move(running_mean.kind, tuning.THREADS)
    run(kernel, (-(-C // tuning.THREADS),), running_mean.owner.stream(), args)
