"""The numbers that decide which kernel runs, each with the measurement behind it.

Measured on 2-core AMD EPYC (Zen 4 and Zen 5); where ``CORE_CACHE`` is not 0, on a 2-core Intel Xeon (Emerald Rapids).
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from fastbn.cpu import caches

Array = npt.NDArray[Any]

PARALLEL = 1 << 19  # elements below which waking a helper (about 50 us) costs more than it brings
CORE_CACHE = caches.core()  # bytes of the cache that blocks should fit in; 0: the one that cores share
_OWN = 5 * CORE_CACHE // 4  # above, ordinary stores take 1.2-1.35, and the shared cache is a quarter as fast
STREAM = _OWN or 10 << 20  # bytes of all tensors from which streaming stores pay, see ``streams``
READ_ONCE = _OWN or 14 << 20  # the same for inference of rows, which wants no line of x back
# And of channels-first arrays; rows take 0.75-0.95 there too, but 1.3-1.5 out of the memory.
READ_ONCE_RUNS = _OWN or 19 << 20
# Elements of a tensor from which the CPU reads two of them too slowly by itself: then gradients of rows of any length
# ask for lines. 0.85-0.95, float16 0.65; 1.03 at half as many elements. AMD's CPUs need it for wide rows alone.
DISTANT = 10 << 20 if CORE_CACHE else 1 << 62
MATRIX = 256  # columns that a short matrix row is widened to; 1024 are 1.1x slower to sum, their rows lie 4 KB apart
SLIM = 64  # the same for inference between two caches, where each fetch of a constant counts: 0.9 of the time
SLIM_SIZES = (1 << 17, 7 << 18)  # elements, both of them out: 1.05-1.09x below, 1.0 (half types 1.1) above
WIDTH = 2048  # columns of a block: its constants (28 KB) share L1 with four rows
# Columns of a band or block whose lines do not cross its ends, up to half as many more: their sums and constants share
# L1 with two rows. 2048 columns take 1.35x (gradients) and 1.2x (training) at 1568 rows, 1.03 and 1.1 at 8192; 1280
# columns cut in two 1.1 and 1.3.
SIDE = 1024
WHOLE = 1 << 18  # elements of a tensor that is one block
TALL = 1024  # rows from which a block of columns no longer fits in the cache
MANY = 1 << 17  # channels whose statistics, 3 MB and more, are made block by block where they are needed once
LYING = 1 << 18  # valid values from which they are read where they lie instead of packed
STRETCH = 768  # elements of a run of valid rows from which the same: packed as fast at 640, 1.3x the time at 1600
PIECE = 2  # vectors of a piece of valid values of a run from which the same, see ``launch_masked_planes``
BAND = (1 << 15, 1 << 20)  # elements of a band of rows: small ones cost 1.3x, a large one is what a thread may wait for


def streams(*tensors: Array | None, least: int | None = None, over: tuple[Array | None, ...] = ()) -> bool:
    """Tell whether a kernel that reads and writes these tensors should stream what it writes past the cache.

    ``over``: the result, and inputs whose memory it may be. If so, the line that is written was just read, lies in a
    cache, and would have to leave it first: inference in place takes 0.37-0.45 of the time with ordinary stores,
    gradients 0.6-0.75, training over a residual 0.53-0.86 (Intel). Not where signs are kept, which are written by line.

    Ordinary stores take, of the time of streaming ones: inference 0.7-0.8 at 12 to 18 MB of tensors, 0.8-1.0 at 20,
    1.0-1.2 at 24; training 1.0 (rows 0.9) at 8 MB, 1.02-1.08 at 12, 1.2 at 24; gradients 1.0 at 12 MB, 1.2 at 24. Who
    reads the result next finds it in the cache.
    """
    if sum(t.nbytes for t in tensors if t is not None) < (STREAM if least is None else least):
        return False
    places = [t.ctypes.data for t in over if t is not None]
    return not places or places[0] not in places[1:]
