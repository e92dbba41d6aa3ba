"""Vectors: half types are rounded as NumPy does, tails touch nothing behind them, NaN goes through a ReLU."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from fastbn.cpu import simd
from tests.tolerances import BF16

if numba.config.DISABLE_JIT:
    pytest.skip("intrinsics exist in compiled code only", allow_module_level=True)


@numba.njit
def move(x, y, n):
    """Whole vectors, then the tail."""
    W, i = simd.lanes(x), 0
    while i + W <= n:
        simd.store(y, i, simd.load(x, i))
        i += W
    if i < n:
        simd.store_n(y, i, simd.first(simd.load_n(x, i, n - i), n - i), n - i)


@numba.njit
def copy(x, y, n):
    count = x.size
    p, q = simd.base(x), simd.base(y)
    move(simd.like(q, p), simd.like(p, q), n)
    return count


@numba.njit
def copy_split(x, y, n):
    """As ``copy``, through split vectors."""
    count = x.size
    p, q = simd.split(simd.base(x)), simd.split(simd.base(y))
    move(simd.like(q, p), simd.like(p, q), n)
    return count


@numba.njit
def blend_split(n, x, y, z):
    count = x.size
    x, y, z = simd.split(simd.base(x)), simd.split(simd.base(y)), simd.split(simd.base(z))
    simd.store(z, 0, simd.blend(n, simd.load(x, 0), simd.load(y, 0)))
    return count


@numba.njit
def numbers(x, n):
    """(sum of the first n lanes, x[3], lanes, distance to the next vector)."""
    count = x.size
    p = simd.base(x)
    return simd.total(simd.first(simd.load(p, 0), n)), simd.get(p, 3), simd.lanes(p), simd.head(p, 0), count


@numba.njit
def eight_totals(x):
    """Sums of x's first eight vectors."""
    count = x.size
    p, W = simd.base(x), simd.lanes(simd.base(x))
    a, b, c, d = simd.load(p, 0), simd.load(p, W), simd.load(p, 2 * W), simd.load(p, 3 * W)
    e, f, g, h = simd.load(p, 4 * W), simd.load(p, 5 * W), simd.load(p, 6 * W), simd.load(p, 7 * W)
    return simd.totals(a, b, c, d, e, f, g, h), count


@numba.njit
def relu(x, y):
    count = x.size
    x, y = simd.base(x), simd.base(y)
    v = simd.load(x, 0)
    simd.store(y, 0, simd.where_positive(v, v))
    return count


def widened(half):
    """As float32; where NumPy converts by the CPU's own instruction (ARM), a signalling NaN is a warning."""
    with np.errstate(invalid="ignore"):
        return half.astype(np.float32)


def interesting():
    """Return float32 numbers that are hard to round: all half values, their midpoints, and a little to either side."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    values = [widened(halves.view(np.float16)), widened(halves.view(BF16))]
    bits = np.concatenate([v[~np.isnan(v)] for v in values]).view(np.uint32)
    around = np.concatenate([bits, bits + 1, bits - 1, bits ^ 0x8000, bits ^ 0x1000, (bits ^ 0x8000) + 1])
    x = around.view(np.float32)
    return x[~np.isnan(x)]


@pytest.mark.parametrize(("code", "half"), [(np.uint16, np.float16), (np.int16, BF16)], ids=["float16", "bfloat16"])
def test_rounding_to_half_types(code, half):
    x = interesting()
    got = np.empty(x.size, code)
    copy(x, got, x.size)
    with np.errstate(over="ignore"):
        want = x.astype(half)
    assert np.array_equal(got.view(np.uint16), want.view(np.uint16))
    back = np.empty(1 << 16, np.float32)
    codes = np.arange(1 << 16, dtype=np.uint16)
    copy(codes.view(code), back, back.size)
    np.testing.assert_array_equal(back, widened(codes.view(half)))


def test_split_vectors_round_alike():
    """Even elements in the first register, odd ones in the second; float32 has no such order."""
    x = interesting()
    x = x[: x.size // 32 * 32]
    lanes = x.reshape(-1, 16, 2).transpose(0, 2, 1).ravel()
    got, back = np.empty(x.size, np.int16), np.empty_like(x)
    copy_split(lanes, got, x.size)
    with np.errstate(over="ignore"):
        want = x.astype(BF16)
    assert np.array_equal(got.view(np.uint16), want.view(np.uint16))
    copy_split(got, back, x.size)
    np.testing.assert_array_equal(back.reshape(-1, 2, 16).transpose(0, 2, 1).ravel(), want.astype(np.float32))


def test_split_vectors_know_their_elements():
    x, y = np.arange(1, 33, dtype=np.float32).astype(BF16), -np.arange(1, 33, dtype=np.float32).astype(BF16)
    for n in range(33):
        z, tail = np.zeros(32, BF16), np.zeros(40, BF16)
        blend_split(n, x.view(np.int16), y.view(np.int16), z.view(np.int16))
        np.testing.assert_array_equal(z, np.where(np.arange(32) < n, x, y))
        copy_split(x.view(np.int16), tail.view(np.int16), n)
        np.testing.assert_array_equal(tail[:n], x[:n])
        assert not tail[n:].any()


@pytest.mark.parametrize("code", [np.uint16, np.int16])
def test_nan_stays_nan(code):
    bits = [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFC08000, 0x7FFF8000, 0x7FFF7FFF, 0xFFFFFFFF]
    x = np.array(bits * 4, np.uint32).view(np.float32)
    y = np.empty(x.size, code)
    copy(x, y, x.size)
    assert np.isnan(y.view({np.uint16: np.float16, np.int16: BF16}[code]).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.int16])
def test_tails_write_nothing_behind_them(dtype):
    x = np.arange(1, 50, dtype=dtype)
    for n in range(40):
        y = np.zeros(50, dtype)
        copy(x, y, n)
        assert np.array_equal(y[:n], x[:n]) and not y[n:].any()


def test_tails_read_nothing_behind_them():
    """The last element of a page in front of one that cannot be read."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mprotect") or libc.mprotect(ctypes.c_void_p(address + page), page, 0):
        pytest.skip("mprotect is not available")
    try:
        x = np.frombuffer(memory, np.float32, page // 4)
        for dtype in (np.float32, np.uint16):
            for n in (0, 1, 5, 15, 17, 31, 33):
                part, y = x.view(dtype)[x.nbytes // np.dtype(dtype).itemsize - n :], np.empty(n, dtype)
                copy(part, y, n)
                copy(y, part, n)
    finally:
        libc.mprotect(ctypes.c_void_p(address + page), page, 3)


@pytest.mark.parametrize(("dtype", "lanes"), [(np.float32, 16), (np.float64, 8), (np.uint16, 32)])
def test_numbers(dtype, lanes):
    memory = np.zeros(512, np.uint8)
    start = -memory.ctypes.data % 64
    for at in (0, 8, 24, 56):
        x = memory[start + at : start + at + 32 * np.dtype(dtype).itemsize].view(dtype)
        values = np.arange(1, 33, dtype=np.float32)
        x[:] = values.astype(np.float16).view(np.uint16) if dtype is np.uint16 else values
        got = numbers(x, 5)
        line = lanes * x.itemsize
        assert got[:3] == (15.0, 4.0, lanes) and got[3] == (-x.ctypes.data % line) // x.itemsize


@pytest.mark.parametrize(("dtype", "lanes"), [(np.float32, 16), (np.float64, 8), (np.uint16, 32)])
def test_totals_of_eight_vectors(rng, dtype, lanes):
    values = rng.integers(-1000, 1000, 8 * lanes)
    x = values.astype(np.float16).view(np.uint16) if dtype == np.uint16 else values.astype(dtype)
    assert np.array_equal(eight_totals(x)[0], values.reshape(8, lanes).sum(1))


def test_vectors_of_another_length_are_refused():
    """A line of float16 is 32 lanes, a line of float32 16."""

    @numba.njit
    def mixed(x, y):
        simd.store(simd.base(y), 0, simd.load(simd.base(x), 0))
        return x.size + y.size

    with pytest.raises(numba.TypingError, match="lanes"):
        mixed(np.zeros(32, np.float32), np.zeros(32, np.uint16))


def test_relu_keeps_nan_and_drops_negative_zero():
    x = np.array([np.nan, -np.nan, -0.0, 0.0, -1.0, 1.0, np.inf, -np.inf] * 2, np.float32)
    y = np.empty_like(x)
    relu(x, y)
    want = np.where(x <= 0, 0, x)
    np.testing.assert_array_equal(y, want)
    assert not np.signbit(y[2])
