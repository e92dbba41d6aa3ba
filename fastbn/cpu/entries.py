"""Which gate for which shape of batch norm: its code without Numba's dispatcher, and where its kernel lies."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from fastbn.cpu import finalize, gates, planes, planes_backward, plans, rows
from fastbn.cpu.objects import Kind, handle, readable

Dims = tuple[int, int, int]
Entry = Callable[..., int]
Numbers = tuple[int | bool | None, ...]

INT, FLOAT = types.intp, types.float64
F32, F64 = types.Array(types.float32, 1, "C"), types.Array(types.float64, 1, "C")
# What kernels take tensors and parameters for, by the name of the dtype.
_NUMBERS = {
    "float32": (types.float32, types.float32), "float64": (types.float64, types.float64),
    "float16": (types.uint16, types.float32), "bfloat16": (types.int16, types.float32),
}  # fmt: skip
_BITS = types.Array(types.uint8, 1, "C")
# Each with its kernels, and what follows the place.
_GATES: dict[str, tuple[Any, tuple[Any, Any], tuple[Any, ...]]] = {
    "train": (gates.train, (planes.train, rows.train), (INT, FLOAT, FLOAT)),
    "infer": (gates.infer, (planes.infer, rows.infer), (FLOAT,)),
    "backward": (gates.backward, (planes_backward.backward, rows.backward), (types.boolean,)),
}


def address_of(kernel: Any, args: tuple[Any, ...]) -> int | None:
    """Address of the code that was compiled for arguments of exactly these types; None if there is none yet."""
    found = getattr(kernel, "overloads", {}).get(args)
    return None if found is None else found.library.get_pointer_to_function(found.fndesc.llvm_func_name)


def arrays(name: str) -> tuple[Any, Any]:
    """Return the types of tensors and of parameters."""
    tensor, wide = _NUMBERS[name]
    return types.Array(tensor, 1, "C"), types.Array(wide, 1, "C")


def kinds(name: str) -> list[Any]:
    """Return the types of the two dtypes' objects as gates take them."""
    return [Kind(numbers) for numbers in _NUMBERS[name]]


def _kernel_arguments(op: str, by_rows: bool, relu: Any, fused: bool, signs: bool, name: str) -> tuple[Any, ...]:
    """Return the types of a kernel's arguments."""
    x, wide = arrays(name)
    residual = x if fused else types.none
    place = (types.UniTuple(INT, 3), INT, INT) if by_rows else (INT, INT, INT)
    last = relu, types.boolean, types.Array(types.int64, 1, "C")
    if op == "train":
        y = types.Tuple((x, _BITS)) if signs else x
        return (x, residual, y, *[wide] * 4, F64, *place, FLOAT, FLOAT, *last)
    if op == "infer":
        return (x, residual, x, wide, wide, F64, *place, *last)
    y, early = _BITS if signs else residual, () if by_rows else (types.none,)
    return (x, x, y, x, residual, *early, *[wide] * 4, F64, *place, types.boolean, *last)


def compiled(gate: Any, signature: tuple[Any, ...]) -> Entry | None:
    """Compile a gate for these types; None where Numba's inside has changed: calls then take the usual way."""
    try:
        gate.compile(signature)
        entry: Entry = gate.overloads[signature].entry_point
    except Exception:
        return None
    return entry


@functools.cache
def _code(op: str, by_rows: bool, relu: Any, fused: bool, signs: bool, name: str) -> Entry | None:
    """Compile a gate."""
    gate, _, behind = _GATES[op]
    place = [*([INT, INT] if by_rows else [types.none, types.none]), types.boolean]
    other, bits = handle if fused else types.none, handle if signs else types.none
    if op == "backward":
        objects = [handle, handle, types.none if signs else other, handle, other, *[handle] * 5, bits, handle]
    else:
        objects = [handle, other, *[handle] * 6, *([bits] if op == "train" else []), handle]
    objects += kinds(name)
    addresses = [INT] * (6 if op == "infer" else 5)  # and size, N, C, S
    return compiled(gate, (*objects, *addresses, *place, *behind, relu))


@functools.cache
def _as_stored(name: str) -> np.dtype[Any]:
    """Return the dtype that kernels take tensors for."""
    return np.dtype(str(_NUMBERS[name][0]))


def _plan(op: str, dims: Dims, name: str) -> plans.Plan:
    """Return what ``launch`` finds."""
    dtype = _as_stored(name)
    return plans.plan(dims, plans.lanes_of(dtype), dtype.itemsize if op == "infer" else 0)


def _streamed(op: str, p: plans.Plan, dims: Dims, fused: bool, name: str) -> bool:
    """Tell what ``tuning.streams`` says of these tensors."""
    tensors = 3 + 2 * fused if op == "backward" else 2 + fused
    return _as_stored(name).itemsize * math.prod(dims) * tensors >= plans.streams_from(p, once=op == "infer")


def gated(op: str, dims: Dims, fused: bool, name: str = "float32") -> bool:
    """Tell whether one call of one kernel does this; behind a residual it depends on where that's gradient lies."""
    p = _plan(op, dims, name)
    if p.kind == "planes":
        return not (op == "backward" and fused and _streamed(op, p, dims, fused, name))
    if op == "infer":
        return plans.in_one_call(p, dims[1], alone=True) and not plans.many(p, dims[1])
    return p.kind == "rows"


def writes_signs(dims: Dims, relu: bool | None, fused: bool, name: str = "float32") -> bool:
    """Tell what ``launch.keeps_signs`` says of training on such tensors."""
    return fused and relu is not None and _streamed("train", _plan("train", dims, name), dims, fused, name)


def find(
    op: str, dims: Dims, relu: bool | None, fused: bool = False, signs: bool = False, name: str = "float32"
) -> tuple[Entry, Numbers] | None:
    """Return the gate of a contiguous tensor for one thread, and the numbers that it takes behind the objects.

    None before its kernel is compiled, and where gates cannot work; only for what is ``gated``. ``fused``: with a
    residual; ``signs``: which training writes, or gradients read instead of y; ``name`` of the dtype. It is called as
    ``train(x, residual, y, weight, bias, running_mean, running_var, stats, signs, *kinds, *numbers, moved, eps,
    momentum, relu)``, ``infer(x, residual, y, mean, var, weight, bias, stats, *kinds, *numbers, eps, relu)`` or
    ``backward(x, grad, y, dx, dr, weight, bias, dweight, dbias, stats, signs, *kinds, *numbers, frozen, relu)``;
    ``kinds`` are ndarray, the dtype of tensors and that of parameters.
    """
    if not readable():
        return None
    p = _plan(op, dims, name)
    by_rows = p.kind != "planes"
    activation = types.none if relu is None else types.boolean
    kernel = _GATES[op][1][by_rows]
    addresses = [address_of(kernel, _kernel_arguments(op, by_rows, activation, fused, signs, name))]
    if op == "infer":
        addresses.insert(0, address_of(finalize.given, (*[arrays(name)[1]] * 2, F64, FLOAT)))
    if None in addresses or (code := _code(op, by_rows, activation, fused, signs, name)) is None:
        return None
    place = (p.V, p.per) if by_rows else (None, None)
    return code, (*addresses, math.prod(dims), *dims, *place, _streamed(op, p, dims, fused, name))
