"""Kernels of sets with an affine inside, forward (``sets``): odd sizes, tails, seams, alignment, threads, edges."""

from __future__ import annotations

import itertools
import os
import sys

import numba
import numpy as np
import pytest

from fastbn import reference
from fastbn.cpu import launch_sets, sets, tuning
from tests.oracle import same_bits
from tests.tolerances import DTYPES, arithmetic, assert_within, bound

if numba.config.DISABLE_JIT:
    pytest.skip("kernels exist in compiled code only", allow_module_level=True)

# (B, G, C, S): by element with and without whole vectors, rows below, at and above one; by run with and without seams;
# few and long ones, swept twice; one channel each (instance norm).
SIZES = [
    (1, 1, 1, 1), (3, 1, 2, 1), (41, 1, 7, 1), (29, 1, 16, 1), (30, 1, 33, 1), (70, 1, 768, 1), (5, 1, 5003, 1),
    (1003, 1, 100, 1), (9, 3, 6, 5), (3, 2, 8, 49), (4, 4, 4, 67), (3, 2, 6, 128), (2, 4, 8, 131), (3, 1, 2, 4099),
    (2, 5, 5, 9001), (1, 1, 40000, 1), (3, 1, 16421, 1), (17, 1, 4099, 1), (35, 1, 4112, 1), (2, 1, 33001, 1),
    (3, 5, 5, 49), (2, 70, 70, 17), (3, 131, 131, 64), (40, 3, 3, 100), (61, 9, 9, 127), (2, 3, 3, 16),
    (300, 3, 3, 4), (5, 200, 200, 9), (7, 2, 2, 31), (3, 7, 7, 2),
]  # fmt: skip

# Of more than one block, for several threads.
BLOCKS = [(301, 1, 67, 1), (9, 3, 6, 5), (900, 1, 768, 1), (3, 1, 40021, 1), (131, 67, 67, 33), (3001, 9, 9, 4)]


def codes(x):
    """View half types as the kernels take them."""
    return x if x.itemsize > 2 else x.view(np.uint16 if x.dtype == np.float16 else np.int16)


def draw(rng, d, dtype, offset=1.5):
    B, _, C, S = d
    x = (rng.standard_normal((B, C, S)) * rng.uniform(0.5, 2.0, (C, 1)) + offset).astype(dtype).reshape(-1)
    weight, bias = rng.uniform(-2.0, 2.0, (2, C)).astype(arithmetic(dtype))
    return x, weight, bias


def split(d):
    B, G, C, S = d
    return B, G, C // G, S


def expected(x, weight, bias, d):
    """Return y in float64 and the magnitude of its terms."""
    wide = [None if p is None else p.astype(np.float64).reshape(d[1], -1, 1) for p in (weight, bias)]
    x = x.astype(np.float64).reshape(split(d))
    terms = 1.0 + np.abs(reference.normalise(x, (2, 3)))
    if weight is not None:
        terms = terms * np.abs(wide[0]) + np.abs(wide[1])
    return reference.normalise(x, (2, 3), *wide).reshape(-1), terms.reshape(-1)


def forward(x, weight, bias, d, out=None):
    y = np.empty_like(x) if out is None else out
    return y, launch_sets.train(codes(x), codes(y), weight, bias, d, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES, ids=str)
def test_forward(rng, monkeypatch, d, dtype):
    x, weight, bias = draw(rng, d, dtype)
    for affine, bytes_from in itertools.product((True, False), (0, 1 << 40)):
        monkeypatch.setattr(tuning, "STREAM", bytes_from)
        w, b = (weight, bias) if affine else (None, None)
        y, stats = forward(x, w, b, d)
        want, terms = expected(x, w, b, d)
        assert_within(y, want, bound(want, 4 * terms, dtype), "y")
        mean, invstd, var = stats.reshape(3, -1)
        wide = x.astype(np.float64).reshape(d[0] * d[1], -1)
        kind = arithmetic(dtype)
        assert_within(mean, wide.mean(1), bound(0.0, np.abs(wide).mean(1), kind), "mean")
        assert_within(var, wide.var(1), bound(0.0, wide.var(1) + 1e-30, kind), "variance")
        assert_within(invstd, 1 / np.sqrt(wide.var(1) + 1e-5), bound(0.0, 1 / np.sqrt(wide.var(1) + 1e-5), kind), "std")


@pytest.mark.parametrize("d", SIZES, ids=str)
def test_large_mean(rng, d):
    """Right to float32 rounding at mean 1e4, std 1."""
    x, weight, bias = draw(rng, d, np.float32, 1e4)
    y, _ = forward(x, weight, bias, d)
    want, terms = expected(x, weight, bias, d)
    assert_within(y, want, 1e-6 * terms, "y")


@pytest.mark.parametrize("d", SIZES, ids=str)
def test_constant_sets_give_the_bias(rng, d):
    _, weight, bias = draw(rng, d, np.float32)
    for value, dtype in itertools.product((1e-30, 123.456, 1e30, 3e38), (np.float32, np.float64)):
        x = np.full(d[0] * d[2] * d[3], value, dtype)
        w, b = weight.astype(dtype), bias.astype(dtype)
        assert np.array_equal(
            forward(x, w, b, d)[0].reshape(d[0], d[2], d[3]), np.broadcast_to(b[:, None], (d[0], d[2], d[3]))
        )


@pytest.mark.parametrize(
    "d",
    [(41, 1, 7, 1), (70, 1, 768, 1), (9, 3, 6, 5), (3, 2, 6, 131), (3, 1, 16421, 1), (3, 5, 5, 49), (30, 3, 3, 4)],
    ids=str,
)
def test_not_finite_values_stay_in_their_set(rng, d):
    x, weight, bias = draw(rng, d, np.float32)
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        at = bad.size // 2
        bad[at] = value
        got, want = (forward(v, weight, bias, d)[0].reshape(d[0] * d[1], -1) for v in (bad, x))
        where = at // got.shape[1]
        assert np.isnan(got[where]).all()
        assert same_bits(np.delete(got, where, 0), np.delete(want, where, 0))


@pytest.mark.parametrize("scale", [1e-25, 1e18, 1e30])
@pytest.mark.parametrize(
    "d", [(5, 1, 300, 1), (3, 2, 6, 131), (9, 1, 5, 1), (2, 1, 16421, 1), (3, 5, 5, 49), (30, 3, 3, 4)], ids=str
)
def test_squares_outside_of_float32(rng, d, scale):
    x, weight, bias = draw(rng, d, np.float32)
    x = (x * np.float32(scale)).astype(np.float32)
    want, terms = expected(x, weight, bias, d)
    assert_within(forward(x, weight, bias, d)[0], want, bound(want, 4 * terms, np.float32), "y")


@pytest.mark.parametrize(
    "d", [(5, 1, 3000, 1), (2, 2, 6, 500), (3, 1, 16421, 1), (3, 5, 5, 49), (30, 3, 3, 4)], ids=str
)
def test_ends_of_a_set_far_from_its_mean(rng, d):
    """The first guess of the mean comes from there."""
    x, weight, bias = draw(rng, d, np.float32)
    length = x.size // (d[0] * d[1])
    x.reshape(-1, length)[:, :16] += 1e4
    x.reshape(-1, length)[:, -16:] += 1e4
    want, terms = expected(x, weight, bias, d)
    assert_within(forward(x, weight, bias, d)[0], want, bound(want, 4 * terms, np.float32), "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [*BLOCKS, (7, 2, 6, 131)], ids=str)
def test_same_bits_at_every_address_and_by_any_number_of_threads(rng, threads, monkeypatch, d, dtype):
    monkeypatch.setattr(tuning, "STREAM", 0)
    monkeypatch.setattr(tuning, "PARALLEL", 0)
    x, weight, bias = draw(rng, d, dtype)
    results = []
    for n, shift in ((1, 0), (2, 3), (5, 7), (3, 1)):
        threads(n)
        there, out = np.empty(x.size + 64, dtype)[shift:][: x.size], np.empty(x.size + 64, dtype)[2 * shift :][: x.size]
        there[:] = x
        results.append(forward(there, weight, bias, d, out))
    for y, stats in results[1:]:
        assert same_bits(y, results[0][0]) and same_bits(stats, results[0][1])


@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 1 << 40), (1 << 40, 1), (8192, 768)])
def test_blocks_cover_extreme_shapes(count, length):
    per = sets.block_sets.py_func(count, length)
    assert per >= 1 and (per == 1 or per * length <= sets.BLOCK[1])
    assert sets.NEAR <= sets.reach.py_func(length) <= sets.RUN


# In a process of its own: every array ends, or begins, beside a page that may be neither read nor written.
GUARDED = """
import ctypes, itertools, mmap
import numpy as np
from fastbn.cpu import launch_sets, tuning
from tests.cpu.test_sets import SIZES, codes, draw
from tests.tolerances import BF16

libc, page, kept = ctypes.CDLL(None), mmap.PAGESIZE, []

def guard(a, at_end):
    size = -(-a.nbytes // page) * page
    memory = mmap.mmap(-1, size + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for border in (address, address + page + size):
        assert libc.mprotect(ctypes.c_void_p(border), page, 0) == 0
    kept.append(memory)
    start = page + (size - a.nbytes if at_end else 0)
    got = np.frombuffer(memory, np.uint8, a.nbytes, start).view(a.dtype).reshape(a.shape)
    got[...] = a
    return got

rng = np.random.default_rng(0)
swept = launch_sets.ALWAYS, launch_sets.ALWAYS_BACK
for d, dtype, at_end, stream in itertools.product(SIZES, (np.dtype("f4"), BF16), (True, False), (0, 1 << 40)):
    tuning.STREAM = stream
    launch_sets.ALWAYS, launch_sets.ALWAYS_BACK = swept if at_end or stream else (0, 0)
    x, weight, bias = (guard(a, at_end) for a in draw(rng, d, dtype))
    y, dx = guard(x, at_end), guard(x, at_end)
    for w, b in ((weight, bias), (None, None)):
        stats = guard(launch_sets.train(codes(x), codes(y), w, b, d, 1e-5), at_end)
        launch_sets.backward(codes(x), codes(y), codes(dx), w, stats, d)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_kernels_touch_nothing_outside_of_their_arrays(python):
    assert python(GUARDED, PYTHONPATH=os.pathsep.join(sys.path)).stdout.strip() == "done"
