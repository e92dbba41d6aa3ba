"""How gangs of blocks share bundles of channels whose runs are short or odd (see ``bundle``); from numbers alone."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from fastbn.cuda import tuning
from fastbn.cuda.arrays import ITEMSIZE
from fastbn.cuda.plan import Dims

MOST = 16  # channels of a bundle
OWN = 512  # channels that a gang keeps account of


class Bundle(NamedTuple):
    """``gangs`` of ``blocks`` each; ``channels`` is 0 where there is no such bundle or the chip cannot hold one."""

    threads: int
    layers: int
    channels: int = 0  # of a bundle
    vectors: int = 0  # of its run
    blocks: int = 0
    gangs: int = 0
    chunk: int = 0  # rows that a block keeps
    shared: int = 0  # bytes of it


def channels(C: int, S: int, itemsize: int) -> int:
    """Return how many neighbours make runs of whole vectors that are long enough, best for all threads; 0 for none."""
    lanes, threads = 16 // itemsize, tuning.BUNDLE_THREADS
    if lanes - 1 > S:  # a vector would have values of three channels
        return 0
    least = lanes // math.gcd(S, lanes)
    there = [K for K in range(least, MOST + 1, least) if C % K == 0 and K * S // lanes <= threads]

    def cost(K: int) -> tuple[int, bool, int]:
        return max(0, tuning.BUNDLE_RUN - K * S * itemsize), 8 * (threads % (K * S // lanes)) > threads, K

    return min(there, key=cost, default=0)


def own(kind: str) -> int:
    """Return the bytes of the kernel's own arrays."""
    arithmetic = 8 if kind == "f64" else 4
    return (4 * tuning.BUNDLE_THREADS + 14 * MOST + OWN) * arithmetic + OWN + 256


def passes(kind: str, tensors: int, limit: int) -> int:
    """Return how many vectors of each tensor a thread may keep; ``limit``: shared memory that one block may have."""
    room = (limit + 1024) // tuning.BUNDLE_LAYERS - 1024 - own(kind)  # the system takes 1 KB a block
    return room // (16 * tensors * tuning.BUNDLE_THREADS)


@functools.lru_cache(maxsize=1024)
def bundle(dims: Dims, kind: str, aligned: bool, tensors: int, multiprocessors: int, limit: int) -> Bundle:
    """Share bundles among all blocks that fit on the GPU: the fewest rounds, weighed with the work of a round."""
    N, C, S = dims
    threads, none = tuning.BUNDLE_THREADS, Bundle(tuning.BUNDLE_THREADS, tuning.BUNDLE_LAYERS)
    K = channels(C, S, ITEMSIZE[kind])
    if not tuning.BUNDLE or not aligned or S == 1 or not K or N * C * S * ITEMSIZE[kind] < tuning.BUNDLE_LEAST:
        return none
    vectors, bundles = K * S * ITEMSIZE[kind] // 16, C // K
    height = threads // vectors
    there, most = multiprocessors * tuning.BUNDLE_LAYERS, passes(kind, tensors, limit) * height
    least = -(-N // most) if most > 0 else there + 1
    if least > there:
        return none

    def cost(blocks: int) -> tuple[int, int]:
        rounds = -(-bundles // (there // blocks))
        return rounds * (-(-N // blocks) * vectors + tuning.GANG_MEETING), blocks

    widest = min(there, max(4 * least, there // bundles), max(1, N // height))
    blocks = min(range(least, max(least, widest) + 1), key=cost)
    chunk = -(-N // blocks)
    if OWN // K * (there // blocks) < bundles:
        return none
    shared = -(-chunk // height) * threads * 16 * tensors
    gangs = min(bundles, there // blocks)
    return Bundle(threads, tuning.BUNDLE_LAYERS, K, vectors, -(-N // chunk), gangs, chunk, shared)
