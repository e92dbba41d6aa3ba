"""Rows in one launch: rows that blocks give each other to write, sums of many blocks, and where they wait for all."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn.cuda import choice, driver, meeting, persistent, plan, tuning
from fastbn.cuda.arrays import ITEMSIZE
from tests.cuda.device import GpuArray, get, through_gpu
from tests.cuda.test_masks import check as check_masked
from tests.cuda.test_simulator import flat
from tests.oracle import case, check_backward, check_train, same_bits
from tests.tolerances import DTYPES

# Many rows of a thread; a row more or less than others have; fewer than are kept, or than there are blocks.
SHAPES = [(1000, 16), (337, 16), (257, 8), (127, 8), (66, 16)]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    through_gpu(monkeypatch)
    monkeypatch.setattr(tuning, "PERSISTENT", True)
    choice.forget()


@pytest.fixture
def pool(monkeypatch):
    """Return a function that leaves room for so many rows of a thread, and says how rows are given out."""

    def choose(shape, kept, depth, kind="f32", backward=False):
        lanes, size, tensors = 16 // ITEMSIZE[kind], 8 if kind == "f64" else 4, 2 if backward else 1
        threads, limits = tuning.PERSISTENT_THREADS, driver.device_properties()
        own = 2 * threads * lanes * size + 7 * plan.TILE * lanes * size
        monkeypatch.setattr(tuning, "RESERVE", limits.shared - own - kept * threads * 16 * tensors)
        monkeypatch.setattr(tuning, "PERSISTENT_POOL", depth)
        choice.forget()
        one = choice.one_launch(kind, (*shape, 1), True, False, False, backward, False, limits)
        assert one.name == "persistent"
        return one.cut[4]

    return choose


def step(c, rng):
    _, saved = check_train(c)
    check_backward(c, saved, rng.standard_normal(c.x.shape).astype(c.x.dtype))


@pytest.mark.parametrize(("kept", "depth"), [(0, 0), (0, 16), (2, 0), (2, 2), (2, 16)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_that_are_not_kept(rng, shape, kept, depth, pool):
    for backward in (False, True):
        found = pool(shape, kept, depth, backward=backward)
        assert shape != (1000, 16) or found == min(depth >> backward, 16 - kept)  # of 16 rows of a thread
        for activation, residual in ((None, False), ("relu", True)):
            step(case(rng, shape, np.float32, activation=activation, residual=residual), rng)


@pytest.mark.parametrize(("kept", "depth"), [(0, 0), (1, 2)])
def test_several_tiles(rng, kept, depth, pool):
    pool((83, 136), kept, depth)
    step(case(rng, (83, 136), np.float32, activation="relu", residual=True), rng)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.float32], ids=lambda d: d.name)
def test_every_dtype(rng, dtype, pool):
    kind = {"float64": "f64", "float16": "f16", "bfloat16": "bf16"}[dtype.name]
    shape = (520, 24)
    assert pool(shape, 1, 4, kind) and pool(shape, 1, 4, kind, backward=True)
    for activation, residual in (("relu", True), (None, False)):
        step(case(rng, shape, dtype, activation=activation, residual=residual), rng)


def test_a_mask_beside_rows_that_are_not_kept(rng, pool):
    for depth in (0, 2):
        pool((300, 16), 1, depth)
        for activation, residual in ((None, False), ("relu", True)):
            check_masked(rng, (300, 16), 1, np.float32, activation, residual)


def test_every_row_is_written_once_and_alike_whoever_does(rng, pool):
    """In place: what is written twice would be added twice."""
    c = case(rng, (700, 16), np.float32, residual=True)
    grad, found = rng.standard_normal(c.x.shape).astype(np.float32), []
    for depth in (0, 1, 3, 8):
        assert pool(c.x.shape, 2, depth) == depth
        x, weight, bias, r, g = (GpuArray.of(a) for a in (c.x, c.weight, c.bias, c.residual, grad))
        _, saved = fastbn.batch_norm_train(x, weight, bias)
        dx = fastbn.backward(g, saved, out=g).input
        y, _ = fastbn.batch_norm_train(x, weight, bias, residual=r, out=r)
        found.append([get(y).copy(), get(dx).copy()])
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_sums_that_are_no_good_beside_rows_that_are_not_kept(rng, pool):
    x = rng.standard_normal((400, 16)).astype(np.float32)
    x[:, 3] = 1e30
    x[:, 7] = x[:, 7] * 1e-3 + 1e4
    assert pool(x.shape, 2, 4)
    check_train(case(rng, x.shape, np.float32)._replace(x=x))


@pytest.mark.parametrize("rows", [40 * 8, 40 * 8 * 3 - 5])
def test_more_blocks_than_lanes_of_a_warp(rng, rows, monkeypatch):
    monkeypatch.setattr(tuning, "PERSISTENT_THREADS", 32)
    monkeypatch.setattr(driver, "_properties", lambda number: driver.Limits(40, 64 * 1024))
    choice.forget()
    one = choice.one_launch("f32", (rows, 16, 1), True, False, False, False, False, driver.device_properties())
    assert one.grid == (1, 40)
    step(case(rng, (rows, 16), np.float32, activation="relu"), rng)


@pytest.mark.parametrize("parts", [1, 5, 33, 160, 161, 330])
def test_parts_of_a_column_are_added_up(rng, parts):
    column, values = meeting.make_column("f32"), rng.standard_normal((parts, 2)).astype(np.float32)
    words = np.ones((parts, 2, 2), np.int32)  # each number beside its tag
    words[..., 0] = values.view(np.int32)
    place, out = flat(words.view(np.float32).reshape(-1), "f32"), flat(np.zeros(4, np.float32), "f32")

    def kernel(place, out, P):
        found = column(place, 0, 0, P)
        if driver.cuda.threadIdx.x == 7:
            for k in range(4):
                out[k] = found[k]

    driver.run(driver.Kernel(kernel, "AAi", "f32", 32, 1), (1, 1), 0, (place, out, parts))
    got = out.array.astype(np.float64).reshape(2, 2).sum(1)
    np.testing.assert_allclose(got, values.astype(np.float64).sum(0), rtol=1e-6, atol=1e-7)


def test_waiting_for_all_behind_the_rows(rng, pool, monkeypatch):
    kernels = persistent.train, persistent.backward
    try:
        monkeypatch.setattr(tuning, "PERSISTENT_EARLY", False)
        for made in kernels:
            made.cache_clear()
        for kept in (2, 9):
            pool((337, 16), kept, 2)
            step(case(rng, (337, 16), np.float32, activation="relu", residual=True), rng)
    finally:
        for made in kernels:
            made.cache_clear()
