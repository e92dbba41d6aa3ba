"""Which gate for which shape: its code without Numba's dispatcher before it, and where its kernel lies in memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from numba import types

from fastbn.cpu import (
    finalize,
    gates,
    gates_sets,
    launch,
    launch_sets,
    planes,
    planes_backward,
    rows,
    sets,
    sets_backward,
    sets_short,
)
from fastbn.cpu.objects import handle, readable

Dims = tuple[int, int, int]
Entry = Callable[..., int]
Numbers = tuple[int | bool | None, ...]

_INT, _FLOAT = types.intp, types.float64
_F32, _F64 = types.Array(types.float32, 1, "C"), types.Array(types.float64, 1, "C")
_BITS = types.Array(types.uint8, 1, "C")
# Each with its kernels, and what follows the place.
_GATES: dict[str, tuple[Any, tuple[Any, Any], tuple[Any, ...]]] = {
    "train": (gates.train, (planes.train, rows.train), (_INT, _FLOAT, _FLOAT)),
    "infer": (gates.infer, (planes.infer, rows.infer), (_FLOAT,)),
    "backward": (gates.backward, (planes_backward.backward, rows.backward), (types.boolean,)),
}


def _address(kernel: Any, args: tuple[Any, ...]) -> int | None:
    """Address of the code that was compiled for arguments of exactly these types; None if there is none yet."""
    found = getattr(kernel, "overloads", {}).get(args)
    return None if found is None else found.library.get_pointer_to_function(found.fndesc.llvm_func_name)


def _kernel_arguments(op: str, by_rows: bool, relu: Any, fused: bool, signs: bool) -> tuple[Any, ...]:
    """Return the types of a kernel's arguments."""
    residual = _F32 if fused else types.none
    place = (types.UniTuple(_INT, 3), _INT, _INT) if by_rows else (_INT, _INT, _INT)
    last = relu, types.boolean, types.Array(types.int64, 1, "C")
    if op == "train":
        y = types.Tuple((_F32, _BITS)) if signs else _F32
        return (_F32, residual, y, *[_F32] * 4, _F64, *place, _FLOAT, _FLOAT, *last)
    if op == "infer":
        return (_F32, residual, *[_F32] * 3, _F64, *place, *last)
    y, early = _BITS if signs else residual, () if by_rows else (types.none,)
    return (_F32, _F32, y, _F32, residual, *early, *[_F32] * 4, _F64, *place, types.boolean, *last)


def _compiled(gate: Any, signature: tuple[Any, ...]) -> Entry | None:
    """Compile a gate for these types; None where Numba's inside has changed: calls then take the usual way."""
    try:
        gate.compile(signature)
        entry: Entry = gate.overloads[signature].entry_point
    except Exception:
        return None
    return entry


@functools.cache
def _code(op: str, by_rows: bool, relu: Any, fused: bool, signs: bool) -> Entry | None:
    """Compile a gate."""
    gate, _, behind = _GATES[op]
    place = [*([_INT, _INT] if by_rows else [types.none, types.none]), types.boolean]
    other, bits = handle if fused else types.none, handle if signs else types.none
    if op == "backward":
        objects = [handle, handle, types.none if signs else other, handle, other, *[handle] * 5, bits, *[handle] * 2]
    else:
        objects = [handle, other, *[handle] * 6, *([bits] if op == "train" else []), *[handle] * 2]
    addresses = [_INT] * (6 if op == "infer" else 5)  # and size, N, C, S
    return _compiled(gate, (*objects, *addresses, *place, *behind, relu))


def _streamed(op: str, p: launch.Plan, dims: Dims, fused: bool) -> bool:
    """Tell what ``tuning.streams`` says of float32 tensors."""
    tensors = 3 + 2 * fused if op == "backward" else 2 + fused
    return 4 * math.prod(dims) * tensors >= launch.streams_from(p, once=op == "infer")


def gated(op: str, dims: Dims, fused: bool) -> bool:
    """Tell whether one call of one kernel does this; behind a residual it depends on where that's gradient lies."""
    p = launch.plan(dims, once=op == "infer")
    if p.kind == "planes":
        return not (op == "backward" and fused and _streamed(op, p, dims, fused))
    if op == "infer":
        return launch.in_one_call(p, dims[1], alone=True) and not launch.many(p, dims[1])
    return p.kind == "rows"


def writes_signs(dims: Dims, relu: bool | None, fused: bool) -> bool:
    """Tell what ``launch.keeps_signs`` says of training on float32 tensors."""
    return fused and relu is not None and _streamed("train", launch.plan(dims), dims, fused)


def find(
    op: str, dims: Dims, relu: bool | None, fused: bool = False, signs: bool = False
) -> tuple[Entry, Numbers] | None:
    """Return the gate of a contiguous float32 tensor for one thread, and the numbers that it takes behind the objects.

    None before its kernel is compiled, and where gates cannot work; only for what is ``gated``. ``fused``: with a
    residual; ``signs``: which training writes, or gradients read instead of y. It is called as
    ``train(x, residual, y, weight, bias, running_mean, running_var, stats, signs, ndarray, float32, *numbers, moved,
    eps, momentum, relu)``, ``infer(x, residual, y, mean, var, weight, bias, stats, ndarray, float32, *numbers, eps,
    relu)`` or ``backward(x, grad, y, dx, dr, weight, bias, dweight, dbias, stats, signs, ndarray, float32, *numbers,
    frozen, relu)``.
    """
    if not readable():
        return None
    p = launch.plan(dims, once=op == "infer")
    by_rows = p.kind != "planes"
    activation = types.none if relu is None else types.boolean
    kernel = _GATES[op][1][by_rows]
    addresses = [_address(kernel, _kernel_arguments(op, by_rows, activation, fused, signs))]
    if op == "infer":
        addresses.insert(0, _address(finalize.given, (_F32, _F32, _F64, _FLOAT)))
    if None in addresses or (code := _code(op, by_rows, activation, fused, signs)) is None:
        return None
    place = (p.V, p.per) if by_rows else (None, None)
    return code, (*addresses, math.prod(dims), *dims, *place, _streamed(op, p, dims, fused))


@functools.cache
def _set_code(op: str, short: bool, by_run: bool) -> Entry | None:
    """As ``_code``, of the gates in ``gates_sets``."""
    gate = getattr(gates_sets, op)
    objects = [handle] * (7 if op == "train" else 9)
    last = [_FLOAT] if op == "train" else [_INT] * 2
    place = types.none if short else _INT, _INT if by_run else types.none
    return _compiled(gate, (*objects, *[_INT] * 5, *place, *last))


def find_sets(op: str, d: launch_sets.Sizes) -> tuple[Entry, tuple[int | None, ...]] | None:
    """As ``find``, for layer, group and instance norm of contiguous float32 numbers with weight and bias.

    It is called as ``train(x, y, weight, bias, stats, ndarray, float32, *numbers, eps)`` or ``backward(x, grad, dx,
    weight, dweight, dbias, stats, ndarray, float32, *numbers)``.
    """
    if not launch_sets.is_small(d) or not readable():
        return None
    count, L, run = launch_sets.shape(d, affine=True)
    short = run is None and launch_sets.is_short(d, 4)
    place = [_INT] * 3 if short else [_INT] * 4 + [types.none if run is None else _INT]
    last = types.boolean, types.Array(types.int64, 1, "C")
    kernel: Any
    if op == "train":
        kernel = sets_short.train if short else sets.train
        address = _address(kernel, (*[_F32] * 4, _F64, _F32, *place, _FLOAT, *last))
    else:
        kernel = sets_short.backward if short else sets_backward.backward
        address = _address(kernel, (*[_F32] * 4, _F64, _F64, _F32, *place, _INT, *last))
    if address is None or (code := _set_code(op, short, run is not None)) is None:
        return None
    numbers = address, count, L, d[2], d[3], None if short else d[1], run
    return code, numbers if op == "train" else (*numbers, *launch_sets.sums(d, affine=True))
