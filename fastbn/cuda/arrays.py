"""Arrays that live on a GPU, seen as the functions see NumPy's: shape, strides, dtype, memory.

What belongs to one library (PyTorch, CuPy, Numba) is in ``libraries``. Needs none of them itself, and no numba-cuda.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from fastbn.cuda.library import Library
from fastbn.errors import ArgumentTypeError

__all__ = [
    "INSTALL",
    "ITEMSIZE",
    "WIDE",
    "DeviceArray",
    "Flat",
    "Geometry",
    "Library",
    "dtype_of",
    "geometry",
    "strides_of",
    "supported",
]

INSTALL = 'install the GPU extra that fits the driver: pip install "numba-cuda[cu13]" (or [cu12])'
ITEMSIZE = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}
WIDE = {"f32": "f32", "f64": "f64", "f16": "f32", "bf16": "f32"}  # the kind of statistics and parameters
FLOATS = ("float32", "float64", "float16", "bfloat16")
_KINDS = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}
_KINDS |= {"bool": "u8", "int32": "i32", "int64": "i64"}  # masks and lengths
_ITEMSIZE = ITEMSIZE | {"u8": 1, "i32": 4, "i64": 8}


class _BFloat16:
    """Stands for the dtype where ml_dtypes, which owns it, is not installed."""

    itemsize, name, isnative = 2, "bfloat16", True

    def __str__(self) -> str:
        return self.name


@functools.cache
def dtype_of(name: str) -> Any:
    """Return the NumPy dtype of this name."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        return _BFloat16()
    return np.dtype(ml_dtypes.bfloat16)


_MEMORY = {"f32": "<f4", "f64": "<f8", "f16": "<u2", "bf16": "<i2", "u8": "|u1", "i32": "<i4", "i64": "<i8"}


class Flat:
    """A tensor as kernels take it: an address, a number of elements and what they are. Keeps its memory alive."""

    __slots__ = ("_array", "address", "kind", "owner", "size")

    def __init__(self, address: int, size: int, kind: str, owner: Any = None):
        self.address, self.size, self.kind, self.owner = address, size, kind, owner
        self._array: Any = None

    @property
    def array(self) -> Any:
        """The memory as a NumPy array; only in the simulator, where an address is one of host memory."""
        if self._array is None:
            memory = _MEMORY[self.kind]
            self._array = np.asarray(_Host(self.address, self.size, memory))
        return self._array

    @property
    def array_owner(self) -> Any:
        """The array of the library that this is a view of."""
        return self.owner.owner if type(self.owner) is DeviceArray else self.owner

    def part(self, start: int, size: int) -> Flat:
        """View some of the elements."""
        return Flat(self.address + start * _ITEMSIZE[self.kind], size, self.kind, self.owner)

    def shares(self, other: Flat) -> bool:
        """Tell whether some element of both is the same memory."""
        ends = (flat.address + flat.size * _ITEMSIZE[flat.kind] for flat in (self, other))
        return max(self.address, other.address) < min(ends)


class _Host:
    def __init__(self, address: int, size: int, typestr: str):
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": typestr, "version": 3}


def strides_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def supported(name: str, dtype: str, allowed: tuple[str, ...] = tuple(_KINDS)) -> None:
    """Raise unless this dtype is allowed, by default any that kernels know."""
    if dtype not in allowed:
        names = FLOATS if len(allowed) > 4 else allowed
        expected = ", ".join(names[:-1]) + (" or " if len(names) > 1 else "") + names[-1]
        raise ArgumentTypeError(name, f"an array of {expected}", dtype)


class Geometry(NamedTuple):
    """Everything about an array but its memory; made once for each shape, strides and dtype that occur."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    name: str
    kind: str
    dtype: Any
    itemsize: int
    ndim: int
    size: int
    c_contiguous: bool


@functools.lru_cache(maxsize=4096)
def geometry(shape: tuple[int, ...], strides: tuple[int, ...], name: str, unit: int) -> Geometry:
    """Describe an array; strides in multiples of ``unit`` bytes."""
    kind = _KINDS[name]
    shape, strides, size = tuple(shape), tuple(s * unit for s in strides), math.prod(shape)
    dense = strides_of(shape, _ITEMSIZE[kind])
    same = not size or all(n == 1 or a == b for n, a, b in zip(shape, strides, dense, strict=True))
    return Geometry(shape, strides, name, kind, dtype_of(name), _ITEMSIZE[kind], len(shape), size, same)


class DeviceArray:
    """An array on a GPU with the attributes of NumPy's that checks and layouts look at; ``owner`` is the array."""

    __slots__ = (
        "address", "c_contiguous", "device", "dtype", "geometry", "itemsize", "kind", "library", "name",
        "ndim", "owner", "shape", "size", "strides", "writeable",
    )  # fmt: skip

    def __init__(
        self, library: Library, owner: Any, address: int, found: Geometry, device: int | None, writeable: bool = True
    ):
        self.library, self.owner, self.address, self.device, self.writeable = library, owner, address, device, writeable
        self.geometry = found
        (
            self.shape, self.strides, self.name, self.kind, self.dtype, self.itemsize, self.ndim, self.size,
            self.c_contiguous,
        ) = found  # fmt: skip

    def transpose(self, order: Any) -> DeviceArray:
        """Return a view with the axes in another order."""
        order = tuple(int(a) for a in order)
        if order == tuple(range(self.ndim)):
            return self
        return self.library.wrap(self.library.transpose(self.owner, order))

    def contiguous(self) -> DeviceArray:
        """Return an array with these values in C order: itself if it has."""
        return self if self.c_contiguous else self.library.wrap(self.library.contiguous(self.owner))

    def empty(self, shape: Any, name: str | None = None) -> DeviceArray:
        """Return an uninitialised array of the same library, on the same device."""
        return self.library.wrap(self.library.empty(tuple(shape), name or self.name, self.owner))

    @property
    def arithmetic(self) -> str:
        """Name of the dtype of parameters and statistics."""
        return "float64" if self.kind == "f64" else "float32"

    def vector(self, size: int) -> Flat:
        """Return an uninitialised vector in the arithmetic type, for results."""
        return self.library.vector(size, self.arithmetic, self.owner)

    def zeros(self, size: int) -> Flat:
        """Return a vector of zeros in the arithmetic type."""
        return self.library.wrap(self.library.zeros((size,), self.arithmetic, self.owner)).flat()

    def host(self) -> Any:
        """Return the values as a NumPy array; waits for the GPU."""
        return self.library.host(self.owner)

    scratch = vector  # memory in stream order, given back to the library when the last reference goes

    def flat(self) -> Flat:
        """See the memory as kernels do; only for dense arrays, in memory order.

        Not kept: it holds this array, and the two would hold the GPU's memory until Python looks for cycles.
        """
        return Flat(self.address, self.size, self.kind, self)

    def stream(self) -> int:
        """Return the handle of the caller's current stream."""
        return self.library.stream(self.owner)

    def ready_for(self, x: DeviceArray) -> DeviceArray:
        """Make the stream of x wait for this array, which may be written on another one; returns it.

        PyTorch and CuPy have one current stream for all their arrays; others say with each array which one it is on.
        """
        if self.library is not x.library or self.library.streams_differ:
            here, there = x.stream(), self.stream()
            if here != there:
                from fastbn.cuda import driver  # not above: without numba-cuda the error is to name the argument

                driver.wait(here, there)
        return self

    def bounds(self) -> tuple[int, int]:
        """Return the first address and the one past the last."""
        spans = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(s for s in spans if s < 0)
        return low, self.address + sum(s for s in spans if s > 0) + self.itemsize
