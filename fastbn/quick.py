"""Small plain calls in the fewest steps: (64, 100) in half the time that ``core`` takes, most of which is checks.

Plain: x is a C-contiguous, aligned, writeable float32 array of at most ``MOST`` elements, so is the output, parameters
and statistics are such vectors, eps and momentum floats, and there is no residual. What the shape, the axis and the
activation decide is looked up; all that is asked here is whether the arrays are such ones. Where they are not, the
answer is None, nothing has been written, and ``core`` does it or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import layout, views
from fastbn.arguments import F32
from fastbn.cpu.tuning import WHOLE as MOST

__all__ = ["Call", "Done", "backward", "infer", "train"]

Array = npt.NDArray[Any]
REMEMBERED = 4096  # shapes; then all are forgotten

_array, _empty, _zeros, _share = np.ndarray, np.empty, np.zeros, np.may_share_memory
_INF, _I64 = float("inf"), np.dtype(np.int64)


class Call(NamedTuple):
    """What a shape, an axis and an activation decide: the code (``cpu.entries``), and how the shape is worked off."""

    given: Callable[..., Any] | None  # of inference, before ``run``
    run: Callable[..., Any]
    place: tuple[Any, Any, Any]
    relu: bool | None
    channels: int
    where: layout.Layout
    axis: int
    values: int  # a channel


# The result, how it was found, its statistics, weight and bias as kernels take them, and which of the two were given.
Done = tuple[Array, Call, Array, Array, Array, tuple[bool, bool]]
_calls: dict[tuple[str, tuple[int, ...], Any, Any], Call] = {}


def _find(op: str, shape: tuple[int, ...], axis: Any, activation: Any) -> Call | None:
    """Return the call that is known, or gets to be known now that its kernel is compiled."""
    if type(axis) is not int or (activation is not None and type(activation) is not str):
        return None  # True is 1 to a dictionary
    call = _calls.get((op, shape, axis, activation))
    if call is None and (call := _learn(op, shape, axis, activation)) is not None:
        if len(_calls) >= REMEMBERED:
            _calls.clear()
        _calls[op, shape, axis, activation] = call
    return call


def _learn(op: str, shape: tuple[int, ...], axis: int, activation: str | None) -> Call | None:
    if len(shape) < 2 or 0 in shape or not -len(shape) <= axis < len(shape) or activation not in (None, "relu"):
        return None
    from fastbn.cpu import entries

    where = layout.contiguous(shape, axis % len(shape))
    N, C, S = where.dims
    relu = True if activation == "relu" else None
    if N * S == 1 and op == "train":
        return None
    found, given = entries.find(op, where.dims, relu), entries.given() if op == "infer" else None
    if found is None or (given is None and op == "infer"):
        return None
    return Call(given, *found, relu, C, where, axis % len(shape), N * S)


def _output(x: Any, out: Any, in_place: bool) -> Array | None:
    """Return the array for the result; None where x or ``out`` is not plain, or they overlap."""
    if type(x) is not _array or x.dtype is not F32 or x.size > MOST:
        return None
    given = x.flags
    if not given.carray:
        return None
    if out is None:
        return _empty(x.shape, F32)
    if type(out) is not _array or out.dtype is not F32 or out.shape != x.shape:
        return None
    if out is x:
        return x if in_place else None
    taken = out.flags
    if not taken.carray or (not (given.owndata and taken.owndata) and _share(x, out)):
        return None
    y: Array = out
    return y


def _plain(vectors: tuple[Any, ...], channels: int) -> bool:
    """Tell whether the kernels can take these as they are."""
    for v in vectors:
        if type(v) is not _array or v.dtype is not F32 or v.size != channels or v.ndim != 1 or not v.flags.carray:
            return False
    return True


def train(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
    momentum: Any, eps: Any, axis: Any, activation: Any, out: Any,
) -> Done | None:  # fmt: skip
    """See ``core.train``."""
    y = _output(x, out, False)
    if y is None or type(eps) is not float or not 0.0 < eps < _INF:
        return None
    if type(momentum) is not float or not -_INF < momentum < _INF:
        return None
    if (call := _find("train", x.shape, axis, activation)) is None:
        return None
    _, run, place, relu, channels, _, _, _ = call
    affine = (weight is not None, bias is not None)
    weight = weight if affine[0] else views.constant(1.0, channels, F32)
    bias = bias if affine[1] else views.constant(0.0, channels, F32)
    if running_mean is None and running_var is None:
        running_mean = running_var = views.constant(0.0, 0, F32)
        plain = _plain((weight, bias), channels)
    else:
        plain = running_mean is not running_var and _plain((weight, bias, running_mean, running_var), channels)
        if running_mean is weight or running_mean is bias or running_var is weight or running_var is bias:
            return None  # refused there
    if not plain:
        return None
    stats = _empty(3 * channels)
    run(
        x.ravel(), None, y.ravel(), weight, bias, running_mean, running_var, stats,
        *place, eps, momentum, relu, False, _zeros(2, _I64),
    )  # fmt: skip
    return y, call, stats, weight, bias, affine


def infer(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, eps: Any, axis: Any, activation: Any, out: Any
) -> Done | None:  # fmt: skip
    """See ``core.frozen``."""
    y = _output(x, out, True)
    if y is None or type(eps) is not float or not 0.0 <= eps < _INF:
        return None
    if (call := _find("infer", x.shape, axis, activation)) is None:
        return None
    given, run, place, relu, channels, _, _, _ = call
    affine = (weight is not None, bias is not None)
    weight = weight if affine[0] else views.constant(1.0, channels, F32)
    bias = bias if affine[1] else views.constant(0.0, channels, F32)
    if not _plain((running_mean, running_var, weight, bias), channels):
        return None
    stats = _empty(3 * channels)
    given(running_mean, running_var, stats, eps)  # type: ignore[misc]
    run(x.ravel(), None, y.ravel(), weight, bias, stats, *place, relu, False, _zeros(2, _I64))
    return y, call, stats, weight, bias, affine


def backward(saved: Any, grad: Any, out: Any) -> tuple[Array, Array, Array] | None:
    """Gradients of input, weight and bias for a ``saved.BatchSaved``."""
    x = saved.x
    if saved.residual or type(grad) is not _array or grad.dtype is not F32 or not grad.flags.carray:
        return None
    dx = _output(x, out, False)
    if dx is None or grad.shape != x.shape or (out is not None and dx is not grad and _share(dx, grad)):
        return None
    call = _find("backward", x.shape, saved.axis, "relu" if saved.relu else None)
    if call is None or call.where.dims != saved.layout.dims:
        return None
    dweight, dbias = _empty(call.channels, F32), _empty(call.channels, F32)
    call.run(
        x.ravel(), grad.ravel(), None, dx.ravel(), None, saved.weight, saved.bias, dweight, dbias, saved.stats,
        *call.place, saved.frozen, call.relu, False, _zeros(2, _I64),
    )  # fmt: skip
    return dx, dweight, dbias
