"""``simd`` in the simulator: the same operations on NumPy arrays, with the bounds and alignment that a GPU demands."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn.cuda.driver import ARITHMETIC, Memory

Array = npt.NDArray[Any]


def _place(tensor: Any, index: Any, count: int, aligned: bool) -> Array:
    """The ``count`` elements from ``index``; IndexError outside, as no slice of NumPy's would raise."""
    memory: Array = tensor.array if type(tensor) is Memory else tensor
    if not 0 <= index <= memory.size - count:
        raise IndexError(f"{count} elements at {index} of {memory.size}")
    found = memory[index : index + count]
    if aligned and found.ctypes.data % 16:
        raise IndexError(f"a 128-bit access at {found.ctypes.data % 16} bytes past an aligned address")
    return found


def _to_bfloat16(v: Array) -> Array:
    bits = v.view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(v), 0x7FFF, rounded).astype(np.uint16).view(np.int16)


@functools.cache
def access(kind: str, W: int) -> Any:
    """Return the ``simd.Access`` of a tensor kind and a number of lanes."""
    from fastbn.cuda.simd import Access

    number: Any = np.dtype(ARITHMETIC[kind].name).type

    def load(tensor: Any, index: Any) -> Array:
        return _place(tensor, index, W, W > 1).copy()

    def decode(raw: Array) -> Array:
        if kind == "f16":
            return raw.view(np.float16).astype(np.float32)
        if kind == "bf16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return raw

    def encode(vector: Array) -> Array:
        assert vector.shape == (W,) and vector.dtype == number, (vector.shape, vector.dtype)
        if kind == "f16":
            return vector.astype(np.float16).view(np.uint16)
        return _to_bfloat16(vector) if kind == "bf16" else vector

    def store(tensor: Any, index: Any, vector: Array) -> None:
        _place(tensor, index, W, W > 1)[:] = encode(vector)

    def splat(value: Any) -> Array:
        return np.full(W, value, number)

    def step(value: Any, other: Any, count: Any) -> Array:
        vector: Array = np.where(np.arange(W) < count, value, other).astype(number)
        return vector

    def gather(array: Any, index: Any) -> Array:
        found = _place(array, index, W, False)
        assert found.dtype == number
        return found.copy()

    def gather_aligned(array: Any, index: Any) -> Array:
        size = 16 // number().itemsize
        assert W % size == 0
        return np.concatenate([_place(array, index + k, size, True) for k in range(0, W, size)])

    def scatter(array: Any, index: Any, vector: Array) -> None:
        found = _place(array, index, W, False)
        assert found.dtype == number and vector.dtype == number
        found[:] = vector

    def keep(shared: Array, index: Any, raw: Array) -> None:
        _place(shared, index, 4, True)[:] = raw.view(np.int32)

    def recall(shared: Any, index: Any) -> Array:
        array = shared.array if type(shared) is Memory else shared
        raw: Array = _place(shared, index, 16 // array.itemsize, True).copy().view(np.dtype(memory))
        return raw

    def valid(mask: Any, index: Any) -> Array:
        found = _place(mask, index, W, False)
        assert found.dtype == np.uint8 and found.ctypes.data % W == 0
        return found.copy()

    memory = {"f16": "uint16", "bf16": "int16", "f32": "float32", "f64": "float64"}[kind]
    return Access(
        load, load, load, decode, encode, store, splat, step, gather, gather_aligned, scatter, keep, recall, valid
    )


def add(a: Any, b: Any) -> Any:
    """A + b."""
    return a + b


def sub(a: Any, b: Any) -> Any:
    """A - b."""
    return a - b


def mul(a: Any, b: Any) -> Any:
    """A * b."""
    return a * b


def fma(a: Any, b: Any, c: Any) -> Any:
    """A * b + c, rounded once from float64 (for float64 itself: twice)."""
    kind = np.result_type(a, b, c)
    return (np.float64(1.0) * a * b + c).astype(kind)


def gate(z: Any, u: Any) -> Any:
    """0 where z <= 0, else u."""
    return np.where(z <= 0, np.zeros_like(u), u)


def pick(mask: Any, a: Any) -> Any:
    """A where the mask is not 0, else 0; what a holds elsewhere, NaN included, does not matter."""
    return np.where(mask != 0, a, np.zeros_like(a))


def join(a: Array, b: Array) -> Array:
    """The lanes of a, then those of b."""
    return np.concatenate([a, b])


def total(a: Array) -> Any:
    """Sum of the lanes, in pairs."""
    while a.size > 1:
        a = a[::2] + a[1::2]
    return a[0]


def anew(number: Any) -> Any:
    """The same number or raw vector."""
    return number


def split_total(a: Array, count: Any) -> Any:
    """Sums of the first ``count`` lanes and of the others."""
    first = np.arange(a.size) < count
    return total(np.where(first, a, np.zeros_like(a))), total(np.where(first, np.zeros_like(a), a))


def sqrt(x: Any) -> Any:
    """Root of x; NaN for negative x."""
    return np.sqrt(x)


def invsqrt(x: Any) -> Any:
    """1/sqrt(x)."""
    return type(x)(1) / np.sqrt(x)


def invsqrts(x: Array) -> Array:
    """1/sqrt(x) of each lane."""
    return np.reciprocal(np.sqrt(x))


def finite(x: Any) -> bool:
    """Tell whether x is neither infinite nor NaN."""
    return math.isfinite(x)


def pause() -> None:
    """Let other threads run; who runs them puts something here."""


def say(array: Any, index: Any, a: Any, b: Any, tag: Any) -> None:
    """Write two numbers and their tag: a word of 64 bits at once, one after the other."""
    memory = _place(array, index, 4, True)
    words, halves = memory.view(np.int32).reshape(-1, 2), np.array([a, b], memory.dtype).view(np.int32)
    for k in range(len(words)) if tag & 1 else reversed(range(len(words))):
        pause()
        words[k] = halves[k], tag


def hear(array: Any, index: Any, tag: Any) -> tuple[bool, Any, Any]:
    """Whether two numbers with this tag are there, and what is there."""
    pause()
    memory = _place(array, index, 4, True)
    words = memory.view(np.int32).reshape(-1, 2)
    a, b = np.ascontiguousarray(words[:, 0]).view(memory.dtype)
    return bool((words[:, 1] == tag).all()), a, b


def ticket(array: Any, index: Any) -> int:
    """How often this place has been asked before."""
    pause()
    count = _place(array, index, 1, False).view(np.int32)
    count[0] += 1
    return int(count[0]) - 1


class Copies:
    """Copies that a thread has begun: groups, the last one open."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[Any, ...]]] = [[]]


_copies: Any = Copies()  # who runs threads puts each thread's here


def fetch(shared: Array, index: Any, tensor: Any, place: Any) -> None:
    """Begin to copy 16 bytes: they arrive when they are waited for."""
    count = 16 // tensor.array.itemsize
    _copies.groups[-1].append((_place(shared, index, 4, True), _place(tensor, place, count, True)))


def close() -> None:
    """What has been begun since the last time is a group."""
    _copies.groups.append([])


@functools.cache
def make_await(groups: int) -> Any:
    """Wait until all but the last groups have arrived."""

    def arrived() -> None:
        while len(_copies.groups) > groups + 1:
            for to, source in _copies.groups.pop(0):
                to[:] = source.view(np.int32)

    return arrived
