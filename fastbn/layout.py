"""Any rank, axis and strides -> the one flat shape (N, C, S) that kernels know, without moving a byte.

An array that fills its memory without gaps, in whatever order of axes, is contiguous after a transpose. Seen in that
order the channel axis has N elements before it and S behind it: channels-first arrays have S > 1, rows (channels last,
(N, C), torch's channels_last strides) have S = 1. Anything else (gaps, broadcasts, negative strides) takes one copy.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import recycled
from fastbn.errors import ArgumentTypeError, ArgumentValueError

Array = npt.NDArray[Any]


class Layout(NamedTuple):
    """A dense array's order of axes, outermost first, and its shape as kernels see it."""

    order: tuple[int, ...]
    dims: tuple[int, int, int]


def normalise_axis(axis: object, ndim: int, name: str = "axis") -> int:
    """Return the axis counted from the front; raise if it is none of the array's."""
    if type(axis) is int and 0 <= axis < ndim:
        return axis
    if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
        raise ArgumentTypeError(name, "an integer", type(axis).__name__)
    if not -ndim <= axis < ndim:
        raise ArgumentValueError(name, f"an axis of an array of rank {ndim}", int(axis))
    return int(axis) % ndim


@functools.lru_cache(maxsize=4096)
def of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int) -> Layout | None:
    """Return the layout of a dense array, None where memory has gaps, overlaps or runs backwards."""
    real = [a for a in range(len(shape)) if shape[a] != 1]
    if any(strides[a] <= 0 for a in real):
        return None
    real.sort(key=lambda a: -strides[a])
    step = itemsize
    for a in reversed(real):
        if strides[a] != step:
            return None
        step *= shape[a]
    ones = [a for a in range(len(shape)) if shape[a] == 1]
    place = real.index(axis) if axis in real else 0
    dims = (
        math.prod(shape[a] for a in real[:place]),
        shape[axis],
        math.prod(shape[a] for a in real[place:] if a != axis),
    )
    return Layout((*ones, *real), dims)


def contiguous(shape: tuple[int, ...], axis: int) -> Layout:
    """Return the layout of a C-contiguous array; with one channel all is behind it, as ``of`` finds."""
    dims = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))
    return Layout(tuple(range(len(shape))), (1, 1, math.prod(shape)) if shape[axis] == 1 else dims)


def settle(x: Array, axis: int) -> tuple[Array, Layout]:
    """Return x and its layout, x copied to C order where it has none or where its elements are not aligned."""
    layout = of(x.shape, x.strides, x.itemsize, axis) if x.flags.aligned else None
    if layout is not None:
        return x, layout
    return np.array(x, order="C"), contiguous(x.shape, axis)


def empty_like(x: Array, layout: Layout) -> Array:
    """Return an uninitialised array with the shape, dtype and memory order of x."""
    if x.flags.c_contiguous:
        return recycled.empty(x.shape, x.dtype)
    memory = recycled.empty([x.shape[a] for a in layout.order], x.dtype)
    return memory.transpose(np.argsort(layout.order))


def flat(x: Array, layout: Layout) -> Array:
    """View a dense array as one contiguous axis, in memory order."""
    if x.flags.c_contiguous:
        return x.ravel()  # a view, in half the time of reshape
    return x.transpose(layout.order).reshape(-1)


def matches(x: Array, layout: Layout, axis: int) -> bool:
    """Tell whether x lies in memory exactly as the layout says."""
    found = of(x.shape, x.strides, x.itemsize, axis)
    return found is not None and (found == layout or x.transpose(layout.order).flags.c_contiguous)


def like(x: Array, layout: Layout) -> Array:
    """Return x itself if it lies in memory as the layout says, else a copy that does."""
    ordered = x.transpose(layout.order)
    if ordered.flags.c_contiguous and x.flags.aligned:
        return x
    return np.array(ordered, order="C").transpose(np.argsort(layout.order))


def restore(of: Any, state: tuple[Any, dict[str, Any]], *names: str) -> None:
    """Do what an object's ``__setstate__`` does, its arrays of these names in the order of its ``layout``.

    A pickle of an array keeps C and Fortran order alone.
    """
    for name, value in state[1].items():
        setattr(of, name, value)
    for name in names:
        if (x := getattr(of, name, None)) is not None:
            setattr(of, name, like(x, of.layout))
