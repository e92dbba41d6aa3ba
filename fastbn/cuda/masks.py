"""How many places a mask leaves, and where some of them are, worked out on the GPU; and the mask that lengths mean.

``tally`` is five int32: the number of valid places (of a channel, over samples and runs) and four of them, spread over
the mask, from which a pivot is taken. Nothing waits for it: whatever depends on the number reads it on the GPU.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.driver import cuda, kernel, types

int32, int64 = types.int32, types.int64
PARTS = 64


@functools.cache
def count(threads: int):
    """Number and first of the valid places of each part of a mask."""

    @kernel("MIiii", "f32", threads)
    def masks_count(mask, found, size, chunk, P):
        counts = cuda.shared.array(threads, int32)
        firsts = cuda.shared.array(threads, int32)
        part, tid = cuda.blockIdx.x, cuda.threadIdx.x
        end = int32(min(size, (part + 1) * chunk))
        many, first = int32(0), int32(size)
        e = int32(part * chunk + tid)
        while e < end:
            if mask[e] != 0:
                many = int32(many + 1)
                first = int32(min(first, e))
            e = int32(e + threads)
        counts[tid], firsts[tid] = many, first
        half = threads >> 1
        while half > 0:
            cuda.syncthreads()
            if tid < half:
                counts[tid] = int32(counts[tid] + counts[tid + half])
                firsts[tid] = int32(min(firsts[tid], firsts[tid + half]))
            half >>= 1
        if tid == 0:
            found[part], found[P + part] = counts[0], firsts[0]

    return masks_count


@functools.cache
def gather(threads: int):
    """``tally`` from what ``count`` found in P parts."""
    size = 2 * PARTS

    @kernel("IIi", "f32", threads)
    def masks_gather(found, tally, P):
        both = cuda.shared.array(size, int32)
        for j in range(cuda.threadIdx.x, 2 * P, threads):
            both[j] = found[j]
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            many = filled = int32(0)
            for p in range(P):
                if both[p] > 0:
                    both[P + filled] = both[P + p]  # firsts of the parts that have one, moved together
                    filled = int32(filled + 1)
                    many = int32(many + both[p])
            tally[0] = many
            for j in range(4):
                tally[j + 1] = int32(0)
                if filled > 0:
                    tally[j + 1] = both[P + (2 * j + 1) * filled // 8]

    return masks_gather


@functools.cache
def tally(threads: int):
    """The same of a small mask by one block: the four places are the first ones of its quarters."""
    side = threads // 4

    @kernel("MIi", "f32", threads)
    def masks_tally(mask, tally, size):
        counts = cuda.shared.array(threads, int32)
        firsts = cuda.shared.array(threads, int32)
        tid = cuda.threadIdx.x
        quarter, chunk = tid // side, (size + 3) // 4
        end, e = int32(min(size, (quarter + 1) * chunk)), int32(quarter * chunk + (tid - quarter * side))
        many, first = int32(0), int32(size)
        while e < end:
            if mask[e] != 0:
                many, first = int32(many + 1), int32(min(first, e))
            e = int32(e + side)
        counts[tid], firsts[tid] = many, first
        half = side >> 1
        while half > 0:
            cuda.syncthreads()
            if tid - quarter * side < half:
                counts[tid] = int32(counts[tid] + counts[tid + half])
                firsts[tid] = int32(min(firsts[tid], firsts[tid + half]))
            half >>= 1
        cuda.syncthreads()
        if tid == 0:
            many, first = int32(0), int32(size)
            for k in range(4):
                many, first = int32(many + counts[k * side]), int32(min(first, firsts[k * side]))
            tally[0] = many
            for k in range(4):
                place = firsts[k * side] if firsts[k * side] < size else first
                tally[k + 1] = int32(place if place < size else 0)

    return masks_tally


@functools.cache
def from_lengths(kind: str, threads: int):
    """The mask (N, T) of the first ``lengths[n]`` steps; ``kind`` is that of the lengths, i32 or i64."""

    @kernel("TMii", kind, threads)
    def masks_from_lengths(lengths, mask, N, T):
        e = int64(cuda.blockIdx.x) * threads + cuda.threadIdx.x
        if e < int64(N) * T:
            n = e // T
            mask[e] = types.uint8(1 if e - n * T < lengths[n] else 0)

    return masks_from_lengths
