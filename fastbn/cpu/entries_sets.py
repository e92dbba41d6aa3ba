"""As ``entries``, for layer, group and instance norm."""

from __future__ import annotations

import functools

from numba import types

from fastbn.cpu import gates_sets, launch_sets
from fastbn.cpu.entries import F64, FLOAT, INT, Entry, address_of, arrays, compiled, kinds
from fastbn.cpu.objects import handle, readable


@functools.cache
def _code(op: str, short: bool, by_run: bool, name: str) -> Entry | None:
    """Compile a gate."""
    gate = getattr(gates_sets, op)
    objects = [*[handle] * (6 if op == "train" else 8), *kinds(name)]
    last = [FLOAT] if op == "train" else [INT] * 2
    place = types.none if short else INT, INT if by_run else types.none
    return compiled(gate, (*objects, *[INT] * 5, *place, *last))


def find(op: str, d: launch_sets.Sizes, name: str) -> tuple[Entry, tuple[int | None, ...]] | None:
    """As ``entries.find``, for layer, group and instance norm of contiguous numbers with weight and bias.

    It is called as ``train(x, y, weight, bias, stats, *kinds, *numbers, eps)`` or ``backward(x, grad, dx, weight,
    dweight, dbias, stats, *kinds, *numbers)``.
    """
    if not launch_sets.is_small(d) or not readable():
        return None
    B, G, C, S = d
    x, wide = arrays(name)
    choose = launch_sets.forward_kernel if op == "train" else launch_sets.backward_kernel
    kernel, place = choose(d, x.dtype.bitwidth // 8, True)
    run = place[-1] if len(place) > 1 else None
    last = types.boolean, types.Array(types.int64, 1, "C")
    places = [INT] * 2 + [types.none if n is None else INT for n in place]
    if op == "train":
        address = address_of(kernel, (x, x, wide, wide, F64, wide, *places, FLOAT, *last))
    else:
        address = address_of(kernel, (x, x, x, wide, F64, F64, wide, *places, INT, *last))
    if address is None or (code := _code(op, len(place) == 1, run is not None, name)) is None:
        return None
    numbers = address, B * G, C // G * S, C, S, None if len(place) == 1 else G, run
    return code, numbers if op == "train" else (*numbers, *launch_sets.sums(d, True))
