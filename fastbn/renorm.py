"""Batch renormalisation: normalise small batches nearly as inference will, gradients still through the batch.

Ioffe 2017 (arXiv:1702.03275), algorithm 1: y = weight*(xhat*r + d) + bias with
r = clip(sigma_batch/sigma_running, 1/rmax, rmax), d = clip((mean_batch - mean_running)/sigma_running, -dmax, dmax),
sigma = sqrt(var + eps); r and d are constants in backward. It is batch norm with weight*r and weight*d + bias, so it
needs no kernel of its own. The paper averages sigma itself; like Chainer we keep the running variance, which is what
inference uses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments
from fastbn.core import Forward
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.saved import BatchSaved, Gradients

Array = npt.NDArray[Any]


def bounds(value: Any) -> tuple[float, float]:
    """Check renorm=(rmax, dmax)."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ArgumentTypeError("renorm", "a pair (rmax, dmax)", value)
    rmax, dmax = (arguments.number("renorm", v) for v in value)
    if rmax < 1.0 or dmax < 0.0:
        raise ArgumentValueError("renorm", "rmax >= 1 and dmax >= 0", value)
    return rmax, dmax


def renorm_bounds(step: float) -> tuple[float, float]:
    """Schedule of (rmax, dmax) that the paper trains with.

    Plain batch norm (1, 0) for 5000 steps, then rmax linearly to 3 at step 40000 and dmax to 5 at step 25000
    (Ioffe 2017, arXiv:1702.03275, section 4).

    Parameters
    ----------
    step : int
        Training steps so far.

    Returns
    -------
    tuple of float
        For ``renorm=``.

    Raises
    ------
    ValueError, TypeError
        ``step`` is no finite number.
    """
    step = arguments.number("step", step)
    rmax = 1.0 + 2.0 * min(1.0, max(0.0, (step - 5000) / 35000))
    dmax = 5.0 * min(1.0, max(0.0, (step - 5000) / 20000))
    return rmax, dmax


class RenormSaved(BatchSaved):
    """Batch norm with weight*r and weight*d + bias; r and d lead back to the gradient of weight."""

    __slots__ = ("d", "r")

    r: Array
    d: Array

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``; y = weight*(xhat*r + d) + bias, so dweight = r*sum(u*xhat) + d*sum(u)."""
        dx, dxhat, dbias, residual = self.all_gradients(grad_output, out)
        with np.errstate(all="ignore"):  # NaN and inf stay in their channel
            dweight = (self.r * dxhat + self.d * dbias).astype(dbias.dtype)
        return Gradients(dx, dweight if self.affine[0] else None, dbias if self.affine[1] else None, residual)


def normalise(
    f: Forward, stats: Array, running_mean: Array, running_var: Array, eps: float, limits: tuple[float, float]
) -> RenormSaved:
    """Normalise with weight*r and weight*d + bias; returns what backward needs."""
    rmax, dmax = limits
    mean, invstd, _ = stats.reshape(3, -1)
    with np.errstate(all="ignore"):
        towards = 1.0 / np.sqrt(running_var.astype(np.float64) + eps)
        r = np.clip(towards / invstd, 1.0 / rmax, rmax)
        d = np.clip((mean - running_mean) * towards, -dmax, dmax)
        weight = f.weight
        f.weight, f.bias = (weight * r).astype(f.dtype), (weight * d + f.bias).astype(f.dtype)
    f.normalise(stats)
    plain = f.saved(stats, frozen=False)
    saved = RenormSaved()
    for name in (*BatchSaved.__slots__, "stats", "count", "updated"):
        setattr(saved, name, getattr(plain, name))
    saved.r, saved.d = r, d
    return saved
