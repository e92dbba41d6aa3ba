"""Which kernel for which shape, and how its grid is cut; from numbers alone, so that it is tested without a GPU.

Cuts depend on the shape and the dtype, never on the GPU: sums are added in the same order on every machine.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from fastbn.cuda import tuning
from fastbn.cuda.arrays import ITEMSIZE
from fastbn.errors import ArgumentValueError

Dims = tuple[int, int, int]
MOST = 65535  # blocks along the second axis of a grid
LARGEST = (1 << 31) - (1 << 16)  # where 32-bit positions that step by a block could wrap round
TILE = 32  # most vectors side by side in a tile of rows


class Plan(NamedTuple):
    """How a shape is worked off by the split kernels."""

    rows: bool
    W: int  # lanes of a vector
    R: int  # rows (planes: runs)
    V: int  # columns (planes: elements of a run)
    across: int  # blocks side by side: channels or tiles
    tx: int  # vectors of a tile side by side (rows)
    parts: int  # of the sums
    chunk: int  # vectors of a channel (planes) or rows that a part of the sums has
    apply_parts: int
    apply_chunk: int
    depth: int  # rows of ``partial``, as ``finalize`` counts them
    columns: int  # columns of a channel in ``partial``
    group: int  # channels of a block of ``finalize``


def _cut(length: int, unit: int, across: int, depth: int) -> tuple[int, int]:
    """Cut a length into parts: enough blocks to fill a GPU, few enough that each has work for all its threads."""
    parts = max(-(-length // (unit * depth)), -(-tuning.BLOCKS // across))
    parts = max(1, min(parts, -(-length // unit), MOST))
    chunk = -(-length // parts)
    return -(-length // chunk), chunk


def _widen(N: int, C: int, S: int, lanes: int) -> int:
    """Rows to lay side by side so that they are whole vectors; 0 if that does not go."""
    times = lanes // math.gcd(C * S, lanes)
    return times if N % times == 0 else 0


def small_enough(dims: Dims, kind: str) -> None:
    """Raise where a channel or a row has more values than kernels count."""
    N, C, S = dims
    if max(N * S, C, C * S * (16 // ITEMSIZE[kind])) >= LARGEST:
        raise ArgumentValueError("x", "less than 2**31 values a channel and 2**31 values a row", f"{dims}")


@functools.lru_cache(maxsize=1024)
def plan(dims: Dims, kind: str, aligned: bool) -> Plan:
    """Choose the split kernels' shape and cuts. ``aligned``: all tensors begin at a multiple of 16 bytes."""
    N, C, S = dims
    lanes = 16 // ITEMSIZE[kind]
    small_enough(dims, kind)
    whole = aligned and S % lanes == 0
    if S >= tuning.RUN and (whole or N < tuning.RUNS):
        return planes(dims, lanes if whole else 1)
    times = _widen(N, C, S, lanes) if aligned else 0
    return rows(dims, lanes if times else 1, times or 1)


@functools.lru_cache(maxsize=1024)
def masked(dims: Dims, kind: str, aligned: bool) -> Plan:
    """As ``plan``, where one byte of a mask must tell of all lanes of a vector, or W bytes in a row of each."""
    _, C, S = dims
    small_enough(dims, kind)
    lanes = 16 // ITEMSIZE[kind]
    if S == 1:
        return rows(dims, lanes if aligned and C % lanes == 0 else 1, 1)
    return planes(dims, lanes if aligned and S % lanes == 0 else 1)


def planes(dims: Dims, W: int) -> Plan:
    """Cut channels-first arrays."""
    N, C, S = dims
    vectors = N * (S // W)
    parts, chunk = _cut(vectors, tuning.THREADS, C, tuning.DEPTH)
    apply_parts, apply_chunk = _cut(vectors, tuning.THREADS, C, tuning.APPLY_DEPTH)
    return Plan(False, W, N, S, C, 1, parts, chunk, apply_parts, apply_chunk, parts, 1, min(32, tuning.THREADS))


def rows(dims: Dims, W: int, times: int) -> Plan:
    """Cut rows, ``times`` of them side by side."""
    N, C, S = dims
    R, V = N // times, C * S * times
    vectors = V // W
    tx = -(-vectors // -(-vectors // TILE))
    across, height = -(-vectors // tx), tuning.THREADS // tx
    parts, chunk = _cut(R, height, across, tuning.DEPTH)
    apply_parts, apply_chunk = _cut(R, height, across, tuning.APPLY_DEPTH)
    group = 32 if S == 1 else 1
    return Plan(True, W, R, V, across, tx, parts, chunk, apply_parts, apply_chunk, parts * times, S, group)


@functools.lru_cache(maxsize=1024)
def slab(dims: Dims, kind: str, aligned: bool, tensors: int, limit: int) -> tuple[int, int]:
    """Threads and bytes of shared memory of a block that keeps a channel of so many tensors; (0, 0) if that is no good.

    ``limit`` is the shared memory that a block of this GPU may have.
    """
    N, C, S = dims
    lanes = 16 // ITEMSIZE[kind]
    channel = N * S * ITEMSIZE[kind]
    if not aligned or S % lanes or tensors * channel > limit - tuning.RESERVE:
        return 0, 0
    small = C * channel <= tuning.SMALL
    if not small and (S < tuning.RUN or C < tuning.SLAB_CHANNELS):
        return 0, 0
    return _slab_threads(N * S // lanes, tensors * channel, limit), tensors * channel


def _slab_threads(vectors: int, shared: int, limit: int) -> int:
    """Threads of a block: fewer where several blocks fit on a multiprocessor, since one loads while another writes."""
    together = max(1, min(tuning.SLAB_TOGETHER, limit // (shared + tuning.RESERVE // 2)))
    return next(threads for least, threads in tuning.SLAB if vectors >= least and threads <= 1024 // together)


@functools.lru_cache(maxsize=1024)
def again(dims: Dims, kind: str) -> int:
    """Threads of a block that has a channel of a small tensor to itself and reads it twice; 0 if that is no good."""
    N, C, S = dims
    values, most = N * S, tuning.SCATTERED if S == 1 else tuning.SMALL
    if values > tuning.AGAIN or C * values * ITEMSIZE[kind] > most:
        return 0
    return next(threads for least, threads in tuning.SLAB if values >= least)


class Persistent(NamedTuple):
    """How the one-launch kernel for rows works off a shape; ``threads`` is 0 where it cannot."""

    threads: int
    across: int = 0  # tiles side by side
    tx: int = 0
    parts: int = 0  # blocks below each other
    turns: int = 0  # rows of each thread, of which some have one more
    depth: int = 0  # rows of a thread that a warp takes at once to write; 0: those that it has summed
    kept: int = 0  # vectors that each thread keeps in shared memory
    shared: int = 0  # bytes of it
    alone: bool = False  # one block below another: few rows, no meeting


def persistent_threads(capability: tuple[int, int]) -> int:
    """Return the threads of a block of the one-launch kernel for rows; (0, 0): of no GPU in particular."""
    before = (0, 0) < capability < (9, 0)
    return tuning.PERSISTENT_THREADS_BEFORE if before else tuning.PERSISTENT_THREADS


@functools.lru_cache(maxsize=1024)
def persistent(
    dims: Dims, kind: str, aligned: bool, tensors: int, blocks: int, limit: int, batches: int = 1,
    capability: tuple[int, int] = (0, 0),
) -> Persistent:  # fmt: skip
    """Cut rows for a grid that must be on the GPU at once: at most ``blocks`` (its multiprocessors).

    ``tensors`` are kept in shared memory, of which a block of this GPU may have ``limit`` bytes. ``batches`` of these
    dims are worked off together: where their tiles are blocks enough, each is one block's alone.
    """
    N, C, S = dims
    lanes, threads = 16 // ITEMSIZE[kind], persistent_threads(capability)
    if not tuning.PERSISTENT or S != 1 or not aligned or C % lanes:
        return Persistent(0)
    vectors = C // lanes
    tx = -(-vectors // -(-vectors // TILE))
    across, height = -(-vectors // tx), threads // tx
    alone = tuning.ALONE * height >= N and N * C * ITEMSIZE[kind] <= tuning.SMALL
    alone = alone or (batches > 1 and 2 * batches * across >= blocks)
    if across > blocks and not alone:
        return Persistent(0)
    layers = -(-N // height)
    parts = 1 if alone else min(blocks // across, layers)
    most = -(-layers // parts)
    arithmetic = 8 if kind == "f64" else 4
    own = 2 * threads * lanes * arithmetic + 7 * TILE * lanes * arithmetic
    kept = max(0, min(most, (limit - own - tuning.RESERVE) // (threads * 16 * tensors)))
    depth = 0 if parts == 1 else min(tuning.PERSISTENT_POOL // tensors, most - kept)
    shared, turns = kept * threads * 16 * tensors, N // (parts * height)
    return Persistent(threads, across, tx, parts, turns, depth, kept, shared, alone)
