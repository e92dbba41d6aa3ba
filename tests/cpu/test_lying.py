"""Valid values that are read where they lie (``launch_masked``): right, as packed ones to rounding, nothing leaks."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn import dispatch, reference
from fastbn.cpu import launch_masked, tuning
from fastbn.cpu.launch_masked_planes import Pieces
from fastbn.cpu.launch_masked_rows import Stretches
from tests.tolerances import DTYPES, arithmetic, assert_within, bound

# Runs of 1 to hundreds of values; lines and vectors begin and end everywhere.
CASES = [
    ((5, 11, 403), 1),
    ((3, 20, 9, 60), 1),
    ((7, 300, 13), 2),
    ((2, 60, 16), 2),
    ((97, 300), 1),
    ((3, 40, 9, 7), 3),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let small tensors take the way of large ones, rows in many bands."""
    for name, value in (("LYING", 1), ("STRETCH", 0), ("PIECE", 0), ("BAND", (64, 1 << 20))):
        monkeypatch.setattr(tuning, name, value)


def draw(rng, shape, axis, dtype=np.float32):
    """Return x, a mask whose last axis has long runs and single values, one sample all valid and one not at all."""
    C, kind = shape[axis], arithmetic(dtype)
    x = (rng.standard_normal(shape) * 2 + 1).astype(dtype)
    mask = np.zeros(np.delete(shape, axis), bool)
    flat = mask.reshape(-1, mask.shape[-1])
    for row in flat:
        cuts = np.sort(rng.integers(0, row.size, 4))
        row[cuts[0] : cuts[1]] = row[cuts[2] : cuts[3]] = True
    if len(flat) > 1:
        flat[0], flat[1], flat[-1, -1] = True, False, True
    return x, mask, rng.uniform(-2, 2, C).astype(kind), rng.standard_normal(C).astype(kind)


def rows(x, axis, mask):
    return np.moveaxis(x, axis, -1)[mask]


def lying(saved, axis, x):
    return isinstance(saved.places.lying, Stretches if axis % x.ndim == x.ndim - 1 else Pieces)


# dtype, residual, activation: each is a compilation
VARIANTS = [(DTYPES[0], r, a) for r in (False, True) for a in (None, "relu")] + [
    (DTYPES[1], False, None),
    (DTYPES[2], True, "relu"),
    (DTYPES[3], True, "relu"),
]


@pytest.mark.parametrize(("dtype", "with_residual", "activation"), VARIANTS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_against_the_reference(rng, shape, axis, dtype, with_residual, activation):
    x, mask, weight, bias = draw(rng, shape, axis, dtype)
    C, kind, wide = shape[axis], arithmetic(dtype), np.float64
    residual = rng.standard_normal(shape).astype(dtype) if with_residual else None
    g = rng.standard_normal(shape).astype(dtype)
    moving = [np.full(C, 0.5, kind), np.full(C, 2.0, kind)]
    y, saved = fastbn.batch_norm_train(
        x, weight, bias, *moving, axis=axis, mask=mask, residual=residual, activation=activation
    )
    assert lying(saved, axis, x) and saved.count == mask.sum()
    px, pg = rows(x, axis, mask).astype(wide), rows(g, axis, mask).astype(wide)
    pr = rows(residual, axis, mask).astype(wide) if with_residual else 0.0
    mean, var = reference.statistics(px)
    np.testing.assert_allclose(saved.mean, mean, rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose(saved.variance, var, rtol=2e-6)
    np.testing.assert_allclose(moving[0], 0.9 * 0.5 + 0.1 * mean, rtol=1e-5, atol=1e-6)
    z = reference.apply(px, mean, var, weight, bias) + pr
    want = np.maximum(z, 0) if activation else z
    assert_within(rows(y, axis, mask), want, bound(want, 16.0, dtype), "y")
    assert not rows(y, axis, ~mask).any()
    grads = fastbn.backward(g, saved)
    if activation:  # by our own output: rounding may move a value across zero
        pg = np.where(rows(y, axis, mask) > 0, pg, 0.0)
    wants = reference.backward(pg, px, mean, var, weight, bias)
    scale = np.abs(pg).sum(0)
    assert_within(rows(grads.input, axis, mask), wants[0], bound(wants[0], 40.0, dtype), "dx")
    assert_within(grads.weight, wants[1], bound(wants[1], 4 * scale, kind), "dweight")
    assert_within(grads.bias, wants[2], bound(wants[2], scale, kind), "dbias")
    assert not rows(grads.input, axis, ~mask).any()
    if with_residual:
        assert np.array_equal(rows(grads.residual, axis, mask).astype(wide), pg)
        assert not rows(grads.residual, axis, ~mask).any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_nothing_leaks(rng, shape, axis, garbage):
    x, mask, weight, bias = draw(rng, shape, axis)
    g, results = rng.standard_normal(shape).astype(np.float32), []
    dirty, dirty_g = x.copy(), g.copy()
    for a in (dirty, dirty_g):
        np.moveaxis(a, axis, -1)[~mask] = garbage
    for a, b in ((x, g), (dirty, dirty_g)):
        moving = np.zeros(shape[axis], np.float32), np.ones(shape[axis], np.float32)
        y, saved = fastbn.batch_norm_train(
            a, weight, bias, *moving, axis=axis, mask=mask, residual=b, activation="relu"
        )
        assert lying(saved, axis, x)
        results.append([y, *fastbn.backward(b, saved), *moving, fastbn.Moments.of(a, axis, mask).m2])
    for clean, other in zip(*results, strict=True):
        assert np.array_equal(clean, other)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize(("shape", "axis"), [((5, 11, 403), 1), ((7, 300, 13), 2), ((7, 300, 16), 2)], ids=str)
def test_written_where_arrays_begin(rng, shape, axis, offset, streamed, monkeypatch):
    """The bits do not depend on streaming, on where an array begins in a line, nor on what is overwritten."""
    x, mask, weight, bias = draw(rng, shape, axis)
    g = rng.standard_normal(shape).astype(np.float32)
    want, saved = fastbn.batch_norm_train(x, weight, bias, axis=axis, mask=mask, residual=g, activation="relu")
    wanted = fastbn.backward(g, saved)
    monkeypatch.setattr(tuning, "streams", lambda *_, **__: streamed)

    def placed(a):
        moved = np.empty(a.size + offset, a.dtype)[offset:].reshape(a.shape)
        moved[...] = a
        return moved

    around = np.full(x.size + 64, 7.0, np.float32)
    out = around[32 : 32 + x.size].reshape(shape)
    y, saved = fastbn.batch_norm_train(
        placed(x), weight, bias, axis=axis, mask=mask, residual=placed(g), activation="relu", out=out
    )
    kept, dx = out.copy(), placed(g)
    assert y is out and np.array_equal(out, want)
    grads = fastbn.backward(placed(g), saved, out=placed(g))
    assert np.array_equal(out, kept) and (around[:32] == 7).all() and (around[32 + x.size :] == 7).all()
    for got, expected in zip(grads, wanted, strict=True):
        assert np.array_equal(got, expected)
    plain = fastbn.batch_norm_train(x, weight, bias, axis=axis, mask=mask, out=placed(g))[1]
    assert np.array_equal(fastbn.backward(dx, plain, out=dx).input, fastbn.backward(g, plain).input)
    into = placed(g)  # the residual itself
    fastbn.batch_norm_train(x, weight, bias, axis=axis, mask=mask, residual=into, activation="relu", out=into)
    assert np.array_equal(into, want)


@pytest.mark.parametrize(("shape", "axis"), [c for c in CASES if c[0][c[1]] > 5], ids=str)
def test_sums_that_cannot_be_trusted(rng, shape, axis):
    """A far pivot, a constant, a NaN, products beyond float32: right in their channels, and no other is touched."""
    x, mask, weight, bias = draw(rng, shape, axis)
    g = rng.standard_normal(shape).astype(np.float32)
    clean = fastbn.batch_norm_train(x, weight, bias, axis=axis, mask=mask)
    v, h = np.moveaxis(x, axis, -1), np.moveaxis(g, axis, -1)
    v[..., 0] = np.where(rng.random(v.shape[:-1]) < 0.01, 1e6, v[..., 0])
    v[..., 1] = 3.25
    v[..., 2] += 1e4
    place = tuple(np.argwhere(mask)[len(np.argwhere(mask)) // 2])
    v[(*place, 3)] = np.nan
    h[..., 4] *= 1e30
    v[..., 4] *= 1e10
    y, saved = fastbn.batch_norm_train(x, weight, bias, axis=axis, mask=mask)
    grads = fastbn.backward(g, saved)
    px, pg = rows(x, axis, mask).astype(np.float64), rows(g, axis, mask).astype(np.float64)
    mean, var = reference.statistics(px)
    want = reference.apply(px, mean, var, weight, bias)
    assert (rows(y, axis, mask)[:, 1] == bias[1]).all()
    assert_within(rows(y, axis, mask), want, bound(want, 16.0, np.float32), "y")
    dx = reference.backward(pg, px, mean, var, weight, bias)[0]
    limit = bound(dx, 40 * np.abs(dx).max(0), np.float32)
    assert_within(rows(grads.input, axis, mask), dx, limit, "dx")
    assert np.array_equal(y.take(5, axis), clean[0].take(5, axis))
    assert np.isnan(saved.mean[3]) and np.isfinite(np.delete(saved.mean, 3)).all()


@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_as_packed_and_with_any_number_of_threads(rng, shape, axis, monkeypatch):
    monkeypatch.setattr(tuning, "PARALLEL", 1)
    x, mask, weight, bias = draw(rng, shape, axis)
    g, results = rng.standard_normal(shape).astype(np.float32), []
    try:
        for threads in (1, 2, 3):
            fastbn.set_num_threads(threads)
            y, saved = fastbn.batch_norm_train(x, weight, bias, axis=axis, mask=mask)
            results.append([y, *fastbn.backward(g, saved)[:3], fastbn.Moments.of(x, axis, mask).m2])
    finally:
        fastbn.set_num_threads(None)
    monkeypatch.setattr(dispatch, "masked_kernels", lambda: None)
    y, saved = fastbn.batch_norm_train(x, weight, bias, axis=axis, mask=mask)
    packed = [y, *fastbn.backward(g, saved)[:3], fastbn.Moments.of(x, axis, mask).m2]
    for one, two, three, other in zip(*results, packed, strict=True):
        assert np.array_equal(one, two) and np.array_equal(one, three)
        np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * np.abs(other).max())


@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_given_statistics(rng, shape, axis):
    """Renormalisation and single values normalise by statistics that are not the batch's."""
    x, mask, weight, bias = draw(rng, shape, axis)
    bn = fastbn.BatchNorm(shape[axis], axis=axis, renorm=(3.0, 5.0))
    bn.weight[:], bn.bias[:] = weight, bias
    y = bn(x, mask=mask)
    mean, var = reference.statistics(rows(x, axis, mask).astype(np.float64))
    running = np.sqrt(1.0 + 1e-5)
    r, d = np.clip(np.sqrt(var + 1e-5) / running, 1 / 3, 3), np.clip(mean / running, -5, 5)
    want = reference.apply(rows(x, axis, mask).astype(np.float64), mean, var) * r + d
    want = want * weight + bias
    assert_within(rows(y, axis, mask), want, bound(want, 40.0, np.float32), "y")
    assert not rows(y, axis, ~mask).any()


def test_short_runs_are_packed(rng, monkeypatch):
    monkeypatch.setattr(tuning, "STRETCH", 768)
    monkeypatch.setattr(tuning, "PIECE", 2)
    mask = rng.random((8, 400)) < 0.5
    for shape, axis in (((8, 5, 400), 1), ((8, 400, 5), 2)):
        x = rng.standard_normal(shape).astype(np.float32)
        assert fastbn.batch_norm_train(x, axis=axis, mask=mask)[1].places.lying is None
    assert launch_masked.find((np.zeros(2, np.int64), np.zeros(0, np.int64), None), 3, 1, (1, 1, 4), True, x) is None
