"""As ``entries``, for layer, group and instance norm."""

from __future__ import annotations

import functools

from numba import types

from fastbn.cpu import gates_sets, launch_sets
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
    B, G, C, S = d
    kernel, place = (launch_sets.forward_kernel if op == "train" else launch_sets.backward_kernel)(d, 4, True)
    run = place[-1] if len(place) > 1 else None
    last = types.boolean, types.Array(types.int64, 1, "C")
    kinds = [INT] * 2 + [types.none if n is None else INT for n in place]
    if op == "train":
        address = address_of(kernel, (*[F32] * 4, F64, F32, *kinds, FLOAT, *last))
    else:
        address = address_of(kernel, (*[F32] * 4, F64, F64, F32, *kinds, INT, *last))
    if address is None or (code := _code(op, len(place) == 1, run is not None)) is None:
        return None
    numbers = address, B * G, C // G * S, C, S, None if len(place) == 1 else G, run
    return code, numbers if op == "train" else (*numbers, *launch_sets.sums(d, True))
