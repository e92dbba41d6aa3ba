"""Options of training: one value per channel, batches that are not finite, who moves the running statistics and how."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn import reference


def state(channels, dtype=np.float32):
    return np.full(channels, 0.25, dtype), np.full(channels, 3.0, dtype)


@pytest.fixture
def x(rng):
    return rng.standard_normal((6, 3, 5)).astype(np.float32)


def test_biased_running_variance(x):
    (m1, v1), (m2, v2) = state(3), state(3)
    y1, saved = fastbn.batch_norm_train(x, None, None, m1, v1, momentum=0.3)
    y2, _ = fastbn.batch_norm_train(x, None, None, m2, v2, momentum=0.3, unbiased=False)
    mean, var = reference.statistics(x)
    assert np.array_equal(y1, y2) and saved.updated == 1
    np.testing.assert_allclose(m2, reference.running(0.25 * np.ones(3), mean, 0.3), rtol=1e-6)
    np.testing.assert_allclose(v2, reference.running(3.0 * np.ones(3), var, 0.3), rtol=1e-6)
    np.testing.assert_allclose(v1, reference.running(3.0 * np.ones(3), var * 30 / 29, 0.3), rtol=1e-6)
    np.testing.assert_allclose(m1, m2, rtol=1e-6)


@pytest.mark.parametrize("values", [(np.inf, -np.inf), (np.nan, 0.0), (3e38, -3e38), (1e-45, 1e-45)])
@pytest.mark.parametrize("options", [{}, {"ghost": 3}, {"mask": np.arange(8) != 4}, {"renorm": (3, 5)}], ids=str)
@pytest.mark.parametrize("more", [{"unbiased": False}, {"update_stats": False}, {"ghost": 4, "mask": np.arange(8) != 4},
                                  {"ghost": 4, "renorm": (3, 5)}], ids=str)  # fmt: skip
def test_bad_values_do_not_warn(rng, values, options, more):
    """Warnings are errors in the tests; here floating-point errors are too."""
    x = rng.standard_normal((8, 3)).astype(np.float32)
    x[::4, 0], x[1::4, 0] = values
    x[:, 1] = values[0]
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    with np.errstate(all="raise"):
        _, saved = fastbn.batch_norm_train(x, np.ones(3, np.float32), None, mean, var, **options | more)
        grads = fastbn.backward(np.full(x.shape, 3e38, np.float32), saved)
        fastbn.update_running(mean, var, saved.moments)
    assert np.isfinite(mean[2]) and np.isfinite(var[2]) and not np.isnan(grads.input[:, 2]).any()


def test_no_update(x):
    m, v = state(3)
    y, saved = fastbn.batch_norm_train(x, None, None, m, v, update_stats=False)
    assert (m == 0.25).all() and (v == 3).all() and saved.updated == 0
    assert np.array_equal(y, fastbn.batch_norm_train(x)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_batch_that_is_not_finite(x, bad):
    x[1, 2, 3] = bad
    m, v = state(3)
    y, saved = fastbn.batch_norm_train(x, None, None, m, v)
    assert not np.isfinite(m[2]) or not np.isfinite(v[2])
    m, v = state(3)
    skipped, saved = fastbn.batch_norm_train(x, None, None, m, v, nonfinite="skip_update")
    assert np.array_equal(y, skipped, equal_nan=True) and saved.updated == 0
    assert (m == 0.25).all() and (v == 3).all()
    out = np.zeros_like(x)
    with pytest.raises(ValueError, match=r"^x: expected finite batch statistics, got NaN or inf in channel 2$"):
        fastbn.batch_norm_train(x, None, None, m, v, nonfinite="raise", out=out)
    assert (m == 0.25).all() and not out.any()


def test_finite_data_with_a_variance_out_of_range(x):
    huge = x * np.float32(1e25)
    m, v = state(3)
    saved = fastbn.batch_norm_train(huge, None, None, m, v, nonfinite="skip_update")[1]
    assert saved.updated == 0 and (v == 3).all()


def test_good_batches_pass_every_policy(x):
    want = fastbn.batch_norm_train(x)
    for nonfinite in ("propagate", "skip_update", "raise"):
        m, v = state(3)
        y, saved = fastbn.batch_norm_train(x, None, None, m, v, nonfinite=nonfinite)
        np.testing.assert_allclose(y, want[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            fastbn.backward(x, saved).input, fastbn.backward(x, want[1]).input, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(m, 0.225 + 0.1 * x.mean((0, 2)), rtol=1e-5)
        assert saved.updated == 1


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=str)
def test_one_value_per_channel(rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    weight, bias = rng.standard_normal((2, 3)).astype(np.float32)
    m, v = state(3)
    with pytest.raises(ValueError, match=r"^x: expected more than 1 value per channel .*, got shape \(1, 3"):
        fastbn.batch_norm_train(x, weight, bias, m, v, unbiased=False)
    with pytest.raises(ValueError, match=r"^x: expected more than 1 value per channel .*, got a mask that leaves 1$"):
        fastbn.batch_norm_train(np.concatenate([x, x]), mask=np.arange(2).reshape(2, *[1] * (x.ndim - 2)) > 0)
    y, saved = fastbn.batch_norm_train(x, weight, bias, m, v, on_single="running", activation="relu", residual=x)
    want = fastbn.batch_norm_infer(x, m, v, weight, bias, activation="relu", residual=x)
    assert np.array_equal(y, want) and (m == 0.25).all() and saved.updated == 0
    slope = fastbn.backward(np.ones_like(x), saved).input.reshape(-1)
    np.testing.assert_allclose(slope, (want.reshape(-1) > 0) * weight / np.sqrt(3 + 1e-5), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^on_single: expected running statistics"):
        fastbn.batch_norm_train(x, on_single="running")
    assert fastbn.batch_norm_train(np.ones((2, 3), np.float32), None, None, m, v, on_single="running")[1].updated == 1


def test_one_valid_value(rng):
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    m, v = state(3)
    y, saved = fastbn.batch_norm_train(x, None, None, m, v, lengths=[0, 1], on_single="running")
    np.testing.assert_allclose(y[1, :, 0], (x[1, :, 0] - 0.25) / np.sqrt(3 + 1e-5), rtol=1e-6)
    assert np.count_nonzero(y) == 3 and saved.updated == 0


def test_layer_takes_every_option(rng, x):
    bn = fastbn.BatchNorm(3, momentum=None, unbiased=False, nonfinite="skip_update", on_single="running")
    bn(x)
    bn(x + np.float32(np.nan))
    bn(x[:1, :, :1])
    assert bn.num_batches_tracked == 1
    np.testing.assert_allclose(bn.running_var, x.var((0, 2)), rtol=1e-5)
    bn(x, update_stats=False)
    assert bn.num_batches_tracked == 1
    bn(2 * x)
    assert bn.num_batches_tracked == 2
    np.testing.assert_allclose(bn.running_mean, 1.5 * x.mean((0, 2)), rtol=1e-5, atol=1e-7)


def test_micro_batches_are_one_batch(rng):
    x = rng.standard_normal((12, 3, 5)) + 4
    whole, parts = fastbn.BatchNorm(3, dtype=np.float64), fastbn.BatchNorm(3, dtype=np.float64, update_stats=False)
    whole(x)
    total = fastbn.Moments(0, np.zeros(3), np.zeros(3))
    for part in np.split(x, [2, 7]):
        parts(part)
        total = total.merge(parts.saved.moments)
    assert parts.num_batches_tracked == 0 and not parts.running_mean.any()
    parts.update(total)
    for key, value in whole.state_dict().items():
        np.testing.assert_allclose(parts.state_dict()[key], value, rtol=1e-12)
    parts.update(fastbn.Moments(0, np.zeros(3), np.zeros(3)))
    assert parts.num_batches_tracked == 1


def test_frozen_layers_stay_frozen(x):
    bn = fastbn.BatchNorm(3).freeze().train()
    y = bn(x)
    assert np.array_equal(y, fastbn.BatchNorm(3).eval()(x)) and bn.num_batches_tracked == 0
    grads = bn.backward(np.ones_like(x))
    np.testing.assert_allclose(grads.input, 1 / np.sqrt(1 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(grads.weight, x.sum((0, 2)) / np.sqrt(1 + 1e-5), rtol=1e-4, atol=1e-5)
    assert bn.freeze(False)(x) is not None and bn.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"on_single": "skip"}, ValueError, "on_single"),
        ({"nonfinite": None}, ValueError, "nonfinite"),
        ({"unbiased": "biased"}, TypeError, "unbiased"),
        ({"update_stats": 0}, TypeError, "update_stats"),
        ({"unbiased": False, "eps": 0.0}, ValueError, "eps"),
        ({"unbiased": False, "momentum": None}, TypeError, "momentum"),
        ({"unbiased": False, "running_mean": np.zeros(3, np.float32)}, ValueError, "running_var"),
    ],
)
def test_errors_name_the_argument(x, options, error, named):
    with pytest.raises(error, match=rf"^{named}: expected"):
        fastbn.batch_norm_train(x, **options)


@pytest.mark.parametrize("shape", [(1, 3), (6, 3), (4, 3, 5), (0, 3)], ids=str)
def test_moments_are_the_batchs_own_where_it_was_normalised_by_others(rng, shape):
    x = (rng.standard_normal(shape) + 7).astype(np.float32)
    mask = np.ones((shape[0], *shape[2:]), bool)
    mask[1:2] = False
    frozen = fastbn.BatchNorm(3).freeze()
    for given in ({}, {"mask": mask}):
        frozen(x, **given)
        want, got = fastbn.Moments.of(x, **given), frozen.saved.moments
        assert got.count == want.count
        assert np.array_equal(got.mean, want.mean) and np.array_equal(got.m2, want.m2)


def test_a_single_value_can_be_a_micro_batch(rng):
    x = rng.standard_normal((7, 3))
    whole, parts = (fastbn.BatchNorm(3, on_single="running", dtype=np.float64) for _ in range(2))
    whole(x)
    total = fastbn.Moments(0, np.zeros(3), np.zeros(3))
    for part in np.split(x, [3, 4]):
        parts(part, update_stats=False)
        total = total.merge(parts.saved.moments)
    parts.update(total)
    np.testing.assert_allclose(parts.running_mean, whole.running_mean, rtol=1e-12)
    np.testing.assert_allclose(parts.running_var, whole.running_var, rtol=1e-12)
