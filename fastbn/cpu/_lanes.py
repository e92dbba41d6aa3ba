"""Arithmetic on vectors: operators, fused multiply-add, selects, sums of lanes."""

from __future__ import annotations

import operator

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic, lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from fastbn.cpu._tails import elements_below
from fastbn.cpu._vectors import F64, I32, Vector, broadcast, vector_of


@intrinsic
def splat(typingctx, x, scalar):
    """Fill the vector that fits array x with one number, rounded to its lanes."""
    vector = vector_of(x)

    def codegen(ctx, builder, sig, args):
        value = ctx.cast(builder, args[1], sig.args[1], vector.scalar)
        return broadcast(builder, vector.ir, value)

    return vector(x, scalar), codegen


@intrinsic
def rounded(typingctx, x, number):
    """The number as the lanes of x's vectors hold it, given back as float64."""
    narrow = vector_of(x).scalar

    def codegen(ctx, builder, sig, args):
        lane = ctx.cast(builder, args[1], types.float64, narrow)
        return ctx.cast(builder, lane, narrow, types.float64)

    return types.float64(x, types.float64), codegen


def _operator(python_operator, left, right, lower):
    """Give an operator a meaning for two classes of types, the left one being that of the result.

    ``overload`` was the alternative: a function to compile for each operator and pair of types, 0.1 s a kernel.
    """

    class Template(AbstractTemplate):
        def generic(self, args, kws):
            a, b = args if len(args) == 2 else (None, None)
            if isinstance(a, left) and isinstance(b, right) and (a == b or left is not right):
                return signature(a, a, b)
            return None

    infer_global(python_operator)(Template)
    lower_builtin(python_operator, left, right)(lower)


_operator(operator.add, Vector, Vector, lambda ctx, builder, sig, args: builder.fadd(*args))
_operator(operator.sub, Vector, Vector, lambda ctx, builder, sig, args: builder.fsub(*args))
_operator(operator.mul, Vector, Vector, lambda ctx, builder, sig, args: builder.fmul(*args))
_operator(operator.add, types.CPointer, types.Integer, lambda ctx, builder, sig, args: builder.gep(args[0], [args[1]]))


@intrinsic
def fma(typingctx, a, b, c):
    """Return a * b + c with one rounding where the CPU has it (``fmuladd``: a libm call would cost 50x)."""

    def codegen(ctx, builder, sig, args):
        vec = args[0].type
        name = f"llvm.fmuladd.v{vec.count}f{sig.args[0].bits}"
        return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(vec, [vec] * 3), name), args)

    return a(a, b, c), codegen


@intrinsic
def where_positive(typingctx, z, v):
    """Keep v where z > 0 or z is NaN, else 0: ReLU with z = v, its gradient otherwise."""

    def codegen(ctx, builder, sig, args):
        zero = ir.Constant(args[1].type, None)
        return builder.select(builder.fcmp_unordered(">", args[0], ir.Constant(args[0].type, None)), args[1], zero)

    return v(z, v), codegen


@intrinsic
def where_nonzero(typingctx, z, v):
    """Keep v where z is not zero, else 0: a factor of zero then wins over NaN and inf."""

    def codegen(ctx, builder, sig, args):
        zero = ir.Constant(args[1].type, None)
        return builder.select(builder.fcmp_ordered("==", args[0], zero), zero, args[1])

    return v(z, v), codegen


@intrinsic
def first(typingctx, v, n):
    """Zero all lanes of v from number n on."""

    def codegen(ctx, builder, sig, args):
        mask = elements_below(builder, sig.args[0], args[1])
        return builder.select(mask, args[0], ir.Constant(args[0].type, None))

    return v(v, types.intp), codegen


@intrinsic
def blend(typingctx, n, a, b):
    """The first n lanes of a, then those of b."""

    def codegen(ctx, builder, sig, args):
        return builder.select(elements_below(builder, sig.args[1], args[0]), args[1], args[2])

    return a(types.intp, a, b), codegen


@intrinsic
def total(typingctx, v):
    """Sum of the lanes in float64, in one fixed order."""

    def codegen(ctx, builder, sig, args):
        lanes, value = sig.args[0].lanes, args[0]
        if sig.args[0].bits == 32:
            value = builder.fpext(value, ir.VectorType(F64, lanes))
        while lanes > 1:
            half = lanes // 2
            undef = ir.Constant(value.type, ir.Undefined)
            low, high = (
                builder.shuffle_vector(value, undef, ir.Constant(ir.VectorType(I32, half), list(range(at, at + half))))
                for at in (0, half)
            )
            value, lanes = builder.fadd(low, high), half
        return builder.extract_element(value, ir.Constant(I32, 0))

    return types.float64(v), codegen


def _halves_of(builder, u, v, step):
    """Add the two halves of every 2 * step lanes of u and v: those of u's sums come first, then v's, block by block."""
    lanes = u.type.count
    low, high = [], []
    for block in range(0, lanes, 2 * step):
        low += [*range(block, block + step), *range(lanes + block, lanes + block + step)]
        high += [*range(block + step, block + 2 * step), *range(lanes + block + step, lanes + block + 2 * step)]
    return builder.fadd(*(builder.shuffle_vector(u, v, ir.Constant(ir.VectorType(I32, lanes), m)) for m in (low, high)))


@intrinsic
def totals(typingctx, s0, s1, s2, s3, q0, q1, q2, q3):
    """Sums of the lanes of eight vectors in float64, in that order.

    Vectors are halved together: two shuffles for two of them instead of one each, and one conversion for all. All but
    the last additions are in the lanes' type.
    """
    each = s0.lanes // 8

    def codegen(ctx, builder, sig, args):
        s0, s1, s2, s3, q0, q1, q2, q3 = args
        values, step = [s0, q0, s2, q2, s1, q1, s3, q3], sig.args[0].lanes // 2
        while len(values) > 1:
            values = [_halves_of(builder, *values[j : j + 2], step) for j in range(0, len(values), 2)]
            step //= 2
        value = values[0]
        if sig.args[0].bits == 32:
            value = builder.fpext(value, ir.VectorType(F64, 8 * each))
        order = [ir.Constant(ir.VectorType(I32, 8), list(range(o, 8 * each, each))) for o in range(each)]
        parts = [builder.shuffle_vector(value, value, o) for o in order]
        while len(parts) > 1:
            parts = [builder.fadd(*parts[j : j + 2]) for j in range(0, len(parts), 2)]
        numbers = [builder.extract_element(parts[0], ir.Constant(I32, j)) for j in range(8)]
        return ctx.make_tuple(builder, sig.return_type, numbers)

    return types.UniTuple(types.float64, 8)(s0, s1, s2, s3, q0, q1, q2, q3), codegen
