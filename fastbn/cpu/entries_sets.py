"""As ``entries``, for layer, group and instance norm."""

from __future__ import annotations

import functools
from typing import Any

from numba import types

from fastbn.cpu import gates_sets, launch_sets, sets, sets_backward, sets_four
from fastbn.cpu.entries import F32, F64, FLOAT, INT, Entry, address_of, compiled
from fastbn.cpu.objects import handle, readable


@functools.cache
def _code(op: str, short: bool, by_run: bool) -> Entry | None:
    """Compile a gate."""
    gate = getattr(gates_sets, op)
    objects = [handle] * (7 if op == "train" else 9)
    last = [FLOAT] if op == "train" else [INT] * 2
    place = types.none if short else INT, INT if by_run else types.none
    return compiled(gate, (*objects, *[INT] * 5, *place, *last))


def find(op: str, d: launch_sets.Sizes) -> tuple[Entry, tuple[int | None, ...]] | None:
    """As ``entries.find``, for layer, group and instance norm of contiguous float32 numbers with weight and bias.

    It is called as ``train(x, y, weight, bias, stats, ndarray, float32, *numbers, eps)`` or ``backward(x, grad, dx,
    weight, dweight, dbias, stats, ndarray, float32, *numbers)``.
    """
    if not launch_sets.is_small(d) or not readable():
        return None
    count, L, run = launch_sets.shape(d, affine=True, back=op == "backward")
    short = run is None and (launch_sets.in_fours(d, 4) if op == "train" else launch_sets.in_fours_back(d, 4, True))
    place = [INT] * 3 if short else [INT] * 4 + [types.none if run is None else INT]
    last = types.boolean, types.Array(types.int64, 1, "C")
    kernel: Any
    if op == "train":
        kernel = sets_four.train if short else sets.train
        address = address_of(kernel, (*[F32] * 4, F64, F32, *place, FLOAT, *last))
    else:
        kernel = sets_four.backward if short else sets_backward.backward
        address = address_of(kernel, (*[F32] * 4, F64, F64, F32, *place, INT, *last))
    if address is None or (code := _code(op, short, run is not None)) is None:
        return None
    numbers = address, count, L, d[2], d[3], None if short else d[1], run
    return code, numbers if op == "train" else (*numbers, *launch_sets.sums(d, affine=True))
