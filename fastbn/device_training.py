"""Batch norm in training with options, for arrays on a GPU: the twin of ``training`` and ``ghosts``.

Statistics, renormalisation and what may move are worked out on the GPU, in stream order. What must become a number on
the host waits for it: ``nonfinite="raise"``, ``on_single="running"`` under a mask that is on the GPU, and, when asked,
``Saved.updated`` and ``Saved.count``. Small ghost batches of equal size are one launch, others calls of their own on
parts of the memory.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from fastbn import arguments, device, ghosts, layout, masked, training
from fastbn.cuda.arrays import DeviceArray, Flat
from fastbn.cuda.libraries import wrap
from fastbn.device_pieces import Done, OptionsSaved, Piece, count
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments
from fastbn.saved import Saved

__all__ = ["train", "update"]


class _Training:
    """One call: its checked arguments, and what is decided before anything is launched."""

    def __init__(self, f: device.Call, running: tuple[Flat, Flat] | None, o: training.Options, found: Any):
        self.f, self.running, self.o, self.found = f, running, o, found

    def pieces(self) -> list[Piece]:
        """Cut the batch."""
        from fastbn.cuda import launch

        f, o = self.f, self.o
        samples, (N, C, S) = f.x.shape[0], f.layout.dims
        x, out, each, places = f.x.flat(), f.out.flat(), f.x.size // samples, N * S // samples
        if o.ghost is None:
            return [Piece(x, f.residual, out, self.found or launch.ALL, (N, C, S), 0)]
        result = []
        for a, b in ghosts.bounds(samples, o.ghost):
            mask = launch.ALL
            if self.found is not None:
                valid = self.found.valid.part(a * places, (b - a) * places)
                mask = launch.mask_of(valid, f.x.stream())
            start, size = a * each, (b - a) * each
            added = None if f.residual is None else f.residual.part(start, size)
            dims = _dims(f, samples, b - a)
            result.append(Piece(x.part(start, size), added, out.part(start, size), mask, dims, start))
        return result

    def single(self, piece: Piece) -> bool:
        """Tell whether a piece has one value per channel and must be normalised by the running statistics."""
        if piece.mask.valid is not None and self.o.on_single == "error":
            return False  # nobody has looked, and nobody will
        if count(piece) != 1:
            return False
        if self.o.on_single == "error":
            if self.o.ghost is None or self.o.renorm is not None:
                raise ArgumentValueError("x", "more than 1 value per channel when training", f"shape {self.f.x.shape}")
            raise ArgumentValueError("ghost", "more than 1 value per channel in a ghost batch", self.o.ghost)
        if self.running is None:
            raise ArgumentValueError("on_single", "running statistics to normalise by", "none")
        return True

    def refuse_nonfinite(self) -> None:
        """Raise for statistics that are not finite, before anything is written; waits for the GPU."""
        batch = device.moments_found(self.f.x, self.f.layout, self.found)
        if batch.count:
            training.refuse_nonfinite(batch, np.dtype(self.f.x.arithmetic))

    def normalise(self, piece: Piece, stats: Flat, single: bool) -> Done:
        """Launch the statistics and the output of a piece; moves nothing."""
        from fastbn.cuda import launch, launch_adjust

        f, o, params = self.f, self.o, (self.f.weight, self.f.bias)
        tensors = (piece.x, piece.residual, piece.out)
        if single:
            assert self.running is not None
            launch.statistics(*self.running, o.eps, stats)
            launch.infer(*tensors, *params, stats, piece.dims, f.relu, piece.mask)
            return Done(stats, params, None, frozen=True)
        if o.renorm is None:
            launch.train(*tensors, *params, None, None, piece.dims, o.eps, 0.0, f.relu, True, piece.mask, stats)
            return Done(stats, params, None)
        assert self.running is not None
        launch.moments(piece.x, piece.dims, o.eps, piece.mask, stats)
        renormed = launch_adjust.renorm(piece.x, stats, self.running, params, o.eps, o.renorm)
        params = renormed.weight, renormed.bias
        launch.infer(*tensors, *params, stats, piece.dims, f.relu, piece.mask)
        return Done(stats, params, renormed)

    def alike(self, pieces: list[Piece], single: list[bool]) -> int:
        """Return how many pieces, from the first on, differ in nothing but their place; 0 where each is a call."""
        if self.found is not None or self.o.renorm is not None or any(single):
            return 0
        found = sum(1 for _ in itertools.takewhile(lambda p: p.dims == pieces[0].dims, pieces))
        return found if found > 1 else 0

    def together(self, pieces: list[Piece], alike: int, stats: Flat) -> list[Done]:
        """Launch what one launch can work off; return what it left, nothing where each piece is a call."""
        if not alike:
            return []
        from fastbn.cuda import launch_ghosts

        f, first, C, size = self.f, pieces[0], self.f.layout.dims[1], alike * pieces[0].x.size
        x, out, added = (None if t is None else t.part(0, size) for t in (f.x.flat(), f.out.flat(), f.residual))
        assert x is not None and out is not None
        params, eps = (f.weight, f.bias), self.o.eps
        if not launch_ghosts.train(x, added, out, params, stats, first.dims, alike, eps, f.relu):
            return []
        return [Done(stats.part(4 * C * i, 4 * C), params, None) for i in range(alike)]

    def move(self, pieces: list[Piece], done: list[Done], alike: int) -> tuple[int, Flat | None]:
        """Move the running statistics by each piece in turn; by those that are alike in one launch."""
        from fastbn.cuda import launch_adjust

        o = self.o
        if self.running is None or not o.update_stats:
            return 0, None
        library = self.f.x.library
        make = library.zeros if any(d.frozen for d in done) else library.empty
        last = library.wrap(make((len(pieces),), "int32", self.f.x.owner)).flat()
        skip = o.nonfinite == "skip_update"
        asked = skip or any(p.mask.valid is not None for p in pieces)
        for i, (piece, d) in enumerate(zip(pieces, done, strict=True)):
            if d.frozen or 0 < i < alike:
                continue
            n = alike if alike and not i else 1
            stats = Flat(d.stats.address, n * d.stats.size, d.stats.kind, d.stats.owner)
            launch_adjust.move(
                piece.x, stats, self.running, last.part(i, n), piece.dims, o.momentum, o.unbiased, skip, piece.mask, n
            )
        return sum(not d.frozen for d in done), last if asked else None


def _dims(f: device.Call, samples: int, some: int) -> tuple[int, int, int]:
    """Return the dims of some of the samples, which lie in front of the channels, or behind the only one."""
    N, C, S = f.layout.dims
    return (N // samples * some, C, S) if N % samples == 0 else (N, C, S // samples * some)


def train(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, o: training.Options,
    axis: Any, residual: Any, mask: Any, lengths: Any, out: Any,
) -> tuple[Any, Saved]:  # fmt: skip
    """See ``fastbn.batch_norm_train``."""
    o = training.check(o)
    f = device.Call(x, weight, bias, axis, o.activation, residual, out, in_place=False)
    C = f.layout.dims[1]
    running = device.pair(running_mean, running_var, f.x, C, f)
    if o.renorm is not None and running is None:
        raise ArgumentValueError("renorm", "running statistics to renormalise towards", "none")
    if o.ghost is not None and f.axis == 0:
        raise ArgumentValueError("axis", "a channel axis other than 0, that of the samples", 0)
    if o.ghost is not None and o.on_single == "error":
        _refuse_single(f.x, f.axis, mask, lengths, o.ghost)
    back = _samples_first(f) if o.ghost is not None and f.x.size else None
    found = f.mask(mask, lengths, train=True, single=o.on_single == "running")
    if f.x.size == 0:
        return f.result, f.saved(f.x.zeros(4 * C), frozen=False)
    y, saved = _run(_Training(f, running, o, found))
    if back is not None:
        back.library.assign(back.owner, f.out.owner)
    return y, saved


def _refuse_single(x: DeviceArray, axis: int, mask: Any, lengths: Any, size: int) -> None:
    """Raise if a mask that is on the host leaves a ghost batch one value per channel."""
    if (mask is None and lengths is None) or device.on_device(mask) or device.on_device(lengths):
        return
    shape: Any = x  # shape and rank are all that is looked at
    valid = masked.valid(mask, lengths, shape, axis)
    if any(np.count_nonzero(valid[a:b]) == 1 for a, b in ghosts.bounds(x.shape[0], size)):
        raise ArgumentValueError(
            "x", "more than 1 value per channel when training", "a mask that leaves a ghost batch 1"
        )


def _run(t: _Training) -> tuple[Any, Saved]:
    f, C = t.f, t.f.layout.dims[1]
    pieces = t.pieces()
    single = [t.single(piece) for piece in pieces]
    if t.o.nonfinite == "raise" and not all(single):
        t.refuse_nonfinite()
    stats = f.x.vector(4 * C * len(pieces))
    alike = t.alike(pieces, single)
    done = t.together(pieces, alike, stats)
    for i, piece in itertools.islice(enumerate(pieces), len(done), None):
        done.append(t.normalise(piece, stats.part(4 * C * i, 4 * C), single[i]))
    saved = OptionsSaved()
    saved.moves, saved.alike = t.move(pieces, done, alike), alike
    saved.pieces, saved.done, saved.several = pieces, done, t.o.ghost is not None
    saved.given = f.weight is not None, f.bias is not None
    f.saved(stats, all(single), mask=t.found, into=saved)
    return f.result, saved


def _samples_first(f: device.Call) -> DeviceArray | None:
    """Put arrays into C order if samples do not lie behind each other; returns where the output must go in the end."""
    order = f.layout.order
    if all(f.x.shape[a] == 1 for a in order[: order.index(0)]):
        return None
    final = f.out
    f.layout = layout.contiguous(f.x.shape, f.axis)
    f.x = f.x.contiguous()
    if f.residual is not None:
        added: DeviceArray = f.residual.owner
        f.residual = added.contiguous().flat()
    f.out = f.x.empty(f.x.shape)
    return final


def update(running_mean: Any, running_var: Any, moments: Any, momentum: Any, unbiased: Any) -> None:
    """Move running statistics on a GPU by statistics gathered elsewhere; see ``fastbn.update_running``."""
    if not isinstance(moments, Moments):
        raise ArgumentTypeError("moments", "fastbn.Moments", type(moments).__name__)
    like = wrap("running_mean", running_mean, ("float32", "float64"))
    moved = device.pair(running_mean, running_var, like, moments.mean.size)
    momentum = arguments.number("momentum", momentum)
    if moments.count == 0 or moved is None:
        return
    if moments.count == 1 and unbiased:
        raise ArgumentValueError("moments", "more than 1 value per channel for the unbiased variance", "count 1")
    from fastbn.cuda import launch_sets

    zero = np.zeros(moments.mean.size)
    values = np.concatenate([moments.mean, zero, moments.variance(int(bool(unbiased))), zero])
    with np.errstate(over="ignore", invalid="ignore"):
        stats = like.library.wrap(like.library.put(values.astype(like.arithmetic), like.owner)).flat()
    launch_sets.move(stats, *moved, 1, momentum, 1.0)
