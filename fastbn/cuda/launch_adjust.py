"""Launches of what training options need between statistics and output; see ``adjust``."""

from __future__ import annotations

from typing import NamedTuple

from fastbn.cuda import adjust, tuning
from fastbn.cuda.arrays import WIDE, Flat
from fastbn.cuda.driver import run
from fastbn.cuda.launch import Mask, flags_of, moving
from fastbn.cuda.plan import Dims


class Renormed(NamedTuple):
    """What renormalisation made of a channel's numbers, C of each."""

    factors: Flat  # r, d
    weight: Flat  # weight*r
    bias: Flat  # weight*d + bias


def _blocks(channels: int) -> tuple[int]:
    return (-(-channels // tuning.THREADS),)


def move(
    x: Flat, stats: Flat, running: tuple[Flat, Flat], moved: Flat, dims: Dims, momentum: float, unbiased: bool,
    skip: bool, mask: Mask, batches: int = 1,
) -> None:  # fmt: skip
    """Move running statistics by those of batches of ``dims`` in turn, 4*C each.

    Writes to ``moved`` (an int32 each) 1 where it did. ``skip``: not where any is bad.
    """
    _, keep, momentum, unbias = moving(dims, 0.0, momentum)
    flags = skip | (0 if unbiased else 8)
    args = (stats, *running, moved, dims[1], keep, momentum, unbias, flags, mask.tally, batches)
    run(adjust.move(WIDE[x.kind], tuning.THREADS, mask.tally is not None), (1,), x.owner.stream(), args)


def renorm(
    x: Flat, stats: Flat, running: tuple[Flat, Flat], params: tuple[Flat | None, Flat | None], eps: float,
    limits: tuple[float, float],
) -> Renormed:  # fmt: skip
    """Work out r and d towards the running statistics, and the parameters with them."""
    C, (rmax, dmax) = running[0].size, limits
    factors, both = x.owner.vector(2 * C), x.owner.vector(2 * C)
    args = (stats, *running, *params, factors, both, C, eps, 1.0 / rmax, rmax, dmax, flags_of(*params))
    run(adjust.renorm(WIDE[x.kind], tuning.THREADS), _blocks(C), x.owner.stream(), args)
    return Renormed(factors, both.part(0, C), both.part(C, C))


def renorm_gradient(x: Flat, found: Renormed, grads: tuple[Flat, Flat]) -> None:
    """Turn the gradient of weight*r into that of weight, in place."""
    C = found.weight.size
    run(adjust.renorm_gradient(WIDE[x.kind], tuning.THREADS), _blocks(C), x.owner.stream(), (found.factors, *grads, C))
