"""Signs of an output behind a ReLU, a bit an element: what gradients need of it, in a thirty-second of its bytes.

A kernel writes them where its output is not an array but a pair (output, signs), and reads them where it expects an
output and gets bytes. They are two int64, ``phase`` and ``shared``, then a bit for each element, 1 where the output is
positive or NaN: that of element i is number phase + i. The phase is how far into a line the output begins, so a line is
whole bytes, written by the thread that writes the line. Where a line is the end of what one thread writes another may
write the rest of it: if ``shared`` its bits are put into place atomically. That also waits for all that was streamed:
training of (64, 256, 14, 14) takes 1.18 of the time, alone 1.0.
"""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types
from numba.core.datamodel import models
from numba.core.extending import intrinsic, register_model

from fastbn.cpu._halves import decode
from fastbn.cpu._tails import lowest
from fastbn.cpu._vectors import F64, I64, constant, half, memory_vector

HEAD = 16  # bytes in front of the bits; behind them eight more may be read
_ONE = {"f16": 0x3C00, "bf16": 0x3F80}


class _OfNumbers(types.CPointer):
    """A pointer that kernels use like the pointer to ``numbers``."""

    def __init__(self, numbers: types.CPointer):
        super().__init__(numbers.dtype)
        self.numbers = numbers
        self.name = f"{type(self).__name__} of {numbers.name}"

    @property
    def key(self):
        return self.name


class Signs(_OfNumbers):
    """The number of a bit in memory, to be read like the ``numbers``: ones and zeros."""


class Marked(_OfNumbers):
    """The address of ``numbers``, the number of the bit that tells the first one's sign, and ``shared``."""


@register_model(Signs)
class _SignsModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, I64)


@register_model(Marked)
class _MarkedModel(models.StructModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, [("numbers", fe_type.numbers), ("first", types.int64), ("shared", types.int64)])


def _header(builder, data):
    """Return the number of the bit of element 0, and ``shared``; signs that were copied may begin anywhere."""
    head = builder.bitcast(data, I64.as_pointer())
    phase, shared = builder.load(head), builder.load(builder.gep(head, [ir.Constant(I64, 1)]))
    phase.align = shared.align = 1
    behind = builder.add(builder.ptrtoint(data, I64), ir.Constant(I64, HEAD))
    return builder.add(builder.shl(behind, ir.Constant(I64, 3)), phase), shared


@intrinsic
def signs(typingctx, y, x):
    """Return y, or where it points to bytes the signs there, to be read like the numbers at x."""
    if not (isinstance(y, types.CPointer) and y.dtype == types.uint8):
        return y(y, x), lambda ctx, builder, sig, args: args[0]
    return Signs(x)(y, x), lambda ctx, builder, sig, args: _header(builder, args[0])[0]


def marked(ctx, builder, pair, value):
    """Return what ``base`` makes of (output, signs)."""
    output, bits = (ctx.make_array(kind)(ctx, builder, builder.extract_value(value, i)) for i, kind in enumerate(pair))
    made = ir.Constant(ctx.get_value_type(Marked(types.CPointer(pair[0].dtype))), ir.Undefined)
    for i, part in enumerate((output.data, *_header(builder, bits.data))):
        made = builder.insert_value(made, part, i)
    return made


def numbers(builder, pointer: types.CPointer, value):
    """Return the address of the numbers alone."""
    return builder.extract_value(value, 0) if isinstance(pointer, Marked) else value


def _place(builder, at, width: int):
    """Return the address of the bits from number ``at`` on as that of an integer."""
    return builder.inttoptr(builder.lshr(at, ir.Constant(I64, 3)), ir.IntType(width).as_pointer())


def _within(builder, at, below: int, width: int):
    """Return ``at`` modulo a power of two as an integer of so many bits."""
    rest = builder.and_(at, ir.Constant(I64, below - 1))
    return rest if width == 64 else builder.trunc(rest, ir.IntType(width))


def mark(builder, pointer: types.CPointer, value, i, raw, n=None):
    """Write the signs of a vector as it is stored at i, a whole line, or of its first n numbers, a part of one."""
    if not isinstance(pointer, Marked):
        return
    count = raw.type.count
    word = ir.IntType(count)
    numbers_as_integers = builder.bitcast(raw, ir.VectorType(ir.IntType(memory_vector(pointer)[1] * 8), count))
    nonzero = builder.icmp_unsigned("!=", numbers_as_integers, ir.Constant(numbers_as_integers.type, None))
    bits, at = builder.bitcast(nonzero, word), builder.add(builder.extract_value(value, 1), i)
    if n is None:
        builder.store(bits, _place(builder, at, count))
        return
    low, shift = builder.trunc(lowest(builder, count, n), word), _within(builder, at, count, count)
    place = _place(builder, builder.and_(at, ir.Constant(I64, -count)), count)
    others, bits = builder.not_(builder.shl(low, shift)), builder.shl(builder.and_(bits, low), shift)
    shared = builder.icmp_signed("!=", builder.extract_value(value, 2), ir.Constant(I64, 0))
    with builder.if_else(shared, likely=False) as (together, alone):
        with together:
            builder.atomic_rmw("and", place, others, "monotonic")
            builder.atomic_rmw("or", place, bits, "monotonic")
        with alone:
            builder.store(builder.or_(builder.and_(builder.load(place), others), bits), place)


def load_signs(builder, pointer: Signs, first, i):
    """Return the vector from element i on."""
    vec, _ = memory_vector(pointer)
    at, width = builder.add(first, i), max(16, 2 * vec.count)
    word = builder.load(_place(builder, at, width))
    word.align = 1
    bits = builder.trunc(builder.lshr(word, _within(builder, at, 8, width)), ir.IntType(vec.count))
    mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), vec.count))
    one = constant(vec.element, vec.count, _ONE.get(half(pointer), 1.0))
    return decode(builder, pointer, builder.select(mask, one, ir.Constant(vec, None)))


def get_sign(builder, first, i):
    """Return element i as float64."""
    at = builder.add(first, i)
    byte = builder.lshr(builder.load(_place(builder, at, 8)), _within(builder, at, 8, 8))
    return builder.uitofp(builder.trunc(byte, ir.IntType(1)), F64)
