"""Every kernel against the float64 reference, with the checks of the CPU's tests (tests/oracle.py)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastbn
from fastbn import reference
from fastbn.cuda import choice, launch, plan, tuning
from fastbn.cuda.driver import device_properties
from fastbn.errors import DeviceError
from tests.cuda import device
from tests.cuda.device import GpuArray, through_gpu
from tests.oracle import (
    case,
    check_backward,
    check_frozen,
    check_infer,
    check_train,
    column,
    expected,
    normal,
    same_bits,
)
from tests.tolerances import DTYPES, arithmetic, assert_within

OPTIONS = list(itertools.product((None, "relu"), (False, True)))
AFFINE = list(itertools.product((True, False), repeat=2))
# By kernel; odd sizes, tails, one channel, one sample, 7x7.
SHAPES = {
    "planes": [(8, 2, 136), (3, 5, 8, 9), (2, 1, 96), (1, 3, 264), (2, 2, 67)],
    "rows": [(77, 13), (67, 12), (8, 3, 7, 7), (9, 8), (3, 16), (2, 1, 5), (8, 5, 3)],
    "slab": [(8, 2, 136), (3, 5, 8, 8), (1, 3, 96), (4, 2, 16)],
    "persistent": [(337, 16), (131, 8), (3, 80), (2, 8)],
    "alone": [(120, 16), (31, 8), (3, 272), (2, 8)],
    "gang": [(8, 2, 136), (3, 5, 8, 8), (1, 3, 96), (8, 11, 128), (2, 1, 4096)],
    "bundle": [(8, 4, 7, 7), (9, 12, 3, 3), (9, 24, 3, 3), (3, 8, 5, 5), (2, 4, 3), (35, 4, 7, 7), (3, 8, 2, 2)],
    "again": [(9, 3, 7, 7), (40, 6), (2, 1, 5), (3, 2, 67), (1, 3, 264)],
}
ALL = [(kernel, shape) for kernel, shapes in SHAPES.items() for shape in shapes]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    through_gpu(monkeypatch)


@pytest.fixture
def use(monkeypatch):
    """Return a function that lets ``launch`` choose the kernel of this name, and checks that it does."""

    def choose(kernel, dims=None, kind="f32"):
        monkeypatch.setattr(tuning, "PERSISTENT", kernel in ("persistent", "alone"))
        monkeypatch.setattr(tuning, "SMALL", 1 << 20 if kernel in ("slab", "alone", "again") else 0)
        monkeypatch.setattr(tuning, "AGAIN", 1 << 14 if kernel == "again" else 0)
        monkeypatch.setattr(tuning, "GANG", kernel == "gang")
        monkeypatch.setattr(tuning, "BUNDLE", kernel == "bundle")
        choice.forget()
        if dims is None:
            return
        one = choice.one_launch(kind, dims, kernel != "again", False, False, True, False, device_properties())
        chosen = "rows" if plan.plan(dims, kind, True).rows else "planes"
        assert kernel == (chosen if one is None else one.name)

    return choose


def dims_of(shape):
    return shape[0], shape[1], int(np.prod(shape[2:]))


@pytest.mark.parametrize(("kernel", "shape"), ALL, ids=str)
def test_every_kernel_and_option(kernel, shape, use, rng):
    use(kernel, dims_of(shape))
    for (activation, residual), affine in zip(OPTIONS, AFFINE, strict=True):
        c = case(rng, shape, np.float32, activation=activation, residual=residual, affine=affine)
        _, saved = check_train(c)
        check_backward(c, saved, rng.standard_normal(shape).astype(np.float32))
    if kernel in ("planes", "rows"):
        mean, var = saved.mean.copy(), saved.variance.copy()
        for activation, residual in OPTIONS:
            c = case(rng, shape, np.float32, activation=activation, residual=residual)
            check_infer(c, mean, var)
            _, saved = check_frozen(c, mean, var)
            check_backward(c, saved, rng.standard_normal(shape).astype(np.float32), is_frozen=True)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.float32], ids=lambda d: d.name)
@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        ("planes", (3, 2, 8, 9)),
        ("rows", (16, 3, 7)),
        ("slab", (3, 3, 64)),
        ("persistent", (37, 24)),
        ("alone", (37, 24)),
        ("gang", (3, 3, 64)),
        ("gang", (5, 2, 192)),
        ("bundle", (5, 8, 7, 7)),
        ("bundle", (9, 16, 3, 3)),
        ("again", (5, 3, 7)),
    ],
    ids=str,
)
def test_every_dtype(kernel, shape, dtype, use, rng):
    kind = {"float64": "f64", "float16": "f16", "bfloat16": "bf16"}[dtype.name]
    use(kernel, dims_of(shape), kind)
    for activation, residual in (("relu", True), (None, False)):
        c = case(rng, shape, dtype, activation=activation, residual=residual)
        _, saved = check_train(c)
        check_backward(c, saved, rng.standard_normal(shape).astype(dtype))
    mean, var = (saved.mean.astype(arithmetic(dtype)), saved.variance.astype(arithmetic(dtype)))
    check_infer(c, mean, var)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("order", ["C", "channels_last"])
def test_axes_and_memory_orders(axis, order, rng):
    shape = (4, 3, 5, 6) if axis == 1 else (4, 5, 6, 3)
    c = case(rng, shape, np.float32, axis=axis % 4, activation="relu", residual=True)
    if order == "channels_last":
        c = c._replace(x=np.ascontiguousarray(c.x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
    _, saved = check_train(c)
    check_backward(c, saved, rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("skew", [1, 2])
def test_memory_that_is_not_aligned_takes_the_scalar_kernels(skew, use, rng):
    for kernel, shape in (("slab", (3, 2, 64)), ("persistent", (20, 8))):
        use(kernel)
        c = case(rng, shape, np.float32)
        mean, var = reference.statistics(c.x)
        y, _ = device.device.train(
            GpuArray.of(c.x, skew), GpuArray.of(c.weight), GpuArray.of(c.bias), None, None, 0.1, 1e-5, 1, None, None,
            None,
        )  # fmt: skip
        want = reference.apply(c.x, mean, var, c.weight, c.bias)
        assert np.abs(y.host - want).max() <= 4e-6


SMALL = [
    ("planes", (4, 3, 72)), ("rows", (40, 6)), ("slab", (4, 3, 64)), ("persistent", (40, 8)), ("alone", (40, 8)),
    ("again", (4, 3, 49)), ("gang", (8, 3, 136)), ("gang", (4, 3, 544)),
    ("bundle", (9, 8, 3, 3)), ("bundle", (4, 4, 7, 7)),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "shape"), SMALL, ids=str)
def test_large_mean_is_no_loss(kernel, shape, use, rng):
    use(kernel)
    x = (rng.standard_normal(shape) + 1e4).astype(np.float32)
    weight = rng.uniform(0.5, 3.0, shape[1]).astype(np.float32)
    y, saved = device.batch_norm_train(x, weight)
    mean, var = reference.statistics(x)
    assert (np.abs(y - reference.apply(x, mean, var, weight)) / column(weight, x.ndim, 1)).max() <= 1e-6
    grad = rng.standard_normal(shape).astype(np.float32)
    dx = reference.backward(grad, x, mean, var, weight)[0]
    assert (np.abs(device.backward(grad, saved).input - dx) / column(weight, x.ndim, 1)).max() <= 2e-6


@pytest.mark.parametrize(("kernel", "shape"), SMALL, ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30, 123.456, 1e30])
def test_constant_channel_gives_exactly_the_bias(kernel, shape, value, use, rng):
    use(kernel)
    x = normal(rng, shape, np.float32)
    x[:, 1] = value
    weight, bias = (rng.normal(size=shape[1]).astype(np.float32) for _ in range(2))
    y, saved = device.batch_norm_train(x, weight, bias)
    assert (y[:, 1] == bias[1]).all() and saved.variance[1] == 0.0 and saved.mean[1] == np.float32(value)


@pytest.mark.parametrize(("kernel", "shape"), SMALL, ids=str)
def test_pivots_far_from_the_data(kernel, shape, use, rng):
    use(kernel)
    N, S = shape[0], int(np.prod(shape[2:]))
    c = case(rng, shape, np.float32)
    x = c.x.reshape(N, shape[1], S)
    for n in {N // 8, 3 * N // 8, 5 * N // 8, 7 * N // 8}:
        x[n, :, [0, S // 2]] = 3e4
    _, saved = check_train(c)
    check_backward(c, saved, rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("scale", [1e18, 1e-18])
@pytest.mark.parametrize(("kernel", "shape"), SMALL, ids=str)
def test_squares_that_are_hardly_float32(kernel, shape, scale, use, rng):
    use(kernel)
    c = case(rng, shape, np.float32, eps=1e-5 if scale > 1 else 1e-3 * scale**2)
    c = c._replace(x=(c.x.astype(np.float64) * scale).astype(np.float32))
    _, saved = check_train(c)
    check_backward(c, saved, rng.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize(("kernel", "shape"), SMALL, ids=str)
def test_gradients_where_deviations_are_huge(kernel, shape, use, rng):
    """Their slope times the scale would be no float32."""
    use(kernel)
    x = (rng.standard_normal(shape) * 1e25).astype(np.float32)
    grad = rng.standard_normal(shape).astype(np.float32)
    mean, var = reference.statistics(x)
    want = reference.backward(grad, x, mean, var)[0] * 1e25
    got = device.backward(grad, device.batch_norm_train(x)[1]).input * np.float64(1e25)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_variance_beyond_float32_still_normalises(rng):
    """The saved variance is inf, its inverse root is not."""
    c = case(rng, (4, 3, 72), np.float32)
    c = c._replace(x=(c.x.astype(np.float64) * 1e25).astype(np.float32))
    y, _ = device.batch_norm_train(c.x, c.weight, c.bias)
    mean, var = reference.statistics(c.x)
    np.testing.assert_allclose(y, reference.apply(c.x, mean, var, c.weight, c.bias), atol=4e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("kernel", "shape"), SMALL, ids=str)
def test_nan_and_inf_stay_in_their_channel(kernel, shape, value, use, rng):
    use(kernel)
    x, clean = normal(rng, shape, np.float32), [0, 2]
    dirty = x.copy()
    dirty[0, 1] = value
    rm, rv = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    y, saved = device.batch_norm_train(dirty, None, None, rm, rv)
    want, saved_clean = device.batch_norm_train(x)
    assert np.isnan(y[:, 1]).all() and same_bits(y[:, clean], want[:, clean])
    assert np.isnan(rv[1]) and np.isnan(rm[1]) == np.isnan(value) and not np.isfinite(rm[1])
    grads = device.backward(x, saved)
    assert np.isnan(grads.input[:, 1]).all()
    assert same_bits(grads.input[:, clean], device.backward(x, saved_clean).input[:, clean])


@pytest.mark.parametrize(("kernel", "shape"), SMALL, ids=str)
def test_infinite_gradients_stay_infinite(kernel, shape, use, rng):
    """The error of a two-sum is NaN there, and so is the mean's remainder, 0, times infinity."""
    use(kernel)
    x, g = normal(rng, shape, np.float32), normal(rng, shape, np.float32)
    g[-1, 1, ...].flat[0] = -np.inf
    weight, bias = np.ones((2, shape[1]), np.float32)
    grads = device.backward(g, device.batch_norm_train(x, weight, bias)[1])
    want = fastbn.backward(g, fastbn.batch_norm_train(x, weight, bias)[1])
    np.testing.assert_allclose(grads.bias, want.bias, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.weight, want.weight, rtol=1e-5, atol=1e-5)
    assert grads.bias[1] == -np.inf


def test_in_place(use, rng):
    for kernel, shape in SMALL:
        use(kernel)
        c = case(rng, shape, np.float32, activation="relu")
        mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
        want = check_infer(c, mean, var)
        x = c.x.copy()
        assert device.batch_norm_infer(x, mean, var, c.weight, c.bias, activation="relu", out=x) is x
        assert same_bits(x, want)
        _, saved = check_train(c)
        grad = rng.standard_normal(shape).astype(np.float32)
        want_dx = device.backward(grad, saved).input
        assert device.backward(grad, saved, out=grad).input is grad and same_bits(grad, want_dx)


@pytest.mark.parametrize(("kernel", "shape"), [("gang", (8, 19, 8, 8)), ("bundle", (9, 48, 3, 3))], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_in_place_of_the_residual_where_sums_are_no_good(kernel, shape, activation, use, rng):
    """What is done again reads the residual once more."""
    use(kernel, dims_of(shape))
    c = case(rng, shape, np.float32, residual=True, activation=activation)
    c.x[:, 1::12] *= 1e25
    moved = GpuArray.of(np.zeros(shape[1], np.float32)), GpuArray.of(np.ones(shape[1], np.float32))
    x, residual, params = GpuArray.of(c.x), GpuArray.of(c.residual), (GpuArray.of(c.weight), GpuArray.of(c.bias))
    y, _ = device.device.train(x, *params, *moved, 0.1, 1e-5, 1, activation, residual, residual)
    mean, var = reference.statistics(c.x)
    want, limit, _ = expected(c, mean, var)
    assert y is residual
    assert_within(y.host, want, limit, "y")
    np.testing.assert_allclose(moved[0].host, 0.1 * mean, rtol=1e-4, atol=1e-5)  # once, not twice
    unbiased = var * c.x[:, 0].size / (c.x[:, 0].size - 1)
    np.testing.assert_allclose(moved[1].host[2:12], 0.9 + 0.1 * unbiased[2:12], rtol=1e-4)


def test_empty_batch():
    rm, rv = np.full(3, 0.25, np.float32), np.full(3, 0.75, np.float32)
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0)):
        x = np.empty(shape, np.float32)
        y, saved = device.batch_norm_train(x, np.ones(3, np.float32), np.zeros(3, np.float32), rm, rv)
        assert y.shape == shape and (rm == 0.25).all() and saved.count == 0
        grads = device.backward(x, saved)
        assert grads.input.shape == shape and (grads.weight == 0).all()
        assert device.batch_norm_infer(x, rm, rv).shape == shape


def test_moments_come_to_the_host_in_float64(rng):
    for shape in ((4, 3, 72), (40, 6)):
        x = (rng.standard_normal(shape) + 1e4).astype(np.float32)
        found = device.device.moments_of(GpuArray.of(x), 1)
        mean, var = reference.statistics(x)
        assert found.count == x.size // shape[1]
        np.testing.assert_allclose(found.mean, mean, rtol=1e-10)  # more than float32 holds
        np.testing.assert_allclose(found.variance(), var, rtol=2e-6)


def test_same_bits_every_time(use, rng):
    for kernel, shape in SMALL:
        use(kernel)
        c = case(rng, shape, np.float32)
        first, saved = device.batch_norm_train(c.x, c.weight, c.bias)
        second, _ = device.batch_norm_train(c.x, c.weight, c.bias)
        assert same_bits(first, second)
        grad = rng.standard_normal(shape).astype(np.float32)
        a, b = device.backward(grad, saved), device.backward(grad, saved)
        assert all(same_bits(p, q) for p, q in zip(a[:3], b[:3], strict=True) if p is not None)


def test_a_grid_that_the_driver_refuses_is_split(use, rng, monkeypatch):
    use("persistent")
    refused = []

    def refuses(kernel, *rest):
        refused.append(kernel)
        raise DeviceError("too large")

    monkeypatch.setattr(choice, "run", refuses)
    monkeypatch.setattr(choice, "SIMULATED", False)
    monkeypatch.setattr(choice, "fits", lambda *args: True)
    monkeypatch.setattr(choice, "_refused", set())
    c = case(rng, (337, 16), np.float32)
    with pytest.warns(RuntimeWarning, match="no rows_train in one launch, several launches instead: too large"):
        _, saved = check_train(c)
    with pytest.warns(RuntimeWarning, match="no rows_backward"):
        check_backward(c, saved, rng.standard_normal((337, 16)).astype(np.float32))
    check_train(c)
    assert len(refused) == 2


def test_the_family_of_entry_points_is_the_cpus():
    from fastbn.cpu import launch as cpu

    for name in ("train", "infer", "backward", "moments"):
        assert callable(getattr(launch, name)) and callable(getattr(cpu, name))
