"""How the blocks of one grid, all on the GPU at once, put their sums together: publish, meet, collect."""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.finalize import add_pair
from fastbn.cuda.rows import make_reduce
from fastbn.cuda.simd import access, add

int64 = types.int64


def make_publish(kind: str, W: int, threads: int, alone: bool):
    """Write the sums of the block where the other blocks find them, and wait until all have.

    ``alone``: there are no other blocks of this tile, and the block waits for its own threads.
    """
    reduce = make_reduce(kind, W, threads)

    @device
    def publish(s, q, red, partial, part, P, V, tile, width, tx, ty, height):
        reduce(s, q, red, partial, part, P, V, tile, width, tx, ty, height)
        if alone:
            cuda.syncthreads()
        else:
            cuda.cg.this_grid().sync()

    return publish


def make_collect(kind: str, W: int, threads: int):
    """Behind the barrier: the sums of some parts, added slot by slot into ``red``; returns the number of slots."""
    wide_kind = "f64" if kind == "f64" else "f32"
    A, L, half = ARITHMETIC[kind], 2 if kind == "f64" else 4, threads * W
    io = access(wide_kind, L)
    recall, decode, splat, scatter = io.recall, io.decode, io.splat, io.scatter

    @device
    def collect(red, partial, P, first, last, V, tile, width):
        groups = width // L
        slots = threads // groups
        slot = cuda.threadIdx.x // groups
        at = (cuda.threadIdx.x - slot * groups) * L
        s = q = splat(A(0))
        if slot < slots and tile * width + at < V:
            p = first + slot
            while p < last:
                s = add(s, decode(recall(partial, int64(p) * V + tile * width + at)))
                q = add(q, decode(recall(partial, int64(P + p) * V + tile * width + at)))
                p += slots
        if slot < slots:
            scatter(red, slot * width + at, s)
            scatter(red, half + slot * width + at, q)
        cuda.syncthreads()
        return slots

    @device
    def column(red, j, width, slots):
        s = se = q = qe = A(0)
        for i in range(slots):
            s, se = add_pair(s, se, red[i * width + j], A(0))
            q, qe = add_pair(q, qe, red[half + i * width + j], A(0))
        return s, se, q, qe

    return collect, column
