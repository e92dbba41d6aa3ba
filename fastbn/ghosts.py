"""Ghost batches: batch norm of every few samples on their own, in training only.

Hoffer et al. 2017 (arXiv:1705.08741), algorithm 1: running statistics move once per ghost batch, in order. A batch of
N samples makes N // size ghosts; the last takes the remainder too, because a remainder of its own would be normalised
by the noisiest statistics of all, and a remainder of one value per channel by none.

Ghosts under a mask have other counts each, renormalised ones another affine each: they are worked off one by one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, recycled
from fastbn.blocks import BlockForward, Blocks, Piece
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments
from fastbn.saved import Gradients, Saved, output

Array = npt.NDArray[Any]

# (samples, their x, their residual) -> (y, saved): how one ghost is normalised
Turn = Callable[[slice, Array, Any], tuple[Array, Saved]]


def check(size: Any) -> int:
    """Check ghost=size; return it as Python's integer: those of NumPy may be too small for the places in a batch."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise ArgumentTypeError("ghost", "an integer", type(size).__name__)
    if size < 1:
        raise ArgumentValueError("ghost", "an integer >= 1", size)
    return int(size)


class Ghosts(Saved):
    """What ghost batches save; mean, invstd and variance have shape (ghosts, C)."""

    __slots__ = ("ghosts",)

    numpy_sums = True

    ghosts: list[Moments]

    @property
    def moments(self) -> Moments:
        """The statistics of the whole batch."""
        return functools.reduce(Moments.merge, self.ghosts)


class GhostSaved(Ghosts):
    """What ghosts save that go through the kernels together."""

    __slots__ = ("f", "pieces")

    f: BlockForward
    pieces: list[Piece]

    def _row(self, i: int) -> Array:
        return np.concatenate([stats.reshape(3, d.B, d.C)[i] for _, d, stats in self.pieces])

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        return self.f.gradients(self.pieces, grad_output, out)


class TurnSaved(Ghosts):
    """What ghosts save that are worked off one by one."""

    __slots__ = ("axis", "bounds", "parts", "x")

    x: Array
    axis: int
    bounds: list[tuple[int, int]]  # first sample of each ghost, and the one behind its last
    parts: list[Saved]

    def _row(self, i: int) -> Array:
        return np.stack([part._row(i) for part in self.parts])

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        grad = arguments.same_kind("grad_output", grad_output, self.x)
        target = checked_output(out, self.x, self.axis)
        if out is not None:
            arguments.apart("grad_output", out, grad, exact_allowed=True)
            for part in self.parts:
                arguments.apart_from_parameters(out, getattr(part, "weight", None), getattr(part, "bias", None))
        each = [part.gradients(grad[a:b], None) for (a, b), part in zip(self.bounds, self.parts, strict=True)]
        kept = each[0].residual is not None
        residual = np.concatenate([g.residual for g in each if g.residual is not None]) if kept else None
        np.concatenate([g.input for g in each], out=target)
        totals = [None if v is None else v.astype(np.float64) for v in each[0][1:3]]
        for g in each[1:]:
            totals = [None if v is None or t is None else t + v for t, v in zip(totals, g[1:3], strict=True)]
        kind = arguments.arithmetic(grad.dtype)
        dweight, dbias = (None if total is None else total.astype(kind) for total in totals)
        return Gradients(target, dweight, dbias, residual)


def checked_output(out: Any, x: Array, axis: int) -> Array:
    """Return the checked output, or a new array like x."""
    if out is None:
        return recycled.empty_like(x)
    output(out, x, axis)
    arguments.apart("x", out, x, exact_allowed=False)
    target: Array = out
    return target


def bounds(samples: int, size: int) -> list[tuple[int, int]]:
    """Return where ghosts of ``size`` samples begin and end; the last takes the remainder."""
    edges = [i * size for i in range(max(1, samples // size))]
    return list(itertools.pairwise([*edges, samples]))


def in_turn(step: Turn, x: Array, axis: int, residual: Any, out: Any, size: int) -> tuple[Array, TurnSaved]:
    """Normalise every ghost by a call of its own. Nothing is written to ``out`` before all have gone well."""
    if axis == 0:
        raise ArgumentValueError("axis", "a channel axis other than 0, that of the samples", 0)
    target = checked_output(out, x, axis)
    if residual is not None:
        residual = arguments.same_kind("residual", residual, x)
        arguments.apart("residual", target, residual, exact_allowed=True)
    saved = TurnSaved()
    saved.x, saved.axis, saved.bounds = x, axis, bounds(x.shape[0], size)
    done = [step(slice(a, b), x[a:b], None if residual is None else residual[a:b]) for a, b in saved.bounds]
    saved.parts = [part for _, part in done]
    saved.count, saved.updated = sum(part.count for part in saved.parts), 0
    saved.ghosts = [part.moments for part in saved.parts]
    return np.concatenate([y for y, _ in done], out=target), saved


def cut(samples: int, size: int, one: Blocks) -> list[tuple[slice, Blocks]]:
    """Cut a batch into ghosts of ``size`` samples, the last with the remainder; equal ones are one piece."""
    count = max(1, samples // size)
    size = min(size, samples)
    equal = count if samples == count * size else count - 1
    pieces = []
    if equal:
        pieces.append((slice(0, equal * size * one.slab), Blocks(equal, size * one.N, one.C, one.S)))
    if equal < count:
        rest = samples - equal * size
        pieces.append((slice(equal * size * one.slab, None), Blocks(1, rest * one.N, one.C, one.S)))
    return pieces


def train(f: BlockForward, size: int, eps: float) -> tuple[Array, GhostSaved]:
    """Normalise every ghost batch of checked arguments."""
    pieces = cut(f.blocks.B, size, f.blocks)
    if min(d.N * d.S for _, d in pieces) == 1:
        raise ArgumentValueError("ghost", "more than 1 value per channel in a ghost batch", size)
    saved = GhostSaved()
    saved.f, saved.pieces = f, [(part, d, f.train_piece(part, d, eps)) for part, d in pieces]
    saved.count, saved.updated = f.count, 0
    saved.ghosts = [
        Moments._of_variance(d.N * d.S, mean, var)
        for _, d, stats in saved.pieces
        for mean, _, var in stats.reshape(3, d.B, d.C).swapaxes(0, 1)
    ]
    return f.result(), saved
