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
    layers: int = 1  # blocks of a multiprocessor
    blocks: int = 0
    gangs: int = 0
    chunk: int = 0  # vectors of a channel that a block keeps
    shared: int = 0  # bytes of shared memory


def room(tensors: int, limit: int, layers: int) -> int:
    """Return how many vectors of so many tensors a block may keep; ``limit``: what one block may have of a GPU."""
    own = (limit + 1024) // layers - 1024 - tuning.GANG_RESERVE  # the system takes 1 KB a block
    return own // (16 * tensors)


@functools.lru_cache(maxsize=1024)
def gang(dims: Dims, kind: str, aligned: bool, tensors: int, multiprocessors: int, limit: int) -> Gang:
    """Share channels among all blocks that fit on the GPU: least work in all rounds, with what a round costs anyway."""
    N, C, S = dims
    lanes, threads = 16 // ITEMSIZE[kind], tuning.GANG_THREADS
    none = Gang(threads)
    if not tuning.GANG or not aligned or S % lanes or S * ITEMSIZE[kind] < tuning.GANG_RUN:
        return none
    if N * C * S * ITEMSIZE[kind] <= tuning.SMALL:
        return none
    found = []
    for layers in (2,) if kind == "f64" else tuning.GANG_LAYERS:
        there, most = multiprocessors * layers, room(tensors, limit, layers)
        meeting = tuning.GANG_MEETING * (1.0 - 0.1 * layers if tensors == 1 else 1.0)  # in forward, more blocks win
        found += _shares(N * S // lanes, C, threads, layers, there, most, meeting)
    if not found:
        return none
    _, blocks, layers, gangs, chunk = min(found)
    return Gang(threads, layers, blocks, gangs, chunk, chunk * 16 * tensors)


def _shares(
    vectors: int, C: int, threads: int, layers: int, there: int, most: int, meeting: float
) -> list[tuple[float, int, int, int, int]]:
    """Return (cost, blocks, layers, gangs, chunk) for every number of blocks that a gang may have."""
    found = []
    least = -(-vectors // most) if most else there + 1
    for wanted in range(least, min(there, max(4 * least, there // C), max(1, vectors // threads)) + 1):
        chunk = -(-vectors // wanted)
        blocks = -(-vectors // chunk)
        gangs = min(C, there // wanted)
        rounds = -(-C // gangs)
        if rounds <= TURNS:
            busy = meeting if blocks > 1 else tuning.GANG_ROUND
            found.append((rounds * (chunk * layers + busy), blocks, layers, gangs, chunk))
    return found
