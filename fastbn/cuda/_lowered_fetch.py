"""``fetch`` on the GPU: PTX's asynchronous copies (sm_80 and newer)."""

# mypy: ignore-errors
from __future__ import annotations

import functools

from llvmlite import ir

try:
    from numba.cuda.extending import intrinsic
except ImportError:  # older numba-cuda shares this with Numba
    from numba.core.extending import intrinsic

from fastbn.cuda._lowered import I8, I32, _address
from fastbn.cuda.driver import types

SHARED = 3  # LLVM's address space


def _asm(builder, text, arguments=(), constraints=""):
    kinds = [a.type for a in arguments]
    memory = "~{memory}" if not constraints else constraints + ",~{memory}"
    builder.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), kinds), text, memory, side_effect=True), arguments)


@intrinsic
def fetch(typingctx, shared, index, tensor, place):
    """Begin to copy the 16 bytes of a tensor at ``place`` to ``index`` of an int32 array in shared memory."""

    def emit(context, builder, sig, args):
        to = _address(context, builder, sig.args[0], *args[:2])
        to = builder.addrspacecast(builder.bitcast(to, I8.as_pointer()), ir.PointerType(I8, SHARED))
        source = _address(context, builder, sig.args[2], *args[2:])
        text = "cp.async.cg.shared.global.L2::256B [$0], [$1], 16;"
        _asm(builder, text, [builder.ptrtoint(to, I32), source], "r,l")
        return context.get_dummy_value()

    return types.void(shared, types.int64, tensor, types.int64), emit


@intrinsic
def close(typingctx):
    """What this thread has begun since the last time is a group."""

    def emit(context, builder, sig, args):
        _asm(builder, "cp.async.commit_group;")
        return context.get_dummy_value()

    return types.void(), emit


@functools.cache
def make_await(groups):
    """Wait until all but the last ``groups`` groups of this thread have arrived; it alone sees them then."""

    @intrinsic
    def arrived(typingctx):
        def emit(context, builder, sig, args):
            _asm(builder, f"cp.async.wait_group {groups};")
            return context.get_dummy_value()

        return types.void(), emit

    return arrived
