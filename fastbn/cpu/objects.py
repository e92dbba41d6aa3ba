"""NumPy arrays as compiled code can look at them itself: by the fields of NumPy's struct.

Numba unpacks an array to rank, element size and strides; whether it is a plain one must be asked in Python first, for
0.15 us an array. Here an argument is the object itself (``Handle``), and what is asked costs nothing. The struct is
part of NumPy's binary interface, the same in 1.x and 2.x; ``readable`` compares it with what Python sees all the same.
"""

from __future__ import annotations

import ctypes
import functools

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.errors import TypingError
from numba.core.extending import NativeValue, intrinsic, register_model, unbox

from fastbn.cpu._jit import part
from fastbn.cpu._scalars import array
from fastbn.cpu._vectors import I32, I64, nothing

# Bytes from the object's address: every object ends its head with its type; then the fields of PyArrayObject_fields.
DATA = object.__basicsize__
TYPE, RANK, SHAPE, DTYPE, FLAGS = DATA - 8, DATA + 8, DATA + 16, DATA + 40, DATA + 48
CARRAY = 0x0001 | 0x0100 | 0x0400  # NPY_ARRAY_CARRAY: C-contiguous, aligned, writeable

BYTES = ir.IntType(8).as_pointer()


class Handle(types.Opaque):
    """Any Python object; the caller of the compiled code keeps it alive."""

    def __init__(self):
        super().__init__("handle")


handle = Handle()
register_model(Handle)(models.OpaqueModel)


class Kind(types.Opaque):
    """A dtype of NumPy's, the object; ``numbers``: what kernels take arrays of it for."""

    def __init__(self, numbers: types.Type) -> None:
        self.numbers = numbers
        super().__init__(f"kind of {numbers}")


register_model(Kind)(models.OpaqueModel)


@unbox(Handle)
@unbox(Kind)
def _unbox(typ, obj, c):
    return NativeValue(obj)


def _as_said(a):
    """Tell whether one array lies in memory as this file says."""

    def field(at, kind=ctypes.c_int64):
        return kind.from_address(id(a) + at).value

    if field(TYPE) != id(np.ndarray) or field(DTYPE) != id(a.dtype) or field(DATA) != a.ctypes.data:
        return False
    if field(RANK, ctypes.c_int32) != a.ndim or field(FLAGS, ctypes.c_int32) & CARRAY != a.flags.num & CARRAY:
        return False
    return tuple((ctypes.c_int64 * a.ndim).from_address(field(SHAPE))) == a.shape


@functools.cache
def readable():
    """Tell whether arrays lie in memory as this file says."""
    whole, gaps, fixed = np.zeros((3, 5, 7), np.float32), np.zeros((4, 6))[:, ::2], np.zeros(9, np.int32)
    fixed.flags.writeable = False
    return ctypes.sizeof(ctypes.c_void_p) == 8 and all(map(_as_said, (whole, gaps, fixed)))


@intrinsic
def address(typingctx, a):
    """Address of an object."""
    return types.intp(a), lambda ctx, builder, sig, args: builder.ptrtoint(args[0], I64)


def _reading(size):
    """Intrinsic of an address that returns the integer there."""

    def read(typingctx, at):
        def codegen(ctx, builder, sig, args):
            return builder.sext(builder.load(builder.inttoptr(args[0], size.as_pointer())), I64)

        return types.intp(types.intp), codegen

    return intrinsic(read)


_word, _half = _reading(I64), _reading(I32)


@part
def data(a):
    """Address of an array's first element."""
    return _word(address(a) + DATA)


@part
def plain(a, kind, dtype, size):
    """Address of the elements of a plain array: a ``kind``, not a subclass, of ``dtype``, size, and CARRAY; else 0."""
    at = address(a)
    if _word(at + TYPE) != address(kind):
        return 0
    if _word(at + DTYPE) != address(dtype) or _half(at + FLAGS) & CARRAY != CARRAY:
        return 0
    shape, found = _word(at + SHAPE), 1
    for i in range(_half(at + RANK)):
        found *= _word(shape + 8 * i)
    return _word(at + DATA) if found == size else 0


@part
def vector(a, kind, dtype, size):
    """Address of the elements of a plain array of rank 1, else 0."""
    at = plain(a, kind, dtype, size)
    return at if at != 0 and _half(address(a) + RANK) == 1 else 0


@part
def same_shape(a, b):
    """Tell whether two arrays have the same shape."""
    rank = _half(address(a) + RANK)
    if _half(address(b) + RANK) != rank:
        return False
    one, other = _word(address(a) + SHAPE), _word(address(b) + SHAPE)
    for i in range(rank):  # noqa: SIM110 -- compiled
        if _word(one + 8 * i) != _word(other + 8 * i):
            return False
    return True


@intrinsic
def float64s(typingctx, at, size):
    """Array of so many numbers at an address."""
    kind = types.Array(types.float64, 1, "C")

    def codegen(ctx, builder, sig, args):
        return array(ctx, builder, kind, builder.inttoptr(args[0], BYTES), args[1])

    return kind(types.intp, types.intp), codegen


@intrinsic
def numbers(typingctx, dtype, at, size):
    """The same of a dtype."""
    kind = types.Array(dtype.numbers, 1, "C")

    def codegen(ctx, builder, sig, args):
        return array(ctx, builder, kind, builder.inttoptr(args[1], BYTES), args[2])

    return kind(dtype, types.intp, types.intp), codegen


@intrinsic
def numbers_of(typingctx, dtype, a, size):
    """The numbers of a plain array of a dtype, None of None: not an optional array, which kernels do not take."""
    if isinstance(a, types.NoneType):
        return types.none(dtype, a, types.intp), nothing
    kind = types.Array(dtype.numbers, 1, "C")

    def codegen(ctx, builder, sig, args):
        field = builder.add(builder.ptrtoint(args[1], I64), ir.Constant(I64, DATA))
        return array(ctx, builder, kind, builder.load(builder.inttoptr(field, BYTES.as_pointer())), args[2])

    return kind(dtype, a, types.intp), codegen


@intrinsic
def nbytes(typingctx, dtype, size):
    """Bytes of so many numbers of a dtype."""
    each = ir.Constant(I64, dtype.numbers.bitwidth // 8)
    return types.intp(dtype, types.intp), lambda ctx, builder, sig, args: builder.mul(args[1], each)


_BITS = types.Array(types.uint8, 1, "C")


def _bits(ctx, builder, signs):
    """Array at the elements of an object, of which kernels take the address alone."""
    field = builder.add(builder.ptrtoint(signs, I64), ir.Constant(I64, DATA))
    return array(ctx, builder, _BITS, builder.load(builder.inttoptr(field, BYTES.as_pointer())), ir.Constant(I64, 0))


@intrinsic
def with_signs(typingctx, y, signs):
    """An output and the array that its signs go to (``_signs``) as kernels take them; y if that is None."""
    if isinstance(signs, types.NoneType):
        return y(y, signs), lambda ctx, builder, sig, args: args[0]
    pair = types.Tuple((y, _BITS))

    def codegen(ctx, builder, sig, args):
        return ctx.make_tuple(builder, pair, [args[0], _bits(ctx, builder, args[1])])

    return pair(y, signs), codegen


@intrinsic
def or_signs(typingctx, y, signs):
    """Signs as kernels read them instead of an output y; y if there are none."""
    if isinstance(signs, types.NoneType):
        return y(y, signs), lambda ctx, builder, sig, args: args[0]
    return _BITS(y, signs), lambda ctx, builder, sig, args: _bits(ctx, builder, args[1])


@intrinsic
def zeros2(typingctx):
    """Array of two int64 zeros on the stack."""
    kind = types.Array(types.int64, 1, "C")

    def codegen(ctx, builder, sig, args):
        memory = cgutils.alloca_once(builder, ir.ArrayType(I64, 2), zfill=True)
        return array(ctx, builder, kind, memory, ir.Constant(I64, 2))

    return kind(), codegen


@intrinsic
def call(typingctx, at, *arguments):
    """Call the kernel whose code begins at an address and which takes arguments of exactly these types."""
    if any(isinstance(a, types.Optional) for a in arguments):  # nobody would notice before it crashes
        raise TypingError(f"arguments: expected types that kernels take, got {arguments}")

    def codegen(ctx, builder, sig, args):
        kinds, convention = sig.args[1].types, ctx.call_conv
        code = builder.inttoptr(args[0], convention.get_function_type(types.intp, kinds).as_pointer())
        status, result = convention.call_function(
            builder, code, types.intp, kinds, cgutils.unpack_tuple(builder, args[1])
        )
        with cgutils.if_unlikely(builder, status.is_error):
            convention.return_status_propagate(builder, status)
        return result

    return types.intp(types.intp, types.StarArgTuple(arguments)), codegen
