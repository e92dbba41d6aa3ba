"""Elements moved as they are, whatever they mean: runs of them, single ones, and whole lines past the caches."""

from __future__ import annotations

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.extending import intrinsic

from fastbn.cpu._jit import part
from fastbn.cpu._memory import ask, head
from fastbn.cpu._parts import LINE
from fastbn.cpu._scalars import least
from fastbn.cpu._stores import stream_store
from fastbn.cpu._vectors import I64, nothing

GAP = 1 << 12  # elements of a gap that is read rather than skipped


def _bytes(builder, pointer, i):
    """Address of element i as one of bytes."""
    return builder.bitcast(builder.gep(pointer, [i]), ir.IntType(8).as_pointer())


def _size(pointer, builder, n):
    """Bytes of n elements."""
    return builder.mul(n, ir.Constant(I64, pointer.dtype.bitwidth // 8))


@intrinsic
def move(typingctx, y, i, x, j, n):
    """y[i:i+n] = x[j:j+n] of elements of one type, in memory of its own."""
    if x.dtype != y.dtype:
        raise TypingError(f"x: expected elements of {y.dtype}, got {x.dtype}")

    def codegen(ctx, builder, sig, args):
        target, source = _bytes(builder, args[0], args[1]), _bytes(builder, args[2], args[3])
        cgutils.raw_memcpy(builder, target, source, _size(sig.args[0], builder, args[4]), 1)
        return ctx.get_dummy_value()

    return types.void(y, types.intp, x, types.intp, types.intp), codegen


@intrinsic
def move_one(typingctx, y, i, x, j):
    """y[i] = x[j] of elements of one type."""

    def codegen(ctx, builder, sig, args):
        builder.store(builder.load(builder.gep(args[2], [args[3]])), builder.gep(args[0], [args[1]]))
        return ctx.get_dummy_value()

    return types.void(y, types.intp, x, types.intp), codegen


@intrinsic
def wipe(typingctx, y, i, n):
    """y[i:i+n] = 0."""

    def codegen(ctx, builder, sig, args):
        cgutils.memset(builder, _bytes(builder, args[0], args[1]), _size(sig.args[0], builder, args[2]), 0)
        return ctx.get_dummy_value()

    return types.void(y, types.intp, types.intp), codegen


def _line(builder, pointer, place, i):
    """Address of the line that begins at element i."""
    return builder.bitcast(
        builder.gep(pointer, [i]), ir.VectorType(I64, LINE // 8).as_pointer()
    ), place.dtype.bitwidth // 8


@intrinsic
def line(typingctx, x):
    """Return how many elements a line holds."""
    count = LINE * 8 // x.dtype.bitwidth
    return types.intp(x), lambda ctx, builder, sig, args: ir.Constant(I64, count)


@intrinsic
def move_line(typingctx, y, i, x, j):
    """Move the line x[j:] to y[i:], wherever both lie."""

    def codegen(ctx, builder, sig, args):
        (target, size), (source, _) = (_line(builder, args[k], sig.args[k], args[k + 1]) for k in (0, 2))
        value = builder.load(source)
        value.align = size
        builder.store(value, target).align = size
        return ctx.get_dummy_value()

    return types.void(y, types.intp, x, types.intp), codegen


@intrinsic
def stream_line(typingctx, y, i, x, j):
    """Move the line x[j:] to y[i:], which must begin one, past the caches. End with ``fence``."""

    def codegen(ctx, builder, sig, args):
        source, size = _line(builder, args[2], sig.args[2], args[3])
        value = builder.load(source)
        value.align = size
        stream_store(builder, value, _line(builder, args[0], sig.args[0], args[1])[0], LINE)
        return ctx.get_dummy_value()

    return types.void(y, types.intp, x, types.intp), codegen


@intrinsic
def stream_zeros(typingctx, y, i):
    """Clear the line y[i:], which must begin one, past the caches. End with ``fence``."""

    def codegen(ctx, builder, sig, args):
        target, _ = _line(builder, args[0], sig.args[0], args[1])
        stream_store(builder, ir.Constant(target.type.pointee, None), target, LINE)
        return ctx.get_dummy_value()

    return types.void(y, types.intp), codegen


@intrinsic
def touch(typingctx, x, i):
    """Read x[i] for nothing, so that the CPU goes on reading ahead; nothing of None."""
    if isinstance(x, types.NoneType):
        return types.none(x, types.intp), nothing

    def codegen(ctx, builder, sig, args):
        place = builder.gep(args[0], [args[1]])
        number = ir.IntType(sig.args[0].dtype.bitwidth)
        builder.load_atomic(builder.bitcast(place, number.as_pointer()), "monotonic", number.width // 8)
        return ctx.get_dummy_value()

    return types.void(x, types.intp), codegen


@part
def pass_over(x, i, n):
    """Read a number of each line of x[i:i+n] for nothing, where n is not too large for that.

    A CPU that reads ahead stops at a gap and starts anew behind it: 768 of 1,024 numbers took 1.24 ms, all 0.66.
    """
    if x is not None and n <= GAP:
        for j in range(i, i + n, line(x)):
            touch(x, j)


@part
def move_run(y, i, x, j, n, ahead):
    """As ``move``; asks for the lines that lie ``ahead`` elements further on in x, which will be wanted next."""
    h = 0
    while h + line(y) <= n:
        ask(x, j + h + ahead)
        move_line(y, i + h, x, j + h)
        h += line(y)
    ask(x, j + h + ahead)
    move(y, i + h, x, j + h, n - h)


@part
def put_run(y, i, x, j, n, streamed):
    """As ``move``; whole lines past the caches if ``streamed``."""
    h = 0
    if streamed:
        h = least(head(y, i), n)
        move(y, i, x, j, h)
        while h + line(y) <= n:
            stream_line(y, i + h, x, j + h)
            h += line(y)
    move(y, i + h, x, j + h, n - h)


@part
def put_zeros(y, i, n, streamed):
    """As ``wipe``; whole lines past the caches if ``streamed``.

    Nothing is written where there is nothing to write: even memset of no bytes fetches the line, 1.5x in all.
    """
    h = 0
    if streamed:
        h = least(head(y, i), n)
        if h > 0:
            wipe(y, i, h)
        while h + line(y) <= n:
            stream_zeros(y, i + h)
            h += line(y)
    if h < n:
        wipe(y, i + h, n - h)
