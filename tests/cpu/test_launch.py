"""Shapes find their kernels, and index arithmetic goes beyond 2^31 elements."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import fastbn
from fastbn.cpu import launch, pool
from tests.oracle import ALL_SHAPES, SHAPES


@pytest.mark.parametrize(("kind", "shape"), ALL_SHAPES, ids=str)
def test_the_shapes_of_the_tests_reach_every_kernel(kind, shape):
    assert launch.plan((shape[0], shape[1], int(np.prod(shape[2:])))).kind == kind


def test_rows_come_in_one_block_and_in_many():
    plans = [launch.plan((s[0], s[1], int(np.prod(s[2:])))) for s in SHAPES["rows"]]
    assert {p.per < s[1] for p, s in zip(plans, SHAPES["rows"], strict=True)} == {False, True}
    assert any(s[1] * int(np.prod(s[2:])) < p.V for p, s in zip(plans, SHAPES["rows"], strict=True)), "widened"


@pytest.mark.parametrize("dims", [(1, 1, 2), (2, 1, 1), (1, 1, 1 << 40), (1 << 40, 1, 1), (1 << 20, 1 << 20, 1 << 20)])
def test_plans_of_extreme_shapes(dims):
    p = launch.plan(dims)
    if p.kind == "swept":
        size = dims[0] * dims[1] * dims[2]
        down, across = p.bands(size)
        assert (down - 1) * p.height * p.V < size <= down * p.height * p.V
        assert (across - 1) * p.width < p.V <= across * p.width


@pytest.fixture
def ends_only(monkeypatch):
    """Let kernels do their first blocks and their last one: the arrays have 2^31 elements, but only on paper.

    Untouched memory of ``np.zeros`` and ``np.empty`` is never allocated, so these tests cost little.
    """

    def stop(claim):
        while claim[0] == 0:
            time.sleep(0)
        claim[0] = 1 << 62

    def run(kernel, *args, units, parallel):
        claim = np.zeros(2, np.int64)
        watch = threading.Thread(target=stop, args=(claim,))
        watch.start()
        kernel(*args, claim)
        watch.join()
        kernel(*args, np.array([units - 1, 0], np.int64))

    monkeypatch.setattr(pool, "run", run)


# More than 2^31 elements, and 2^32 bytes.
BEYOND = {"planes": (1, (1 << 17) + 3, 1 << 14), "rows": (700, (1 << 21) + 1009, 2), "swept": ((1 << 23) + 777, 257)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BEYOND)
def test_indices_beyond_32_bits(kind, ends_only, rng):
    shape = BEYOND[kind]
    dims, C = (shape[0], shape[1], int(np.prod(shape[2:]))), shape[1]
    assert np.prod(shape) > 1 << 31 and launch.plan(dims).kind == kind
    x, y = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
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
    assert np.array_equal(y[at], half), "backward"
    if kind == "swept":
        return  # its statistics need all bands: test_moments_beyond_32_bits
    stats = launch.train(codes[0], None, codes[1], one, zero, none, none, dims, 1e-5, 0.1, None)
    wide = values.astype(np.float64)
    assert stats[C - 1] == pytest.approx(wide.mean(), abs=1e-6)
    assert stats[3 * C - 1] == pytest.approx(wide.var(), rel=1e-5)
    want = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    np.testing.assert_allclose(y[at].astype(np.float64), want, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 2, (1 << 30) + 5), ((1 << 23) + 777, 257)], ids=["planes", "swept"])
def test_moments_beyond_32_bits(shape):
    """All of it: pages of zeros that are only read exist once."""
    x = np.zeros(shape, np.float16)
    x[-1, -1, ...] = 0
    x.reshape(-1)[-2:] = 1.0, 3.0
    m = fastbn.Moments.of(x)
    n = x.size // shape[1]
    assert m.count == n
    if len(shape) == 3:
        assert m.mean[0] == 0 and m.mean[1] * n == pytest.approx(4.0, rel=1e-6)
        assert m.m2[1] == pytest.approx(10.0, rel=1e-6)
    else:
        assert m.mean[-2] * n == pytest.approx(1.0, rel=1e-6) and m.mean[-1] * n == pytest.approx(3.0, rel=1e-6)
        assert (m.mean[:-2] == 0).all() and (m.m2[:-2] == 0).all()
