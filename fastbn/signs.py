"""The signs of an output behind a residual and a ReLU, kept instead of the output itself where that is large.

Gradients need no more of it: a thirty-second of its bytes (``cpu/_signs.py``, the kernels' side, says how they lie),
and the output is the caller's to change. Behind a ReLU alone they are found again from x.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import recycled

Array = npt.NDArray[Any]

LINE = 64  # bytes, as whose part ``phase`` is counted
HEAD, TAIL = 16, 8  # bytes in front of the bits, and what vectors may read behind them
_BYTE = np.dtype(np.uint8)


def room(address: int, size: int, itemsize: int) -> npt.NDArray[np.uint8]:
    """Return memory for the signs of an output at an address, which one thread will write or ``launch`` says it."""
    phase = address % LINE // itemsize
    signs = recycled.empty((HEAD + (phase + size + 7) // 8 + TAIL,), _BYTE)
    signs[:HEAD].view(np.int64)[:] = phase, 0
    return signs


def phase(signs: npt.NDArray[np.uint8]) -> int:
    """Return the number of the bit of element 0."""
    return int(signs[:HEAD].view(np.int64)[0])
