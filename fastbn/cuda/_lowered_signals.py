"""``signals`` on the GPU: PTX with the memory orders that blocks need between each other."""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir

try:
    from numba.cuda.extending import intrinsic
except ImportError:  # older numba-cuda shares this with Numba
    from numba.core.extending import intrinsic

from fastbn.cuda._lowered import F32, F64, I32, I64, _address
from fastbn.cuda.driver import types


def _ordered(builder, at, result, text, constraints):
    """One instruction that nothing that touches memory is moved across."""
    asm = ir.InlineAsm(ir.FunctionType(result, [at.type]), text, constraints + ",~{memory}", side_effect=True)
    return builder.call(asm, [at])


def _put(builder, at, words):
    """Store two words, each at once, for all blocks to see."""
    kinds = ir.FunctionType(ir.VoidType(), [at.type, I64, I64])
    text = "st.relaxed.gpu.global.v2.b64 [$0], {$1,$2};"
    builder.call(ir.InlineAsm(kinds, text, "l,l,l,~{memory}", side_effect=True), [at, *words])


def _get(builder, at):
    """Load two words, each at once, as other blocks have stored them."""
    two = ir.LiteralStructType([I64, I64])
    both = _ordered(builder, at, two, "ld.relaxed.gpu.global.v2.b64 {$0,$1}, [$2];", "=l,=l,l")
    return [builder.extract_value(both, i) for i in (0, 1)]


def _words_at(builder, at, k):
    return builder.gep(builder.bitcast(at, I64.as_pointer()), [I32(k)])


def _tagged(builder, number, value, tag):
    """Words of a number's halves, each with the tag above it."""
    above = builder.shl(builder.zext(tag, I64), I64(32))
    if number == types.float32:
        return [builder.or_(builder.zext(builder.bitcast(value, I32), I64), above)]
    bits = builder.bitcast(value, I64)
    return [builder.or_(half, above) for half in (builder.and_(bits, I64(0xFFFFFFFF)), builder.lshr(bits, I64(32)))]


def _untagged(builder, number, words):
    """A number of its halves' words."""
    if number == types.float32:
        return builder.bitcast(builder.trunc(words[0], I32), F32)
    low = builder.and_(words[0], I64(0xFFFFFFFF))
    return builder.bitcast(builder.or_(low, builder.shl(words[1], I64(32))), F64)


@intrinsic
def say(typingctx, array, index, a, b, tag):
    """Write two numbers and their tag for other blocks, each word at once."""
    number = array.dtype

    def emit(context, builder, sig, args):
        at = _address(context, builder, sig.args[0], *args[:2])
        words = [word for value in args[2:4] for word in _tagged(builder, number, value, args[4])]
        for k in range(0, len(words), 2):
            _put(builder, _words_at(builder, at, k), words[k : k + 2])
        return context.get_dummy_value()

    return types.void(array, types.int64, number, number, types.int32), emit


@intrinsic
def hear(typingctx, array, index, tag):
    """Whether two numbers with this tag are there, and what is there."""
    number = array.dtype
    result = types.Tuple((types.boolean, number, number))

    def emit(context, builder, sig, args):
        at, words = _address(context, builder, sig.args[0], *args[:2]), []
        for k in range(0, 2 if number == types.float32 else 4, 2):
            words += _get(builder, _words_at(builder, at, k))
        there = ir.IntType(1)(1)
        for word in words:
            above = builder.trunc(builder.lshr(word, I64(32)), I32)
            there = builder.and_(there, builder.icmp_unsigned("==", above, args[2]))
        numbers = [_untagged(builder, number, half) for half in (words[: len(words) // 2], words[len(words) // 2 :])]
        return context.make_tuple(builder, sig.return_type, [there, *numbers])

    return result(array, types.int64, types.int32), emit


@intrinsic
def ticket(typingctx, array, index):
    """How often this place, a 32-bit number that was 0, has been asked before: no two who ask hear the same."""

    def emit(context, builder, sig, args):
        at = _address(context, builder, sig.args[0], *args)
        return _ordered(builder, at, I32, "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;", "=r,l")

    return types.int32(array, types.int64), emit
