"""Ghost batches: batch norm of every few samples on their own, in training only.

Hoffer et al. 2017 (arXiv:1705.08741), algorithm 1: running statistics move once per ghost batch, in order. A batch of
N samples makes N // size ghosts; the last takes the remainder too, because a remainder of its own would be normalised
by the noisiest statistics of all, and a remainder of one value per channel by none.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn.blocks import BlockForward, Blocks, Piece
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments
from fastbn.saved import Gradients, Saved

Array = npt.NDArray[Any]


def check(size: Any) -> None:
    """Check ghost=size."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise ArgumentTypeError("ghost", "an integer", type(size).__name__)
    if size < 1:
        raise ArgumentValueError("ghost", "an integer >= 1", size)


class GhostSaved(Saved):
    """What ghost batches save; mean, invstd and variance have shape (ghosts, C)."""

    __slots__ = ("f", "ghosts", "pieces")

    f: BlockForward
    pieces: list[Piece]
    ghosts: list[Moments]

    def _row(self, i: int) -> Array:
        return np.concatenate([stats.reshape(3, d.B, d.C)[i] for _, d, stats in self.pieces])

    @property
    def moments(self) -> Moments:
        """The statistics of the whole batch."""
        return functools.reduce(Moments.merge, self.ghosts)

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        return self.f.gradients(self.pieces, grad_output, out)


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
    saved.f, saved.pieces = f, [(part, d, f.train(part, d, eps)) for part, d in pieces]
    saved.count, saved.updated = f.count, 0
    saved.ghosts = [
        Moments(d.N * d.S, mean, var * (d.N * d.S))
        for _, d, stats in saved.pieces
        for mean, _, var in stats.reshape(3, d.B, d.C).swapaxes(0, 1)
    ]
    return f.result(), saved
