"""Vectors and numbers from memory, numbers to it, hints, atomic counters; vectors to memory are in ``_stores``."""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from fastbn.cpu._halves import decode, decode_one
from fastbn.cpu._jit import part
from fastbn.cpu._signs import Marked, Signs, get_sign, load_signs, marked, numbers
from fastbn.cpu._tails import load_first
from fastbn.cpu._vectors import (
    F64,
    I32,
    I64,
    SplitPointer,
    WidePointer,
    broadcast,
    half,
    memory_vector,
    nothing,
    vector_of,
    vector_pointer,
)


@intrinsic
def base(typingctx, array):
    """Address of a contiguous array's first element, None of None; the caller keeps the array alive.

    Of an output and its signs (``_signs``) an address to write both.
    """
    if isinstance(array, types.NoneType):
        return types.none(array), nothing
    if isinstance(array, types.BaseTuple):
        kind = Marked(types.CPointer(array[0].dtype))
        return kind(array), lambda ctx, builder, sig, args: marked(ctx, builder, sig.args[0], args[0])

    def codegen(ctx, builder, sig, args):
        return ctx.make_array(sig.args[0])(ctx, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def after(typingctx, x, i):
    """Address of x[i:], None of None."""
    if isinstance(x, types.NoneType):
        return types.none(x, types.intp), nothing
    return x(x, types.intp), lambda ctx, builder, sig, args: builder.gep(args[0], [args[1]])


@intrinsic
def like(typingctx, x, p):
    """Address p, to be read and written in vectors as those of x if its numbers are of the lanes' type."""
    wide = vector_of(x) != vector_of(p) and not half(p)
    result = WidePointer(p.dtype, vector_of(x)) if wide else p
    return result(x, p), lambda ctx, builder, sig, args: args[1]


@intrinsic
def split(typingctx, x):
    """Address x; of bfloat16 numbers, to be read in split vectors (order within a vector must not matter)."""
    if isinstance(x, types.NoneType):
        return types.none(x), nothing
    result = x
    if half(x) == "bf16":
        result = Marked(SplitPointer(x.dtype)) if isinstance(x, Marked) else SplitPointer(x.dtype)
    return result(x), lambda ctx, builder, sig, args: args[0]


@intrinsic
def load(typingctx, x, i):
    """x[i:i+W], None of None; no alignment is asked for."""
    if isinstance(x, types.NoneType):
        return types.none(x, types.intp), nothing

    def codegen(ctx, builder, sig, args):
        if isinstance(sig.args[0], Signs):
            return load_signs(builder, sig.args[0], *args)
        vec, size = memory_vector(sig.args[0])
        raw = builder.load(vector_pointer(builder, args[0], args[1], vec))
        raw.align = size
        return decode(builder, sig.args[0], raw)

    return vector_of(x)(x, types.intp), codegen


@intrinsic
def load_n(typingctx, x, i, n):
    """The first n lanes of x[i:i+W], zero behind them, None of None; reads nothing past x[i+n-1]."""
    if isinstance(x, types.NoneType):
        return types.none(x, types.intp, types.intp), nothing

    def codegen(ctx, builder, sig, args):
        if isinstance(sig.args[0], Signs):  # their memory goes on behind the last one
            return load_signs(builder, sig.args[0], *args[:2])
        vec, size = memory_vector(sig.args[0])
        ptr = vector_pointer(builder, args[0], args[1], vec)
        return decode(builder, sig.args[0], load_first(builder, vec, ptr, size, args[2]))

    return vector_of(x)(x, types.intp, types.intp), codegen


@intrinsic
def head(typingctx, y, i):
    """Return how many elements lie between y + i and the next address that ``stream`` may write to; 0 for None."""
    if isinstance(y, types.NoneType):
        return types.intp(y, types.intp), lambda ctx, builder, sig, args: ir.Constant(I64, 0)

    def codegen(ctx, builder, sig, args):
        vec, size = memory_vector(sig.args[0])
        first = numbers(builder, sig.args[0], args[0])
        address = builder.ptrtoint(vector_pointer(builder, first, args[1], vec), I64)
        gap = builder.and_(builder.neg(address), ir.Constant(I64, size * vec.count - 1))
        return builder.lshr(gap, ir.Constant(I64, size.bit_length() - 1))

    return types.intp(y, types.intp), codegen


@intrinsic
def get(typingctx, x, i):
    """x[i] as float64, half types decoded."""

    def codegen(ctx, builder, sig, args):
        if isinstance(sig.args[0], Signs):
            return get_sign(builder, *args)
        raw = decode_one(builder, sig.args[0], builder.load(builder.gep(args[0], [args[1]])))
        return raw if raw.type == F64 else builder.fpext(raw, F64)

    return types.float64(x, types.intp), codegen


@intrinsic
def clear(typingctx, y, n):
    """y[:n] = 0."""

    def codegen(ctx, builder, sig, args):
        size = sig.args[0].dtype.bitwidth // 8
        cgutils.memset(builder, args[0], builder.mul(args[1], ir.Constant(I64, size)), 0)
        return ctx.get_dummy_value()

    return types.void(y, types.intp), codegen


@intrinsic
def fetch_add(typingctx, counter, i, value):
    """Add to counter[i] atomically and return what it held before."""

    def codegen(ctx, builder, sig, args):
        return builder.atomic_rmw("add", builder.gep(args[0], [args[1]]), args[2], "seq_cst")

    return types.int64(counter, types.intp, types.int64), codegen


@intrinsic
def put(typingctx, y, i, value):
    """y[i] = value for float32 and float64."""

    def codegen(ctx, builder, sig, args):
        number = ctx.cast(builder, args[2], sig.args[2], sig.args[0].dtype)
        builder.store(number, builder.gep(args[0], [args[1]]))
        return ctx.get_dummy_value()

    return types.void(y, types.intp, value), codegen


@part
def aligned(array):
    """Address of the first element of a contiguous scratch array that begins a vector; up to W - 1 lie before it.

    Column constants at other addresses cost two cache lines a load: 1.4x on a whole normalisation.
    """
    p = base(array)
    return p + head(p, 0)


@intrinsic
def lanes(typingctx, x):
    """Return W, the number of lanes of the vectors that fit array x, as a constant."""
    count = vector_of(x).lanes

    def codegen(ctx, builder, sig, args):
        return ir.Constant(I64, count)

    return types.intp(x), codegen


@intrinsic
def widen_add(typingctx, acc, i, v):
    """acc[i:i+W] += v for a float64 array acc: how short float32 sums are put away."""

    def codegen(ctx, builder, sig, args):
        n = sig.args[2].lanes
        vec = ir.VectorType(F64, n)
        ptr = vector_pointer(builder, args[0], args[1], vec)
        old = builder.load(ptr)
        old.align = 8
        value = builder.fpext(args[2], vec) if sig.args[2].bits == 32 else args[2]
        builder.store(builder.fadd(old, value), ptr).align = 8
        return ctx.get_dummy_value()

    return types.void(acc, types.intp, v), codegen


def _asking(locality):
    """Intrinsic that asks for the line of x[i], which may lie behind the array; nothing for None."""

    def prefetch(typingctx, x, i):
        if isinstance(x, types.NoneType | Signs):
            return types.void(x, types.intp), nothing

        def codegen(ctx, builder, sig, args):
            byte = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(8).as_pointer())
            kind = ir.FunctionType(ir.VoidType(), [byte.type, I32, I32, I32])
            fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(fn, [byte, ir.Constant(I32, 0), ir.Constant(I32, locality), ir.Constant(I32, 1)])
            return ctx.get_dummy_value()

        return types.void(x, types.intp), codegen

    return intrinsic(prefetch)


prefetch = _asking(3)  # into the first cache
ask = _asking(2)  # into the second


@intrinsic
def load_or_splat(typingctx, x, w, i):
    """w[i:i+W] of an array w of the lanes' type, a number w in every lane of x's vectors, None of None."""
    if isinstance(w, types.NoneType):
        return types.none(x, w, types.intp), nothing
    vector = vector_of(x)
    if isinstance(w, types.CPointer):

        def codegen(ctx, builder, sig, args):
            raw = builder.load(vector_pointer(builder, args[1], args[2], vector.ir))
            raw.align = vector.bits // 8
            return raw

        return vector(x, w, types.intp), codegen

    def spread(ctx, builder, sig, args):
        return broadcast(builder, vector.ir, ctx.cast(builder, args[1], sig.args[1], vector.scalar))

    return vector(x, w, types.intp), spread
