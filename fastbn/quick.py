"""Plain calls in the fewest steps: (64, 100) in a third of the time that ``core`` takes, most of which is checks.

Plain: x is a C-contiguous, aligned, writeable array, of less than ``PARALLEL`` elements where other threads
would help (a call of 4 MB is a tenth faster still), so is the output, parameters and statistics are such vectors, a
residual is like x, eps and momentum are floats. What the shape, the axis and the activation decide is looked up;
compiled code asks whether the arrays are such ones (``cpu.gates``). Where they are not, the answer is None, nothing has
been written, and ``core`` does it or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import layout, recycled, signs, views
from fastbn.arguments import F32, arithmetic, supported
from fastbn.cpu.tuning import PARALLEL
from fastbn.threads import get_num_threads

__all__ = ["Call", "Done", "backward", "infer", "train"]

Array = npt.NDArray[Any]
REMEMBERED = 4096  # shapes; then all are forgotten

_array, _empty = np.ndarray, np.empty


class Call(NamedTuple):
    """What a shape, an axis and an activation decide: the gate (``cpu.gates``), and how the shape is worked off."""

    enter: Callable[..., int]
    numbers: tuple[int | bool | None, ...]
    relu: bool | None
    channels: int
    where: layout.Layout
    axis: int
    values: int  # a channel
    fused: bool  # with a residual
    signs: bool  # which training writes, or gradients read
    dtype: np.dtype[Any]
    wide: np.dtype[Any]  # of parameters

    @property
    def matrix(self) -> bool:
        """Tell whether the shape is worked off as rows, by a width and channels of a block."""
        return self.numbers[-3] is not None


# The result, how it was found, its statistics, weight and bias as kernels take them, which of the two were given, and
# the result's signs if they are kept.
Done = tuple[Array, Call, Array, Array, Array, tuple[bool, bool], Array | None]
_Key = tuple[tuple[int, ...], int, Any, bool, bool, np.dtype[Any] | None]
_Known = dict[_Key, Call]
_train: _Known = {}
_infer: _Known = {}
_backward: _Known = {}
_others: dict[tuple[str, _Key], Call | None] = {}  # large ones, and None for what goes the long way for good


def _find(
    op: str, known: _Known, x: Array, axis: Any, activation: Any, fused: bool, signs: bool = False
) -> Call | None:
    """Return the call that is known, or gets to be known now that its kernel is compiled."""
    if type(axis) is not int or (activation is not None and type(activation) is not str):
        return None  # True is 1 to a dictionary
    dtype = x.dtype
    key = x.shape, axis, activation, fused, signs, None if dtype is F32 else dtype  # its hash takes 0.1 us
    call = known.get(key)
    return _find_other(op, known, x, key) if call is None else call


def _find_other(op: str, known: _Known, x: Array, key: _Key) -> Call | None:
    """Return the call for a large array if there is one thread, or one that gets to be known now.

    Of other arrays, channels last, another kernel is compiled: this one would be looked for in every call.
    """
    large = x.size >= PARALLEL
    if (large and get_num_threads() > 1) or not x.flags.c_contiguous:
        return None
    call: Call | Literal[False] | None = _others.get((op, key), False)
    if call is not False:
        return call
    call = _learn(op, *key)
    if call is False:
        return None
    if len(known) + len(_others) >= REMEMBERED:
        known.clear()
        _others.clear()
    if call is None or large:
        _others[op, key] = call
    else:
        known[key] = call
    return call


def _learn(
    op: str, shape: tuple[int, ...], axis: int, activation: str | None, fused: bool, signs: bool,
    other: np.dtype[Any] | None,
) -> Call | Literal[False] | None:  # fmt: skip
    """Find a call; None if there is none, False if its kernel is not compiled yet."""
    if len(shape) < 2 or 0 in shape or not -len(shape) <= axis < len(shape) or activation not in (None, "relu"):
        return None
    dtype = F32 if other is None else other
    if not supported(dtype):
        return None
    from fastbn.cpu import entries

    where = layout.contiguous(shape, axis % len(shape))
    N, C, S = where.dims
    if (N * S == 1 and op == "train") or not entries.gated(op, where.dims, fused, dtype.name):
        return None
    relu = True if activation == "relu" else None
    signs = signs or (op == "train" and entries.writes_signs(where.dims, relu, fused, dtype.name))
    found = entries.find(op, where.dims, relu, fused, signs, dtype.name)
    if found is None:
        return False
    return Call(*found, relu, C, where, axis % len(shape), N * S, fused, signs, dtype, arithmetic(dtype))


def train(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
    momentum: Any, eps: Any, axis: Any, activation: Any, residual: Any, out: Any,
) -> Done | None:  # fmt: skip
    """See ``core.train``."""
    if type(x) is not _array or type(eps) is not float or type(momentum) is not float:
        return None
    if (call := _find("train", _train, x, axis, activation, residual is not None)) is None:
        return None
    enter, numbers, relu, channels, _, _, _, _, signed, dtype, wide = call
    affine = (weight is not None, bias is not None)
    weight = weight if affine[0] else views.constant(1.0, channels, wide)
    bias = bias if affine[1] else views.constant(0.0, channels, wide)
    moved = channels
    if running_mean is None and running_var is None:
        running_mean = running_var = views.constant(0.0, 0, wide)
        moved = 0
    y = recycled.empty(x.shape, dtype) if out is None else out
    stats, bits = _empty(3 * channels), None
    if signed:
        if type(y) is not _array:
            return None
        bits = signs.room(y.ctypes.data, x.size, dtype.itemsize)
    if enter(
        x, residual, y, weight, bias, running_mean, running_var, stats, bits, _array, dtype, wide, *numbers,
        moved, eps, momentum, relu,
    ):  # fmt: skip
        return y, call, stats, weight, bias, affine, bits
    return None


def infer(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any,
    eps: Any, axis: Any, activation: Any, residual: Any, out: Any,
) -> Done | None:  # fmt: skip
    """See ``core.frozen``."""
    if type(x) is not _array or type(eps) is not float:
        return None
    if (call := _find("infer", _infer, x, axis, activation, residual is not None)) is None:
        return None
    enter, numbers, relu, channels, _, _, _, _, _, dtype, wide = call
    affine = (weight is not None, bias is not None)
    weight = weight if affine[0] else views.constant(1.0, channels, wide)
    bias = bias if affine[1] else views.constant(0.0, channels, wide)
    y = recycled.empty(x.shape, dtype) if out is None else out
    stats = _empty(3 * channels)
    if enter(x, residual, y, running_mean, running_var, weight, bias, stats, _array, dtype, wide, *numbers, eps, relu):
        return y, call, stats, weight, bias, affine, None
    return None


def backward(saved: Any, grad: Any, out: Any) -> tuple[Array, Array, Array, Array | None] | None:
    """Gradients of input, weight, bias and, behind a ReLU, residual for a ``saved.BatchSaved``."""
    y, bits = saved.y, saved.signs
    fused = y is not None or bits is not None
    alone = saved.residual and not fused and not saved.relu and out is None  # the residual's gradient is grad itself
    if saved.places is not None or (saved.residual is not fused and not alone):
        return None
    x = saved.x
    call = _find("backward", _backward, x, saved.axis, "relu" if saved.relu else None, fused, bits is not None)
    if call is None or call.where.dims != saved.layout.dims:
        return None
    if saved.frozen and call.matrix and x.size >= PARALLEL:  # written while it is summed, by another kernel
        return None
    enter, numbers, relu, channels, _, _, _, _, _, dtype, wide = call
    dx = recycled.empty(x.shape, dtype) if out is None else out
    dr = recycled.empty(x.shape, dtype) if fused else None
    dweight, dbias = _empty(channels, wide), _empty(channels, wide)
    if enter(
        x, grad, y, dx, dr, saved.weight, saved.bias, dweight, dbias, saved.stats, bits, _array, dtype, wide, *numbers,
        saved.frozen, relu,
    ):  # fmt: skip
        return dx, dweight, dbias, grad if alone else dr
    return None
