"""How gangs of blocks share the channels of a channels-first array (see ``gang``); from numbers alone."""

from __future__ import annotations

import functools
from typing import NamedTuple

from fastbn.cuda import tuning
from fastbn.cuda.arrays import ITEMSIZE
from fastbn.cuda.plan import Dims

TURNS = 8192  # channels that a gang keeps account of


class Gang(NamedTuple):
    """``gangs`` of ``blocks`` each; ``blocks`` is 0 where the chip cannot hold a channel or its runs are too short."""

    threads: int
    layers: int
    blocks: int = 0
    gangs: int = 0
    chunk: int = 0  # vectors of a channel that a block keeps
    shared: int = 0  # bytes of it


def layers_of(kind: str) -> int:
    """Return how many blocks a multiprocessor has: fewer where numbers take two registers."""
    return min(2, tuning.GANG_LAYERS) if kind == "f64" else tuning.GANG_LAYERS


def room(tensors: int, limit: int, layers: int) -> int:
    """Return how many vectors of each tensor a block may keep; ``limit``: shared memory that one block may have."""
    threads = tuning.GANG_THREADS
    own = (limit + 1024) // layers - 1024 - tuning.GANG_RESERVE  # the system takes 1 KB a block
    return own // (16 * tensors * threads) * threads


@functools.lru_cache(maxsize=1024)
def gang(dims: Dims, kind: str, aligned: bool, tensors: int, multiprocessors: int, limit: int) -> Gang:
    """Share channels among all blocks that fit on the GPU: the fewest rounds, weighed with the work of a round."""
    N, C, S = dims
    lanes, threads, layers = 16 // ITEMSIZE[kind], tuning.GANG_THREADS, layers_of(kind)
    none = Gang(threads, layers)
    if not tuning.GANG or not aligned or S % lanes or S * ITEMSIZE[kind] < tuning.GANG_RUN:
        return none
    if N * C * S * ITEMSIZE[kind] <= tuning.SMALL:
        return none
    vectors, most = N * S // lanes, room(tensors, limit, layers)
    there = multiprocessors * layers
    least = -(-vectors // most) if most else there + 1
    if least > there:
        return none

    def cost(blocks: int) -> tuple[int, int]:
        rounds = -(-C // (there // blocks))
        return rounds * (-(-vectors // blocks) + tuning.GANG_MEETING), blocks

    widest = min(there, max(4 * least, there // C), max(1, vectors // threads))
    blocks = min(range(least, max(least, widest) + 1), key=cost)
    chunk = -(-vectors // blocks)
    if TURNS * (there // blocks) < C:
        return none
    return Gang(threads, layers, -(-vectors // chunk), min(C, there // blocks), chunk, chunk * 16 * tensors)
