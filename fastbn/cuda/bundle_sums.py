"""Sums of a bundle of channels (see ``bundle``): over the lanes, over the threads of a block, over a gang of blocks."""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any, NamedTuple

from fastbn.cuda.channel import make_team_sum
from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.gang_sums import make_add_up
from fastbn.cuda.signals import SAID, say
from fastbn.cuda.simd import anew, split_total

int32, int64 = types.int32, types.int64


def scratch_size(gangs: int, blocks: int, channels: int) -> int:
    """Numbers of scratch that so many gangs of so many blocks need: the sums of two turns."""
    return gangs * 2 * channels * blocks * SAID


class BundleSums(NamedTuple):
    """Three steps, between which a block may do something else."""

    ready: Any  # set the scratch to 0
    publish: Any  # sum the block's threads and say the sums
    collect: Any  # (own, partial, gang, blocks, turn, channel, channels) -> the gang's sums as pairs, by a warp


def make_bundle_sums(kind: str, W: int, threads: int) -> BundleSums:
    """Return the steps; a warp has every ``threads // 32``-th channel. Orders of addition are fixed by the shape."""
    A, warps, add_up = ARITHMETIC[kind], threads // 32, make_add_up(kind)
    warp_sum = make_team_sum(kind, threads, 32)

    @device
    def channel_sum(red, j, S, V, height):
        """Sum channel j over the threads that have some of it; a vector has values of two channels at most."""
        s = q = A(0)
        v, height = int32(j * S // W + (cuda.threadIdx.x & 31)), anew(height)
        while v * W < (j + 1) * S:
            at = v
            if v * W < j * S:  # it begins in the channel before
                at = int32(v + 2 * threads)
            for _ in range(height):
                s += red[at]
                q += red[threads + at]
                at = int32(at + V)
            v = int32(v + 32)
        return warp_sum(s, q, red)

    @device
    def first_of(gang, blocks, turn, j, channels):
        return ((int64(anew(gang)) * 2 + (turn & 1)) * channels + j) * SAID * blocks

    @device
    def ready(partial, gang, blocks, part, channels):
        if blocks > 1:
            for i in range(cuda.threadIdx.x, 2 * channels * SAID, threads):
                partial[first_of(gang, blocks, 0, i // SAID, channels) + SAID * part + i % SAID] = A(0)
            cuda.cg.this_grid().sync()

    @device
    def publish(red, own, partial, gang, blocks, part, turn, s, q, count, S, V, height, channels):
        tid = anew(int32(cuda.threadIdx.x))
        red[tid], red[2 * threads + tid] = split_total(s, count)
        red[threads + tid], red[3 * threads + tid] = split_total(q, count)
        cuda.syncthreads()
        for j in range(tid >> 5, channels, warps):
            s, q = channel_sum(red, j, S, V, height)
            if tid & 31 == 0:
                if blocks == 1:  # for itself, in ``collect``
                    own[2 * j], own[2 * j + 1] = s, q
                else:
                    say(partial, first_of(gang, blocks, turn, j, channels) + SAID * part, s, q, turn + 1)

    @device
    def collect(own, partial, gang, blocks, turn, j, channels):
        if blocks == 1:
            return own[2 * j], A(0), own[2 * j + 1], A(0)
        return add_up(partial, first_of(gang, blocks, turn, j, channels), blocks, turn + 1)

    return BundleSums(ready, publish, collect)
