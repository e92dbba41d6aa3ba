"""Checks of arrays on a GPU, before anything is launched: the twin of ``arguments``, with its messages."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn import layout
from fastbn.cuda.arrays import DeviceArray, Flat
from fastbn.cuda.libraries import on_device, wrap
from fastbn.errors import ArgumentTypeError, ArgumentValueError


def _array(name: str, value: Any) -> DeviceArray:
    if not on_device(value):
        raise ArgumentTypeError(name, "an array on the GPU, as x is", type(value).__name__)
    return wrap(name, value)


def tensor(name: str, value: Any) -> DeviceArray:
    """Check a tensor."""
    array = _array(name, value)
    if array.ndim < 2:
        raise ArgumentValueError(name, "an array of rank >= 2", f"shape {array.shape}")
    return array


def like(name: str, value: Any, x: DeviceArray) -> DeviceArray:
    """Check an array with the shape and dtype of x."""
    array = tensor(name, value)
    if array.shape != x.shape:
        raise ArgumentValueError(name, f"the shape of x, {x.shape}", array.shape)
    if array.kind != x.kind:
        raise ArgumentTypeError(name, f"the dtype of x, {x.name}", array.name)
    return array.ready_for(x)


def parameter(name: str, value: Any, x: DeviceArray, shape: tuple[int, ...]) -> DeviceArray:
    """Check a parameter: its shape, and the arithmetic dtype."""
    array = _array(name, value)
    if array.shape != shape:
        expected = f"one number per channel, shape {shape}" if len(shape) == 1 else f"shape {shape}"
        raise ArgumentValueError(name, expected, f"shape {array.shape}")
    if array.name != x.arithmetic:
        raise ArgumentTypeError(name, f"{x.arithmetic} (parameters of half types are float32)", array.name)
    return array.ready_for(x)


def running(name: str, value: Any, x: DeviceArray, channels: int) -> Flat:
    """Check a running statistic, which is updated in place."""
    array = parameter(name, value, x, (channels,))
    if not array.writeable:
        raise ArgumentValueError(name, "a writeable array (it is updated in place)", "a read-only one")
    if not array.c_contiguous:
        raise ArgumentValueError(name, "a contiguous vector (it is updated in place)", f"strides {array.strides}")
    return array.flat()


def output(out: Any, x: DeviceArray, axis: int) -> tuple[DeviceArray, layout.Layout]:
    """Check an output array, which may be empty; return its layout."""
    array = like("out", out, x)
    if not array.writeable:
        raise ArgumentValueError("out", "a writeable array", "a read-only one")
    found = layout.of(array.shape, array.strides, array.itemsize, axis)
    if not x.size:
        return array, layout.contiguous(x.shape, axis)
    if found is None:
        raise ArgumentValueError(
            "out", "an array without gaps in memory (contiguous in some order of axes)", f"strides {array.strides}"
        )
    return array, found


def apart(name: str, out: DeviceArray, other: DeviceArray, exact_allowed: bool) -> None:
    """Raise if out overlaps another array, unless it is the very same memory and that is allowed."""
    (low, high), (start, end) = out.bounds(), other.bounds()
    if not out.size or high <= start or end <= low:
        return
    same = out.address == other.address and out.strides == other.strides
    if same and exact_allowed:
        return
    expected = f"memory apart from {name}" + (f", or exactly that of {name}" if exact_allowed else "")
    raise ArgumentValueError("out", expected, "the same memory" if same else "overlapping memory")


def apart_from_vectors(out: DeviceArray, **vectors: Flat | None) -> None:
    """Raise if a dense output overlaps vectors that kernels read while they write it."""
    written = out.flat()
    for name, vector in vectors.items():
        if vector is not None and written.shares(vector):
            raise ArgumentValueError("out", f"memory apart from {name}", "overlapping memory")


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(a) for a in np.argsort(order))


def settle(x: DeviceArray, axis: int) -> tuple[DeviceArray, layout.Layout]:
    """Return x and its layout, x copied where it has none."""
    found = layout.of(x.shape, x.strides, x.itemsize, axis) if x.size else None
    return (x, found) if found is not None else (x.contiguous(), layout.contiguous(x.shape, axis))


def in_order(x: DeviceArray, where: layout.Layout) -> DeviceArray:
    """Return x itself if it lies in memory as the layout says, else a copy that does."""
    if not x.size:
        return x
    ordered = x.transpose(where.order)
    return x if ordered.c_contiguous else ordered.contiguous().transpose(_inverse(where.order))


def empty_like(x: DeviceArray, where: layout.Layout) -> DeviceArray:
    """Return an uninitialised array with the shape, dtype and memory order of x."""
    if x.c_contiguous:
        return x.empty(x.shape)
    return x.empty([x.shape[a] for a in where.order]).transpose(_inverse(where.order))
