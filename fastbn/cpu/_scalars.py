"""Smaller, larger, and scratch memory, each in one instruction or call where a kernel uses it.

Numba's ``min``, ``max`` and ``np.empty`` are functions of its own, compiled again for each kernel's types: a quarter
of a second of the first compilation.
"""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types
from numba.core.extending import intrinsic

from fastbn.cpu._parts import LINE
from fastbn.cpu._vectors import I64


def _choosing(comparison):
    """Intrinsic of two integers that returns the first one where it compares so with the second."""

    def choose(typingctx, a, b):
        def codegen(ctx, builder, sig, args):
            return builder.select(builder.icmp_signed(comparison, *args), *args)

        return types.intp(types.intp, types.intp), codegen

    return intrinsic(choose)


least = _choosing("<")
most = _choosing(">")


def array(ctx, builder, kind, data, size, owner=None):
    """Return Numba's one-dimensional array of so many elements at ``data``, any pointer; nobody owns it by default."""
    from numba.np import arrayobj  # 40 ms that code from the disk need not wait for

    result, step = arrayobj.make_array(kind)(ctx, builder), ir.Constant(I64, kind.dtype.bitwidth // 8)
    data = builder.bitcast(data, result.data.type)
    arrayobj.populate_array(result, data=data, shape=[size], strides=[step], itemsize=step, meminfo=owner)
    return result._getvalue()


@intrinsic
def empty(typingctx, n, kind):
    """Return an uninitialised array of n numbers of kind's dtype that begins on a line; MemoryError if there is none.

    Numba frees an array after its last use, that of its address does not count.
    """
    result = types.Array(kind.dtype, 1, "C")

    def codegen(ctx, builder, sig, args):
        size = builder.mul(args[0], ir.Constant(I64, kind.dtype.bitwidth // 8))
        memory = ctx.nrt.meminfo_alloc_aligned(builder, size, LINE)
        return array(ctx, builder, result, ctx.nrt.meminfo_data(builder, memory), args[0], memory)

    return result(types.intp, kind), codegen
