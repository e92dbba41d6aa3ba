"""Inference with one vector a thread: the flat tensor, block by block, as a copy goes through it.

Floor: one read and one write a tensor, reached as a copy reaches it: nothing is shared, nobody waits for others. A
thread asks for its vector first, then finds out its channels and asks for their parameters, which come from L1 or L2.
Where a vector lies decides how many channels it has:

- "run": one, where channels-first runs are whole vectors;
- "spread": one or two neighbours, in odd runs: the first ``count`` lanes have the first one;
- "columns": W neighbours, channels last.

Divisions by S and C are multiplications (Granlund & Montgomery 1994, round-up). A thread may have a second vector, as
far behind the first as half of the samples: it has the same channels. The last block comes first: the end of x is what
the kernel before this one has left in L2. Eight vectors a thread and constants once a block, behind a barrier, as in
``planes`` and ``rows``, cost 8 % at 200 MB and up to 80 % at 13 MB.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools
import math
from typing import NamedTuple

from fastbn.cuda import tuning
from fastbn.cuda.arrays import ITEMSIZE
from fastbn.cuda.channel import fold, make_affine, make_parameters
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.plan import LARGEST, Dims, small_enough
from fastbn.cuda.simd import access, add, anew, fma, invsqrts, mul
from fastbn.cuda.sweep import Variant, make_output

int32, int64, uint32, uint64 = types.int32, types.int64, types.uint32, types.uint64


class Cut(NamedTuple):
    """How a shape is worked off."""

    layout: str  # run, spread or columns
    W: int
    depth: int  # vectors of a thread
    blocks: int
    numbers: tuple[int, ...]  # C, S (or what stands for it), their reciprocals, vectors between a thread's two, all


def reciprocal(d: int) -> tuple[int, int]:
    """(multiplier, shift) with n // d = (n * multiplier) >> shift for 0 <= n < 2**31.

    The multiplier has 32 bits, the highest is set; it is returned as an int32 of the same bits.
    """
    shift = 31 + (d - 1).bit_length()
    return -(-(1 << shift) // d) - (1 << 32), shift


def layout_of(dims: Dims, lanes: int, wide: bool) -> str:
    """Return how the channels of vectors lie, "" where this is not for them."""
    _, C, S = dims
    if S == 1 and C % lanes == 0:
        return "columns" if wide else ""
    if S % lanes == 0:
        return "run"
    return "spread" if lanes - 1 <= S else ""


def cut(dims: Dims, kind: str, wide: bool) -> Cut | None:
    """Cut a tensor that begins at a multiple of 16 bytes; ``wide``: so do the parameters. None: not for this kernel."""
    depth = tuning.FLAT_DEPTH
    if dims[2] == 1:
        depth = tuning.FLAT_HALVES if ITEMSIZE[kind] == 2 else tuning.FLAT_COLUMNS
    return _cut(dims, kind, wide, depth, tuning.THREADS)


@functools.lru_cache(maxsize=1024)
def _cut(dims: Dims, kind: str, wide: bool, depth: int, threads: int) -> Cut | None:
    small_enough(dims, kind)
    N, C, S = dims
    lanes = 16 // ITEMSIZE[kind]
    layout, size = layout_of(dims, lanes, wide), N * C * S
    total = size // lanes
    if not layout or not size or size % lanes or (size if layout == "spread" else total) >= LARGEST:
        return None
    times = lanes // math.gcd(C * S, lanes)  # samples that are whole vectors together
    depth = depth if 2 * times <= N else 1
    far = total if depth == 1 else -(-N // (2 * times)) * (C * S * times // lanes)
    run = {"run": S // lanes, "spread": S, "columns": C // lanes}[layout]
    numbers = (C, run, *reciprocal(C), *reciprocal(run), far, total)
    return Cut(layout, lanes, depth, -(-far // threads), numbers)


@device
def quotient(n, multiplier, shift):
    """Divide by what ``reciprocal`` was taken of."""
    return anew(int32((uint64(uint32(n)) * uint64(uint32(multiplier))) >> uint64(shift)))


def make_run(what: Variant):
    """Constants (m, k, b) of the only channel of vector v; ``numbers`` as in ``Cut``, without the last two."""
    affine = make_affine(what.kind, what.given)

    @device
    def run_constants(v, stats, more, weight, bias, eps, flags, numbers):
        C, _, by_C, shift_C, by_run, shift_run = numbers
        c = quotient(v, by_run, shift_run)
        c = int32(c - quotient(c, by_C, shift_C) * C)
        m, _, k, b, _ = affine(stats, more, weight, bias, c, C, eps, flags)
        return m, k, b

    return run_constants


def make_spread(what: Variant):
    """Constants of each lane of vector v, of two channels."""
    W, given, A, step = what.W, what.given, ARITHMETIC[what.kind], access(what.kind, what.W).step
    parameters = make_parameters(what.kind)

    @device
    def spread_constants(v, stats, more, weight, bias, eps, flags, numbers):
        C, S, by_C, shift_C, by_S, shift_S = numbers
        first = quotient(v * W, by_S, shift_S)
        count = int32((first + 1) * S - v * W)
        c = int32(first - quotient(first, by_C, shift_C) * C)
        d = c
        if count < W:
            d = int32(c + 1 if c + 1 < C else 0)
        (w0, b0), (w1, b1) = parameters(weight, bias, c, flags), parameters(weight, bias, d, flags)
        m, rest0, rest1 = step(stats[c], stats[d], count), A(0), A(0)
        if given:
            both = invsqrts((A(more[c] + eps), A(more[d] + eps)))
            i0, i1 = both[0], both[1]
        else:
            i0, i1, rest0, rest1 = stats[C + c], stats[C + d], stats[3 * C + c], stats[3 * C + d]
        (k0, b0), (k1, b1) = fold(i0, rest0, w0, b0), fold(i1, rest1, w1, b1)
        return m, step(k0, k1, count), step(b0, b1, count)

    return spread_constants


def make_columns(what: Variant):
    """Constants of each lane of vector v, of W channels: ``channel.make_affine`` by vectors."""
    kind, W, given, A = what.kind, what.W, what.given, ARITHMETIC[what.kind]
    io = access(kind, W)
    gather, splat = io.gather_aligned, io.splat

    @device
    def columns_constants(v, stats, more, weight, bias, eps, flags, numbers):
        C, tiles, _, _, by_tiles, shift_tiles = numbers
        c = int32(v - quotient(v, by_tiles, shift_tiles) * tiles) * W
        m, rest = gather(stats, c), splat(A(0))
        w, b = splat(A(1)), splat(A(0))
        if flags & 1:
            w = gather(weight, c)
        if flags & 2:
            b = gather(bias, c)
        if given:
            invstd = invsqrts(add(gather(more, c), eps))
        else:
            invstd, rest = gather(stats, C + c), gather(stats, 3 * C + c)
        k = mul(w, invstd)
        return m, k, fma(mul(rest, A(-1)), k, b)

    return columns_constants


MAKE = {"run": make_run, "spread": make_spread, "columns": make_columns}
BLOCKS = (8, 6, 5, 4)  # on a multiprocessor, the first as many as there is place for; registers for 0, 1, ... causes


def blocks_of(what: Variant, layout: str, two: bool) -> int:
    """Blocks on a multiprocessor for which the registers are enough, the rare ways through a root included."""
    several, columns = layout != "run", layout == "columns"
    double, half = what.kind == "f64", what.W == 8
    causes = (two and several) + (double and (two or several)) + 2 * (half and columns)
    causes += what.residual and several and (columns or half or double)
    return BLOCKS[min(causes, 3)]


@functools.cache
def normalise(what: Variant, layout: str, depth: int):
    """Output of one vector of each thread, or of two; ``numbers`` of ``Cut`` are its arguments."""
    kind, W, threads, residual, two = what.kind, what.W, what.threads, what.residual, depth > 1
    io, output, constants = access(kind, W), make_output(what), MAKE[layout](what)
    load, load_early, store = io.load_last, io.load_early, io.store

    @kernel("TTTAAAAaiiiiiiiii", kind, threads, blocks_of(what, layout, two))
    def flat_normalise(
        x, res, y, stats, more, weight, bias, eps, C, run, by_C, shift_C, by_run, shift_run, far, total, flags
    ):
        block = int32(cuda.gridDim.x - 1 - cuda.blockIdx.x)
        v = int32(block * threads + cuda.threadIdx.x)
        at = int64(min(v, int32(far - 1))) * W  # all threads of a warp load, also those that have nothing to do
        x0 = load_early(x, at)
        r0 = x0
        if residual:
            r0 = load_early(res, at)
        if v < far:
            behind, both = at + int64(far) * W, two and v < total - far
            x1, r1 = x0, r0
            if both:
                x1 = load(x, behind)
                if residual:
                    r1 = load(res, behind)
            numbers = (C, run, by_C, shift_C, by_run, shift_run)
            m, k, b = constants(v, stats, more, weight, bias, eps, flags, numbers)
            store(y, at, output(x0, r0, m, k, b))
            if both:
                store(y, behind, output(x1, r1, m, k, b))

    return flat_normalise
