"""The vector type of the kernels and how its lanes lie in memory: what ``_memory`` and ``_lanes`` are written with."""

from __future__ import annotations

import functools

import llvmlite.ir as ir
from numba import types
from numba.core.datamodel import models
from numba.core.extending import register_model
from numba.core.registry import cpu_target

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
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


@functools.cache
def has(feature: str) -> bool:
    """Tell whether the CPU that kernels are compiled for has a feature, by LLVM's name."""
    features = getattr(cpu_target.target_context.codegen(), "_tm_features", "") or ""
    return f"+{feature}" in features.split(",")


def halves(builder, vector):
    """Split a vector into its first and its second half."""
    size = vector.type.count // 2
    return [
        builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, size), list(range(at, at + size))))
        for at in (0, size)
    ]


def nothing(ctx, builder, sig, args):
    return ctx.get_dummy_value()
