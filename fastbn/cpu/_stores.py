"""Vectors to memory, and with them the signs of what they hold where these are kept: ordinary and streaming stores."""

from __future__ import annotations

import llvmlite.ir as ir
from llvmlite.ir.instructions import StoreInstr
from numba import types
from numba.core.errors import TypingError
from numba.core.extending import intrinsic

from fastbn.cpu._halves import encode
from fastbn.cpu._signs import mark, numbers
from fastbn.cpu._tails import store_first
from fastbn.cpu._vectors import I32, memory_vector, nothing, vector_of, vector_pointer


def _check(y, v):
    """Refuse a vector that is not as long as those of array y."""
    if v != vector_of(y):
        raise TypingError(f"v: expected {vector_of(y).lanes} lanes of float{vector_of(y).bits}, got {v.name}")


def _storing(y, v, more, put):
    """Signature and code of a store by ``put(builder, raw, address, size, *more)``."""
    kinds = (y, types.intp, v, *more)
    if isinstance(y, types.NoneType):
        return types.void(*kinds), nothing
    _check(y, v)

    def codegen(ctx, builder, sig, args):
        kind = sig.args[0]
        vec, size = memory_vector(kind)
        raw = encode(builder, kind, args[2])
        put(builder, raw, vector_pointer(builder, numbers(builder, kind, args[0]), args[1], vec), size, *args[3:])
        mark(builder, kind, args[0], args[1], raw, *args[3:])
        return ctx.get_dummy_value()

    return types.void(*kinds), codegen


@intrinsic
def store(typingctx, y, i, v):
    """y[i:i+W] = v, rounded to y's dtype; nothing into None."""

    def put(builder, raw, address, size):
        builder.store(raw, address).align = size

    return _storing(y, v, (), put)


@intrinsic
def store_n(typingctx, y, i, v, n):
    """Write the first n lanes of v to y[i:i+n]; nothing into None."""
    return _storing(y, v, (types.intp,), store_first)


class StreamInstr(StoreInstr):
    """A volatile non-temporal store: LLVM merged plain ones with the ordinary store of another branch.

    They are then ordinary themselves: one in four of float16 training, all of bfloat16's.
    """

    def descr(self, buf):
        text = []
        super().descr(text)
        buf.append("".join(text).replace("store ", "store volatile ", 1))


def stream_store(builder, value, pointer, align):
    """Store past the caches."""
    op = StreamInstr(builder.block, value, pointer)
    op.align = align
    op.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))
    builder._insert(op)


@intrinsic
def stream(typingctx, y, i, v):
    """y[i:i+W] = v past the caches; y + i must be aligned to the vector (see ``head``). End with ``fence``."""

    def put(builder, raw, address, size):
        stream_store(builder, raw, address, size * raw.type.count)

    return _storing(y, v, (), put)


@intrinsic
def fence(typingctx):
    """Make streamed data visible to other threads."""

    def codegen(ctx, builder, sig, args):
        builder.fence("seq_cst")
        return ctx.get_dummy_value()

    return types.void(), codegen
