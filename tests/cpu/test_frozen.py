"""Gradients of large matrices with frozen statistics, whose sums are taken while they are written."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import fastbn
from fastbn.cpu import plans, tuning
from fastbn.functional import frozen
from tests.oracle import case, check_backward, check_frozen, same_bits
from tests.tolerances import DTYPES

if numba.config.DISABLE_JIT:
    pytest.skip("kernels exist in compiled code only", allow_module_level=True)

SHAPES = [(70001, 5), (4099, 131), (701, 1100), (300, 4160), (9, 300, 11, 11)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(shape, dtype, rng):
    for axis, relu in ((1, None), (-1, None), (1, "relu")):
        c = case(rng, shape, dtype, axis=axis, activation=relu, residual=relu is not None)
        mean, var = rng.standard_normal(c.weight.size), rng.uniform(0.5, 2.0, c.weight.size)
        mean, var = mean.astype(c.weight.dtype), var.astype(c.weight.dtype)
        check_backward(c, check_frozen(c, mean, var)[1], rng.standard_normal(shape).astype(dtype), is_frozen=True)


def place(shape, offset):
    """Return an array that begins ``offset`` numbers behind a cache line."""
    memory = np.empty(int(np.prod(shape)) + 64, np.float32)
    start = -memory.ctypes.data // 4 % 16 + offset
    return memory[start:][: int(np.prod(shape))].reshape(shape)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_the_same_bits_in_place_at_every_address_and_by_any_number_of_threads(shape, rng, threads, monkeypatch):
    monkeypatch.setattr(tuning, "STREAM", 0)
    monkeypatch.setattr(tuning, "PARALLEL", 0)
    C = shape[1]
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    four = np.zeros(C, np.float32), np.ones(C, np.float32), np.full(C, 2, np.float32), np.zeros(C, np.float32)
    results = []
    for n, offset in ((1, 0), (3, 5), (2, 0), (1, None)):
        threads(n)
        grad = dy.copy()
        out = grad if offset is None else place(shape, offset)
        results.append(fastbn.backward(grad, frozen(x, *four)[1], out=out))
    for other in results[1:]:
        for name in ("input", "weight", "bias"):
            assert same_bits(getattr(other, name), getattr(results[0], name)), name


def test_sums_outside_of_float32_are_taken_again(rng):
    """Their terms leave its range, they do not; dx is right where the gradient is its memory, too."""
    x = np.full((5000, 96), 4.0, np.float32)
    dy = np.tile(np.array([[3e38], [-3e38]], np.float32), (2500, 96))
    four = np.zeros(96, np.float32), np.ones(96, np.float32), np.full(96, 1e-3, np.float32), np.zeros(96, np.float32)
    for grad in (dy, dy.copy()):
        found = fastbn.backward(grad, frozen(x, *four, eps=0.0)[1], out=None if grad is dy else grad)
        assert np.array_equal(found.weight, np.zeros(96)) and np.array_equal(found.bias, np.zeros(96))
        np.testing.assert_allclose(found.input, dy * np.float32(1e-3), rtol=1e-6)


def test_parts_of_rows_are_written_at_once_where_lines_do_not_cross_their_ends():
    p, grad = plans.swept(plans.plan((300, 4160, 1)), 300 * 4160), place((300, 4160), 0)
    assert p.width < p.V
    assert plans.at_once(p, grad, place((300, 4160), 0)) and not plans.at_once(p, grad, place((300, 4160), 1))
    assert not plans.at_once(p, grad, grad)
