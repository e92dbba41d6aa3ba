"""The yardstick: a copy with streaming stores, the fastest way here to read and write a tensor once."""

from __future__ import annotations

from typing import Any

import numba
import numpy.typing as npt

from fastbn.cpu.simd import base, fence, head, lanes, load, load_n, store_n, stream


@numba.njit(nogil=True)
def stream_copy(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
    """Copy the float32 array x to y."""
    n = x.size
    x, y = base(x), base(y)
    W = lanes(x)
    i = min(head(y, 0), n)
    store_n(y, 0, load_n(x, 0, i), i)
    while i + W <= n:
        stream(y, i, load(x, i))
        i += W
    store_n(y, i, load_n(x, i, n - i), n - i)
    fence()
