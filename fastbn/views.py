"""Arrays as the kernels take them: one flat axis, half types as 16-bit integers, writeable in Numba's eyes."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, layout

Array = npt.NDArray[Any]

_KEPT = 1 << 16  # elements up to which a constant is kept for the next call


@functools.lru_cache(maxsize=256)
def _kept(value: float, size: int, dtype: np.dtype[Any]) -> Array:
    return np.full(size, value, dtype)


def constant(value: float, size: int, dtype: np.dtype[Any]) -> Array:
    """Stand in for an absent weight or bias. Never handed out, never written."""
    return _kept(value, size, dtype) if size <= _KEPT else np.full(size, value, dtype)


class _Memory:
    """Carry an array interface that says writeable: a read-only input would compile every kernel a second time."""

    def __init__(self, array: Array):
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.keep = array


def raw(flat: Array) -> Array:
    """View a flat contiguous array as the kernels take it."""
    if flat.itemsize == 2:
        flat = flat.view(np.int16 if arguments.is_bfloat16(flat.dtype) else np.uint16)
    if not flat.flags.writeable:
        flat = np.asarray(_Memory(flat))
    return flat


def flat(x: Array, where: layout.Layout) -> Array:
    """View an array in a known memory order as the kernels take it."""
    if x.flags.carray and x.itemsize != 2:
        return x.ravel()
    return raw(layout.flat(x, where))
