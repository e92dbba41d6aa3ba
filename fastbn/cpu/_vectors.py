"""The vector type of the kernels and how its lanes lie in memory: what ``_memory`` and ``_lanes`` are written with."""

from __future__ import annotations

import functools

import llvmlite.ir as ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.extending import register_model
from numba.core.registry import cpu_target

I32, I64 = ir.IntType(32), ir.IntType(64)
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()


class Vector(types.Type):
    """A SIMD value: ``lanes`` x float32 or float64. Lives in registers; has no Python counterpart.

    ``split``: the elements at even places come first, then those at odd ones.
    """

    def __init__(self, bits: int, lanes: int, split: bool = False):
        self.bits, self.lanes, self.split = bits, lanes, split
        super().__init__(name=f"vector{lanes}xf{bits}{'split' if split else ''}")

    @property
    def ir(self) -> ir.VectorType:
        return ir.VectorType(F32 if self.bits == 32 else F64, self.lanes)

    @property
    def scalar(self) -> types.Float:
        return types.float32 if self.bits == 32 else types.float64


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir)


V32, V64 = Vector(32, 16), Vector(64, 8)
V32_OF_HALF = Vector(32, 32)  # two registers: in memory a whole line of half types
V32_SPLIT = Vector(32, 32, split=True)


class SplitPointer(types.CPointer):
    """Address of bfloat16 numbers whose vectors are split: a shift and a mask decode them."""

    def __init__(self, dtype: types.Integer):
        super().__init__(dtype)
        self.name = f"split {self.name}"


class WidePointer(types.CPointer):
    """Address of float32 numbers that are read and written as vectors of another array's."""

    def __init__(self, dtype: types.Float, vector: Vector):
        super().__init__(dtype)
        self.vector = vector
        self.name = f"{vector.name} {self.name}"

    @property
    def key(self):
        return super().key, self.vector


for _pointer in (SplitPointer, WidePointer):
    register_model(_pointer)(models.PointerModel)


def vector_of(pointer: types.CPointer) -> Vector:
    """Return the vector type that arithmetic on this array uses: what 64 bytes of it hold."""
    pointer = getattr(pointer, "numbers", pointer)  # see ``_signs``
    if isinstance(pointer, WidePointer):
        return pointer.vector
    if half(pointer):
        return V32_SPLIT if isinstance(pointer, SplitPointer) else V32_OF_HALF
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
    if vector.split:
        pairs = builder.bitcast(raw, ir.VectorType(I32, vector.lanes // 2))
        even = builder.shl(pairs, constant(I32, vector.lanes // 2, 16))
        odd = builder.and_(pairs, constant(I32, vector.lanes // 2, -0x10000))
        both = ir.Constant(ir.VectorType(I32, vector.lanes), list(range(vector.lanes)))
        return builder.bitcast(builder.shuffle_vector(even, odd, both), vector.ir)
    wide = builder.zext(raw, ir.VectorType(I32, vector.lanes))
    return builder.bitcast(builder.shl(wide, constant(I32, vector.lanes, 16)), vector.ir)


class _BFloat(ir.Type):
    """bfloat16, which llvmlite does not have: as the type of an instruction's result only."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


@functools.cache
def _has(feature: str) -> bool:
    """Tell whether the CPU that kernels are compiled for has a feature, by LLVM's name."""
    features = getattr(cpu_target.target_context.codegen(), "_tm_features", "") or ""
    return f"+{feature}" in features.split(",")


def _halves(builder, vector):
    """Split a vector into its first and its second half."""
    size = vector.type.count // 2
    return [
        builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, size), list(range(at, at + size))))
        for at in (0, size)
    ]


def _round_to_float16(builder, vector: Vector, value):
    """Round by the CPU's instruction, which gives integers: LLVM does not stream vectors of its own half type.

    With those, half of the stores of training were ordinary ones, 1.3x the time.
    """
    raw = ir.VectorType(ir.IntType(16), vector.lanes)
    if not _has("avx512f"):
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(F16, vector.lanes)), raw)
    halves, part = _halves(builder, value), ir.VectorType(ir.IntType(16), 16)
    kind = ir.FunctionType(part, [halves[0].type, I32, part, ir.IntType(16)])
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.vcvtps2ph.512")
    rest = [ir.Constant(I32, 8), ir.Constant(part, None), ir.Constant(ir.IntType(16), -1)]  # 8: nearest even, silently
    low, high = (builder.call(fn, [v, *rest]) for v in halves)
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 32), list(range(32))))


def _round_by_instruction(builder, vector: Vector, value):
    """Round to bfloat16 where the CPU can (AVX512_BF16), but take its answer only where it is right.

    The instruction makes zero of numbers below 2**-126. They are looked for in both halves and hardly ever found.
    """
    first, second = _halves(builder, value)
    number = _BFloat() if llvm_version_info[0] > 15 else ir.IntType(16)  # what the intrinsic returns
    kind = ir.FunctionType(ir.VectorType(number, 32), [first.type] * 2)
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    found = builder.bitcast(builder.call(fn, [second, first]), ir.VectorType(ir.IntType(16), 32))
    if vector.split:
        order = [i // 2 + 16 * (i % 2) for i in range(32)]
        found = builder.shuffle_vector(found, found, ir.Constant(ir.VectorType(I32, 32), order))
    kind = ir.FunctionType(ir.VectorType(ir.IntType(1), 16), [first.type, I32])
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.fpclass.ps.512")
    tiny = builder.or_(*(builder.call(fn, [v, ir.Constant(I32, 0x20)]) for v in (first, second)))
    before = builder.block
    with builder.if_then(builder.icmp_unsigned("!=", builder.bitcast(tiny, ir.IntType(16)), ir.IntType(16)(0)), False):
        exact = _round_by_integers(builder, vector, value)
        inside = builder.block
    result = builder.phi(found.type)
    result.add_incoming(found, before)
    result.add_incoming(exact, inside)
    return result


def _round_by_integers(builder, vector: Vector, value):
    """Round to bfloat16 with integer instructions.

    Without the select it takes 0.92 of the time, but would make zero of a NaN whose bits are all ones.
    """
    lanes = vector.lanes
    raw = ir.VectorType(ir.IntType(16), lanes)
    bits = builder.bitcast(value, ir.VectorType(I32, lanes))
    odd = builder.and_(builder.lshr(bits, constant(I32, lanes, 16)), constant(I32, lanes, 1))
    rounded = builder.add(builder.add(bits, odd), constant(I32, lanes, 0x7FFF))
    quiet = builder.or_(bits, constant(I32, lanes, 0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    if not vector.split:
        return builder.trunc(builder.lshr(chosen, constant(I32, lanes, 16)), raw)
    first, second = _halves(builder, chosen)
    low = builder.lshr(first, constant(I32, lanes // 2, 16))
    return builder.bitcast(builder.or_(low, builder.and_(second, constant(I32, lanes // 2, -0x10000))), raw)


def encode(builder, pointer: types.CPointer, value):
    """Round to nearest even; a NaN stays a (quiet) NaN."""
    kind = half(pointer)
    if kind is None:
        return value
    vector = vector_of(pointer)
    if kind == "f16":
        return _round_to_float16(builder, vector, value)
    return (_round_by_instruction if _has("avx512bf16") else _round_by_integers)(builder, vector, value)


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


def nothing(ctx, builder, sig, args):
    return ctx.get_dummy_value()
