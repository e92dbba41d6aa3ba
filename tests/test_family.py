"""Layer, instance and group norm against the float64 reference, in every dtype, memory order and with every affine."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn import reference
from tests.tolerances import DTYPES, arithmetic, assert_within, bound

SHAPES = [(3, 8, 5), (2, 8, 300), (9, 8), (2, 8, 3, 7), (33, 8, 17, 19), (70, 8, 300)]


def orders(x):
    """Yield x in several memory orders: C, Fortran, channels last, with gaps, read-only."""
    yield x
    yield np.asfortranarray(x)
    yield np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    yield np.repeat(x, 2, axis=-1)[..., ::2]
    locked = x.copy()
    locked.flags.writeable = False
    yield locked


class Kind:
    """One member of the family: the call, its sets in the reference, the shape of its parameters."""

    def __init__(self, name, shape):
        self.name, self.shape = name, shape
        rank, C = len(shape), shape[1]
        self.split, self.groups = shape, 4
        if name == "layer":
            self.axes, self.param, self.wide = (rank - 1,), shape[-1:], shape[-1:]
        elif name == "layer from 1":
            self.axes, self.param, self.wide = tuple(range(1, rank)), shape[1:], shape[1:]
        elif name == "instance":
            self.axes, self.param, self.wide = tuple(range(2, rank)), (C,), (C, *[1] * (rank - 2))
        else:
            self.groups = 1 if name == "one group" else 4
            self.split = (shape[0], self.groups, C // self.groups, *shape[2:])
            self.axes, self.param = tuple(range(2, rank + 1)), (C,)
            self.wide = (self.groups, C // self.groups, *[1] * (rank - 2))

    def __call__(self, x, weight, bias, **options):
        if self.name == "layer":
            return fastbn.layer_norm(x, weight, bias, **options)
        if self.name == "layer from 1":
            return fastbn.layer_norm(x, weight, bias, axis=1, **options)
        if self.name == "instance":
            return fastbn.instance_norm(x, weight, bias, **options)
        return fastbn.group_norm(x, self.groups, weight, bias, **options)

    def want(self, x, weight, bias):
        x = np.asarray(x, np.float64).reshape(self.split)
        parts = [None if p is None else np.asarray(p, np.float64).reshape(self.wide) for p in (weight, bias)]
        y = reference.normalise(x, self.axes, *parts)
        terms = (1.0 + np.abs(reference.normalise(x, self.axes))) * (1.0 if weight is None else np.abs(parts[0]))
        terms = terms + (0.0 if bias is None else np.abs(parts[1]))
        return y.reshape(self.shape), terms.reshape(self.shape)

    def want_gradients(self, g, x, weight):
        x, g = (np.asarray(a, np.float64).reshape(self.split) for a in (x, g))
        w = None if weight is None else np.asarray(weight, np.float64).reshape(self.wide)
        dx, uxhat = reference.normalise_backward(g, x, self.axes, w)
        over = tuple(a for a, n in enumerate((1,) * (x.ndim - len(self.wide)) + self.wide) if n != x.shape[a])
        over += tuple(a for a in range(x.ndim - len(self.wide)) if a not in over)
        return dx.reshape(self.shape), uxhat.sum(over).reshape(self.param), g.sum(over).reshape(self.param)


KINDS = ["layer", "layer from 1", "instance", "group", "one group"]


def make(rng, name, shape, dtype, affine=(True, True)):
    kind, p = Kind(name, shape), arithmetic(dtype)
    x = (
        rng.standard_normal(shape) * rng.uniform(0.5, 2.0, shape[1]).reshape(-1, *[1] * (len(shape) - 2)) + 1.5
    ).astype(dtype)
    weight = rng.uniform(-2.0, 2.0, kind.param).astype(p) if affine[0] else None
    bias = rng.standard_normal(kind.param).astype(p) if affine[1] else None
    return kind, x, weight, bias


def skip_without_runs(name, shape):
    if name == "instance" and len(shape) == 2:
        pytest.skip("one value per set")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_forward_and_backward(rng, name, shape, dtype):
    skip_without_runs(name, shape)
    for affine in ((True, True), (True, False), (False, True), (False, False)):
        kind, x, weight, bias = make(rng, name, shape, dtype, affine)
        g = rng.standard_normal(shape).astype(dtype)
        want, terms = kind.want(x, weight, bias)
        wants = kind.want_gradients(g, x, weight)
        y, saved = kind(x, weight, bias)
        assert y.dtype == x.dtype and y.flags.c_contiguous
        assert_within(y, want, bound(want, 4 * terms, dtype), "y")
        grads = fastbn.backward(g, saved)
        scale = saved.invstd.max() * np.abs(g).max() * (1.0 if weight is None else np.abs(weight).max())
        limit = bound(wants[0], 16 * scale, dtype)
        assert_within(grads.input, wants[0], limit, "dx")
        count = x.size / weight.size if affine[0] else x.size / bias.size if affine[1] else 0
        for given, got, exact in zip(affine, (grads.weight, grads.bias), wants[1:], strict=True):
            assert (got is None) == (not given)
            if given:
                assert got.dtype == arithmetic(dtype) and got.shape == kind.param
                assert_within(got, exact, bound(exact, 16 * np.sqrt(count), arithmetic(dtype)), "parameter gradient")
        assert grads.residual is None


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 8, 300), (33, 8, 17, 19)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_every_memory_order(rng, name, shape):
    kind, x, weight, bias = make(rng, name, shape, np.float32)
    g = rng.standard_normal(shape).astype(np.float32)
    want, terms = kind.want(x, weight, bias)
    dx = kind.want_gradients(g, x, weight)[0]
    for mine in orders(x):
        for out in (None, np.empty_like(x), np.empty_like(np.asfortranarray(x))):
            y, saved = kind(mine, weight, bias, out=out)
            assert out is None or y is out
            assert_within(y, want, bound(want, 4 * terms, np.float32), "y")
        for grad in orders(g):
            got = fastbn.backward(grad, saved).input
            assert_within(got, dx, bound(dx, 16 * np.abs(dx).max(), np.float32), "dx")
        assert np.shares_memory(y, out)


@pytest.mark.parametrize("name", ["instance", "group"])
@pytest.mark.parametrize("shape", [(3, 5, 8), (4, 31, 33, 8), (2, 3, 8, 4)], ids=str)
def test_another_channel_axis(rng, name, shape):
    axis = shape.index(8)
    first = np.moveaxis(np.empty(shape), axis, 1).shape
    kind, x, weight, bias = make(rng, name, first, np.float32)
    g = rng.standard_normal(first).astype(np.float32)
    want, terms = kind.want(x, weight, bias)
    dx, dweight, dbias = kind.want_gradients(g, x, weight)
    there = [np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (x, g, want, terms, dx)]
    y, saved = kind(there[0], weight, bias, axis=axis - len(shape))
    assert y.flags.c_contiguous
    assert_within(y, there[2], bound(there[2], 4 * there[3], np.float32), "y")
    grads = fastbn.backward(there[1], saved)
    assert_within(grads.input, there[4], bound(there[4], 16 * np.abs(dx).max(), np.float32), "dx")
    np.testing.assert_allclose(grads.weight, dweight, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(grads.bias, dbias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_finite_differences(rng, name):
    kind, x, weight, bias = make(rng, name, (3, 8, 4), np.float64)
    g = rng.standard_normal(x.shape)
    grads = fastbn.backward(g, kind(x, weight, bias)[1])
    h = 1e-6
    for got, array, put in (
        (grads.input, x, lambda a: (a, weight, bias)),
        (grads.weight, weight, lambda a: (x, a, bias)),
        (grads.bias, bias, lambda a: (x, weight, a)),
    ):
        for at in rng.choice(array.size, 4, replace=False):
            step = np.zeros(array.size)
            step[at] = h
            step = step.reshape(array.shape)
            up, down = (np.sum(kind(*put(array + s))[0] * g) for s in (step, -step))
            assert got.flat[at] == pytest.approx((up - down) / (2 * h), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_large_mean_and_constant_sets(rng, name):
    for shape in ((3, 8, 64), (2, 8, 300)):
        kind, _, weight, bias = make(rng, name, shape, np.float32)
        far = (rng.standard_normal(shape) + 1e4).astype(np.float32)
        want, terms = kind.want(far, weight, bias)
        assert_within(kind(far, weight, bias)[0], want, bound(want, 4 * terms, np.float32), "y")
        for value in (1e-30, 123.456, 1e30):
            y, _ = kind(np.full(shape, value, np.float32), weight, bias)
            assert np.array_equal(y, kind.want(np.zeros(shape), np.zeros_like(weight), bias)[0].astype(np.float32))


def test_nan_stays_in_its_set(rng):
    x = rng.standard_normal((4, 6, 9)).astype(np.float32)
    x[1, 2, 3] = np.nan
    bad = np.isnan(fastbn.layer_norm(x)[0])
    assert bad[1, 2].all() and bad.sum() == 9
    bad = np.isnan(fastbn.instance_norm(x)[0])
    assert bad[1, 2].all() and bad.sum() == 9
    bad = np.isnan(fastbn.group_norm(x, 2)[0])
    assert bad[1, :3].all() and bad.sum() == 27


def test_gradients_beyond_the_dtype_do_not_warn(rng):
    """Warnings are errors in the tests; here floating-point errors are too."""
    x = rng.standard_normal((3, 8, 300)).astype(np.float32)
    x[0, 0, :2] = np.inf, -np.inf
    g = np.full(x.shape, 3e38, np.float32)
    for name in KINDS:
        kind = Kind(name, x.shape)
        with np.errstate(all="raise"):
            _, saved = kind(x, np.ones(kind.param, np.float32), np.zeros(kind.param, np.float32))
            grads = fastbn.backward(g, saved)
        assert np.isinf(grads.bias).all() and not np.isfinite(grads.weight).all()


def test_moments_are_by_set(rng):
    """As on a GPU."""
    x = rng.standard_normal((3, 8, 30))
    for saved in (fastbn.group_norm(x, 2)[1], fastbn.instance_norm(x)[1], fastbn.layer_norm(x)[1]):
        sets = x.reshape(-1, saved.count)
        assert saved.moments.count == sets.shape[1]
        np.testing.assert_allclose(saved.moments.mean, sets.mean(1), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(saved.moments.variance(), sets.var(1), rtol=1e-12)


def test_what_is_saved(rng):
    x = rng.standard_normal((4, 6, 5, 3))
    for call, axes, shape in (
        (lambda: fastbn.layer_norm(x, axis=2), (2, 3), (4, 6)),
        (lambda: fastbn.instance_norm(x), (2, 3), (4, 6)),
        (lambda: fastbn.group_norm(x, 6), (2, 3), (4, 6)),
    ):
        saved = call()[1]
        assert saved.mean.shape == saved.invstd.shape == shape and saved.count == 15 and saved.updated == 0
        np.testing.assert_allclose(saved.mean, x.mean(axes), rtol=0, atol=1e-14)
        np.testing.assert_allclose(saved.variance, x.var(axes), rtol=1e-13)
        np.testing.assert_allclose(saved.invstd, 1 / np.sqrt(x.var(axes) + 1e-5), rtol=1e-13)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", [(0, 8, 5), (3, 8, 0)], ids=str)
def test_empty(name, shape):
    kind = Kind(name, shape)
    ones = np.ones(kind.param, np.float32)
    y, saved = kind(np.empty(shape, np.float32), ones, ones)
    grads = fastbn.backward(y, saved)
    assert y.shape == grads.input.shape == shape
    assert grads.weight.shape == kind.param and not grads.weight.any()


def test_gradient_in_place(rng):
    for name in KINDS:
        kind, x, weight, bias = make(rng, name, (3, 8, 300), np.float32)
        g = rng.standard_normal(x.shape).astype(np.float32)
        _, saved = kind(x, weight, bias)
        want = fastbn.backward(g, saved)
        got = fastbn.backward(g, saved, out=g)
        assert got.input is g
        np.testing.assert_allclose(g, want.input, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got.weight, want.weight, rtol=1e-5, atol=1e-5)


X = np.zeros((4, 6, 5), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: fastbn.layer_norm(X, np.ones(4, np.float32)), ValueError, "weight"),
        (lambda: fastbn.layer_norm(X, None, np.ones(5)), TypeError, "bias"),
        (lambda: fastbn.layer_norm(X, [[1.0], [2.0, 3.0]]), TypeError, "weight"),
        (lambda: fastbn.group_norm(X, 2, np.ma.ones(6)), TypeError, "weight"),
        (lambda: fastbn.layer_norm(X, axis=3), ValueError, "axis"),
        (lambda: fastbn.layer_norm(X, eps=10**400), ValueError, "eps"),
        (lambda: fastbn.layer_norm(X, eps=0.0), ValueError, "eps"),
        (lambda: fastbn.layer_norm(X, out=X), ValueError, "out"),
        (lambda: fastbn.layer_norm(X, out=np.empty((4, 6, 4), np.float32)), ValueError, "out"),
        (lambda: fastbn.layer_norm(X.astype(int)), TypeError, "x"),
        (lambda: fastbn.layer_norm(X[0, 0]), ValueError, "x"),
        (lambda: fastbn.instance_norm(X, axis=0), ValueError, "axis"),
        (lambda: fastbn.instance_norm(X[..., :1]), ValueError, "x"),
        (lambda: fastbn.instance_norm(X[:, :, 0]), ValueError, "x"),
        (lambda: fastbn.instance_norm(X, out=X[::-1]), ValueError, "out"),
        (lambda: fastbn.instance_norm(X, np.ones(5, np.float32)), ValueError, "weight"),
        (lambda: fastbn.group_norm(X, 4), ValueError, "num_groups"),
        (lambda: fastbn.group_norm(X, 0), ValueError, "num_groups"),
        (lambda: fastbn.group_norm(X, 2.0), TypeError, "num_groups"),
        (lambda: fastbn.group_norm(X[:1, :, :1], 6), ValueError, "x"),
        (lambda: fastbn.group_norm(X, 2, axis=0), ValueError, "axis"),
        (lambda: fastbn.group_norm(X, 2, np.ones(2, np.float32)), ValueError, "weight"),
        (lambda: fastbn.backward(X[:2], fastbn.layer_norm(X)[1]), ValueError, "grad_output"),
        (lambda: fastbn.backward(X, fastbn.group_norm(X, 2)[1], out=X), ValueError, "out"),
        (lambda: fastbn.backward(X, fastbn.instance_norm(X)[1], out=X), ValueError, "out"),
    ],
)
def test_errors_name_the_argument(call, error, named):
    before = X.copy()
    with pytest.raises(error, match=rf"^{named}: expected"):
        call()
    assert np.array_equal(X, before)


@pytest.mark.torch
def test_parity_with_torch(rng):
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    x = rng.standard_normal((3, 8, 6, 5)).astype(np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)
    w, b = rng.standard_normal((2, 8)).astype(np.float32)
    lw, lb = rng.standard_normal((2, 6, 5)).astype(np.float32)
    for ours, theirs, p in (
        (lambda: fastbn.layer_norm(x, lw, lb, axis=2), lambda x, w, b: F.layer_norm(x, (6, 5), w, b), (lw, lb)),
        (lambda: fastbn.instance_norm(x, w, b), lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (w, b)),
        (lambda: fastbn.group_norm(x, 2, w, b), lambda x, w, b: F.group_norm(x, 2, w, b), (w, b)),
    ):
        tensors = [torch.tensor(a, requires_grad=True) for a in (x, *p)]
        want = theirs(*tensors)
        want.backward(torch.tensor(g))
        y, saved = ours()
        grads = fastbn.backward(g, saved)
        np.testing.assert_allclose(y, want.detach().numpy(), rtol=1e-5, atol=1e-5)
        for got, tensor in zip(grads, tensors, strict=False):
            np.testing.assert_allclose(got, tensor.grad.numpy(), rtol=1e-4, atol=2e-5)
