"""``signals`` on the GPU: PTX with the memory orders that blocks need between each other."""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir

try:
    from numba.cuda.extending import intrinsic
except ImportError:  # older numba-cuda shares this with Numba
    from numba.core.extending import intrinsic

from fastbn.cuda._lowered import F32, F64, I32, _address
from fastbn.cuda.driver import types


def _ordered(builder, at, result, text, constraints):
    """One instruction that nothing that touches memory is moved across."""
    asm = ir.InlineAsm(ir.FunctionType(result, [at.type]), text, constraints + ",~{memory}", side_effect=True)
    return builder.call(asm, [at])


@intrinsic
def arrive(typingctx, array, index):
    """Add 1 to a counter; what this thread has written before is visible to whoever sees it."""

    def emit(context, builder, sig, args):
        at = _address(context, builder, sig.args[0], *args)
        _ordered(builder, at, ir.VoidType(), "red.release.gpu.global.add.u32 [$0], 1;", "l")
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@intrinsic
def seen(typingctx, array, index):
    """Value of a counter; what was written before it got there is visible from now on."""

    def emit(context, builder, sig, args):
        at = _address(context, builder, sig.args[0], *args)
        return _ordered(builder, at, I32, "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l")

    return types.int32(array, types.int64), emit


@intrinsic
def fresh(typingctx, array, index):
    """One number that another block has written during the kernel: not from L1."""
    number = array.dtype

    def emit(context, builder, sig, args):
        at = _address(context, builder, sig.args[0], *args)
        if number == types.float64:
            return _ordered(builder, at, F64, "ld.relaxed.gpu.global.f64 $0, [$1];", "=d,l")
        return _ordered(builder, at, F32, "ld.relaxed.gpu.global.f32 $0, [$1];", "=f,l")

    return number(array, types.int64), emit
