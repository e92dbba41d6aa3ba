"""Loads, stores and conversions of ``simd`` on the GPU: LLVM and PTX for each."""

# mypy: ignore-errors
from __future__ import annotations

import functools

from llvmlite import ir

try:
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic
except ImportError:  # older numba-cuda shares these with Numba
    from numba.core import cgutils
    from numba.core.extending import intrinsic

from fastbn.cuda.driver import ARITHMETIC, types

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
LOAD = "ld.global.nc.L1::no_allocate.L2::256B.v4.b32"
LOAD_LAST = "ld.global.cs.v4.b32"  # not .nc: an in-place kernel writes what it has read
EARLY = " bar.warp.sync 0xffffffff;"  # a NOP, behind which the compiler leaves all other loads
STORE = "st.global.cs.v4.b32"


def _address(context, builder, ty, value, index):
    base = value if isinstance(ty, types.CPointer) else context.make_array(ty)(context, builder, value=value).data
    return builder.gep(base, [index])


def _words(kind, W):
    """Type of a raw vector: four 32-bit words, or one element as an integer of its size."""
    if W > 1:
        return types.UniTuple(types.int32, 4)
    return types.UniTuple({"f32": types.int32, "f64": types.int64}.get(kind, types.int16), 1)


def _load(kind, W, instruction, early=False):
    raw = _words(kind, W)

    @intrinsic
    def load(typingctx, tensor, index):
        def emit(context, builder, sig, args):
            at = _address(context, builder, sig.args[0], *args)
            if W == 1:
                element = {"f32": I32, "f64": I64}.get(kind, I16)
                words = [builder.load(builder.bitcast(at, element.as_pointer()))]
            else:
                result = ir.LiteralStructType([I32] * 4)
                text = instruction + " {$0,$1,$2,$3}, [$4];" + EARLY * early
                asm = ir.InlineAsm(ir.FunctionType(result, [at.type]), text, "=r,=r,=r,=r,l", side_effect=early)
                loaded = builder.call(asm, [at])
                words = [builder.extract_value(loaded, k) for k in range(4)]
            return context.make_tuple(builder, sig.return_type, words)

        return raw(tensor, types.int64), emit

    return load


def _decode_word(builder, kind, word):
    """Two lanes of a half type from one 32-bit word."""
    if kind == "f16":
        low, high = builder.trunc(word, I16), builder.trunc(builder.lshr(word, I32(16)), I16)
        return [builder.fpext(builder.bitcast(h, F16), F32) for h in (low, high)]
    low, high = builder.shl(word, I32(16)), builder.and_(word, I32(0xFFFF0000))
    return [builder.bitcast(h, F32) for h in (low, high)]


def _decode(kind, W):
    vector = types.UniTuple(ARITHMETIC[kind], W)

    @intrinsic
    def decode(typingctx, raw):
        def emit(context, builder, sig, args):
            words = cgutils.unpack_tuple(builder, args[0])
            if kind == "f32":
                lanes = [builder.bitcast(w, F32) for w in words]
            elif kind == "f64" and W == 1:
                lanes = [builder.bitcast(words[0], F64)]
            elif kind == "f64":
                low, high = [builder.zext(w, I64) for w in words[::2]], [builder.zext(w, I64) for w in words[1::2]]
                pairs = zip(low, high, strict=True)
                lanes = [builder.bitcast(builder.or_(a, builder.shl(b, I64(32))), F64) for a, b in pairs]
            elif W == 1:
                lanes = [_decode_word(builder, kind, builder.zext(words[0], I32))[0]]
            else:
                lanes = [lane for w in words for lane in _decode_word(builder, kind, w)]
            return context.make_tuple(builder, sig.return_type, lanes)

        return vector(raw), emit

    return decode


def _encode_pair(builder, kind, low, high):
    asm = ir.InlineAsm(ir.FunctionType(I32, [F32, F32]), f"cvt.rn.{kind}x2.f32 $0, $1, $2;", "=r,f,f")
    return builder.call(asm, [high, low])


def _encode(builder, kind, lanes):
    if kind == "f32":
        return [builder.bitcast(v, I32) for v in lanes]
    if kind == "f64":
        whole = [builder.bitcast(v, I64) for v in lanes]
        return [builder.trunc(builder.lshr(v, I64(s)), I32) for v in whole for s in (0, 32)]
    return [_encode_pair(builder, kind, a, b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]


def _encode_raw(kind, W):
    raw = _words(kind, W)

    @intrinsic
    def encode(typingctx, vector):
        def emit(context, builder, sig, args):
            words = _encode(builder, kind, cgutils.unpack_tuple(builder, args[0]))
            return context.make_tuple(builder, sig.return_type, words)

        return raw(vector), emit

    return encode


def _store_one(builder, kind, at, value):
    if kind in ("f32", "f64"):
        builder.store(value, at)
    else:
        word = _encode_pair(builder, kind, value, ir.Constant(F32, 0.0))
        builder.store(builder.trunc(word, I16), at)


def _store(kind, W):
    @intrinsic
    def store(typingctx, tensor, index, vector):
        def emit(context, builder, sig, args):
            at = _address(context, builder, sig.args[0], *args[:2])
            lanes = cgutils.unpack_tuple(builder, args[2])
            if W == 1:
                _store_one(builder, kind, at, lanes[0])
                return context.get_dummy_value()
            words = _encode(builder, kind, lanes)
            asm = ir.InlineAsm(
                ir.FunctionType(ir.VoidType(), [at.type] + [I32] * 4),
                STORE + " [$0], {$1,$2,$3,$4};", "l,r,r,r,r,~{memory}", side_effect=True,
            )  # fmt: skip
            builder.call(asm, [at, *words])
            return context.get_dummy_value()

        return types.void(tensor, types.int64, vector), emit

    return store


def _splat(kind, W):
    A = ARITHMETIC[kind]

    @intrinsic
    def splat(typingctx, number):
        def emit(context, builder, sig, args):
            return context.make_tuple(builder, sig.return_type, [args[0]] * W)

        return types.UniTuple(A, W)(A), emit

    return splat


def _step(kind, W):
    A = ARITHMETIC[kind]

    @intrinsic
    def step(typingctx, number, other, count):
        def emit(context, builder, sig, args):
            first, second, lanes = args
            each = [builder.select(builder.icmp_signed(">", lanes, I32(k)), first, second) for k in range(W)]
            return context.make_tuple(builder, sig.return_type, each)

        return types.UniTuple(A, W)(A, A, types.int32), emit

    return step


def _gather(kind, W):
    A = ARITHMETIC[kind]

    @intrinsic
    def gather(typingctx, array, index):
        def emit(context, builder, sig, args):
            at = _address(context, builder, sig.args[0], *args)
            lanes = [builder.load(builder.gep(at, [I32(k)])) for k in range(W)]
            return context.make_tuple(builder, sig.return_type, lanes)

        return types.UniTuple(A, W)(array, types.int64), emit

    return gather


def _gather_aligned(kind, W):
    A, number, most = ARITHMETIC[kind], F64 if kind == "f64" else F32, 2 if kind == "f64" else 4

    @intrinsic
    def gather_aligned(typingctx, array, index):
        def emit(context, builder, sig, args):
            at, lanes, size = _address(context, builder, sig.args[0], *args), [], min(W, most)
            vector = ir.VectorType(number, size)
            for k in range(0, W, size):
                value = builder.load(builder.bitcast(builder.gep(at, [I32(k)]), vector.as_pointer()), align=16)
                lanes += [builder.extract_element(value, I32(i)) for i in range(size)]
            return context.make_tuple(builder, sig.return_type, lanes)

        return types.UniTuple(A, W)(array, types.int64), emit

    return gather_aligned


def _scatter(kind, W):
    @intrinsic
    def scatter(typingctx, array, index, vector):
        def emit(context, builder, sig, args):
            at = _address(context, builder, sig.args[0], *args[:2])
            for k, lane in enumerate(cgutils.unpack_tuple(builder, args[2])):
                builder.store(lane, builder.gep(at, [I32(k)]))
            return context.get_dummy_value()

        return types.void(array, types.int64, vector), emit

    return scatter


def _valid(W):
    @intrinsic
    def valid(typingctx, mask, index):
        """One load of W bytes, at a multiple of W."""

        def emit(context, builder, sig, args):
            word = ir.IntType(8 * W)
            at = builder.bitcast(_address(context, builder, sig.args[0], *args), word.as_pointer())
            value = builder.load(at, align=W)
            each = [builder.trunc(builder.lshr(value, word(8 * k)) if k else value, ir.IntType(8)) for k in range(W)]
            return context.make_tuple(builder, sig.return_type, each)

        return types.UniTuple(types.uint8, W)(mask, types.int64), emit

    return valid


FOUR = ir.VectorType(I32, 4)


@intrinsic
def _keep(typingctx, shared, index, raw):
    """One 128-bit store of a raw vector into an int32 array in shared memory."""

    def emit(context, builder, sig, args):
        at = _address(context, builder, sig.args[0], *args[:2])
        value = ir.Constant(FOUR, ir.Undefined)
        for k, word in enumerate(cgutils.unpack_tuple(builder, args[2])):
            value = builder.insert_element(value, word, I32(k))
        builder.store(value, builder.bitcast(at, FOUR.as_pointer()), align=16)
        return context.get_dummy_value()

    return types.void(shared, types.int64, raw), emit


@intrinsic
def _recall(typingctx, shared, index):
    def emit(context, builder, sig, args):
        at = _address(context, builder, sig.args[0], *args)
        value = builder.load(builder.bitcast(at, FOUR.as_pointer()), align=16)
        return context.make_tuple(builder, sig.return_type, [builder.extract_element(value, I32(k)) for k in range(4)])

    return types.UniTuple(types.int32, 4)(shared, types.int64), emit


@functools.cache
def access(kind, W):
    """Return the ``simd.Access`` of a tensor kind and a number of lanes."""
    from fastbn.cuda.simd import Access

    return Access(
        _load(kind, W, LOAD), _load(kind, W, LOAD_LAST), _load(kind, W, LOAD_LAST, True), _decode(kind, W),
        _encode_raw(kind, W), _store(kind, W), _splat(kind, W), _step(kind, W), _gather(kind, W),
        _gather_aligned(kind, W), _scatter(kind, W), _keep, _recall, _valid(W),
    )  # fmt: skip
