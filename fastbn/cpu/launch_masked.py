"""Tensors of which only some values count: found where they lie if that is in long runs, else packed by the caller.

What methods return is None where a sum cannot be trusted (``finalize.near``); nothing has been written then, and the
caller packs the values, since packed ones can be summed again.
"""

from __future__ import annotations

from typing import TypeAlias

from fastbn.cpu.launch import Array, Table
from fastbn.cpu.launch_masked_planes import Pieces, pieces
from fastbn.cpu.launch_masked_rows import Stretches, stretches
from fastbn.cpu.plans import lanes_of

Lying: TypeAlias = Stretches | Pieces


def find(table: Table, M: int, C: int, dims: tuple[int, int, int], whole: bool, x: Array) -> Lying | None:
    """Return how kernels find M values a channel where they lie; None where packing is as fast.

    ``table`` as of ``launch.pieces``; ``dims`` is (N, C, S), or of ``whole`` rows (samples, 1, elements of a sample).
    """
    return stretches(table, dims[2], M, C, lanes_of(x)) if whole else pieces(table, M, dims, lanes_of(x))
