"""Vectors of 64 bytes as Numba values, so that a kernel can say exactly which instruction it means.

What this file must give the kernels:

- one arithmetic width everywhere: 16 lanes of float32 or 8 of float64. LLVM splits them where the CPU is narrower;
- half types for free: a ``uint16`` array is float16, an ``int16`` array bfloat16, decoded to float32 lanes;
- streaming (non-temporal) stores: a scalar ``!nontemporal`` one becomes ``movntss``, the explicit vector ``vmovntps``;
- a tail of ``n`` lanes by masked loads and stores, so that the last lanes run through the same instructions as the rest
  and are rounded alike;
- explicit fused multiply-add: forward and backward decide the sign of a ReLU's input on the same bits.

Auto-vectorised loops were tried first: they match in the reductions, but LLVM never turns a plain loop into streaming
stores (2x on the write) and picks another rounding for the scalar remainder of every row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator, no-any-return"
from __future__ import annotations

import operator

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import intrinsic, lower_builtin, register_model
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from fastbn.cpu._jit import part

I32, I64 = ir.IntType(32), ir.IntType(64)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class Vector(types.Type):
    """A SIMD value: ``lanes`` x float32 or float64. Lives in registers; has no Python counterpart."""

    def __init__(self, bits: int):
        self.bits, self.lanes = bits, 512 // bits
        super().__init__(name=f"vector{self.lanes}xf{bits}")

    @property
    def ir(self) -> ir.VectorType:
        return ir.VectorType(F32 if self.bits == 32 else F64, self.lanes)

    @property
    def scalar(self) -> types.Float:
        return types.float32 if self.bits == 32 else types.float64


V32, V64 = Vector(32), Vector(64)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir)


def vector_of(pointer: types.CPointer) -> Vector:
    """Return the vector type that arithmetic on this array uses."""
    return V64 if pointer.dtype == types.float64 else V32


def _half(pointer: types.CPointer) -> str | None:
    return {types.uint16: "f16", types.int16: "bf16"}.get(pointer.dtype)


def _const(element: ir.Type, lanes: int, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _splat(builder, vec: ir.VectorType, scalar):
    undef = ir.Constant(vec, ir.Undefined)
    first = builder.insert_element(undef, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undef, _const(I32, vec.count, 0))


def _pointer(builder, base, index, vec: ir.VectorType):
    return builder.bitcast(builder.gep(base, [index]), vec.as_pointer())


def _memory_vector(pointer: types.CPointer) -> tuple[ir.VectorType, int]:
    """Return the vector as it lies in memory, and the size of one element in bytes."""
    lanes = vector_of(pointer).lanes
    if _half(pointer):
        return ir.VectorType(ir.IntType(16), lanes), 2
    return vector_of(pointer).ir, pointer.dtype.bitwidth // 8


def _decode(builder, pointer: types.CPointer, raw):
    """float16: hardware conversion. bfloat16: the upper half of a float32."""
    kind = _half(pointer)
    if kind is None:
        return raw
    lanes = V32.lanes
    if kind == "f16":
        return builder.fpext(builder.bitcast(raw, ir.VectorType(F16, lanes)), V32.ir)
    wide = builder.zext(raw, ir.VectorType(I32, lanes))
    return builder.bitcast(builder.shl(wide, _const(I32, lanes, 16)), V32.ir)


def _encode(builder, pointer: types.CPointer, value):
    """Round to nearest even; a NaN stays a (quiet) NaN."""
    kind = _half(pointer)
    if kind is None:
        return value
    lanes = V32.lanes
    raw = ir.VectorType(ir.IntType(16), lanes)
    if kind == "f16":
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(F16, lanes)), raw)
    bits = builder.bitcast(value, ir.VectorType(I32, lanes))
    odd = builder.and_(builder.lshr(bits, _const(I32, lanes, 16)), _const(I32, lanes, 1))
    rounded = builder.add(builder.add(bits, odd), _const(I32, lanes, 0x7FFF))
    quiet = builder.or_(bits, _const(I32, lanes, 0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, _const(I32, lanes, 16)), raw)


def _lanes_below(builder, lanes: int, n):
    """Mask of the lanes whose number is < n."""
    number = ir.Constant(ir.VectorType(I64, lanes), list(range(lanes)))
    return builder.icmp_signed("<", number, _splat(builder, ir.VectorType(I64, lanes), n))


def _masked(builder, name: str, vec: ir.VectorType, args: list, result: ir.Type):
    element = {"half": "f16", "float": "f32", "double": "f64"}.get(str(vec.element), str(vec.element))
    kinds = [a.type for a in args]
    fn = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, kinds), f"llvm.masked.{name}.v{vec.count}{element}.p0"
    )
    return builder.call(fn, args)


def _nothing(ctx, builder, sig, args):
    return ctx.get_dummy_value()


@intrinsic
def base(typingctx, array):
    """Address of a contiguous array's first element, None of None; the caller keeps the array alive."""
    if isinstance(array, types.NoneType):
        return types.none(array), _nothing

    def codegen(ctx, builder, sig, args):
        return ctx.make_array(sig.args[0])(ctx, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


# -- memory ------------------------------------------------------------------------------------------------------


@intrinsic
def load(typingctx, x, i):
    """x[i:i+W], None of None; no alignment is asked for."""
    if isinstance(x, types.NoneType):
        return types.none(x, types.intp), _nothing

    def codegen(ctx, builder, sig, args):
        vec, size = _memory_vector(sig.args[0])
        raw = builder.load(_pointer(builder, args[0], args[1], vec))
        raw.align = size
        return _decode(builder, sig.args[0], raw)

    return vector_of(x)(x, types.intp), codegen


@intrinsic
def load_n(typingctx, x, i, n):
    """The first n lanes of x[i:i+W], zero behind them, None of None; reads nothing past x[i+n-1]."""
    if isinstance(x, types.NoneType):
        return types.none(x, types.intp, types.intp), _nothing

    def codegen(ctx, builder, sig, args):
        vec, size = _memory_vector(sig.args[0])
        ptr = _pointer(builder, args[0], args[1], vec)
        mask = _lanes_below(builder, vec.count, args[2])
        zero = ir.Constant(vec, None)
        raw = _masked(builder, "load", vec, [ptr, ir.Constant(I32, size), mask, zero], vec)
        return _decode(builder, sig.args[0], raw)

    return vector_of(x)(x, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, y, i, v):
    """y[i:i+W] = v, rounded to y's dtype; nothing into None."""
    if isinstance(y, types.NoneType):
        return types.void(y, types.intp, v), _nothing

    def codegen(ctx, builder, sig, args):
        vec, size = _memory_vector(sig.args[0])
        raw = _encode(builder, sig.args[0], args[2])
        builder.store(raw, _pointer(builder, args[0], args[1], vec)).align = size
        return ctx.get_dummy_value()

    return types.void(y, types.intp, v), codegen


@intrinsic
def store_n(typingctx, y, i, v, n):
    """Write the first n lanes of v to y[i:i+n]; nothing into None."""
    if isinstance(y, types.NoneType):
        return types.void(y, types.intp, v, types.intp), _nothing

    def codegen(ctx, builder, sig, args):
        vec, size = _memory_vector(sig.args[0])
        raw = _encode(builder, sig.args[0], args[2])
        ptr = _pointer(builder, args[0], args[1], vec)
        mask = _lanes_below(builder, vec.count, args[3])
        _masked(builder, "store", vec, [raw, ptr, ir.Constant(I32, size), mask], ir.VoidType())
        return ctx.get_dummy_value()

    return types.void(y, types.intp, v, types.intp), codegen


@intrinsic
def stream(typingctx, y, i, v):
    """y[i:i+W] = v past the caches; y + i must be aligned to the vector (see ``head``). End with ``fence``."""
    if isinstance(y, types.NoneType):
        return types.void(y, types.intp, v), _nothing

    def codegen(ctx, builder, sig, args):
        vec, size = _memory_vector(sig.args[0])
        raw = _encode(builder, sig.args[0], args[2])
        op = builder.store(raw, _pointer(builder, args[0], args[1], vec))
        op.align = size * vec.count
        op.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
        return ctx.get_dummy_value()

    return types.void(y, types.intp, v), codegen


@intrinsic
def fence(typingctx):
    """Make streamed data visible to other threads."""

    def codegen(ctx, builder, sig, args):
        builder.fence("seq_cst")
        return ctx.get_dummy_value()

    return types.void(), codegen


@intrinsic
def head(typingctx, y, i):
    """Return how many elements lie between y + i and the next address that ``stream`` may write to; 0 for None."""
    if isinstance(y, types.NoneType):
        return types.intp(y, types.intp), lambda ctx, builder, sig, args: ir.Constant(I64, 0)

    def codegen(ctx, builder, sig, args):
        vec, size = _memory_vector(sig.args[0])
        address = builder.ptrtoint(_pointer(builder, args[0], args[1], vec), I64)
        gap = builder.and_(builder.neg(address), ir.Constant(I64, size * vec.count - 1))
        return builder.lshr(gap, ir.Constant(I64, size.bit_length() - 1))

    return types.intp(y, types.intp), codegen


@intrinsic
def get(typingctx, x, i):
    """x[i] as float64, half types decoded."""

    def codegen(ctx, builder, sig, args):
        raw = builder.load(builder.gep(args[0], [args[1]]))
        kind = _half(sig.args[0])
        if kind == "f16":
            raw = builder.bitcast(raw, F16)
        elif kind == "bf16":
            raw = builder.bitcast(builder.shl(builder.zext(raw, I32), ir.Constant(I32, 16)), F32)
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


# -- arithmetic --------------------------------------------------------------------------------------------------


@intrinsic
def splat(typingctx, x, scalar):
    """Fill the vector that fits array x with one number, rounded to its lanes."""
    vector = vector_of(x)

    def codegen(ctx, builder, sig, args):
        value = ctx.cast(builder, args[1], sig.args[1], vector.scalar)
        return _splat(builder, vector.ir, value)

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
        mask = _lanes_below(builder, sig.args[0].lanes, args[1])
        return builder.select(mask, args[0], ir.Constant(args[0].type, None))

    return v(v, types.intp), codegen


@intrinsic
def blend(typingctx, n, a, b):
    """The first n lanes of a, then those of b."""

    def codegen(ctx, builder, sig, args):
        return builder.select(_lanes_below(builder, sig.args[1].lanes, args[0]), args[1], args[2])

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
        ptr = _pointer(builder, args[0], args[1], vec)
        old = builder.load(ptr)
        old.align = 8
        value = builder.fpext(args[2], vec) if sig.args[2].bits == 32 else args[2]
        builder.store(builder.fadd(old, value), ptr).align = 8
        return ctx.get_dummy_value()

    return types.void(acc, types.intp, v), codegen


@intrinsic
def prefetch(typingctx, x, i):
    """Ask for the line of x[i], which may lie behind the array; nothing for None."""
    if isinstance(x, types.NoneType):
        return types.void(x, types.intp), _nothing

    def codegen(ctx, builder, sig, args):
        byte = builder.bitcast(builder.gep(args[0], [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [byte.type, I32, I32, I32])
        fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fn, [byte, ir.Constant(I32, 0), ir.Constant(I32, 3), ir.Constant(I32, 1)])
        return ctx.get_dummy_value()

    return types.void(x, types.intp), codegen


@intrinsic
def load_or_splat(typingctx, x, w, i):
    """w[i:i+W] of an array w, a number w in every lane of x's vectors, None of None."""
    if isinstance(w, types.CPointer):

        def codegen(ctx, builder, sig, args):
            vec, size = _memory_vector(sig.args[1])
            raw = builder.load(_pointer(builder, args[1], args[2], vec))
            raw.align = size
            return _decode(builder, sig.args[1], raw)

        return vector_of(w)(x, w, types.intp), codegen
    if isinstance(w, types.NoneType):
        return types.none(x, w, types.intp), _nothing
    vector = vector_of(x)

    def spread(ctx, builder, sig, args):
        return _splat(builder, vector.ir, ctx.cast(builder, args[1], sig.args[1], vector.scalar))

    return vector(x, w, types.intp), spread
