"""Half types: a line of them to two vectors of float32 and back, float16 and bfloat16.

float16 is converted by instructions, AVX-512's, F16C's or those of 64-bit ARM; without them LLVM would call functions
that nobody links, and by integers.
"""

from __future__ import annotations

import functools
import platform

import llvmlite.ir as ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core import cgutils

from fastbn.cpu._vectors import F16, F32, I16, I32, Vector, constant, half, halves, has, vector_of


def decode(builder, pointer: types.CPointer, raw):
    """Half types to float32: float16 see above, bfloat16 is the upper half of a float32."""
    kind = half(pointer)
    if kind is None:
        return raw
    vector = vector_of(pointer)
    if kind == "f16":
        return _from_float16(builder, raw, lambda element: ir.VectorType(element, vector.lanes))
    if vector.split:
        pairs = builder.bitcast(raw, ir.VectorType(I32, vector.lanes // 2))
        even = builder.shl(pairs, constant(I32, vector.lanes // 2, 16))
        odd = builder.and_(pairs, constant(I32, vector.lanes // 2, -0x10000))
        both = ir.Constant(ir.VectorType(I32, vector.lanes), list(range(vector.lanes)))
        return builder.bitcast(builder.shuffle_vector(even, odd, both), vector.ir)
    wide = builder.zext(raw, ir.VectorType(I32, vector.lanes))
    return builder.bitcast(builder.shl(wide, constant(I32, vector.lanes, 16)), vector.ir)


def decode_one(builder, pointer: types.CPointer, raw):
    """As ``decode``, for one element."""
    kind = half(pointer)
    if kind == "f16":
        return _from_float16(builder, raw, lambda element: element)
    return builder.bitcast(builder.shl(builder.zext(raw, I32), ir.Constant(I32, 16)), F32) if kind else raw


@functools.cache
def _has_float16() -> bool:
    """Tell whether the CPU converts float16 itself."""
    return has("f16c") or has("avx512f") or platform.machine().lower() in ("aarch64", "arm64")


def _from_float16(builder, raw, of):
    """Convert integers to float32; ``of(element)``: the type of one or many."""
    if _has_float16():
        return builder.fpext(builder.bitcast(raw, of(F16)), of(F32))
    integer = of(I32)
    bits = builder.zext(raw, integer)
    sign = builder.shl(builder.and_(bits, _each(integer, 0x8000)), _each(integer, 16))
    rest = builder.shl(builder.and_(bits, _each(integer, 0x7FFF)), _each(integer, 13))
    normal = builder.add(rest, _each(integer, 112 << 23))
    endless = builder.add(rest, _each(integer, 224 << 23))  # infinity and NaN
    # 2**-14 and as much: no number below float32's normal ones, which some programs have made zero
    more = builder.bitcast(builder.add(rest, _each(integer, 113 << 23)), of(F32))
    small = builder.bitcast(builder.fsub(more, _each(of(F32), 2.0**-14)), integer)
    large = builder.icmp_unsigned(">=", rest, _each(integer, 0x7C00 << 13))
    result = builder.select(builder.icmp_unsigned("<", rest, _each(integer, 1 << 23)), small, normal)
    return builder.bitcast(builder.or_(builder.select(large, endless, result), sign), of(F32))


def _each(kind: ir.Type, value: float) -> ir.Constant:
    """Return a constant, in every lane if it is of a vector type."""
    return constant(kind.element, kind.count, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


def _float16_by_integers(builder, value, raw: ir.VectorType):
    """Round to nearest even; a NaN is quiet and has no more than its sign."""
    integer = ir.VectorType(I32, raw.count)
    bits = builder.bitcast(value, integer)
    rest = builder.and_(bits, _each(integer, 0x7FFFFFFF))
    sign = builder.lshr(builder.and_(bits, _each(integer, -0x80000000)), _each(integer, 16))
    odd = builder.and_(builder.lshr(rest, _each(integer, 13)), _each(integer, 1))
    normal = builder.add(builder.add(rest, _each(integer, 0xFFF - (112 << 23))), odd)
    # the sum with a number whose last place is a float16's: the CPU rounds
    shifted = builder.fadd(builder.bitcast(rest, value.type), _each(value.type, 0.5))
    small = builder.sub(builder.bitcast(shifted, integer), _each(integer, 126 << 23))
    result = builder.lshr(normal, _each(integer, 13))
    result = builder.select(builder.icmp_unsigned("<", rest, _each(integer, 113 << 23)), small, result)
    nan = builder.icmp_unsigned(">", rest, _each(integer, 255 << 23))
    endless = builder.select(nan, _each(integer, 0x7E00), _each(integer, 0x7C00))
    result = builder.select(builder.icmp_unsigned(">=", rest, _each(integer, 143 << 23)), endless, result)
    return builder.trunc(builder.or_(result, sign), raw)


class _BFloat(ir.Type):
    """bfloat16, which llvmlite does not have: as the type of an instruction's result only."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _round_to_float16(builder, vector: Vector, value):
    """Round by the CPU's instruction, which gives integers: LLVM does not stream vectors of its own half type.

    With those, half of the stores of training were ordinary ones, 1.3x the time.
    """
    raw = ir.VectorType(I16, vector.lanes)
    if not _has_float16():
        return _float16_by_integers(builder, value, raw)
    if not has("avx512f"):
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(F16, vector.lanes)), raw)
    both, part = halves(builder, value), ir.VectorType(I16, 16)
    kind = ir.FunctionType(part, [both[0].type, I32, part, I16])
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.vcvtps2ph.512")
    rest = [ir.Constant(I32, 8), ir.Constant(part, None), ir.Constant(I16, -1)]  # 8: nearest even, silently
    low, high = (builder.call(fn, [v, *rest]) for v in both)
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 32), list(range(32))))


def _round_by_instruction(builder, vector: Vector, value):
    """Round to bfloat16 where the CPU can (AVX512_BF16), but take its answer only where it is right.

    The instruction makes zero of numbers below 2**-126. They are looked for in both halves and hardly ever found.
    """
    first, second = halves(builder, value)
    number = _BFloat() if llvm_version_info[0] > 15 else I16  # what the intrinsic returns
    kind = ir.FunctionType(ir.VectorType(number, 32), [first.type] * 2)
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
    found = builder.bitcast(builder.call(fn, [second, first]), ir.VectorType(I16, 32))
    if vector.split:
        order = [i // 2 + 16 * (i % 2) for i in range(32)]
        found = builder.shuffle_vector(found, found, ir.Constant(ir.VectorType(I32, 32), order))
    kind = ir.FunctionType(ir.VectorType(ir.IntType(1), 16), [first.type, I32])
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.fpclass.ps.512")
    tiny = builder.or_(*(builder.call(fn, [v, ir.Constant(I32, 0x20)]) for v in (first, second)))
    before = builder.block
    with builder.if_then(builder.icmp_unsigned("!=", builder.bitcast(tiny, I16), I16(0)), False):
        exact = _round_by_integers(builder, vector, value)
        inside = builder.block
    result = builder.phi(found.type)
    result.add_incoming(found, before)
    result.add_incoming(exact, inside)
    return result


def _round_by_integers(builder, vector: Vector, value):
    """Round to bfloat16 with integer instructions.

    Without the select it takes 0.92 of the time, but would make zero of a NaN whose bits are all ones. Rejected:
    numbers that end at bfloat16's last one, 0.83-0.89 with AVX2, but a signalling NaN may become infinity.
    """
    lanes = vector.lanes
    raw = ir.VectorType(I16, lanes)
    bits = builder.bitcast(value, ir.VectorType(I32, lanes))
    odd = builder.and_(builder.lshr(bits, constant(I32, lanes, 16)), constant(I32, lanes, 1))
    rounded = builder.add(builder.add(bits, odd), constant(I32, lanes, 0x7FFF))
    quiet = builder.or_(bits, constant(I32, lanes, 0x400000))
    chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    if not vector.split:
        return builder.trunc(builder.lshr(chosen, constant(I32, lanes, 16)), raw)
    first, second = halves(builder, chosen)
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
    return (_round_by_instruction if has("avx512bf16") else _round_by_integers)(builder, vector, value)
