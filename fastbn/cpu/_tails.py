"""The first n lanes of a vector: masks of them, and vectors of which they alone lie in memory."""

from __future__ import annotations

import llvmlite.ir as ir
from numba.core import cgutils

from fastbn.cpu._vectors import I64, Vector


def lowest(builder, bits: int, n):
    """Return an integer whose n lowest bits are set."""
    low, high, one = ir.Constant(I64, 0), ir.Constant(I64, bits), ir.Constant(I64, 1)
    n = builder.select(builder.icmp_signed("<", n, low), low, n)
    n = builder.select(builder.icmp_signed(">", n, high), high, n)
    return builder.sub(builder.shl(one, n), one)


def lanes_below(builder, lanes: int, n):
    """Mask of the elements whose number is < n: the n lowest bits, made as one number and not lane by lane."""
    bits = builder.trunc(lowest(builder, lanes, n), ir.IntType(lanes))
    return builder.bitcast(bits, ir.VectorType(ir.IntType(1), lanes))


def elements_below(builder, vector: Vector, n):
    """``lanes_below`` in the order of the vector's lanes."""
    if not vector.split:
        return lanes_below(builder, vector.lanes, n)
    one, width = ir.Constant(I64, 1), vector.lanes // 2
    even = lowest(builder, width, builder.ashr(builder.add(n, one), one))
    odd = lowest(builder, width, builder.ashr(n, one))
    bits = builder.or_(even, builder.shl(odd, ir.Constant(I64, width)))
    mask = builder.trunc(bits, ir.IntType(vector.lanes))
    return builder.bitcast(mask, ir.VectorType(ir.IntType(1), vector.lanes))


def masked(builder, name: str, vec: ir.VectorType, args: list, result: ir.Type):
    element = {"half": "f16", "float": "f32", "double": "f64"}.get(str(vec.element), str(vec.element))
    kinds = [a.type for a in args]
    fn = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, kinds), f"llvm.masked.{name}.v{vec.count}{element}.p0"
    )
    return builder.call(fn, args)
