"""Small plain calls of layer, group and instance norm in the fewest steps, as ``quick`` does for batch norm.

Plain: x is a C-contiguous, aligned, writeable array, so is the output, weight and bias are such vectors or absent, eps
is a float. Where they are not, the answer is None and ``family`` does it or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import recycled
from fastbn.arguments import F32, arithmetic, supported
from fastbn.cpu.tuning import PARALLEL
from fastbn.groups import Groups
from fastbn.views import constant

__all__ = ["LAST", "Call", "backward", "is_small", "train"]

Array = npt.NDArray[Any]
Key = tuple[tuple[int, ...], int, np.dtype[Any] | None]  # None: float32, see ``quick``
REMEMBERED = 4096  # shapes; then all are forgotten
LAST = 0  # groups of layer norm over the last axis

_array, _empty = np.ndarray, np.empty


class Call(NamedTuple):
    """What a shape decides: the gate (``cpu.gates_sets``) and its numbers, and what ``family.GroupSaved`` keeps."""

    enter: Callable[..., int]
    numbers: tuple[int | None, ...]
    sizes: Groups
    rows: tuple[int, ...]
    affine: tuple[tuple[int], tuple[int]]
    dtype: np.dtype[Any]
    wide: np.dtype[Any]  # of weight and bias


_train: dict[Key, Call] = {}
_backward: dict[Key, Call] = {}


def is_small(x: Array) -> bool:
    """Tell whether instance norm of an array takes these calls: in C order, several values a channel."""
    return x.ndim > 2 and 0 < x.size < PARALLEL and x.size > x.shape[0] * x.shape[1] and x.flags.c_contiguous


def _key(x: Array, groups: int) -> Key:
    dtype = x.dtype
    return x.shape, groups, None if dtype is F32 else dtype


def _learn(op: str, known: dict[Key, Call], x: Array, groups: int) -> Call | None:
    """Return the call that gets to be known now that its kernel is compiled."""
    if x.ndim < 2 or not 0 < x.size < PARALLEL or not supported(x.dtype):
        return None
    if groups == LAST:
        C, rows = x.shape[-1], x.shape[:-1]
        sizes = Groups(x.size // C, 1, C, 1)
    else:
        N, C = x.shape[:2]
        if C % groups:
            return None
        sizes, rows = Groups(N, groups, C, x.size // (N * C)), (N, groups)
        if N * sizes.length == 1:
            return None
    from fastbn.cpu import entries_sets

    found = entries_sets.find(op, sizes, x.dtype.name)
    if found is None:
        return None
    if len(known) >= REMEMBERED:
        known.clear()
    known[_key(x, groups)] = call = Call(*found, sizes, rows, ((C,), (C,)), x.dtype, arithmetic(x.dtype))
    return call


def without_affine(x: Array) -> bool:
    """Tell whether calls without weight and bias do as with ones and zeros, whatever way they take."""
    return x.size < PARALLEL


def train(x: Any, groups: int, weight: Any, bias: Any, eps: Any, out: Any) -> tuple[Array, Array, Call] | None:
    """Normalise as ``family``: LAST, or groups of the channels along axis 1; returns y, the statistics and the call."""
    if type(x) is not _array or type(eps) is not float:
        return None
    call = _train.get(_key(x, groups)) or _learn("train", _train, x, groups)
    if call is None:
        return None
    y = recycled.empty(x.shape, call.dtype) if out is None else out
    sizes = call.sizes
    if weight is None or bias is None:
        weight = constant(1.0, sizes.C, call.wide) if weight is None else weight
        bias = constant(0.0, sizes.C, call.wide) if bias is None else bias
    stats = _empty(3 * sizes.B * sizes.G)
    if call.enter(x, y, weight, bias, stats, _array, call.dtype, call.wide, *call.numbers, eps):
        return y, stats, call
    return None


def backward(
    x: Array, groups: int, weight: Array | None, stats: Array, grad: Any, out: Any
) -> tuple[Array, Array, Array] | None:  # fmt: skip
    """Gradients of input, weight and bias for what ``train`` may have taken; None: take them another way."""
    call = _backward.get(_key(x, groups)) or _learn("backward", _backward, x, groups)
    if call is None:
        return None
    dx = recycled.empty(x.shape, call.dtype) if out is None else out
    C = call.sizes.C
    if weight is None:
        weight = constant(1.0, C, call.wide)
    dweight, dbias = _empty(C, call.wide), _empty(C, call.wide)
    if call.enter(x, grad, dx, weight, dweight, dbias, stats, _array, call.dtype, call.wide, *call.numbers):
        return dx, dweight, dbias
    return None
