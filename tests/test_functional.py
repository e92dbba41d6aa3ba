"""batch_norm_train, batch_norm_infer and backward against the float64 reference: every kernel, dtype and option."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import reference
from fastbn.functional import frozen
from tests.oracle import (
    ALL_SHAPES,
    case,
    check_backward,
    check_frozen,
    check_infer,
    check_train,
    column,
    normal,
    same_bits,
)
from tests.tolerances import BF16, DTYPES, arithmetic

OPTIONS = list(itertools.product((None, "relu"), (False, True)))
AFFINE = list(itertools.product((True, False), repeat=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [shape for _, shape in ALL_SHAPES], ids=str)
def test_every_kernel_dtype_and_option(shape, dtype, rng):
    for (activation, residual), affine in zip(OPTIONS, AFFINE, strict=True):
        c = case(rng, shape, dtype, activation=activation, residual=residual, affine=affine)
        before = c.x.copy()
        _, saved = check_train(c)
        grad = rng.standard_normal(shape).astype(dtype)
        check_backward(c, saved, grad)
        kind = arithmetic(dtype)
        mean, var = saved.mean.astype(kind), saved.variance.astype(kind)
        check_infer(c, mean, var)
        _, saved = check_frozen(c, mean, var)
        check_backward(c, saved, grad, is_frozen=True)
        assert same_bits(before, c.x)


@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=3).filter(lambda s: np.prod(s) // s[1] > 1 and s[0] < 40),
    dtype=st.sampled_from(DTYPES[:2]),
    seed=st.integers(0, 2**32 - 1),
    option=st.sampled_from(OPTIONS),
)
def test_any_small_shape(shape, dtype, seed, option):
    rng = np.random.default_rng(seed)
    c = case(rng, tuple(shape), dtype, activation=option[0], residual=option[1])
    _, saved = check_train(c)
    if saved.count > 2:  # of two values xhat is +-1 whatever they are: the gradient of the input is all cancellation
        check_backward(c, saved, rng.standard_normal(shape).astype(dtype))


@pytest.mark.parametrize("shape", [(16, 3, 300), (64, 5), (4099, 67)], ids=str)
def test_scaling_the_weights_in_front_changes_nothing(shape, rng):
    """BN((aW)u) = BN(Wu), d/du is the same and d/d(aW) = (1/a) d/dW: section 3.3 of the paper."""
    x, grad = normal(rng, shape, np.float64), rng.standard_normal(shape)
    y, saved = fastbn.batch_norm_train(x, eps=1e-12)
    for a in (0.25, 8.0, 1000.0):
        scaled, saved_scaled = fastbn.batch_norm_train(a * x, eps=1e-12)
        np.testing.assert_allclose(scaled, y, rtol=1e-9, atol=1e-9)
        dx, dscaled = fastbn.backward(grad, saved).input, fastbn.backward(grad, saved_scaled).input
        np.testing.assert_allclose(a * dscaled, dx, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", [(4, 3, 20), (2, 3, 40), (5, 3)], ids=str)
def test_gradients_against_finite_differences(shape, activation, rng):
    c = case(rng, shape, np.float64, activation=activation, residual=True)
    grad = rng.standard_normal(shape)

    def loss(x, weight, bias, residual):
        y, _ = fastbn.batch_norm_train(x, weight, bias, activation=activation, residual=residual)
        return float((y * grad).sum())

    _, saved = fastbn.batch_norm_train(c.x, c.weight, c.bias, activation=activation, residual=c.residual)
    got = fastbn.backward(grad, saved)
    arguments = [c.x, c.weight, c.bias, c.residual]
    for i, analytic in enumerate([got.input, got.weight, got.bias, got.residual]):
        for at in rng.choice(analytic.size, min(analytic.size, 6), replace=False):
            moved = []
            for step in (1e-6, -1e-6):
                changed = [a.copy() for a in arguments]
                changed[i].reshape(-1)[at] += step
                moved.append(loss(*changed))
            assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(analytic.reshape(-1)[at], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("shape", [(8, 6, 1024), (300, 6), (5001, 66)], ids=str)
def test_large_mean_is_no_loss(shape, rng):
    """At mean 1e4 and deviation 1 float32 output is right to float32 rounding: a float32 mean alone costs 5e-4."""
    x = (rng.standard_normal(shape) + 1e4).astype(np.float32)
    weight = rng.uniform(0.5, 3.0, shape[1]).astype(np.float32)
    y, saved = fastbn.batch_norm_train(x, weight, eps=1e-5)
    mean, var = reference.statistics(x)
    want = reference.apply(x, mean, var, weight)
    error = np.abs(y - want) / column(weight, x.ndim, 1)
    assert error.max() <= 1e-6
    kind = mean.astype(np.float32), var.astype(np.float32)
    y = fastbn.batch_norm_infer(x, *kind, weight)
    want = reference.apply(x, kind[0].astype(np.float64), kind[1].astype(np.float64), weight)
    assert (np.abs(y - want) / column(weight, x.ndim, 1)).max() <= 1e-6
    grad = rng.standard_normal(shape).astype(np.float32)
    dx = reference.backward(grad, x, mean, var, weight)[0]
    assert (np.abs(fastbn.backward(grad, saved).input - dx) / column(weight, x.ndim, 1)).max() <= 2e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(4, 3, 300), (2, 3, 31), (50, 3), (7, 3, 5), (263, 1009), (4099, 67)], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, 123.456, -7.7, 1e30])
def test_constant_channel_gives_exactly_the_bias(value, shape, dtype, rng):
    x = normal(rng, shape, dtype)
    x[:, 1] = value
    weight, bias = (rng.normal(size=shape[1]).astype(dtype) for _ in range(2))
    y, saved = fastbn.batch_norm_train(x, weight, bias)
    assert (y[:, 1] == bias[1]).all()
    assert saved.variance[1] == 0.0
    assert saved.mean[1] == dtype(value)


@pytest.mark.parametrize("scale", [1e19, 1e30, 1e37, 1e-12, 1e-18, 1e-30])
@pytest.mark.parametrize("shape", [(8, 3, 300), (200, 3), (4099, 67)], ids=str)
def test_float32_data_whose_squares_are_no_float32(shape, scale, rng):
    c = case(rng, shape, np.float32, eps=1e-5 if scale > 1 else 1e-3 * scale**2)
    c = c._replace(x=(c.x.astype(np.float64) * scale).astype(np.float32))
    _, saved = check_train(c)
    check_backward(c, saved, rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(8, 3, 300), (200, 3), (4099, 67), (263, 1009)], ids=str)
def test_pivots_far_from_the_data(shape, dtype, rng):
    """Kernels sum about a few values of a channel; here all likely ones are outliers."""
    N, S = shape[0], int(np.prod(shape[2:]))
    c = case(rng, shape, dtype)
    x = c.x.reshape(N, shape[1], S)
    for n in {0, N // 8, 3 * N // 8, 5 * N // 8, 7 * N // 8}:
        for s in {0, S // 2, S // 8, 3 * S // 8, 5 * S // 8, 7 * S // 8}:
            x[n, :, s] = 3e4
    _, saved = check_train(c)
    check_backward(c, saved, rng.standard_normal(shape).astype(dtype))


def test_values_that_cancel_about_their_pivot():
    """+-1e-25: float32 squares vanish and so do the sums, but the variance is 1e-50."""
    for shape in ((8, 2, 64), (8, 2, 300), (64, 2), (5000, 60)):
        x = np.full(shape, 1e-25, np.float32)
        x[::2] *= -1
        y, saved = fastbn.batch_norm_train(x, eps=1e-60)
        np.testing.assert_allclose(saved.variance, 1e-50, rtol=1e-6)
        np.testing.assert_allclose(np.abs(y), 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(4, 3, 300), (50, 3), (7, 3, 5), (4099, 67)], ids=str)
def test_nan_and_inf_stay_in_their_channel(shape, value, dtype, rng):
    x = normal(rng, shape, dtype)
    clean = [0, 2]
    kind = arithmetic(dtype)
    for at in (0, x.shape[0] - 1):  # where a pivot is taken, and where none is
        dirty = x.copy()
        dirty[at, 1] = value
        rm, rv = np.zeros(shape[1], kind), np.ones(shape[1], kind)
        y, saved = fastbn.batch_norm_train(dirty, None, None, rm, rv)
        want, saved_clean = fastbn.batch_norm_train(x)
        assert np.isnan(y[:, 1].astype(np.float64)).all()
        assert same_bits(y[:, clean], want[:, clean])
        assert np.isnan(rv[1]) and not np.isfinite(rm[1]) and np.isfinite(rv[clean]).all()
        assert np.isnan(rm[1]) == np.isnan(value)  # as PyTorch: inf in the mean, NaN in the variance
        grads = fastbn.backward(x, saved)
        assert np.isnan(grads.input[:, 1].astype(np.float64)).all()
        assert same_bits(grads.input[:, clean], fastbn.backward(x, saved_clean).input[:, clean])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(4, 3, 300), (50, 3), (4099, 67)], ids=str)
def test_frozen_gradients_do_not_see_the_input(shape, value, rng):
    """Its gradient is weight*invstd*grad_output, whatever x holds: as PyTorch in evaluation."""
    c = case(rng, shape, np.float32)
    mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    grad = rng.standard_normal(shape).astype(np.float32)
    want = fastbn.backward(grad, frozen(c.x, mean, var, c.weight, c.bias)[1])
    c.x[1, 1] = value
    got = fastbn.backward(grad, frozen(c.x, mean, var, c.weight, c.bias)[1])
    assert same_bits(got.input, want.input) and same_bits(got.bias, want.bias)
    assert not np.isfinite(got.weight[1]) and same_bits(got.weight[2:], want.weight[2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(4, 3, 300), (50, 3), (4099, 67), (8, 3, 7, 7)], ids=str)
def test_infinite_gradients_stay_infinite(shape, dtype, rng):
    """As PyTorch's; the mean's own rounding error, often 0, times infinity is NaN."""
    x, grad = normal(rng, shape, dtype), normal(rng, shape, dtype)
    grad[-1, 1, ...].flat[0] = -np.inf
    weight, bias = np.ones((2, shape[1]), arithmetic(dtype))
    grads = fastbn.backward(grad, fastbn.batch_norm_train(x, weight, bias)[1])
    xhat = (x[-1, 1].astype(np.float64) - x[:, 1].astype(np.float64).mean()).flat[0]
    assert grads.bias[1] == -np.inf and grads.weight[1] == -np.inf * xhat
    assert np.isfinite(np.delete(grads.bias, 1)).all() and np.isfinite(np.delete(grads.weight, 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_relu_passes_nan(dtype):
    x = np.ones((4, 2, 300), dtype)
    x[0, 1, 7] = np.nan
    y = fastbn.batch_norm_infer(x, np.zeros(2, arithmetic(dtype)), np.ones(2, arithmetic(dtype)), activation="relu")
    assert np.isnan(y.astype(np.float64)).sum() == 1 and np.isnan(float(y[0, 1, 7]))


def test_negative_running_variance_gives_nan_without_a_warning():
    y = fastbn.batch_norm_infer(np.ones((3, 2, 300)), np.zeros(2), np.array([-1.0, 1.0]))
    assert np.isnan(y[:, 0]).all() and np.isfinite(y[:, 1]).all()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0), (2, 3, 0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_empty_batch(shape, dtype):
    x, kind = np.empty(shape, dtype), arithmetic(dtype)
    rm, rv = np.full(3, 0.25, kind), np.full(3, 0.75, kind)
    out = np.empty(shape, dtype)
    for target in (None, out):
        y, saved = fastbn.batch_norm_train(x, np.ones(3, kind), np.zeros(3, kind), rm, rv, out=target)
        assert y.shape == shape and y.dtype == dtype
        assert target is None or y is target
    assert (rm == 0.25).all() and (rv == 0.75).all() and saved.count == 0
    grads = fastbn.backward(x, saved)
    assert grads.input.shape == shape and (grads.weight == 0).all() and (grads.bias == 0).all()
    assert fastbn.batch_norm_infer(x, rm, rv).shape == shape


def test_momentum_moves_the_running_statistics(rng):
    x = normal(rng, (6, 3, 10), np.float64)
    mean, var = reference.statistics(x)
    for momentum in (0.0, 0.1, 1.0):
        rm, rv = np.full(3, 5.0), np.full(3, 7.0)
        fastbn.batch_norm_train(x, running_mean=rm, running_var=rv, momentum=momentum)
        np.testing.assert_allclose(rm, (1 - momentum) * 5.0 + momentum * mean, rtol=1e-13)
        np.testing.assert_allclose(rv, (1 - momentum) * 7.0 + momentum * var * 60 / 59, rtol=1e-13)


def test_running_statistics_of_any_stride_are_updated_in_place(rng):
    x = normal(rng, (6, 3, 10), np.float32)
    plain, memory = np.zeros((2, 3), np.float32), np.zeros((2, 7), np.float32)
    strided = memory[:, 1::2]
    fastbn.batch_norm_train(x, running_mean=plain[0], running_var=plain[1])
    fastbn.batch_norm_train(x, running_mean=strided[0], running_var=strided[1])
    assert same_bits(plain, strided) and not memory[:, ::2].any()


def test_saved_may_be_used_twice_and_by_every_kind_of_caller(rng):
    c = case(rng, (6, 3, 50), np.float32, activation="relu", residual=True)
    _, saved = check_train(c)
    grad = rng.standard_normal(c.x.shape).astype(np.float32)
    first, second = check_backward(c, saved, grad), check_backward(c, saved, grad)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(AttributeError):
        first.input = None


@pytest.mark.parametrize("shape", [(6, 3, 50), (300, 3), (5000, 60)], ids=str)
def test_out_is_returned_and_in_place_inference_is_the_same(shape, rng):
    c = case(rng, shape, np.float32, activation="relu", residual=True)
    mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    want, out = check_infer(c, mean, var), np.empty_like(c.x)
    assert check_infer(c, mean, var, out=out) is out and same_bits(out, want)
    y, saved = check_train(c, out=out)
    assert y is out
    grad = rng.standard_normal(shape).astype(np.float32)
    want_grads = check_backward(c, saved, grad)
    dx = np.empty_like(c.x)
    assert same_bits(check_backward(c, saved, grad, out=dx).input, want_grads.input)
    x, residual = c.x.copy(), c.residual.copy()
    assert fastbn.batch_norm_infer(x, mean, var, c.weight, c.bias, **(c.options() | {"out": x})) is x
    assert same_bits(x, want)
    fastbn.batch_norm_infer(c.x, mean, var, c.weight, c.bias, **(c.options() | {"residual": residual, "out": residual}))
    assert same_bits(residual, want)


def test_backward_in_place(rng):
    c = case(rng, (6, 3, 50), np.float32, activation="relu")
    _, saved = check_train(c)
    grad = rng.standard_normal(c.x.shape).astype(np.float32)
    want = fastbn.backward(grad, saved)
    got = fastbn.backward(grad, saved, out=grad)
    assert got.input is grad and all(same_bits(a, b) for a, b in zip(got[:3], want[:3], strict=True))


def test_the_sign_of_the_relu_is_the_same_forward_and_backward(rng):
    """An element that the forward pass cut off has no gradient, however close to zero it was."""
    for shape in ((8, 4, 1031), (997, 13)):
        x, grad = normal(rng, shape, np.float32), np.ones(shape, np.float32)
        mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
        bias = rng.normal(size=shape[1]).astype(np.float32)
        x.reshape(shape[0], shape[1], -1)[:, :, 0] = -bias * np.float32(1.0 + 5e-6)
        y, saved = frozen(x, mean, var, None, bias, activation="relu")
        assert np.array_equal(fastbn.backward(grad, saved).input != 0, y > 0)


def test_bfloat16_is_rounded_to_nearest_even(rng):
    x = rng.integers(0, 2**16, (1, 1, 1 << 16)).astype(np.uint16).view(BF16)
    y = fastbn.batch_norm_infer(x, np.zeros(1, np.float32), np.ones(1, np.float32), eps=0.0)
    assert np.array_equal(np.isnan(y.astype(np.float32)), np.isnan(x.astype(np.float32)))
    keep = ~np.isnan(x.astype(np.float32))
    assert np.array_equal(y[keep].astype(np.float32), x[keep].astype(np.float32))
    y = fastbn.batch_norm_infer(x, np.zeros(1, np.float32), np.full(1, 9.0, np.float32), eps=0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        want = (x.astype(np.float32) * np.float32(1 / 3)).astype(BF16)
    assert np.array_equal(y[keep].astype(np.float32), want[keep].astype(np.float32))


def test_every_float16_survives_the_identity():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(1, 1, -1)
    y = fastbn.batch_norm_infer(x, np.zeros(1, np.float32), np.ones(1, np.float32), eps=0.0)
    keep = ~np.isnan(x)
    assert np.isnan(y[~keep]).all() and np.array_equal(y[keep], x[keep])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("options", [{}, {"ghost": 2}, {"mask": True}, {"renorm": (3.0, 5.0)}], ids=str)
def test_saved_can_be_copied_and_pickled(options, copied, rng):
    """A pickle of an array loses its memory order, unless that is C's or Fortran's."""
    for order in itertools.permutations(range(3)):
        x, residual, grad = (
            np.asarray(normal(rng, (4, 5, 7), np.float32).transpose(order), order="C").transpose(np.argsort(order))
            for _ in range(3)
        )
        running, valid = (np.zeros(5, np.float32), np.ones(5, np.float32)), np.arange(28).reshape(4, 7) % 3 > 0
        given = options | ({"mask": valid} if "mask" in options else {})
        _, saved = fastbn.batch_norm_train(x, None, None, *running, activation="relu", residual=residual, **given)
        want, found = fastbn.backward(grad, saved), fastbn.backward(grad, copied(saved))
        assert same_bits(want.input, found.input) and same_bits(want.residual, found.residual)
