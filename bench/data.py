"""Arrays for a case: the same numbers in every process, aligned to a cache line, touched before they are timed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.cases import Case

Array = npt.NDArray[Any]


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype, bfloat16 from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any], place: int = 64) -> Array:
    """Return an array that begins 64 bytes into a page, as large tensors of PyTorch do, its pages already mapped.

    All at one place: a result that begins a line or two further on than x takes 1.1-2.7 times as long (``recycled``).
    """
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 4096, np.uint8)
    raw[...] = 0
    start = (place - raw.ctypes.data) % 4096
    return raw[start : start + size].view(dtype).reshape(shape)


class Data:
    """x, gradient, residual, output and parameters of a case; ``shape`` is the memory's, channels along ``axis``.

    Large arrays exist once they are asked for: a case of 1 GB must fit in three processes.
    """

    def __init__(self, case: Case):
        self.case, self.dtype = case, dtype_of(case.dtype)
        memory = case.shape
        if case.layout == "channels_last" and len(memory) == 4:
            n, c, h, w = memory
            memory = (n, h, w, c)
        self.shape = memory
        self.axis = len(memory) - 1 if case.rows else 1
        rng = np.random.default_rng(len(memory) + memory[0])
        channels = memory[self.axis]
        kind = np.float64 if case.dtype == "float64" else np.float32
        self.weight, self.bias, self.mean = (rng.standard_normal(channels).astype(kind) for _ in range(3))
        self.var = rng.uniform(0.5, 2.0, channels).astype(kind)

    def _random(self, seed: int) -> Array:
        rng = np.random.default_rng([seed, *self.shape])
        # A prime number of values: repeated after 2**20, they made constants of the channels of (16, 2**20).
        block = (rng.standard_normal(min(self.case.elements, (1 << 20) - 3), dtype=np.float32) + 1).astype(self.dtype)
        x = empty(self.shape, self.dtype)
        flat = x.reshape(-1)
        for start in range(0, x.size, block.size):
            flat[start : start + block.size] = block[: x.size - start]
        return x

    @functools.cached_property
    def x(self) -> Array:
        return self._random(0)

    @functools.cached_property
    def grad(self) -> Array:
        return self._random(1)

    @functools.cached_property
    def residual(self) -> Array:
        return self._random(2)

    @functools.cached_property
    def out(self) -> Array:
        return empty(self.shape, self.dtype)

    @functools.cached_property
    def out2(self) -> Array:
        return empty(self.shape, self.dtype)
