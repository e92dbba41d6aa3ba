"""Shapes find their kernels, and index arithmetic goes beyond 2^31 elements."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time

import numba
import numpy as np
import pytest

import fastbn
from fastbn import quick, views
from fastbn.cpu import launch, plans, pool, tuning
from tests.oracle import ALL_SHAPES, SHAPES, case, same_bits
from tests.tolerances import DTYPES

if numba.config.DISABLE_JIT:
    pytest.skip("kernels exist in compiled code only", allow_module_level=True)


@pytest.mark.parametrize(("kind", "shape"), ALL_SHAPES, ids=str)
def test_the_shapes_of_the_tests_reach_every_kernel(kind, shape):
    assert plans.plan((shape[0], shape[1], int(np.prod(shape[2:])))).kind == kind


@pytest.mark.parametrize(("dims", "kind", "half"), [
    ((32, 64, 112 * 112), "planes", "planes"), ((32, 1024, 196), "planes", "planes"),
    ((32, 2048, 49), "planes", "rows"), ((8, 16, 256), "planes", "planes"), ((1, 64, 16), "rows", "rows"),
    ((256, 64, 64), "rows", "rows"), ((4096, 7, 100), "swept", "swept"), ((20000, 7, 16), "swept", "swept"),
    ((4096, 3, 3136), "planes", "swept"),
], ids=str)  # fmt: skip
def test_runs_that_are_short_or_far_apart_are_rows(dims, kind, half):
    assert (plans.plan(dims).kind, plans.plan(dims, 32).kind) == (kind, half)


@pytest.mark.parametrize(("dims", "once", "kind"), [
    ((32, 64, 49), 4, "planes"), ((32, 64, 49), 2, "rows"), ((32, 64, 100), 2, "planes"), ((1, 64, 16), 4, "planes"),
    ((18, 64, 36), 4, "rows"), ((17, 64, 36), 4, "planes"), ((4096, 64, 16), 4, "swept"), ((64, 64, 25), 8, "planes"),
], ids=str)  # fmt: skip
def test_inference_takes_short_runs_as_rows(dims, once, kind):
    assert plans.plan(dims, 32 if once == 2 else 16, once).kind == kind


def test_rows_come_in_one_block_and_in_many():
    found = [plans.plan((s[0], s[1], int(np.prod(s[2:])))) for s in SHAPES["rows"]]
    assert {p.per < s[1] for p, s in zip(found, SHAPES["rows"], strict=True)} == {False, True}
    assert any(s[1] * int(np.prod(s[2:])) < p.V for p, s in zip(found, SHAPES["rows"], strict=True)), "widened"


@pytest.mark.parametrize("dims", [(1, 1, 2), (2, 1, 1), (1, 1, 1 << 40), (1 << 40, 1, 1), (1 << 20, 1 << 20, 1 << 20)])
def test_plans_of_extreme_shapes(dims):
    p = plans.plan(dims)
    if p.kind == "swept":
        size = dims[0] * dims[1] * dims[2]
        down, across = p.bands(size)
        assert (down - 1) * p.height * p.V < size <= down * p.height * p.V
        assert (across - 1) * p.width < p.V <= across * p.width


def test_what_replaces_an_input_is_not_streamed(monkeypatch):
    monkeypatch.setattr(tuning, "STREAM", 64)
    x, y = np.zeros((2, 16), np.float32)
    assert tuning.streams(x) and tuning.streams(x, y, over=(y, x, None)) and tuning.streams(x, y, over=(y, x, x))
    assert not tuning.streams(x, x, over=(x, y, x[:])) and not tuning.streams(x[:8], over=(y, x))


# In a process of its own: every array ends, or begins, beside a page that may be neither read nor written.
GUARDED = """
import ctypes, itertools, mmap
import numpy as np, fastbn
from tests.oracle import ALL_SHAPES, case
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
for (_, shape), dtype, at_end in itertools.product(ALL_SHAPES, (np.dtype("f4"), BF16), (True, False)):
    c = case(rng, shape, dtype, activation="relu", residual=True)
    c = c._replace(**{k: guard(getattr(c, k), at_end) for k in ("x", "weight", "bias", "residual")})
    out, grad, dx = (guard(c.residual, at_end) for _ in range(3))
    y, saved = fastbn.batch_norm_train(c.x, c.weight, c.bias, out=out, **c.options())
    fastbn.backward(grad, saved, out=dx)
    fastbn.batch_norm_infer(c.x, c.bias, np.abs(c.weight), c.weight, c.bias, out=out, **c.options())
    fastbn.Moments.of(c.x)
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_kernels_touch_nothing_outside_of_their_arrays(python):
    assert python(GUARDED, PYTHONPATH=os.pathsep.join(sys.path)).stdout.strip() == "done"


class Room:
    """Memory in which arrays begin ``offset`` elements behind a line, between bytes that must not change."""

    def __init__(self, offset):
        self.offset, self.taken = offset, []

    def array(self, like):
        memory = np.full(like.nbytes + 512, 0xA5, np.uint8)
        start = 128 + -memory.ctypes.data % 128 + self.offset * like.itemsize
        self.taken.append((memory, start, start + like.nbytes))
        got = memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)
        got[...] = like
        return got

    def kept(self):
        return all((m[:a] == 0xA5).all() and (m[b:] == 0xA5).all() for m, a, b in self.taken)


# Rows in one block, rows laid side by side, rows swept in bands (some whole vectors, some not, one wide), and runs.
OFFSET_SHAPES = [
    (64, 100), (61, 100), (33, 48), (29, 7, 3), (2, 37), (4099, 80), (3001, 130), (2100, 65, 2), (1100, 4133),
    (1100, 2112), (150, 2112), (150, 704, 3), (3, 40, 57), (5, 9, 196), (2, 33, 16, 128),
]  # fmt: skip


def every_result(c, room, grad):
    x, residual, out, dx = (room.array(a) for a in (c.x, c.residual, c.x, c.x))
    results = []
    for options in ({}, {"residual": residual, "activation": "relu"}):
        y, saved = fastbn.batch_norm_train(x, c.weight, c.bias, out=out, **options)
        results.append(y.copy())
        g = fastbn.backward(grad, saved, out=dx)
        results += [a.copy() for a in g if a is not None]
        mean, var = saved.mean.astype(c.weight.dtype), saved.variance.astype(c.weight.dtype)
        results.append(fastbn.batch_norm_infer(x, mean, var, c.weight, c.bias, out=out, **options).copy())
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", OFFSET_SHAPES, ids=str)
def test_wherever_arrays_begin(shape, dtype, rng, monkeypatch):
    """Streamed or not, from a line or from inside of one: the same bits, and nothing written beside the arrays."""
    c = case(rng, shape, dtype, activation=None, residual=True)
    grad = rng.standard_normal(shape).astype(dtype)
    expected = every_result(c, Room(0), grad)

    def check(offset):
        room = Room(offset)
        assert all(same_bits(a, b) for a, b in zip(every_result(c, room, grad), expected, strict=True)), offset
        assert room.kept(), offset

    for offset in (1, 4, 27):
        check(offset)
    for name in ("STREAM", "READ_ONCE", "READ_ONCE_RUNS"):
        monkeypatch.setattr(tuning, name, 0)
    for known in ("_train", "_infer", "_backward", "_others"):  # what is known remembers not to stream
        monkeypatch.setattr(quick, known, {})
    for offset in (0, 1, 4, 8, 13, 27):
        check(offset)


# Added row by row and two at a time, a matrix of rows laid side by side whose last one is short, runs.
EARLY_SHAPES = [
    (4099, 80), (3001, 128), (8200, 130), (1100, 1024), (1100, 1536), (1100, 2112), (3, 40, 64),
    (2, 5, 1000), (2, 3, 4128),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", EARLY_SHAPES, ids=str)
def test_gradient_of_the_residual_written_with_the_sums(shape, dtype, rng, monkeypatch):
    """On lines it is written with the sums, of rows g and y are not read again; the same bits as elsewhere."""
    monkeypatch.setattr(tuning, "STREAM", 0)
    c = case(rng, shape, dtype, activation="relu", residual=True)
    y, saved = fastbn.batch_norm_train(c.x, c.weight, c.bias, residual=c.residual, activation="relu")
    grad = rng.standard_normal(shape).astype(dtype)
    results = []
    for offset in (0, 1):
        room = Room(offset)
        dx, dr = room.array(c.x), room.array(c.x)
        flat = [views.raw(a.reshape(-1)) for a in (c.x, grad, y, dx, dr)]
        assert plans.lined(flat[-1], 128) == (offset == 0)
        pair = launch.backward(*flat, c.weight, c.bias, saved.stats, (*shape, 1)[:3], False, True)
        results.append((dx, dr, *pair))
        assert room.kept()
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    want = fastbn.backward(grad, saved)
    assert same_bits(results[0][0], want.input) and same_bits(results[0][1], np.where(y > 0, grad, 0).astype(dtype))


@pytest.fixture
def ends_only(monkeypatch):
    """Let kernels do their first blocks and their last one: the arrays have 2^31 elements, but only on paper."""

    def stop(claim):
        while claim[0] == 0:
            time.sleep(0)
        claim[0] = 1 << 62

    def run(kernel, args, units, parallel):
        claim = np.zeros(2, np.int64)
        watch = threading.Thread(target=stop, args=(claim,))
        watch.start()
        kernel(*args, claim)
        watch.join()
        kernel(*args, np.array([units - 1, 0], np.int64))

    monkeypatch.setattr(pool, "run", run)


# More than 2^31 elements, and 2^32 bytes.
BEYOND = {"planes": (1, (1 << 17) + 3, 1 << 14), "rows": (1021, (1 << 20) + 3137, 2), "swept": ((1 << 23) + 777, 257)}


def paper(shape):
    """Return zeros in float16 whose pages exist once they are touched, one small page at a time."""
    memory = mmap.mmap(-1, 2 * int(np.prod(shape)))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float16).reshape(shape)


@pytest.mark.parametrize("kind", BEYOND)
def test_indices_beyond_32_bits(kind, ends_only, rng):
    shape = BEYOND[kind]
    dims, C = (shape[0], shape[1], int(np.prod(shape[2:]))), shape[1]
    assert np.prod(shape) > 1 << 31 and plans.plan(dims).kind == kind
    x, y = paper(shape), paper(shape)
    at = (slice(-3, None), -1) if kind == "swept" else (slice(None), -1)
    values = rng.standard_normal(x[at].shape).astype(np.float16)
    x[at] = values
    codes = [a.reshape(-1).view(np.uint16) for a in (x, y)]
    one, zero, none = np.ones(C, np.float32), np.zeros(C, np.float32), np.empty(0, np.float32)
    stats = np.concatenate([np.zeros(C), np.full(C, 0.5), np.ones(C)])
    half = (values.astype(np.float32) * 0.5).astype(np.float16)
    launch.infer(codes[0], None, codes[1], one, zero, stats, dims, None)
    assert np.array_equal(y[at][-3:], half[-3:]), "infer"
    y[at] = 0
    launch.backward(codes[0], codes[0], None, codes[1], None, one, zero, stats, dims, True, None)
    seen = slice(None) if kind == "planes" else slice(-3, None)  # of matrices those of its last band
    assert np.array_equal(y[at][seen], half[seen]), "backward"
    if kind == "swept":
        return  # its statistics need all bands: test_moments_beyond_32_bits
    y[at] = 0
    launch.backward(codes[0], codes[0], None, codes[1], None, one, zero, stats, dims, False, None)
    u = values.astype(np.float64)
    np.testing.assert_allclose(y[at], 0.5 * (u - u.mean() - 0.5 * u * (0.5 * u * u).mean()), atol=1e-3)
    stats = launch.train(codes[0], None, codes[1], one, zero, none, none, dims, 1e-5, 0.1, None)
    wide = values.astype(np.float64)
    assert stats[C - 1] == pytest.approx(wide.mean(), abs=1e-6)
    assert stats[3 * C - 1] == pytest.approx(wide.var(), rel=1e-5)
    want = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    np.testing.assert_allclose(y[at].astype(np.float64), want, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, (1 << 31) + 5), ((1 << 23) + 777, 257)], ids=["planes", "swept"])
def test_moments_beyond_32_bits(shape):
    """All of it: pages of zeros that are only read exist once."""
    x = np.zeros(shape, np.float16)
    x.reshape(-1)[3 * shape[1] : 4 * shape[1]] = 2.0
    x.reshape(-1)[-1] = 3.0
    m = fastbn.Moments.of(x)
    n = x.size // shape[1]
    total, squares = np.full(shape[1], 2.0), np.full(shape[1], 4.0)
    total[-1] += 3.0
    squares[-1] += 9.0
    assert m.count == n
    np.testing.assert_allclose(m.mean * n, total, rtol=1e-6)
    np.testing.assert_allclose(m.m2, squares, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((16, 1 << 17), "f4"), ((5, (1 << 17) + 13), "f2"), ((3, 1 << 17, 2), "f8")]
)
def test_statistics_of_many_channels_are_made_block_by_block(shape, dtype, rng, threads):
    """As good as those that are made first, which frozen normalisation needs, and the same bits."""
    C, dtype = shape[1], np.dtype(dtype)
    N, S = shape[0], int(np.prod(shape[2:]))
    assert plans.many(plans.plan((N, C, S), plans.lanes_of(np.empty(0, dtype)), np.dtype(dtype).itemsize), C)
    x, residual = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    four = rng.uniform(0.5, 2.0, (4, C)).astype(np.result_type(dtype, np.float32))
    four[1, 7] = -1.0  # no variance: NaN
    for options in ({}, {"activation": "relu", "residual": residual}):
        want, _ = fastbn.functional.frozen(x, *four, **options)
        assert np.isnan(want[:, 7]).all() and np.isfinite(np.delete(want, 7, 1)).all()
        for number in (2, 1):  # with one, plain float32 calls would go through a gate
            threads(number)
            assert same_bits(fastbn.batch_norm_infer(x, *four, **options), want)
        inplace = x.copy()
        assert same_bits(fastbn.batch_norm_infer(inplace, *four, **options, out=inplace), want)
