"""The vector type of the kernels and how its lanes lie in memory: what ``_memory`` and ``_lanes`` are written with."""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import register_model

I32, I64 = ir.IntType(32), ir.IntType(64)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class Vector(types.Type):
    """A SIMD value: ``lanes`` x float32 or float64. Lives in registers; has no Python counterpart."""

    def __init__(self, bits: int, lanes: int):
        self.bits, self.lanes = bits, lanes
        super().__init__(name=f"vector{lanes}xf{bits}")

    @property
    def ir(self) -> ir.VectorType:
        return ir.VectorType(F32 if self.bits == 32 else F64, self.lanes)

    @property
    def scalar(self) -> types.Float:
        return types.float32 if self.bits == 32 else types.float64


V32, V64 = Vector(32, 16), Vector(64, 8)
V32_OF_HALF = Vector(32, 32)  # two registers: in memory a whole line of half types


class WidePointer(types.CPointer):
    """Address of float32 numbers that are read and written as many at a time as half types are."""

    def __init__(self, dtype: types.Float):
        super().__init__(dtype)
        self.name = f"wide {self.name}"


register_model(WidePointer)(models.PointerModel)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir)


def vector_of(pointer: types.CPointer) -> Vector:
    """Return the vector type that arithmetic on this array uses: what 64 bytes of it hold."""
    if half(pointer) or isinstance(pointer, WidePointer):
        return V32_OF_HALF
    return V64 if pointer.dtype == types.float64 else V32


def half(pointer: types.CPointer) -> str | None:
    return {types.uint16: "f16", types.int16: "bf16"}.get(pointer.dtype)


def constant(element: ir.Type, lanes: int, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def broadcast(builder, vec: ir.VectorType, scalar):
    undef = ir.Constant(vec, ir.Undefined)
    first = builder.insert_element(undef, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undef, constant(I32, vec.count, 0))


def vector_pointer(builder, base, index, vec: ir.VectorType):
    return builder.bitcast(builder.gep(base, [index]), vec.as_pointer())


def memory_vector(pointer: types.CPointer) -> tuple[ir.VectorType, int]:
    """Return the vector as it lies in memory, and the size of one element in bytes."""
    vector = vector_of(pointer)
    if half(pointer):
        return ir.VectorType(ir.IntType(16), vector.lanes), 2
    return vector.ir, pointer.dtype.bitwidth // 8


def decode(builder, pointer: types.CPointer, raw):
    """float16: hardware conversion. bfloat16: the upper half of a float32."""
    kind = half(pointer)
    if kind is None:
        return raw
    vector = vector_of(pointer)
    if kind == "f16":
        return builder.fpext(builder.bitcast(raw, ir.VectorType(F16, vector.lanes)), vector.ir)
    wide = builder.zext(raw, ir.VectorType(I32, vector.lanes))
    return builder.bitcast(builder.shl(wide, constant(I32, vector.lanes, 16)), vector.ir)


def encode(builder, pointer: types.CPointer, value):
    """Round to nearest even; a NaN stays a (quiet) NaN.

    bfloat16 without the select takes 0.92 of the time, but would make zero of a NaN whose bits are all ones.
    """
    kind = half(pointer)
    if kind is None:
        return value
    lanes = vector_of(pointer).lanes
    raw = ir.VectorType(ir.IntType(16), lanes)
    if kind == "f16":
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(F16, lanes)), raw)
    bits = builder.bitcast(value, ir.VectorType(I32, lanes))
    odd = builder.and_(builder.lshr(bits, constant(I32, lanes, 16)), constant(I32, lanes, 1))
    rounded = builder.add(builder.add(bits, odd), constant(I32, lanes, 0x7FFF))
    quiet = builder.or_(bits, constant(I32, lanes, 0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(chosen, constant(I32, lanes, 16)), raw)


def lanes_below(builder, lanes: int, n):
    """Mask of the lanes whose number is < n: the n lowest bits, made as one number and not lane by lane."""
    low, high = ir.Constant(I64, 0), ir.Constant(I64, lanes)
    n = builder.select(builder.icmp_signed("<", n, low), low, n)
    n = builder.select(builder.icmp_signed(">", n, high), high, n)
    one = ir.Constant(I64, 1)
    bits = builder.sub(builder.shl(one, n), one)
    return builder.bitcast(builder.trunc(bits, ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes))


def masked(builder, name: str, vec: ir.VectorType, args: list, result: ir.Type):
    element = {"half": "f16", "float": "f32", "double": "f64"}.get(str(vec.element), str(vec.element))
    kinds = [a.type for a in args]
    fn = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, kinds), f"llvm.masked.{name}.v{vec.count}{element}.p0"
    )
    return builder.call(fn, args)


def nothing(ctx, builder, sig, args):
    return ctx.get_dummy_value()
