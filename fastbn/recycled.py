"""Memory for large results, kept when they die and given to the next ones.

A fresh array of 100 MB is not memory yet: the kernel finds and clears each page when it is first written, and takes it
back when the array dies. Inference into such an array takes 2.4 streaming copies, into memory that was written before
1.1 (float32, 32 x 256 x 56 x 56; NumPy asks for huge pages by itself, small ones take 19). So results of LEAST bytes
and more come from blocks that outlive them. A block returns when the last view of its array is gone.

``FASTBN_KEEP_BYTES`` says how much may lie here unused: by default 512 MB, or an eighth of the machine's memory if that
is less; 0 turns recycling off.
"""

from __future__ import annotations

import collections
import math
import os
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Block = npt.NDArray[np.uint8]

LEAST = 4 << 20  # bytes; below, the C library itself keeps memory
LINE = 64  # bytes; results begin on a cache line; on every second one fused gradients took 1.05 at 7 x 7
SLACK = 1.25  # a block serves results down to this part of its size

_returned: collections.deque[Block] = collections.deque()  # appended by finalizers, at any time and in any thread
_free: list[Block] = []  # oldest first
_lock = threading.Lock()


def _limit() -> int:
    named = os.environ.get("FASTBN_KEEP_BYTES", "")
    if named.isdecimal():
        return int(named)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        memory = 4 << 30
    return min(512 << 20, memory // 8)


def _collect(limit: int) -> None:
    """Take in what came back; let go of the oldest blocks beyond the limit."""
    while _returned:
        _free.append(_returned.popleft())
    total = sum(block.nbytes for block in _free)
    while _free and total > limit:
        total -= _free.pop(0).nbytes


def _take(nbytes: int, limit: int) -> Block:
    with _lock:
        _collect(limit)
        fitting = [i for i, block in enumerate(_free) if nbytes <= block.nbytes <= SLACK * nbytes]
        if fitting:
            return _free.pop(min(fitting, key=lambda i: _free[i].nbytes))
    return np.empty(nbytes, np.uint8)


def empty(shape: tuple[int, ...] | list[int], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised C-contiguous array, as ``numpy.empty``; a large one may be memory of a dead one."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST or nbytes > (limit := _limit()):
        return np.empty(shape, dtype)
    block = _take(nbytes + LINE, limit)
    # The array over the memoryview is the base of every view of it, so it dies when the last one does.
    root = np.frombuffer(block.data, np.uint8)
    weakref.finalize(root, _returned.append, block).atexit = False
    at = -block.ctypes.data % LINE
    return root[at : at + nbytes].view(dtype).reshape(shape)


def empty_like(x: Array) -> Array:
    """Return ``numpy.empty_like(x)``, from such memory where x is C-contiguous."""
    return empty(x.shape, x.dtype) if x.flags.c_contiguous else np.empty_like(x)


def _forget() -> None:
    """A forked child may find the lock held by a thread that it does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
