"""The compiled code of a kernel for float32 without Numba's dispatcher before it: 0.4 us less a call.

The code unpacks its arguments itself but looks at rank and element size only: who calls it answers for the types.
Where Numba's inside has changed there are no entries, and calls take the usual way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from fastbn.cpu import finalize, launch, planes, planes_backward, rows

Entry = Callable[..., Any]
Place = tuple[Any, Any, Any]

_KERNELS = {
    "train": (rows.train, planes.train),
    "infer": (rows.infer, planes.infer),
    "backward": (rows.backward, planes_backward.backward),
}


def compiled(kernel: Any, args: tuple[Any, ...]) -> Entry | None:
    """Return the code that was compiled for arguments of exactly these types; None if there is none yet."""
    found = getattr(kernel, "overloads", {}).get(tuple(map(numba.typeof, args)))
    return getattr(found, "entry_point", None)


@functools.cache
def _samples(op: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments of an operation before and behind its place, but for ``relu``, ``streamed`` and ``claim``."""
    f32, f64 = np.empty(1, np.float32), np.empty(1)
    if op == "train":
        return (f32, None, *[f32] * 5, f64), (1.0, 1.0)
    if op == "infer":
        return (f32, None, *[f32] * 3, f64), ()
    return (f32, f32, None, f32, None, *[f32] * 4, f64), (True,)


def find(op: str, dims: tuple[int, int, int], relu: bool | None) -> tuple[Entry, Place] | None:
    """Return how a small contiguous tensor is worked off: the code, and its arguments in the middle.

    These are (N, C, S), or (dims, columns, channels of a block) for the rows kernels. The code is called as
    ``train(x, None, y, weight, bias, running_mean, running_var, stats, *place, eps, momentum, relu, False, claim)``,
    ``infer(x, None, y, weight, bias, stats, *place, relu, False, claim)`` and
    ``backward(x, grad, None, dx, None, weight, bias, dweight, dbias, stats, *place, frozen, relu, False, claim)``.
    """
    p = launch.plan(dims)
    if p.kind == "swept" or p.parallel:
        return None
    place: Place = (dims, p.V, p.per) if p.kind == "rows" else dims
    before, behind = _samples(op)
    kernel = _KERNELS[op][p.kind == "planes"]
    found = compiled(kernel, (*before, *place, *behind, relu, False, np.empty(2, np.int64)))
    return None if found is None else (found, place)


def given() -> Entry | None:
    """Return the code of ``finalize.given(mean, var, stats, eps)``."""
    f32 = np.empty(1, np.float32)
    return compiled(finalize.given, (f32, f32, np.empty(1), 1.0))
