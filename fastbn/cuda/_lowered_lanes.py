"""Arithmetic of ``simd`` on the GPU, lane by lane: LLVM for each operation."""

# mypy: ignore-errors
from __future__ import annotations

from llvmlite import ir

try:
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic
except ImportError:  # older numba-cuda shares these with Numba
    from numba.core import cgutils
    from numba.core.extending import intrinsic

from fastbn.cuda.driver import types


def _lane_types(args):
    """Result type: the vectors' if there is one, else the numbers'."""
    return next((a for a in args if isinstance(a, types.UniTuple)), args[0])


def _per_lane(builder, sig, args, operation):
    W = sig.return_type.count if isinstance(sig.return_type, types.UniTuple) else 0
    if not W:
        return operation(*args)
    columns = [
        cgutils.unpack_tuple(builder, a) if isinstance(ty, types.UniTuple) else [a] * W
        for ty, a in zip(sig.args, args, strict=True)
    ]
    return [operation(*lane) for lane in zip(*columns, strict=True)]


def _emit(operation):
    def emit(context, builder, sig, args):
        result = _per_lane(builder, sig, args, lambda *lane: operation(builder, *lane))
        return context.make_tuple(builder, sig.return_type, result) if isinstance(result, list) else result

    return emit


@intrinsic
def add(typingctx, a, b):
    """A + b."""
    return _lane_types((a, b))(a, b), _emit(lambda builder, x, y: builder.fadd(x, y))


@intrinsic
def sub(typingctx, a, b):
    """A - b."""
    return _lane_types((a, b))(a, b), _emit(lambda builder, x, y: builder.fsub(x, y))


@intrinsic
def mul(typingctx, a, b):
    """A * b."""
    return _lane_types((a, b))(a, b), _emit(lambda builder, x, y: builder.fmul(x, y))


@intrinsic
def fma(typingctx, a, b, c):
    """A * b + c, rounded once."""
    return _lane_types((a, b, c))(a, b, c), _emit(lambda builder, x, y, z: builder.fma(x, y, z))


def _gate(builder, z, u):
    zero = ir.Constant(z.type, 0.0)
    return builder.select(builder.fcmp_ordered("<=", z, zero), ir.Constant(u.type, 0.0), u)


@intrinsic
def gate(typingctx, z, u):
    """0 where z <= 0, else u: NaN passes, as in PyTorch's ReLU."""
    return _lane_types((z, u))(z, u), _emit(_gate)


@intrinsic
def pick(typingctx, mask, a):
    """A where the mask is not 0, else 0; what a holds elsewhere, NaN included, does not matter."""

    def chosen(builder, m, x):
        here = builder.icmp_unsigned("!=", m, ir.Constant(m.type, 0))
        return builder.select(here, x, ir.Constant(x.type, 0.0))

    return a(mask, a), _emit(chosen)


@intrinsic
def join(typingctx, a, b):
    """The lanes of a, then those of b."""

    def emit(context, builder, sig, args):
        lanes = cgutils.unpack_tuple(builder, args[0]) + cgutils.unpack_tuple(builder, args[1])
        return context.make_tuple(builder, sig.return_type, lanes)

    return types.UniTuple(a.dtype, a.count + b.count)(a, b), emit


@intrinsic
def total(typingctx, a):
    """Sum of the lanes, in pairs."""

    def emit(context, builder, sig, args):
        lanes = cgutils.unpack_tuple(builder, args[0])
        while len(lanes) > 1:
            lanes = [builder.fadd(x, y) for x, y in zip(lanes[::2], lanes[1::2], strict=True)]
        return lanes[0]

    return a.dtype(a), emit


@intrinsic
def split_total(typingctx, a, count):
    """Sums of the first ``count`` lanes and of the others."""

    def emit(context, builder, sig, args):
        lanes = cgutils.unpack_tuple(builder, args[0])
        zero, sums = ir.Constant(lanes[0].type, 0.0), []
        inside = [builder.icmp_signed(">", args[1], ir.Constant(args[1].type, k)) for k in range(len(lanes))]
        for first in (True, False):
            own = [builder.select(i, *((v, zero) if first else (zero, v))) for i, v in zip(inside, lanes, strict=True)]
            while len(own) > 1:
                own = [builder.fadd(x, y) for x, y in zip(own[::2], own[1::2], strict=True)]
            sums += own
        return context.make_tuple(builder, sig.return_type, sums)

    return types.UniTuple(a.dtype, 2)(a, types.int32), emit


def _anew(builder, word):
    asm = ir.InlineAsm(ir.FunctionType(word.type, [word.type]), "mov.b32 $0, $1;", "=r,r", side_effect=True)
    return builder.call(asm, [word])


@intrinsic
def anew(typingctx, number):
    """The same int32 or raw vector, but what follows from it is not worked out ahead, where it would take registers."""
    return number(number), _emit(_anew)


def _sqrt(builder, x):
    root = builder.module.declare_intrinsic("llvm.sqrt", [x.type])
    return builder.call(root, [x])


@intrinsic
def sqrt(typingctx, x):
    """Root of x, correctly rounded; NaN for negative x."""
    return x(x), _emit(_sqrt)


def _invsqrt(builder, x):
    return builder.fdiv(ir.Constant(x.type, 1.0), _sqrt(builder, x))


@intrinsic
def invsqrt(typingctx, x):
    """1/sqrt(x), both correctly rounded; inf for 0, NaN for negative x."""
    return x(x), _emit(_invsqrt)


LEAST, SPAN = 0x0D000000, 0x727FFFFF  # bits of 2**-101, and how far above them those of the largest number lie


def _approximate(builder, name, x):
    asm = ir.InlineAsm(ir.FunctionType(x.type, [x.type]), f"{name}.approx.ftz.f32 $0, $1;", "=f,f")
    return builder.call(asm, [x])


def _invsqrt_between(builder, x):
    """``invsqrt`` of a float32 from 2**-101 on, as the compiler does it behind two branches a number."""
    half, one, minus = (ir.Constant(x.type, number) for number in (0.5, 1.0, -1.0))
    near = _approximate(builder, "rsqrt", x)
    root = builder.fmul(x, near)
    root = builder.fma(builder.fma(builder.fmul(root, minus), root, x), builder.fmul(near, half), root)
    near = _approximate(builder, "rcp", root)
    return builder.fma(near, builder.fma(builder.fmul(near, minus), root, one), near)


@intrinsic
def invsqrts(typingctx, x):
    """``invsqrt`` of each lane, bit by bit; float32 with one branch for all."""

    def emit(context, builder, sig, args):
        lanes = cgutils.unpack_tuple(builder, args[0])
        if lanes[0].type != ir.FloatType():
            return context.make_tuple(builder, sig.return_type, [_invsqrt(builder, v) for v in lanes])
        word, usual = ir.IntType(32), None
        for v in lanes:
            above = builder.sub(builder.bitcast(v, word), word(LEAST))
            here = builder.icmp_unsigned("<=", above, word(SPAN))
            usual = here if usual is None else builder.and_(usual, here)
        with builder.if_else(usual) as (then, otherwise):
            with then:
                quick, end = [_invsqrt_between(builder, v) for v in lanes], builder.block
            with otherwise:
                slow, other_end = [_invsqrt(builder, v) for v in lanes], builder.block
        found = []
        for a, b in zip(quick, slow, strict=True):
            either = builder.phi(a.type)
            either.add_incoming(a, end)
            either.add_incoming(b, other_end)
            found.append(either)
        return context.make_tuple(builder, sig.return_type, found)

    return x(x), emit


@intrinsic
def finite(typingctx, x):
    """Tell whether x is neither infinite nor NaN."""

    def emit(context, builder, sig, args):
        return builder.fcmp_ordered("==", builder.fsub(args[0], args[0]), ir.Constant(args[0].type, 0.0))

    return types.boolean(x), emit
