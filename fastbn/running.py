"""Running statistics: the pair that is moved in place, and how it moves where the kernel does not do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, views
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments

Array = npt.NDArray[Any]


def both_or_neither(mean: Any, var: Any) -> None:
    """Raise if one running statistic is given without the other."""
    if (mean is None) != (var is None):
        absent = "running_mean" if mean is None else "running_var"
        raise ArgumentValueError(absent, "both running statistics or neither", "None for one")


def pair(mean: Any, var: Any, channels: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Check that both running statistics are given or neither; for neither return two arrays without elements."""
    both_or_neither(mean, var)
    if mean is None:
        none = views.constant(0.0, 0, dtype)
        return none, none
    return (
        arguments.running("running_mean", mean, channels, dtype),
        arguments.running("running_var", var, channels, dtype),
    )


def check_apart(mean: Array, var: Array, params: tuple[Any, Any], tensors: tuple[Any, Any, Any]) -> None:
    """Raise if a running statistic is memory of another array of the call.

    ``params`` are weight and bias, ``tensors`` x, out and residual, None where there is none. Kernels move channels
    while they read others, and backward would read what was moved. Four arrays with memory of their own need no look
    at it: they are apart unless they are the same.
    """
    weight, bias = params
    owned = mean.flags.owndata and var.flags.owndata
    owned = owned and (weight is None or weight.flags.owndata) and (bias is None or bias.flags.owndata)
    same = mean is var or mean is weight or mean is bias or var is weight or var is bias
    if owned and not same:
        return
    others = {"weight": weight, "bias": bias, "x": tensors[0], "out": tensors[1], "residual": tensors[2]}
    others = {name: other for name, other in others.items() if isinstance(other, np.ndarray)}
    refuse_shared(mean, var, others, arguments.share)


def refuse_shared(mean: Any, var: Any, others: dict[str, Any], share: Callable[[Any, Any], bool]) -> None:
    """Raise if ``share`` finds a running statistic to be memory of the other one or of ``others``."""
    for name, moved, rest in (("running_mean", mean, others), ("running_var", var, others | {"running_mean": mean})):
        for other, array in rest.items():
            if share(moved, array):
                raise ArgumentValueError(name, f"memory apart from {other} (it is updated in place)", "the same memory")


def move(mean: Array, var: Array, batch: Moments, momentum: float, unbiased: bool) -> None:
    """Move checked running statistics in place: running = (1 - momentum)*running + momentum*new, in float64."""
    with np.errstate(all="ignore"):  # NaN and inf stay in their channel, as in the kernels
        mean[:] = (1.0 - momentum) * mean.astype(np.float64) + momentum * batch.mean
        var[:] = (1.0 - momentum) * var.astype(np.float64) + momentum * batch.variance(int(unbiased))


def update(running_mean: Any, running_var: Any, moments: Any, momentum: float, unbiased: bool) -> None:
    """See ``fastbn.update_running``."""
    if not isinstance(moments, Moments):
        raise ArgumentTypeError("moments", "fastbn.Moments", type(moments).__name__)
    dtype = running_mean.dtype if isinstance(running_mean, np.ndarray) else np.dtype(np.float32)
    if dtype not in (arguments.F32, arguments.F64):
        raise ArgumentTypeError("running_mean", "float32 or float64", dtype)
    if running_mean is None:
        raise ArgumentTypeError("running_mean", "a NumPy array (it is updated in place)", "None")
    mean, var = pair(running_mean, running_var, moments.mean.size, dtype)
    refuse_shared(mean, var, {}, arguments.share)
    momentum = arguments.number("momentum", momentum)
    if moments.count == 0:
        return
    if moments.count == 1 and unbiased:
        raise ArgumentValueError("moments", "more than 1 value per channel for the unbiased variance", "count 1")
    move(mean, var, moments, momentum, bool(unbiased))
