"""Batch norm in training with options: masks, ghosts, renormalisation, one value per channel, bad batches.

Each option is a few lines around ``core``: a mask packs, ghosts cut the batch, the rest decides by which statistics
to normalise and whether the running ones move. Without options nothing here runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import arguments, core, ghosts, layout, masked, renorm, running
from fastbn.blocks import BlockForward
from fastbn.errors import ArgumentValueError
from fastbn.moments import Moments
from fastbn.saved import BatchSaved, Saved, no_statistics

Array = npt.NDArray[Any]


class Options(NamedTuple):
    """What ``batch_norm_train`` was asked for beyond its arrays; checked by ``check``."""

    momentum: float
    eps: float
    activation: str | None
    ghost: int | None = None
    renorm: tuple[float, float] | None = None
    on_single: str = "error"
    nonfinite: str = "propagate"
    update_stats: bool = True
    unbiased: bool = True


def check(o: Options) -> Options:
    """Check options before anything is computed."""
    for name, value, allowed in (
        ("on_single", o.on_single, ("error", "running")),
        ("nonfinite", o.nonfinite, ("propagate", "skip_update", "raise")),
    ):
        if not isinstance(value, str) or value not in allowed:
            raise ArgumentValueError(name, " or ".join(f'"{a}"' for a in allowed), repr(value))
    for name, flag in (("update_stats", o.update_stats), ("unbiased", o.unbiased)):
        arguments.flag(name, flag)
    return o._replace(
        ghost=None if o.ghost is None else ghosts.check(o.ghost),
        eps=arguments.epsilon(o.eps, positive=True),
        momentum=arguments.number("momentum", o.momentum),
        renorm=None if o.renorm is None else renorm.bounds(o.renorm),
    )


def train(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, o: Options,
    axis: Any, residual: Any, mask: Any, lengths: Any, out: Any,
) -> tuple[Array, Saved]:  # fmt: skip
    """See ``fastbn.batch_norm_train``."""
    o = check(o)
    alike = mask is None and lengths is None and o.renorm is None and o.nonfinite != "raise"
    if o.ghost is not None and not alike:
        return _ghosts_in_turn(x, weight, bias, running_mean, running_var, o, axis, residual, mask, lengths, out)
    if o.ghost is None:
        one = masked.forward(x, weight, bias, axis, o.activation, residual, out, mask, lengths)
        return _train(one, running_mean, running_var, o)
    f = BlockForward(x, weight, bias, axis, o.activation, residual, out)
    if o.on_single == "running" and o.ghost * f.blocks.N * f.blocks.S == 1 and f.count > 1:
        return _ghosts_in_turn(x, weight, bias, running_mean, running_var, o, axis, residual, None, None, out)
    return _train(f, running_mean, running_var, o)


def _train(f: core.Forward, running_mean: Any, running_var: Any, o: Options) -> tuple[Array, Saved]:
    """Normalise checked arguments."""
    rm, rv = f.running(running_mean, running_var)
    if o.renorm is not None and rm.size < f.weight.size:
        raise ArgumentValueError("renorm", "running statistics to renormalise towards", "none")
    if f.count * f.x.size == 0:
        return f.nothing(), f.saved(no_statistics(f.weight.size, o.eps), frozen=False)
    if f.count == 1:
        return _single(f, rm, rv, o)
    if isinstance(f, BlockForward) and o.ghost is not None:
        return _ghosts(f, rm, rv, o.ghost, o)
    if o.renorm is None and o.nonfinite != "raise":
        if o.update_stats and o.unbiased and o.nonfinite == "propagate":
            saved = core.run(f, rm, rv, o.momentum, o.eps)
        else:
            saved = core.run(f, rm[:0], rv[:0], 0.0, o.eps)
            saved.updated = _move(rm, rv, [saved.moments], f.dtype, o)
    else:
        saved = _statistics_first(f, rm, rv, o)
    return f.result(), saved


def _ghosts(f: BlockForward, rm: Array, rv: Array, size: int, o: Options) -> tuple[Array, Saved]:
    y, saved = ghosts.train(f, size, o.eps)
    saved.updated = _move(rm, rv, saved.ghosts, f.dtype, o)
    return y, saved


def _ghosts_in_turn(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, o: Options,
    axis: Any, residual: Any, mask: Any, lengths: Any, out: Any,
) -> tuple[Array, Saved]:  # fmt: skip
    """Ghosts one by one: under a mask, renormalised, or refused before anything is written where one is not finite.

    All go by the running statistics before the call, which move at the end.
    """
    x = arguments.tensor("x", x)
    axis = layout.normalise_axis(axis, x.ndim)
    moved = running.pair(running_mean, running_var, x.shape[axis], arguments.arithmetic(x.dtype))
    valid = None if mask is None and lengths is None else masked.valid(mask, lengths, x, axis)
    if out is not None:  # ghosts have outputs of their own
        ghosts.checked_output(out, x, axis)
        arguments.apart_from_parameters(out, *(p if isinstance(p, np.ndarray) else None for p in (weight, bias)))
        running.refuse_shared(*moved, {"out": out}, arguments.share)
    alone = o._replace(ghost=None, update_stats=False)

    def turn(samples: slice, x: Array, residual: Any) -> tuple[Array, Saved]:
        some = None if valid is None else valid[samples]
        f = masked.forward(x, weight, bias, axis, o.activation, residual, None, some, None)
        return _train(f, running_mean, running_var, alone)

    assert o.ghost is not None
    y, saved = ghosts.in_turn(turn, x, axis, residual, out, o.ghost)
    saved.updated = _move(*moved, [g for g in saved.ghosts if g.count > 1], moved[0].dtype, o)
    return y, saved


def _statistics_first(f: core.Forward, rm: Array, rv: Array, o: Options) -> BatchSaved:
    """Take the statistics, decide, then normalise: one more read of x."""
    stats = f.statistics(o.eps)
    mean, _, var = stats.reshape(3, -1)
    batch = Moments._of_variance(f.count, mean, var)
    if o.nonfinite == "raise":
        refuse_nonfinite(batch, f.dtype)
    if o.renorm is None:
        f.normalise(stats)
        saved = f.saved(stats, frozen=False)
    else:
        saved = renorm.normalise(f, stats, rm, rv, o.eps, o.renorm)
    saved.updated = _move(rm, rv, [batch], f.dtype, o)
    return saved


def _single(f: core.Forward, rm: Array, rv: Array, o: Options) -> tuple[Array, Saved]:
    """One value per channel has no variance: refuse, or normalise by the running statistics and leave them alone."""
    if o.on_single == "error":
        found = "a mask that leaves 1" if isinstance(f, masked.MaskedForward) else f"shape {f.x.shape}"
        raise ArgumentValueError("x", "more than 1 value per channel when training", found)
    if rm.size == 0:
        raise ArgumentValueError("on_single", "running statistics to normalise by", "none")
    stats = core.given(f, rm, rv, o.eps)
    return f.result(), f.saved(stats, frozen=True)


def finite(batch: Moments, dtype: np.dtype[Any]) -> Array:
    """Tell which channels' statistics are finite in the dtype of the running ones."""
    with np.errstate(all="ignore"):
        mean, var = batch.mean.astype(dtype), batch.variance(1).astype(dtype)
    ok: Array = np.isfinite(mean) & np.isfinite(var)
    return ok


def refuse_nonfinite(batch: Moments, dtype: np.dtype[Any]) -> None:
    """Raise if a channel's statistics are not finite."""
    bad = np.flatnonzero(~finite(batch, dtype))
    if bad.size:
        shown = ", ".join(map(str, bad[:8])) + (", ..." if bad.size > 8 else "")
        raise ArgumentValueError("x", "finite batch statistics", f"NaN or inf in channel {shown}")


def _move(rm: Array, rv: Array, batches: list[Moments], dtype: np.dtype[Any], o: Options) -> int:
    """Move the running statistics by each batch in turn; return how many moved them."""
    if rm.size == 0 or not o.update_stats:
        return 0
    good = [b for b in batches if o.nonfinite != "skip_update" or finite(b, dtype).all()]
    for batch in good:
        running.move(rm, rv, batch, o.momentum, o.unbiased)
    return len(good)
