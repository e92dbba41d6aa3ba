"""``bulk`` on the GPU: PTX's bulk copies and the barrier in shared memory that they report to (sm_90 and newer)."""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir

try:
    from numba.cuda.extending import intrinsic
except ImportError:  # older numba-cuda shares this with Numba
    from numba.core.extending import intrinsic

from fastbn.cuda._lowered import I8, I32, _address
from fastbn.cuda._lowered_fetch import SHARED, _asm
from fastbn.cuda.driver import types

LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
STORE = "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2;"
TRY = "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; selp.u32 $0, 1, 0, p; }"


def _shared(context, builder, ty, *args):
    """Address of an element of an array in shared memory, as 32 bits."""
    at = builder.bitcast(_address(context, builder, ty, *args), I8.as_pointer())
    return builder.ptrtoint(builder.addrspacecast(at, ir.PointerType(I8, SHARED)), I32)


@intrinsic
def begin(typingctx, barrier):
    """Make a barrier ready, by one thread; a barrier of the block must follow."""

    def emit(context, builder, sig, args):
        at = _shared(context, builder, sig.args[0], args[0], ir.Constant(I32, 0))
        _asm(builder, "mbarrier.init.shared::cta.b64 [$0], 1; fence.proxy.async.shared::cta;", [at], "r")
        return context.get_dummy_value()

    return types.void(barrier), emit


@intrinsic
def expect(typingctx, barrier, size):
    """Say, by one thread, how many bytes will arrive this time."""

    def emit(context, builder, sig, args):
        at = _shared(context, builder, sig.args[0], args[0], ir.Constant(I32, 0))
        _asm(builder, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", [at, args[1]], "r,r")
        return context.get_dummy_value()

    return types.void(barrier, types.int32), emit


@intrinsic
def arrived(typingctx, barrier, turn, size):
    """Tell whether all bytes of the turn (counted from 0) have arrived."""

    def emit(context, builder, sig, args):
        at = _shared(context, builder, sig.args[0], args[0], ir.Constant(I32, 0))
        parity = builder.and_(args[1], ir.Constant(I32, 1))
        asm = ir.InlineAsm(ir.FunctionType(I32, [I32, I32]), TRY, "=r,r,r,~{memory}", side_effect=True)
        return builder.trunc(builder.call(asm, [at, parity]), ir.IntType(1))

    return types.boolean(barrier, types.int32, types.int32), emit


@intrinsic
def bring(typingctx, shared, index, tensor, place, size, barrier):
    """Begin to copy ``size`` bytes (a multiple of 16) of a tensor into an int32 array in shared memory."""

    def emit(context, builder, sig, args):
        to = _shared(context, builder, sig.args[0], *args[:2])
        source = _address(context, builder, sig.args[2], *args[2:4])
        at = _shared(context, builder, sig.args[5], args[5], ir.Constant(I32, 0))
        _asm(builder, LOAD, [to, source, args[4], at], "r,l,r,r")
        return context.get_dummy_value()

    return types.void(shared, types.int64, tensor, types.int64, types.int32, barrier), emit


@intrinsic
def send(typingctx, tensor, place, shared, index, size):
    """Begin to copy ``size`` bytes of shared memory into a tensor."""

    def emit(context, builder, sig, args):
        to = _address(context, builder, sig.args[0], *args[:2])
        source = _shared(context, builder, sig.args[2], *args[2:4])
        _asm(builder, STORE, [to, source, args[4]], "l,r,r")
        return context.get_dummy_value()

    return types.void(tensor, types.int64, shared, types.int64, types.int32), emit


def _plain(text, doc):
    def function(typingctx):
        def emit(context, builder, sig, args):
            _asm(builder, text)
            return context.get_dummy_value()

        return types.void(), emit

    function.__doc__ = doc
    return intrinsic(function)


sent = _plain(
    "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;",
    "Wait until what this thread sends has been read: its place may be written again.",
)
show = _plain("fence.proxy.async.shared::cta;", "What this thread has written to shared memory can be sent.")
