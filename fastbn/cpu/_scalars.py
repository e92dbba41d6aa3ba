"""Smaller, larger, and scratch memory, each in one instruction or call where a kernel uses it.

Numba's ``min``, ``max`` and ``np.empty`` are functions of its own, compiled again for each kernel's types: a quarter
of a second of the first compilation.
"""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types
from numba.core.extending import intrinsic
from numba.np import arrayobj

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


@intrinsic
def empty(typingctx, n, kind):
    """Return an uninitialised array of n numbers of kind's dtype that begins on a line; MemoryError if there is none.

    Numba frees an array after its last use, that of its address does not count.
    """
    array = types.Array(kind.dtype, 1, "C")

    def codegen(ctx, builder, sig, args):
        step = ir.Constant(I64, kind.dtype.bitwidth // 8)
        memory = ctx.nrt.meminfo_alloc_aligned(builder, builder.mul(args[0], step), LINE)
        result = arrayobj.make_array(array)(ctx, builder)
        data = builder.bitcast(ctx.nrt.meminfo_data(builder, memory), result.data.type)
        arrayobj.populate_array(result, data=data, shape=[args[0]], strides=[step], itemsize=step, meminfo=memory)
        return result._getvalue()

    return array(types.intp, kind), codegen
