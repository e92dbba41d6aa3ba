"""The signs of an output behind a residual and a ReLU, kept instead of the output itself where that is large.

Gradients need no more of it: a thirty-second of its bytes (``cpu/_signs.py``, the kernels' side, says how they lie),
and the output is the caller's to change. Behind a ReLU alone they are found again from x.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastbn import recycled

LINE = 64  # bytes, as whose part ``phase`` is counted
HEAD, TAIL = 16, 8  # bytes in front of the bits, and what vectors may read behind them
_BYTE = np.dtype(np.uint8)


def room(address: int, size: int, itemsize: int) -> npt.NDArray[np.uint8]:
    """Return memory for the signs of an output at an address, which one thread will write or ``launch`` says it.

    As much wherever the output lies: PyTorch's checkpoints compare the shapes of what is saved and what is saved again.
    """
    signs = recycled.empty((HEAD + (LINE // itemsize + size + 7) // 8 + TAIL,), _BYTE)
    signs[:HEAD].view(np.int64)[:] = address % LINE // itemsize, 0
    return signs
