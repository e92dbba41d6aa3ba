"""Half types: a line of them to two vectors of float32 and back, float16 and bfloat16."""

from __future__ import annotations

import llvmlite.ir as ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.core import cgutils

from fastbn.cpu._vectors import F16, I32, Vector, constant, half, halves, has, vector_of


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


def _round_to_float16(builder, vector: Vector, value):
    """Round by the CPU's instruction, which gives integers: LLVM does not stream vectors of its own half type.

    With those, half of the stores of training were ordinary ones, 1.3x the time.
    """
    raw = ir.VectorType(ir.IntType(16), vector.lanes)
    if not has("avx512f"):
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(F16, vector.lanes)), raw)
    both, part = halves(builder, value), ir.VectorType(ir.IntType(16), 16)
    kind = ir.FunctionType(part, [both[0].type, I32, part, ir.IntType(16)])
    fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.vcvtps2ph.512")
    rest = [ir.Constant(I32, 8), ir.Constant(part, None), ir.Constant(ir.IntType(16), -1)]  # 8: nearest even, silently
    low, high = (builder.call(fn, [v, *rest]) for v in both)
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, 32), list(range(32))))


def _round_by_instruction(builder, vector: Vector, value):
    """Round to bfloat16 where the CPU can (AVX512_BF16), but take its answer only where it is right.

    The instruction makes zero of numbers below 2**-126. They are looked for in both halves and hardly ever found.
    """
    first, second = halves(builder, value)
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
