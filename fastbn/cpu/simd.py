"""Vectors of 64 bytes as Numba values, so that a kernel can say exactly which instruction it means.

What this file must give the kernels:

- one width everywhere, a cache line: 16 lanes of float32 or 8 of float64. LLVM splits them where the CPU is narrower;
- half types for free: a ``uint16`` array is float16, an ``int16`` array bfloat16, decoded to 32 lanes of float32, two
  registers. With 16 lanes half a line was streamed at a time: 5-30x slower wherever two streams are written in turn;
- streaming (non-temporal) stores: a scalar ``!nontemporal`` one becomes ``movntss``, the explicit vector ``vmovntps``;
- a tail of ``n`` lanes by masked loads and stores, so that the last lanes run through the same instructions as the rest
  and are rounded alike;
- explicit fused multiply-add: forward and backward decide the sign of a ReLU's input on the same bits.

Auto-vectorised loops were tried first: they match in the reductions, but LLVM never turns a plain loop into streaming
stores (2x on the write) and picks another rounding for the scalar remainder of every row.
"""

from __future__ import annotations

from fastbn.cpu._lanes import blend, first, fma, rounded, splat, total, totals, where_nonzero, where_positive
from fastbn.cpu._memory import (
    after,
    aligned,
    ask,
    base,
    clear,
    fetch_add,
    get,
    head,
    lanes,
    like,
    load,
    load_n,
    load_or_splat,
    prefetch,
    put,
    split,
    widen_add,
)
from fastbn.cpu._scalars import empty, least, most
from fastbn.cpu._signs import signs
from fastbn.cpu._stores import fence, store, store_n, stream
from fastbn.cpu._vectors import V32, V64, Vector, vector_of

__all__ = [
    "V32",
    "V64",
    "Vector",
    "after",
    "aligned",
    "ask",
    "base",
    "blend",
    "clear",
    "empty",
    "fence",
    "fetch_add",
    "first",
    "fma",
    "get",
    "head",
    "lanes",
    "least",
    "like",
    "load",
    "load_n",
    "load_or_splat",
    "most",
    "prefetch",
    "put",
    "rounded",
    "signs",
    "splat",
    "split",
    "store",
    "store_n",
    "stream",
    "total",
    "totals",
    "vector_of",
    "where_nonzero",
    "where_positive",
    "widen_add",
]
