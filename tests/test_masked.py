"""Masks and lengths: the same as packing the valid values, zero elsewhere, and nothing leaks from masked positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import layout, places, reference
from fastbn.cpu import packing
from tests.tolerances import DTYPES, arithmetic, assert_within, bound

CASES = [
    ((6, 5), 1),
    ((6, 5, 9), 1),
    ((6, 9, 5), 2),
    ((4, 3, 5, 7), 1),
    ((4, 3, 7, 5), -1),
    ((6, 1, 9), 1),
    ((6, 1), 1),
]


def rows(x, axis, mask):
    """Pack by hand: valid positions as rows."""
    return np.moveaxis(x, axis, -1)[np.broadcast_to(mask, np.moveaxis(x, axis, -1).shape[:-1])]


def packed_by_hand(x, axis, mask):
    """Pack by hand as the array lies: rows (M, C), or channels-first (1, C, M)."""
    values = rows(x, axis, mask)
    return values if axis % x.ndim == x.ndim - 1 else np.ascontiguousarray(values.T)[None]


def draw(rng, shape, axis, dtype=np.float32, density=0.6):
    C, p = shape[axis], arithmetic(dtype)
    x = (rng.standard_normal(shape) * 2 + 1).astype(dtype)
    mask = rng.random(np.moveaxis(x, axis, -1).shape[:-1]) < density
    mask[0], mask[1] = False, True
    return x, mask, rng.uniform(-2, 2, C).astype(p), rng.standard_normal(C).astype(p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_same_as_packing(rng, shape, axis, dtype):
    x, mask, weight, bias = draw(rng, shape, axis, dtype)
    C, p = shape[axis], arithmetic(dtype)
    residual = rng.standard_normal(shape).astype(dtype)
    g = rng.standard_normal(shape).astype(dtype)
    moving = [np.full(C, 0.5, p), np.full(C, 2.0, p)]
    packed_moving = [m.copy() for m in moving]
    px, pr, pg = (packed_by_hand(a, axis, mask) for a in (x, residual, g))
    for activation in (None, "relu"):
        y, saved = fastbn.batch_norm_train(
            x, weight, bias, *moving, axis=axis, mask=mask, residual=residual, activation=activation
        )
        packed, inner = fastbn.batch_norm_train(
            px, weight, bias, *packed_moving, residual=pr, activation=activation
        )  # fmt: skip
        assert np.array_equal(packed_by_hand(y, axis, mask), packed) and not rows(y, axis, ~mask).any()
        assert np.array_equal(saved.mean, inner.mean) and saved.count == inner.count == mask.sum()
        grads, packed_grads = fastbn.backward(g, saved), fastbn.backward(pg, inner)
        for got, want in ((grads.input, packed_grads.input), (grads.residual, packed_grads.residual)):
            assert got.shape == shape
            assert np.array_equal(packed_by_hand(got, axis, mask), want) and not rows(got, axis, ~mask).any()
        assert np.array_equal(grads.weight, packed_grads.weight) and np.array_equal(grads.bias, packed_grads.bias)
        moments = fastbn.Moments.of(x, axis, mask)
        assert np.array_equal(moments.m2, fastbn.Moments.of(px).m2) and moments.count == mask.sum()
    assert all(np.array_equal(a, b) for a, b in zip(moving, packed_moving, strict=True))


@pytest.mark.parametrize("runs", [True, False])
def test_a_few_channels_at_a_time(rng, runs, monkeypatch):
    """The bits do not depend on how many are packed together, nor on whether runs or values are moved."""
    x, mask, weight, bias = draw(rng, (5, 7, 60), 1)
    if runs:
        mask[:, 10:50] = True
    g, results = rng.standard_normal(x.shape).astype(np.float32), []
    for chunk, run in ((1 << 18, 10), (1, 10), (3 * mask.sum(), 1), (2 * mask.sum(), 1 << 30)):
        monkeypatch.setattr(places, "CHUNK", chunk)
        monkeypatch.setattr(packing, "RUN", run)
        mean, var = np.zeros(7, np.float32), np.ones(7, np.float32)
        y, saved = fastbn.batch_norm_train(x, weight, bias, mean, var, mask=mask, residual=g, activation="relu")
        results.append([y, mean, var, *fastbn.backward(g, saved), fastbn.Moments.of(x, mask=mask).m2])
    for others in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_against_the_reference(rng):
    x, mask, weight, bias = draw(rng, (6, 5, 9), 1)
    y, saved = fastbn.batch_norm_train(x, weight, bias, mask=mask)
    mean, var = reference.statistics(rows(x, 1, mask))
    want = reference.apply(x, mean, var, weight, bias) * mask[:, None]
    assert_within(y, want, bound(want, 16.0, np.float32), "y")
    np.testing.assert_allclose(saved.variance, var, rtol=1e-5)
    m = fastbn.Moments.of(x, mask=mask)
    np.testing.assert_allclose(m.mean, mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(m.variance(), var, rtol=1e-5)
    assert m.count == mask.sum()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_nothing_leaks(rng, shape, axis, garbage):
    x, mask, weight, bias = draw(rng, shape, axis)
    g = rng.standard_normal(shape).astype(np.float32)
    dirty, dirty_g = x.copy(), g.copy()
    for a in (dirty, dirty_g):
        np.moveaxis(a, axis, -1)[~mask] = garbage
    results = []
    for a, b in ((x, g), (dirty, dirty_g)):
        moving = np.zeros(shape[axis], np.float32), np.ones(shape[axis], np.float32)
        y, saved = fastbn.batch_norm_train(a, weight, bias, *moving, axis=axis, mask=mask)
        grads = fastbn.backward(b, saved)
        results.append([y, *grads[:3], *moving, fastbn.Moments.of(a, axis, mask).m2])
    for clean, other in zip(*results, strict=True):
        assert np.array_equal(clean, other)


def test_a_mask_of_all_and_of_none(rng):
    x = rng.standard_normal((4, 3, 5)).astype(np.float32)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    y, saved = fastbn.batch_norm_train(x, None, None, mean, var, mask=np.zeros((4, 5), bool))
    assert y.shape == x.shape and not y.any() and saved.count == 0 and saved.updated == 0
    assert not mean.any() and (var == 1).all()
    grads = fastbn.backward(x, saved)
    assert grads.input.shape == x.shape and not grads.input.any()
    assert fastbn.Moments.of(x, mask=np.zeros((4, 5), bool)).count == 0
    assert np.array_equal(fastbn.batch_norm_train(x, mask=True)[0], fastbn.batch_norm_train(x)[0])


def test_masks_broadcast(rng):
    x = rng.standard_normal((4, 3, 5, 6)).astype(np.float32)
    row = np.array([True, False, True, True, False])
    full = np.broadcast_to(row[:, None], (4, 5, 6))
    assert np.array_equal(
        fastbn.batch_norm_train(x, mask=row[:, None])[0], fastbn.batch_norm_train(x, mask=full.copy())[0]
    )


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_lengths_are_a_mask(rng, axis):
    shape = (5, 3, 7) if axis == 1 else (5, 7, 3)
    x = rng.standard_normal(shape).astype(np.float32)
    for lengths in ([7, 3, 0, 1, 5], [7, 7, 7, 7, 7], np.array([1, 1, 0, 0, 0], np.uint8)):
        mask = np.arange(7) < np.asarray(lengths)[:, None]
        got, saved = fastbn.batch_norm_train(x, axis=axis, lengths=lengths)
        want, other = fastbn.batch_norm_train(x, axis=axis, mask=mask)
        assert np.array_equal(got, want)
        assert np.array_equal(fastbn.backward(x, saved).input, fastbn.backward(x, other).input)
        assert np.array_equal(fastbn.Moments.of(x, axis, lengths=lengths).m2, fastbn.Moments.of(x, axis, mask).m2)


@given(st.data())
def test_statistics_are_those_of_the_ragged_sequences(data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=5).filter(lambda v: sum(v) > 1))
    rng = np.random.default_rng(sum(lengths))
    x = rng.standard_normal((len(lengths), 6, 2))
    saved = fastbn.batch_norm_train(x, axis=2, lengths=lengths)[1]
    ragged = np.concatenate([x[n, :length] for n, length in enumerate(lengths)])
    np.testing.assert_allclose(saved.mean, ragged.mean(0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(saved.variance, ragged.var(0), rtol=1e-12, atol=1e-20)


def test_lengths_of_nothing():
    x = np.empty((0, 3, 5), np.float32)
    assert fastbn.batch_norm_train(x, lengths=[])[0].shape == x.shape


ORDERS = [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 0, 2, 3)]


def in_order(a, order):
    """Copy an array so that its axes lie in memory in this order."""
    return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("other", [*ORDERS, "gaps"], ids=str)
def test_out_and_memory_orders(rng, order, other):
    """Any order is used as it lies, and where two meet the output's counts; the result is the same to rounding."""
    x, mask, weight, bias = draw(rng, (4, 3, 5, 7), 1)
    g = rng.standard_normal(x.shape).astype(np.float32)
    want, saved = fastbn.batch_norm_train(x, weight, bias, mask=mask, residual=g, activation="relu")
    wanted = fastbn.backward(g, saved)
    gaps = np.repeat(x, 2, axis=-1)[..., ::2]
    given = gaps if other == "gaps" else in_order(x, other)
    out = in_order(np.full(x.shape, np.nan, np.float32), order)
    for into in (None, out):
        got, found = fastbn.batch_norm_train(
            given, weight, bias, mask=mask, residual=in_order(g, order), activation="relu", out=into
        )
        assert got is into or into is None
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
        assert not rows(got, 1, ~mask).any()
        for dx in (None, in_order(np.full(x.shape, np.nan, np.float32), order)):
            grads = fastbn.backward(in_order(g, order), found, out=dx)
            assert grads.input is dx or dx is None
            for a, b in zip(grads, wanted, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fastbn.Moments.of(given, 1, mask).m2, fastbn.Moments.of(x, 1, mask).m2, rtol=1e-6)


def test_channels_last_by_strides_is_channels_last(rng):
    """The transposed view of (N, T, C), as PyTorch's users make it, is not copied: the same bits as axis=2."""
    x, mask, weight, bias = draw(rng, (6, 9, 5), 2)
    g = rng.standard_normal(x.shape).astype(np.float32)
    want, saved = fastbn.batch_norm_train(x, weight, bias, axis=2, mask=mask)
    y, other = fastbn.batch_norm_train(x.swapaxes(1, 2), weight, bias, mask=mask)
    assert np.array_equal(y.swapaxes(1, 2), want) and y.strides == x.swapaxes(1, 2).strides
    dx, wanted = fastbn.backward(g.swapaxes(1, 2), other), fastbn.backward(g, saved)
    assert np.array_equal(dx.input.swapaxes(1, 2), wanted.input) and np.array_equal(dx.weight, wanted.weight)
    assert other.x.base is not None and np.shares_memory(other.x, x)


@pytest.mark.parametrize("shape", [(6, 0), (0, 3), (4, 0, 5), (4, 3, 0)], ids=str)
def test_nothing_into_a_given_output(shape):
    x, mask = np.empty(shape, np.float32), np.arange(shape[0]) > 2
    mask = mask.reshape(-1, *[1] * (len(shape) - 2))
    out = np.empty_like(x)
    y, saved = fastbn.batch_norm_train(x, mask=mask, out=out)
    assert y is out and fastbn.backward(x, saved, out=out).input is out


def test_given_statistics_too(rng):
    x, mask, _, _ = draw(rng, (6, 5, 9), 1)
    x[~np.broadcast_to(mask[:, None], x.shape)] = np.nan
    bn = fastbn.BatchNorm(5).eval()
    y = bn(x, mask=mask)
    want = np.where(mask[:, None], fastbn.BatchNorm(5).eval()(np.nan_to_num(x)), 0)
    assert np.array_equal(y, want)
    dx = bn.backward(np.ones_like(x)).input
    assert not dx[~np.broadcast_to(mask[:, None], x.shape)].any() and np.isfinite(dx).all()


X = np.zeros((4, 3, 5), np.float32)
M = np.ones((4, 5), bool)
M[0] = False


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: fastbn.batch_norm_train(X, mask=M.astype(int)), TypeError, "mask"),
        (lambda: fastbn.batch_norm_train(X, mask=np.ones((4, 3), bool)), ValueError, "mask"),
        (lambda: fastbn.batch_norm_train(X, mask=M, lengths=[1] * 4), ValueError, "mask, lengths"),
        (lambda: fastbn.batch_norm_train(X, lengths=[1, 2, 3]), ValueError, "lengths"),
        (lambda: fastbn.batch_norm_train(X, lengths=[1, 2, 3, 6]), ValueError, "lengths"),
        (lambda: fastbn.batch_norm_train(X, lengths=[1, 2, 3, -1]), ValueError, "lengths"),
        (lambda: fastbn.batch_norm_train(X, lengths=[1.0, 2, 3, 4]), TypeError, "lengths"),
        (lambda: fastbn.batch_norm_train(X, lengths=[1] * 4, axis=0), ValueError, "lengths"),
        (lambda: fastbn.batch_norm_train(X, lengths=[[1], [2, 3], 4, 5]), TypeError, "lengths"),
        (lambda: fastbn.batch_norm_train(X[0], lengths=[1] * 3), ValueError, "lengths"),
        (lambda: fastbn.batch_norm_train(X, lengths=[1, 0, 0, 0]), ValueError, "x"),
        (lambda: fastbn.batch_norm_train(X, mask=M, ghost=0), ValueError, "ghost"),
        (lambda: fastbn.batch_norm_train(X, mask=M, out=X), ValueError, "out"),
        (lambda: fastbn.batch_norm_train(X, mask=M, residual=X[:2]), ValueError, "residual"),
        (lambda: fastbn.backward(X[:2], fastbn.batch_norm_train(X, mask=M)[1]), ValueError, "grad_output"),
        (lambda: fastbn.backward(X.astype(float), fastbn.batch_norm_train(X, mask=M)[1]), TypeError, "grad_output"),
        (lambda: fastbn.backward(X, fastbn.batch_norm_train(X, mask=M)[1], out=X[:2]), ValueError, "out"),
    ],
)
def test_errors_name_the_argument(call, error, named):
    with pytest.raises(error, match=rf"^{named}: expected"):
        call()


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize(("shape", "axis"), [*CASES, ((3, 4, 100), 1), ((2, 100, 3), 2), ((3, 5), 0)], ids=str)
def test_pack_and_unpack_are_inverse(rng, shape, axis, density):
    x, _, _, _ = draw(rng, shape, axis)
    mask = rng.random(np.moveaxis(x, axis, -1).shape[:-1]) < density
    axis %= len(shape)
    where = places.Places(mask, x, axis, layout.contiguous(shape, axis))
    everything = slice(0, shape[axis])
    packed = where.pack(x.reshape(-1), everything, np.empty(x.size, np.float32))
    by_hand = packed_by_hand(x, axis, mask)
    assert where.count == mask.sum() and np.array_equal(packed, by_hand.reshape(-1))
    y = np.full(x.size, np.nan, np.float32)
    where.unpack(packed, y, everything)
    assert np.array_equal(y.reshape(shape), np.where(np.expand_dims(mask, axis), x, 0))


def test_threads_and_masks(rng):
    x, mask, weight, bias = draw(rng, (16, 40, 2000), 1)
    g, results = rng.standard_normal(x.shape).astype(np.float32), []
    try:
        for threads in (1, 2, 3):
            fastbn.set_num_threads(threads)
            for t, m, axis in ((x, mask, 1), (x.reshape(16, 2000, 40), mask, 2)):
                y, saved = fastbn.batch_norm_train(t, weight, bias, axis=axis, mask=m)
                results.append([y, *fastbn.backward(g.reshape(t.shape), saved)[:3]])
    finally:
        fastbn.set_num_threads(None)
    for i, others in enumerate(results):
        assert all(np.array_equal(a, b) for a, b in zip(results[i % 2], others, strict=True))


@pytest.mark.parametrize("options", [
    {"renorm": (1.5, 0.5)}, {"nonfinite": "raise"}, {"nonfinite": "skip_update"}, {"unbiased": False},
    {"update_stats": False}, {"activation": "relu"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 9), 1), ((6, 9, 5), 2)], ids=str)
def test_with_other_options_as_packing(rng, shape, axis, options):
    x, mask, weight, bias = draw(rng, shape, axis)
    g, results = rng.standard_normal(x.shape).astype(np.float32), []
    for packs in (False, True):
        t, h, where = (x, g, {"axis": axis, "mask": mask}) if not packs else (*(
            packed_by_hand(a, axis, mask) for a in (x, g)
        ), {})  # fmt: skip
        mean, var = np.full(5, 0.5, np.float32), np.full(5, 2.0, np.float32)
        y, saved = fastbn.batch_norm_train(t, weight, bias, mean, var, **where, **options)
        dx, *rest = fastbn.backward(h, saved)[:3]
        y, dx = (a if packs else packed_by_hand(a, axis, mask) for a in (y, dx))
        results.append([y, dx, *rest, mean, var, saved.mean, saved.moments.m2, np.array(saved.updated)])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_over_the_gradient_and_not_over_x(rng):
    x, mask, _, _ = draw(rng, (6, 5, 90), 1)
    g = rng.standard_normal(x.shape).astype(np.float32)
    _, saved = fastbn.batch_norm_train(x, mask=mask, residual=g)
    want = fastbn.backward(g, saved)
    with pytest.raises(ValueError, match=r"^out: expected"):
        fastbn.backward(g, saved, out=x)
    assert np.array_equal(want.residual, np.where(mask[:, None], g, 0))
    got = fastbn.backward(g, saved, out=g)
    assert got.input is g and np.array_equal(g, want.input) and np.array_equal(got.residual, want.residual)


def test_frozen_under_a_mask(rng):
    """Its own moments and gradients are those of the valid values."""
    x, mask, weight, bias = draw(rng, (6, 5, 90), 1)
    g = rng.standard_normal(x.shape).astype(np.float32)
    mean, var = rng.standard_normal(5, dtype=np.float32), rng.random(5, dtype=np.float32) + 0.5
    y, saved = fastbn.functional.frozen(x, mean, var, weight, bias, mask=mask)
    packed, inner = fastbn.functional.frozen(packed_by_hand(x, 1, mask), mean, var, weight, bias)
    assert np.array_equal(packed_by_hand(y, 1, mask), packed) and not rows(y, 1, ~mask).any()
    assert np.array_equal(saved.moments.m2, inner.moments.m2) and saved.moments.count == mask.sum()
    grads, want = fastbn.backward(g, saved), fastbn.backward(packed_by_hand(g, 1, mask), inner)
    assert np.array_equal(packed_by_hand(grads.input, 1, mask), want.input)
    assert np.array_equal(grads.weight, want.weight) and np.array_equal(grads.bias, want.bias)
