"""128-bit memory accesses and the arithmetic on their lanes, so that a kernel can say exactly what it means.

What this file must give the kernels:

- one LDG.128 or STG.128 a vector. Record dtypes, arrays of float32x4 and adjacent scalars do not become one (tried);
  inline PTX on four 32-bit registers does, for every dtype;
- half types for free: eight lanes a vector, converted in registers, arithmetic in float32;
- streaming: what is read once does not push the rest out of L1, what is written does not stay in L2;
- explicit fused multiply-add: forward and backward decide the sign of a ReLU's input on the same bits.

A vector is a tuple of W numbers of the arithmetic type (W = 1 where alignment or shape forbid more); operations take
tuples and numbers alike. "Raw" vectors are what memory holds. In the simulator a vector is a NumPy array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastbn.cuda.driver import SIMULATED


class Access(NamedTuple):
    """How tensors of one kind are read and written, W lanes at a time."""

    load: Any  # (tensor, index) -> raw; for data that nobody writes during the kernel
    load_last: Any  # (tensor, index) -> raw; read for the last time, may be overwritten in place
    load_early: Any  # the same, asked for before all that comes behind; by all threads of a warp
    decode: Any  # raw -> vector
    encode: Any  # vector -> raw, to be kept
    store: Any  # (tensor, index, vector) -> None; past the caches
    splat: Any  # number -> vector
    step: Any  # (number, other, count) -> vector of ``count`` times the number, then the other
    gather: Any  # (arithmetic array, index) -> vector of W consecutive numbers
    gather_aligned: Any  # the same by 128-bit loads
    scatter: Any  # (arithmetic array, index, vector) -> None
    keep: Any  # (shared int32 array, index, raw) -> None
    recall: Any  # (shared int32 array, index) -> raw
    valid: Any  # (mask of bytes, index) -> W of them


if SIMULATED:
    from fastbn.cuda._simulated import (
        access,
        add,
        anew,
        finite,
        fma,
        gate,
        invsqrt,
        invsqrts,
        join,
        mul,
        pick,
        split_total,
        sqrt,
        sub,
        total,
    )  # fmt: skip
else:
    from fastbn.cuda._lowered import access
    from fastbn.cuda._lowered_lanes import (
        add,
        anew,
        finite,
        fma,
        gate,
        invsqrt,
        invsqrts,
        join,
        mul,
        pick,
        split_total,
        sqrt,
        sub,
        total,
    )  # fmt: skip

__all__ = [
    "Access", "access", "add", "anew", "finite", "fma", "gate", "invsqrt", "invsqrts", "join", "mul", "pick",
    "split_total", "sqrt", "sub", "total",
]  # fmt: skip
