"""From (N, C, S) to the launches of an operation; the same four entry points as ``fastbn.cpu.launch``.

Tensors and parameters arrive as ``Flat`` (or None where absent), on the current device; results are made by the
library that x comes from, on its current stream. Nothing here waits for the GPU. ``stats`` is an arithmetic vector of
4*C: mean, invstd, biased variance, rounding remainder of the mean.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from fastbn.cuda import finalize, flat, masks, planes, rows, tuning
from fastbn.cuda.arrays import WIDE, Flat
from fastbn.cuda.choice import One, attempt, one_launch
from fastbn.cuda.driver import check, device_properties, run
from fastbn.cuda.gang_sums import clear
from fastbn.cuda.plan import Dims, Plan, masked, plan
from fastbn.cuda.sweep import Variant


class Given(NamedTuple):
    """Running statistics that inference normalises with, straight from their arrays."""

    mean: Flat
    var: Flat
    eps: float


class Mask(NamedTuple):
    """Which places count: a byte for each, and what ``masks`` worked out of them; both None for all."""

    valid: Flat | None
    tally: Flat | None  # int32: their number, and four of them


ALL = Mask(None, None)


def mask_of(valid: Flat, stream: int) -> Mask:
    """Count the places that a mask leaves, on the GPU."""
    if valid.size <= tuning.TALLY:
        tally = valid.owner.empty((5,), "int32").flat()
        run(masks.tally(tuning.THREADS), (1,), stream, (valid, tally, valid.size))
        return Mask(valid, tally)
    parts = max(1, min(masks.PARTS, -(-valid.size // tuning.THREADS)))
    chunk = -(-valid.size // parts)
    parts = -(-valid.size // chunk)
    found, tally = (valid.owner.empty((n,), "int32").flat() for n in (2 * parts, 5))
    run(masks.count(tuning.THREADS), (parts,), stream, (valid, found, valid.size, chunk, parts))
    run(masks.gather(tuning.THREADS), (1,), stream, (found, tally, parts))
    return Mask(valid, tally)


def lengths_to_mask(lengths: Flat, valid: Flat, N: int, T: int, stream: int) -> None:
    """Fill the mask (N, T) of the first ``lengths[n]`` steps."""
    kernel = masks.from_lengths(lengths.kind, tuning.THREADS)
    run(kernel, (-(-N * T // tuning.THREADS),), stream, (lengths, valid, N, T))


def _plan(dims: Dims, kind: str, whole: bool, mask: Mask) -> Plan:
    return plan(dims, kind, whole) if mask.valid is None else masked(dims, kind, whole)


def _whole(mask: Mask, *tensors: Flat | None) -> bool:
    """Tell whether vectors of all tensors may be read at once, and the bytes of a mask for each."""
    return aligned(*tensors) and (mask.valid is None or not mask.valid.address & 7)


def aligned(*tensors: Flat | None) -> bool:
    """Tell whether 128-bit accesses are allowed."""
    for t in tensors:  # noqa: SIM110  (a generator costs as much as the rest of a launch)
        if t is not None and t.address & 15:
            return False
    return True


def flags_of(weight: Flat | None, bias: Flat | None) -> int:
    """Say to a kernel which parameters there are."""
    return (weight is not None) | (bias is not None) << 1


def _moving_flags(moved: tuple[Any, Any], numbers: tuple[float, ...]) -> int:
    """Say whether there are running statistics to move, and whether under a mask by the biased variance."""
    return (4 if moved[0] is not None else 0) | (8 if numbers[3] == 1.0 else 0)


def _stage(p: Plan) -> Any:
    return rows if p.rows else planes


def _shape(p: Plan, dims: Dims) -> tuple[int, ...]:
    """The numbers that describe the tensor to a kernel, after ``partial`` or the parameters."""
    N, C, S = dims
    return (N, C, S, p.R, p.V) if p.rows else (N, C, S)


def _tail(p: Plan) -> tuple[int, ...]:
    return (p.tx,) if p.rows else ()


def _sums(
    p: Plan, what: Variant, tensors: tuple[Any, ...], stats: Any, params: tuple[Any, Any], partial: Flat, dims: Dims,
    stream: int, mask: Mask,
) -> None:  # fmt: skip
    cut = (*_shape(p, dims), p.parts, p.chunk, *_tail(p))
    args = (*tensors, stats, *params, partial, *cut, flags_of(*params), *mask)
    run(_stage(p).sums(what), (p.across, p.parts), stream, args)


@functools.lru_cache(maxsize=1024)
def moving(dims: Dims, eps: float, momentum: float, unbiased: bool = True) -> tuple[float, float, float, float]:
    """The numbers with which statistics are taken and running ones move, as the kernels take them."""
    n = dims[0] * dims[2]
    unbias = 1.0 if not unbiased else n / (n - 1.0) if n > 1 else math.nan
    return eps, 1.0 - momentum, momentum, unbias


def _settle(
    x: Flat, p: Plan, partial: Flat, stats: Flat, moved: tuple[Any, Any], dims: Dims, numbers: tuple[float, ...],
    stream: int, mask: Mask,
) -> None:  # fmt: skip
    flags = _moving_flags(moved, numbers)
    args = (x, partial, stats, *moved, *dims, p.depth, p.columns, p.group, *numbers, flags, *mask)
    settle = finalize.settle_train(x.kind, tuning.THREADS, mask.valid is not None)
    run(settle, (-(-dims[1] // p.group),), stream, args)


def _normalise(
    p: Plan, what: Variant, tensors: tuple[Any, ...], stats: Any, more: Any, params: tuple[Any, Any], eps: float,
    dims: Dims, stream: int, mask: Mask,
) -> None:  # fmt: skip
    shape = _shape(p, dims)
    shape = shape[1:] if p.rows else shape
    args = (*tensors, stats, more, *params, eps, *shape, p.apply_chunk, *_tail(p), flags_of(*params), mask.valid)
    run(_stage(p).normalise(what), (p.across, p.apply_parts), stream, args)


def statistics_of(
    x: Flat, p: Plan, moved: tuple[Any, Any], dims: Dims, numbers: tuple[float, ...], stream: int, mask: Mask = ALL,
    stats: Flat | None = None,
) -> Flat:  # fmt: skip
    """Return ``stats`` of the channels; moves running statistics unless they are None."""
    partial = x.owner.scratch(2 * p.parts * (p.V if p.rows else dims[1]))
    if stats is None:
        stats = x.owner.vector(4 * dims[1])
    what = Variant(x.kind, p.W, tuning.THREADS, masked=mask.valid is not None)
    _sums(p, what, (x, None, None), None, (None, None), partial, dims, stream, mask)
    _settle(x, p, partial, stats, moved, dims, numbers, stream, mask)
    return stats


def train(
    x: Flat, residual: Flat | None, out: Flat, weight: Flat | None, bias: Flat | None, running_mean: Flat | None,
    running_var: Flat | None, dims: Dims, eps: float, momentum: float, relu: bool | None, unbiased: bool = True,
    mask: Mask = ALL, stats: Flat | None = None,
) -> Flat:  # fmt: skip
    """Training forward into ``out``; moves the running statistics unless they are None. Returns ``stats``.

    ``stats``: where to write them, if the caller has a place.
    """
    check()
    tensors, params, moved = (x, residual, out), (weight, bias), (running_mean, running_var)
    stream, whole, numbers = x.owner.stream(), _whole(mask, *tensors), moving(dims, eps, momentum, unbiased)
    limits, counted = device_properties(), mask.valid is not None
    one = one_launch(x.kind, dims, whole, bool(relu), residual is not None, False, False, limits, counted)
    if one is not None:
        if stats is None:
            stats = x.owner.vector(4 * dims[1])
        flags = flags_of(weight, bias) | _moving_flags(moved, numbers)
        args = (*tensors, stats, *params, *moved, *meeting_place(x, one, stream), *one.cut, *numbers, flags)
        if attempt(one, stream, (*args, *mask) if one.masks else args):
            return stats
    what = Variant(x.kind, 1, 0, relu=bool(relu), residual=residual is not None)
    return _split(x, what, tensors, params, moved, dims, numbers, whole, mask, stream, stats)


def meeting_place(x: Flat, one: One, stream: int) -> tuple[Flat | None, ...]:
    """Scratch in which the blocks of one launch meet; None where a kernel takes some and needs none."""
    if not one.scratch:
        return (None,) if one.name in ("alone", "gang") else ()
    found = x.owner.scratch(one.scratch)
    if one.cleared:
        run(clear(WIDE[x.kind], tuning.THREADS), (-(-one.scratch // tuning.THREADS),), stream, (found, one.scratch))
    return (found,)


def _split(
    x: Flat, what: Variant, tensors: tuple[Any, ...], params: tuple[Any, Any], moved: tuple[Any, Any], dims: Dims,
    numbers: tuple[float, ...], whole: bool, mask: Mask, stream: int, stats: Flat | None,
) -> Flat:  # fmt: skip
    """Train by three launches."""
    p = _plan(dims, x.kind, whole, mask)
    stats = statistics_of(x, p, moved, dims, numbers, stream, mask, stats)
    what = what._replace(W=p.W, threads=tuning.THREADS, masked=mask.valid is not None)
    _normalise(p, what, tensors, stats, None, params, 0.0, dims, stream, mask)
    return stats


def moments(x: Flat, dims: Dims, eps: float, mask: Mask = ALL, stats: Flat | None = None) -> Flat:
    """Statistics alone."""
    check()
    p = _plan(dims, x.kind, _whole(mask, x), mask)
    return statistics_of(x, p, (None, None), dims, moving(dims, eps, 0.0), x.owner.stream(), mask, stats)


def statistics(mean: Flat, var: Flat, eps: float, stats: Flat | None = None) -> Flat:
    """``stats`` of given running statistics, for a backward pass through them."""
    check()
    C = mean.size
    if stats is None:
        stats = mean.owner.vector(4 * C)
    what = finalize.settle_given(mean.kind, tuning.THREADS)
    run(what, (-(-C // tuning.THREADS),), mean.owner.stream(), (mean, var, stats, C, eps))
    return stats


def infer(
    x: Flat, residual: Flat | None, out: Flat, weight: Flat | None, bias: Flat | None, stats: Flat | Given,
    dims: Dims, relu: bool | None, mask: Mask = ALL,
) -> None:  # fmt: skip
    """Inference into ``out``, by ``stats`` or by running statistics as they are (one launch)."""
    check()
    tensors, params, whole = (x, residual, out), (weight, bias), _whole(mask, x, residual, out)
    given, stream = isinstance(stats, Given), x.owner.stream()
    first, more, eps = stats if isinstance(stats, Given) else (stats, None, 0.0)
    what = Variant(
        x.kind, 1, tuning.THREADS, relu=bool(relu), residual=residual is not None, given=given,
        masked=mask.valid is not None,
    )  # fmt: skip
    if tuning.FLAT and whole and mask.valid is None:
        cut = flat.cut(dims, x.kind, aligned(first, more, *params))
        if cut is not None:
            args = (*tensors, first, more, *params, eps, *cut.numbers, flags_of(*params))
            run(flat.normalise(what._replace(W=cut.W), cut.layout, cut.depth), (cut.blocks,), stream, args)
            return
    p = _plan(dims, x.kind, whole, mask)
    _normalise(p, what._replace(W=p.W), tensors, first, more, params, eps, dims, stream, mask)


def backward(
    x: Flat, grad: Flat, y: Flat | None, out: Flat, grad_residual: Flat | None, weight: Flat | None,
    bias: Flat | None, stats: Flat, dims: Dims, frozen: bool, relu: bool | None, mask: Mask = ALL,
    grads: tuple[Flat, Flat] | None = None,
) -> tuple[Flat, Flat]:  # fmt: skip
    """Input gradient into ``out``, the residual's into ``grad_residual``; returns those of weight and bias.

    ``grads``: where to write the latter, if the caller has a place.
    """
    check()
    tensors, params, flags = (x, grad, y, out, grad_residual), (weight, bias), flags_of(weight, bias)
    stream, whole = x.owner.stream(), _whole(mask, *tensors)
    if grads is None:
        grads = x.owner.vector(dims[1]), x.owner.vector(dims[1])
    limits, counted = device_properties(), mask.valid is not None
    one = one_launch(x.kind, dims, whole, bool(relu), y is not None, True, frozen, limits, counted)
    if one is not None:
        args = (*tensors, stats, *params, *grads, *meeting_place(x, one, stream), *one.cut, flags)
        if attempt(one, stream, (*args, *mask) if one.masks else args):
            return grads
    what = Variant(x.kind, 1, 0, True, bool(relu), y is not None, frozen)
    _split_backward(x, what, tensors, stats, params, grads, dims, whole, mask, stream)
    return grads


def _split_backward(
    x: Flat, what: Variant, tensors: tuple[Any, ...], stats: Flat, params: tuple[Any, Any], grads: tuple[Flat, Flat],
    dims: Dims, whole: bool, mask: Mask, stream: int,
) -> None:  # fmt: skip
    C, p = dims[1], _plan(dims, x.kind, whole, mask)
    what = what._replace(W=p.W, threads=tuning.THREADS, masked=mask.valid is not None)
    partial = x.owner.scratch(2 * p.parts * (p.V if p.rows else C))
    _sums(p, what._replace(frozen=False), tensors[:3], stats, params, partial, dims, stream, mask)
    settle = finalize.settle_backward(WIDE[x.kind], tuning.THREADS)
    run(settle, (-(-C // p.group),), stream, (partial, stats, *grads, C, p.depth, p.columns, p.group))
    cut = (*_shape(p, dims), p.apply_chunk, *_tail(p))
    args = (*tensors, stats, *params, *grads, *cut, flags_of(*params), *mask)
    run(_stage(p).gradient(what), (p.across, p.apply_parts), stream, args)
