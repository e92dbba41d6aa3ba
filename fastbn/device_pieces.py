"""What training with options keeps of a batch on a GPU: pieces with statistics of their own, and their gradients."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from fastbn import device
from fastbn.cuda.arrays import Flat
from fastbn.moments import Moments

__all__ = ["Done", "OptionsSaved", "Piece", "count"]


class Piece(NamedTuple):
    """One batch with statistics of its own: a part of each tensor, as kernels take it."""

    x: Flat
    residual: Flat | None
    out: Flat
    mask: Any  # launch.Mask
    dims: tuple[int, int, int]
    start: int  # of the elements


class Done(NamedTuple):
    """What normalising a piece left."""

    stats: Flat
    params: tuple[Flat | None, Flat | None]
    renormed: Any  # launch_adjust.Renormed, or None
    frozen: bool = False


class OptionsSaved(device.DeviceSaved):
    """As ``DeviceSaved``, of one or more pieces; what was counted is known to the GPU alone until somebody asks."""

    __slots__ = ("alike", "done", "given", "moves", "pieces", "several")

    pieces: list[Piece]
    done: list[Done]
    alike: int  # pieces, the first ones, that one launch can work off
    several: bool  # ghosts: statistics have a row each
    given: tuple[bool, bool]
    moves: tuple[int, Flat | None]  # how often running statistics moved: known, and one int32 a piece

    @property
    def affine(self) -> tuple[bool, bool]:
        """Tell whether the caller gave weight and bias."""
        return self.given

    @property
    def count(self) -> int:  # type: ignore[override]
        """Values per channel, those that a mask leaves: waits for the GPU if there is one."""
        return sum(map(count, self.pieces))

    @property
    def updated(self) -> int:
        """How often running statistics moved: waits for the GPU if that was decided there."""
        known, found = self.moves
        return known if found is None else int(found.owner.host().sum())

    @updated.setter
    def updated(self, known: int) -> None:
        self.moves = known, None

    @property
    def ghosts(self) -> list[Moments]:
        """The statistics of each piece, on the host."""
        C, several = self.layout.dims[1], device.host(self.vectors.array_owner)
        rows = np.asarray(several, np.float64).reshape(-1, 4, C)
        mean, var, rest = rows[:, 0], rows[:, 2], rows[:, 3]
        mean = mean + np.where(np.isfinite(rest), rest, 0.0)
        return [Moments._of_variance(n, mean[i], var[i]) for i, n in enumerate(map(count, self.pieces))]

    @property
    def moments(self) -> Moments:
        """The statistics of all of it, on the host: waits for the GPU."""
        if any(d.frozen for d in self.done):
            return device.moments_found(self.x, self.layout, self.mask)
        return functools.reduce(Moments.merge, self.ghosts)

    def _row(self, i: int) -> Any:
        C = self.layout.dims[1]
        if not self.several:
            return super()._row(i)
        return self.x.library.reshape(self.vectors.array_owner, (len(self.pieces), 4 * C))[:, i * C : (i + 1) * C]

    def _run(self, grad: Flat, y: Flat | None, target: Flat, dr: Flat | None) -> tuple[Flat, Flat]:
        from fastbn.cuda import launch, launch_adjust, launch_sets

        C, P = self.layout.dims[1], len(self.pieces)
        both = self.x.vector(2 * P * C)  # all gradients of bias, then all of weight
        together = self._together((self.x.flat(), grad, y, target, dr), both)
        for i, (piece, d) in itertools.islice(enumerate(zip(self.pieces, self.done, strict=True)), together, None):
            g, into = grad.part(piece.start, piece.x.size), target.part(piece.start, piece.x.size)
            own_y, own_dr = (None if t is None else t.part(piece.start, piece.x.size) for t in (y, dr))
            grads = both.part((P + i) * C, C), both.part(i * C, C)
            launch.backward(
                piece.x, g, own_y, into, own_dr, *d.params, d.stats, piece.dims, d.frozen, self.relu, piece.mask, grads
            )
            if d.renormed is not None:
                launch_adjust.renorm_gradient(piece.x, d.renormed, grads)
        dweight, dbias = self.x.vector(C), self.x.vector(C)
        launch_sets.settle(self.x.flat(), both, dweight, dbias, (C, P, 1, 32), self.x.stream())
        return dweight, dbias

    def _together(self, tensors: tuple[Flat | None, ...], both: Flat) -> int:
        """Launch the gradients of pieces that one launch can work off; return how many it did."""
        if not self.alike:
            return 0
        from fastbn.cuda import launch_ghosts

        n, C, first = self.alike, self.layout.dims[1], self.pieces[0]
        parts = tuple(None if t is None else t.part(0, n * first.x.size) for t in tensors)
        grads = both.part(len(self.pieces) * C, n * C), both.part(0, n * C)
        stats, params = self.vectors.part(0, 4 * C * n), self.done[0].params
        return n if launch_ghosts.backward(parts, params, stats, grads, first.dims, n, self.relu) else 0


def count(piece: Piece) -> int:
    """Values per channel, those that a mask leaves: waits for the GPU if there is one."""
    if piece.mask.valid is not None:
        return device.counted(piece.mask)
    return piece.dims[0] * piece.dims[2]
