"""Memory for large results, kept when they die and given to the next ones.

A fresh array of 100 MB is not memory yet: the kernel finds and clears each page when it is first written, and takes it
back when the array dies. Inference into such an array takes 2.4 streaming copies, into memory that was written before
1.1 (float32, 32 x 256 x 56 x 56; NumPy asks for huge pages by itself, small ones take 19). The C library keeps small
arrays, but two of 500 KB that die together go back to the system: forward and backward then take 500 us instead of 70,
of 4 MB 5.4 ms instead of 0.5. So results of LEAST bytes and more come from blocks that outlive them. A block returns
when the last view of its array is gone.

Results begin in the middle of a page. Where y begins 48 or 64 bytes further into its page than x does, the CPU takes
each load of x for one of what was just stored to y: 1.1-1.3x in training and gradients, 1.4-2.7x in inference. NumPy's
large arrays begin 16 bytes into a page, PyTorch's 64.

``FASTBN_KEEP_BYTES`` says how much may lie here unused: by default 512 MB, or an eighth of the machine's or the
container's memory if that is less; 0 turns recycling off.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import threading
import weakref
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import limits

Array = npt.NDArray[Any]

LEAST = 1 << 18  # bytes
PAGE, PLACE = 4096, 2048  # where in a page results begin
HUGE = 1 << 22  # bytes from which NumPy asks for huge pages; 0.95 of the time for results of half that and more
SLACK = 1.25  # a block serves results down to this part of its size
MOST = 64  # blocks that lie here unused


class Block(NamedTuple):
    """Memory, where in it results begin, and how many bytes they may have."""

    memory: npt.NDArray[np.uint8]
    at: int
    room: int


class Pool:
    """Blocks that nobody uses, oldest first, and their size in all."""

    __slots__ = ("free", "limit", "total")

    def __init__(self) -> None:
        self.free: list[Block] = []
        self.total, self.limit = 0, 0

    def collect(self) -> None:
        """Take in what came back; let go of the oldest blocks beyond the limit."""
        free = self.free
        while _returned:
            free.append(_returned.popleft())
            self.total += free[-1].memory.size
        while free and (self.total > self.limit or len(free) > MOST):
            self.total -= free.pop(0).memory.size

    def take(self, nbytes: int) -> Block | None:
        """Give a block for a result of so many bytes, the last one that fits: it may still be in the cache."""
        free = self.free
        for i in range(len(free) - 1, -1, -1):
            if nbytes <= free[i].room <= SLACK * nbytes:
                self.total -= free[i].memory.size
                return free.pop(i)
        return None


_returned: collections.deque[Block] = collections.deque()  # appended to at any time and in any thread
_lent: dict[int, tuple[weakref.ref[Any], Block]] = {}
_pool = Pool()
_lock = threading.Lock()


@functools.lru_cache(maxsize=8)
def _limit(named: str | None) -> int:
    if named is not None and named.isdecimal():
        return int(named)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not POSIX
        memory = 4 << 30
    memory = min(memory, limits.memory() or memory)
    return min(512 << 20, memory // 8)


def _take(nbytes: int) -> Block | None:
    """Return a block for a result of so many bytes; None if such blocks are not to be kept."""
    with _lock:
        _pool.collect()
        if (block := _pool.take(nbytes)) is not None:
            return block
        _pool.limit = limit = _limit(os.environ.get("FASTBN_KEEP_BYTES"))  # a microsecond, so only for new blocks
    if nbytes > limit:
        return None
    size = nbytes + PAGE
    memory = np.empty(max(size, HUGE) if nbytes >= HUGE // 2 else size, np.uint8)
    return Block(memory, (PLACE - memory.ctypes.data) % PAGE, nbytes)


def _give_back(ref: Any, lent: Any = _lent, returned: Any = _returned) -> None:
    returned.append(lent.pop(id(ref))[1])  # both given: at the interpreter's exit this module may be empty


def empty(shape: tuple[int, ...] | list[int], dtype: np.dtype[Any]) -> Array:
    """Return an uninitialised C-contiguous array, as ``numpy.empty``; a large one may be memory of a dead one."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LEAST or (block := _take(nbytes)) is None:
        return np.empty(shape, dtype)
    # The array over the memoryview is the base of every view of it, so it dies when the last one does; one over the
    # array itself is not, NumPy goes on to that.
    root = np.frombuffer(block.memory.data, np.uint8)
    ref = weakref.ref(root, _give_back)
    _lent[id(ref)] = ref, block
    return np.ndarray(shape, dtype, root, block.at)


def empty_like(x: Array) -> Array:
    """Return ``numpy.empty_like(x)``, from such memory where x is C-contiguous."""
    return empty(x.shape, x.dtype) if x.flags.c_contiguous else np.empty_like(x)


def _forget() -> None:
    """A forked child may find the lock held by a thread that it does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
