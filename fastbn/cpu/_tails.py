"""The first n lanes of a vector: masks of them, and vectors of which they alone lie in memory.

With AVX-512 masks are registers, and loads and stores take them; with AVX2 they do for numbers of four and eight bytes.
For half types there, and for all without AVX (SSE, ARM's NEON), LLVM asks and moves lane by lane: ``_load_whole`` and
``_store_pieces``.
"""

from __future__ import annotations

import llvmlite.ir as ir
from numba.core import cgutils

from fastbn.cpu._parts import LINE
from fastbn.cpu._vectors import I8, I32, I64, Vector, broadcast, halves, has

PAGE = 4096  # bytes that are readable if one of them is; larger pages are several of these


def lowest(builder, bits: int, n):
    """Return an integer whose n lowest bits are set."""
    one = ir.Constant(I64, 1)
    return builder.sub(builder.shl(one, _clamped(builder, n, bits)), one)


def _clamped(builder, n, most: int):
    """Return n, but at least 0 and at most ``most``."""
    low, high = ir.Constant(I64, 0), ir.Constant(I64, most)
    n = builder.select(builder.icmp_signed("<", n, low), low, n)
    return builder.select(builder.icmp_signed(">", n, high), high, n)


def _below(builder, n, numbers: list[int], bits: int):
    """Mask of the ``numbers`` that are < n, made by comparing integers of so many bits."""
    vec = ir.VectorType(ir.IntType(bits), len(numbers))
    limit = broadcast(builder, vec, builder.trunc(_clamped(builder, n, len(numbers)), vec.element))
    return builder.icmp_signed(">", limit, ir.Constant(vec, numbers))


def lanes_below(builder, lanes: int, n):
    """Mask of the elements of a line in memory whose number is < n; for AVX-512 their bits, made as one number."""
    if not has("avx512f"):
        return _below(builder, n, list(range(lanes)), LINE * 8 // lanes)
    bits = builder.trunc(lowest(builder, lanes, n), ir.IntType(lanes))
    return builder.bitcast(bits, ir.VectorType(ir.IntType(1), lanes))


def elements_below(builder, vector: Vector, n):
    """Mask of the lanes of a vector whose elements have a number < n."""
    width = vector.lanes // 2
    if not has("avx512f"):
        order = [*range(0, vector.lanes, 2), *range(1, vector.lanes, 2)] if vector.split else range(vector.lanes)
        return _below(builder, n, list(order), vector.bits)
    if not vector.split:
        return lanes_below(builder, vector.lanes, n)
    one = ir.Constant(I64, 1)
    even = lowest(builder, width, builder.ashr(builder.add(n, one), one))
    odd = lowest(builder, width, builder.ashr(n, one))
    bits = builder.or_(even, builder.shl(odd, ir.Constant(I64, width)))
    mask = builder.trunc(bits, ir.IntType(vector.lanes))
    return builder.bitcast(mask, ir.VectorType(ir.IntType(1), vector.lanes))


def _masked(builder, name: str, vec: ir.VectorType, args: list, result: ir.Type):
    element = {"half": "f16", "float": "f32", "double": "f64"}.get(str(vec.element), str(vec.element))
    kinds = [a.type for a in args]
    fn = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, kinds), f"llvm.masked.{name}.v{vec.count}{element}.p0"
    )
    return builder.call(fn, args)


def _has_masks(size: int) -> bool:
    """Tell whether the CPU loads and stores elements of so many bytes under a mask."""
    return has("avx512bw") if size == 2 else has("avx") or has("avx512f")


def load_first(builder, vec: ir.VectorType, address, size: int, n):
    """Return the first n elements of a vector, zero behind them; float32 beside half types has two lines of them."""
    zero = ir.Constant(vec, None)
    if not _has_masks(size):
        return builder.select(lanes_below(builder, vec.count, n), _load_whole(builder, vec, address, size, n), zero)
    args = [address, ir.Constant(I32, size), lanes_below(builder, vec.count, n), zero]
    return _masked(builder, "load", vec, args, vec)


def _load_whole(builder, vec: ir.VectorType, address, size: int, n):
    """Return a vector of which the first n elements are those at the address: all of it, or a copy at a page's end."""
    place = builder.and_(builder.ptrtoint(address, I64), ir.Constant(I64, PAGE - 1))
    inside = builder.icmp_unsigned("<=", place, ir.Constant(I64, PAGE - size * vec.count))
    some = builder.icmp_signed(">", n, ir.Constant(I64, 0))  # else nothing here need be readable
    whole = builder.and_(inside, some)
    line = cgutils.alloca_once(builder, vec)
    line.align = LINE
    with builder.if_then(builder.not_(whole), likely=False):
        length = builder.mul(_clamped(builder, n, vec.count), ir.Constant(I64, size))
        cgutils.raw_memcpy(
            builder, builder.bitcast(line, I8.as_pointer()), builder.bitcast(address, I8.as_pointer()), length, 1
        )
    value = builder.load(builder.select(whole, address, line))
    value.align = size
    return value


def store_first(builder, raw, address, size: int, n):
    """Write the first n elements of a line to an address."""
    if not _has_masks(size):
        _store_pieces(builder, raw, address, size, n)
        return
    args = [raw, address, ir.Constant(I32, size), lanes_below(builder, raw.type.count, n)]
    _masked(builder, "store", raw.type, args, ir.VoidType())


def _store_pieces(builder, raw, address, size: int, n):
    """Store a line, or the half, quarter, ... that add up to its first n elements."""
    width = raw.type.count
    n = _clamped(builder, n, width)
    with builder.if_then(builder.icmp_signed("==", n, ir.Constant(I64, width))):
        builder.store(raw, address).align = size
    address = builder.bitcast(address, raw.type.element.as_pointer())
    while width > 1:
        width //= 2
        low, high = halves(builder, raw)
        there, before = builder.and_(n, ir.Constant(I64, width)), builder.block
        with builder.if_then(builder.icmp_signed("!=", there, ir.Constant(I64, 0))):
            builder.store(low, builder.bitcast(address, low.type.as_pointer())).align = size
            inside = builder.block
        raw, address = builder.phi(low.type), builder.gep(address, [there])
        raw.add_incoming(low, before)
        raw.add_incoming(high, inside)
