"""The oracle itself: against NumPy's own statistics, exact rational arithmetic and finite differences."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from fastbn import reference


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_statistics(axis, rng):
    x = rng.standard_normal((4, 5, 6))
    others = tuple(a for a in range(3) if a != axis % 3)
    mean, var = reference.statistics(x, axis)
    np.testing.assert_allclose(mean, x.mean(others), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(var, x.var(others), rtol=1e-13)


def test_statistics_against_rational_numbers(rng):
    values = (rng.standard_normal(50) + 1e4).astype(np.float32)
    exact = [Fraction(float(v)) for v in values]
    mean = sum(exact) / 50
    var = sum((v - mean) ** 2 for v in exact) / 50
    got_mean, got_var = reference.statistics(values.reshape(50, 1))
    assert got_mean[0] == pytest.approx(float(mean), rel=1e-16, abs=2e-12)
    assert got_var[0] == pytest.approx(float(var), rel=1e-11)


@pytest.mark.parametrize("value", [1e-30, 123.456, 1e30])
def test_constant_channels_have_no_variance(value):
    mean, var = reference.statistics(np.full((7, 3, 11), value))
    assert (mean == value).all() and (var == 0).all()


def test_apply_is_the_formula(rng):
    x, w, b, r = (
        rng.standard_normal((3, 2, 4)),
        np.array([2.0, -1.0]),
        np.array([0.5, 0.0]),
        rng.standard_normal((3, 2, 4)),
    )
    mean, var = reference.statistics(x)
    y = reference.apply(x, mean, var, w, b, eps=0.1, residual=r)
    for c in range(2):
        want = (x[:, c] - mean[c]) / np.sqrt(var[c] + 0.1) * w[c] + b[c] + r[:, c]
        np.testing.assert_allclose(y[:, c], want, rtol=1e-14)
    assert np.array_equal(reference.apply(x, mean, var, w, b, eps=0.1, residual=r, activation="relu"), np.maximum(y, 0))
    np.testing.assert_allclose(reference.apply(x, mean, var).mean((0, 2)), 0, atol=1e-15)


def test_running_is_pytorchs():
    assert reference.running(np.array([1.0]), np.array([3.0]), 0.1)[0] == pytest.approx(1.2)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_against_finite_differences(activation, frozen, rng):
    x, g, r = rng.standard_normal((3, 5, 2, 4))
    w, b = rng.standard_normal((2, 2))
    mean, var = reference.statistics(x)

    def loss(x, w, b, r):
        m, v = (mean, var) if frozen else reference.statistics(x)
        return float((reference.apply(x, m, v, w, b, activation=activation, residual=r) * g).sum())

    grads = reference.backward(g, x, mean, var, w, b, activation=activation, residual=r, frozen=frozen)
    values = [x, w, b, r]
    for i, gradient in enumerate(grads):
        for at in range(gradient.size):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [v.copy() for v in values]
                moved[i].reshape(-1)[at] += step
                ends.append(loss(*moved))
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient.reshape(-1)[at], rel=1e-5, abs=1e-7)
