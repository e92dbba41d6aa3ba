"""Batch renormalisation: y = weight*(xhat*r + d) + bias, r and d constants in backward."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn.renorm import renorm_bounds


def by_hand(x, weight, bias, mean, var, rmax, dmax, eps=1e-5, fixed=None):
    """Ioffe 2017, algorithm 1, in float64; ``fixed`` holds r and d constant."""
    axes = (0, *range(2, x.ndim))
    column = (-1, *[1] * (x.ndim - 2))
    sigma, towards = np.sqrt(x.var(axes) + eps), np.sqrt(var + eps)
    r = np.clip(sigma / towards, 1 / rmax, rmax)
    d = np.clip((x.mean(axes) - mean) / towards, -dmax, dmax)
    r, d = fixed or (r, d)
    xhat = (x - x.mean(axes).reshape(column)) / sigma.reshape(column)
    y = (xhat * r.reshape(column) + d.reshape(column)) * weight.reshape(column) + bias.reshape(column)
    return y, (r, d)


@pytest.fixture(params=[(6, 3), (4, 3, 5), (3, 3, 300)], ids=str)
def case(request, rng):
    x = rng.standard_normal(request.param) * 3 + 1
    return x, *rng.uniform(0.5, 2, (2, 3)), rng.standard_normal(3), rng.uniform(0.5, 2, 3)


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.5, 0.5), (3.0, 5.0)])
def test_forward_and_statistics(case, limits):
    x, weight, bias, mean, var = case
    want, _ = by_hand(x, weight, bias, mean, var, *limits)
    plain = mean.copy(), var.copy()
    batch = fastbn.batch_norm_train(x, weight, bias, *plain)[0]
    moved = mean.copy(), var.copy()
    y, saved = fastbn.batch_norm_train(x, weight, bias, *moved, renorm=limits)
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(moved, plain, rtol=1e-12)
    assert saved.updated == 1
    if limits == (1.0, 0.0):
        np.testing.assert_allclose(y, batch, rtol=1e-10, atol=1e-12)


def test_float32_and_options(case, rng):
    x, weight, bias, mean, var = (a.astype(np.float32) for a in case)
    residual = rng.standard_normal(x.shape).astype(np.float32)
    want = by_hand(*(a.astype(np.float64) for a in (x, weight, bias, mean, var)), 2.0, 1.0)[0] + residual
    out = np.empty_like(x)
    y, saved = fastbn.batch_norm_train(
        x, weight, bias, mean, var, renorm=(2, 1), activation="relu", residual=residual, out=out, update_stats=False
    )
    assert y is out and saved.updated == 0
    np.testing.assert_allclose(y, np.maximum(want, 0), rtol=1e-5, atol=1e-5)


def test_r_and_d_are_constants_in_backward(case, rng):
    x, weight, bias, mean, var = case
    g = rng.standard_normal(x.shape)
    _, saved = fastbn.batch_norm_train(x, weight, bias, mean.copy(), var.copy(), renorm=(1.2, 0.4))
    grads = fastbn.backward(g, saved)
    fixed = by_hand(x, weight, bias, mean, var, 1.2, 0.4)[1]

    def loss(x, weight, bias):
        return np.sum(by_hand(x, weight, bias, mean, var, 1.2, 0.4, fixed=fixed)[0] * g)

    arguments = [x, weight, bias]
    for i, got in enumerate((grads.input, grads.weight, grads.bias)):
        for at in rng.choice(arguments[i].size, 3, replace=False):
            step = np.zeros(arguments[i].size)
            step[at] = 1e-6
            step = step.reshape(arguments[i].shape)
            up, down = (loss(*[a + s if i == j else a for j, a in enumerate(arguments)]) for s in (step, -step))
            assert got.flat[at] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-6)


def test_layer_follows_a_schedule(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    bn = fastbn.BatchNorm(3, renorm=(1.0, 0.0))
    np.testing.assert_allclose(bn(x), fastbn.BatchNorm(3)(x), rtol=1e-6, atol=1e-6)
    bn.renorm = renorm_bounds(40000)
    before = bn.state_dict()
    y = bn(x)
    want, _ = by_hand(
        x.astype(np.float64), np.ones(3), np.zeros(3), before["running_mean"], before["running_var"], 3.0, 5.0
    )
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    bn.eval()(x)


def test_masks_renormalise_the_valid_values(rng):
    x = rng.standard_normal((4, 5, 3))
    mask = rng.random((4, 5)) < 0.7
    m, v = np.full(3, 0.1), np.full(3, 2.0)
    y, _ = fastbn.batch_norm_train(x, None, None, m.copy(), v.copy(), axis=2, mask=mask, renorm=(2, 2))
    want, _ = fastbn.batch_norm_train(x[mask], None, None, m, v, renorm=(2, 2))
    np.testing.assert_allclose(y[mask], want)


def test_schedule_of_the_paper():
    assert renorm_bounds(0) == renorm_bounds(5000) == (1.0, 0.0)
    assert renorm_bounds(15000)[1] == 2.5
    assert renorm_bounds(25000) == (pytest.approx(1 + 2 * 20 / 35), 5.0)
    assert renorm_bounds(40000) == renorm_bounds(10**9) == (3.0, 5.0)


@pytest.mark.parametrize(
    ("renorm", "error"),
    [(3, TypeError), ((3,), TypeError), ((0.5, 1), ValueError), ((2, -1), ValueError), ((np.nan, 1), ValueError)],
)
def test_errors(renorm, error):
    m, v = np.zeros(3, np.float32), np.ones(3, np.float32)
    with pytest.raises(error, match=r"^renorm: expected"):
        fastbn.batch_norm_train(np.zeros((4, 3), np.float32), None, None, m, v, renorm=renorm)
    with pytest.raises(ValueError, match=r"^renorm: expected running statistics"):
        fastbn.batch_norm_train(np.zeros((4, 3), np.float32), renorm=(3, 5))
