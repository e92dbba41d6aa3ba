"""Small plain calls of layer norm over the last axis in the fewest steps, as ``quick`` does for batch norm.

Plain: x is a C-contiguous, aligned, writeable float32 array, so is the output, weight and bias are such vectors, eps is
a float. Where they are not, the answer is None and ``family`` does it or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn.arguments import F32
from fastbn.cpu.tuning import PARALLEL
from fastbn.groups import Groups

__all__ = ["Call", "backward", "train"]

Array = npt.NDArray[Any]
REMEMBERED = 4096  # shapes; then all are forgotten

_array, _empty = np.ndarray, np.empty


class Call(NamedTuple):
    """What a shape decides: the gate (``cpu.gates_sets``) and its numbers, and what ``family.GroupSaved`` keeps."""

    enter: Callable[..., int]
    numbers: tuple[int | None, ...]
    sizes: Groups
    rows: tuple[int, ...]
    affine: tuple[tuple[int], tuple[int]]


_train: dict[tuple[int, ...], Call] = {}
_backward: dict[tuple[int, ...], Call] = {}


def _learn(op: str, known: dict[tuple[int, ...], Call], x: Array) -> Call | None:
    """Return the call that gets to be known now that its kernel is compiled."""
    if x.ndim < 2 or not 0 < x.size < PARALLEL:
        return None
    from fastbn.cpu import entries

    L = x.shape[-1]
    sets = x.size // L
    found = entries.find_sets(op, sets, L)
    if found is None:
        return None
    if len(known) >= REMEMBERED:
        known.clear()
    known[x.shape] = call = Call(*found, Groups(sets, 1, L, 1), x.shape[:-1], ((L,), (L,)))
    return call


def train(x: Any, weight: Any, bias: Any, axis: Any, eps: Any, out: Any) -> tuple[Array, Array, Call] | None:
    """See ``family.layer_norm``; returns y, the statistics and the call."""
    if type(x) is not _array or type(eps) is not float or axis != -1 or x.dtype is not F32:
        return None
    call = _train.get(x.shape) or _learn("train", _train, x)
    if call is None:
        return None
    y = _empty(x.shape, F32) if out is None else out
    stats = _empty(3 * call.sizes.B)
    if call.enter(x, y, weight, bias, stats, _array, F32, *call.numbers, eps):
        return y, stats, call
    return None


def backward(x: Array, weight: Array | None, stats: Array, grad: Any, out: Any) -> tuple[Array, Array, Array] | None:
    """Gradients of input, weight and bias for x that ``train`` may have taken; None: take them another way."""
    call = _backward.get(x.shape) or _learn("backward", _backward, x)
    if call is None:
        return None
    dx = _empty(x.shape, F32) if out is None else out
    L = call.sizes.C
    dweight, dbias = _empty(L, F32), _empty(L, F32)
    if call.enter(x, grad, dx, weight, dweight, dbias, stats, _array, F32, *call.numbers):
        return dx, dweight, dbias
    return None
