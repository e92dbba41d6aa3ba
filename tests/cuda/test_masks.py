"""Masks and lengths on the GPU: as if the valid values had been packed, zero elsewhere, whatever lies there."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn import functional, reference
from fastbn.cuda import choice, launch, masks, tuning
from fastbn.cuda.arrays import Flat
from tests.cuda.device import GpuArray, get, put, through_gpu
from tests.test_masked import draw, rows
from tests.tolerances import DTYPES, assert_within, bound

# Vectors along the run, single elements of it, vectors across channels, single channels.
CASES = [((6, 3, 8), 1), ((5, 2, 3, 3), 1), ((4, 9, 8), 2), ((40, 3), 1)]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    through_gpu(monkeypatch)


def whole(mask, axis, shape):
    return np.broadcast_to(np.expand_dims(mask, axis), shape)


def check(rng, shape, axis, dtype, activation, residual, frozen=False):
    """One step with NaN at every masked place, against float64 on the packed values."""
    x, mask, weight, bias = draw(rng, shape, axis, dtype)
    there, ndim = whole(mask, axis, shape), len(shape)
    added = rng.standard_normal(shape).astype(dtype) if residual else None
    g = rng.standard_normal(shape).astype(dtype)
    for array in (x, g) if added is None else (x, g, added):
        array[~there] = np.nan
    moved = [np.full(shape[axis], v, weight.dtype) for v in (0.5, 2.0)]
    on_gpu = [put(m) for m in moved]
    options = {"axis": axis, "mask": put(mask), "residual": put(added), "activation": activation}
    call = functional.frozen if frozen else fastbn.batch_norm_train
    arrays = (*on_gpu, put(weight), put(bias)) if frozen else (put(weight), put(bias), *on_gpu)
    y, saved = call(put(x), *arrays, **options)
    grads = fastbn.backward(put(g), saved)

    def packed(a):
        return None if a is None else rows(np.asarray(a).astype(np.float64), axis, mask)

    X, G, R = packed(x), packed(g), packed(added)
    mean, var = (np.asarray(m, np.float64) for m in moved) if frozen else reference.statistics(X)
    z = reference.apply(X, mean, var, weight, bias, residual=R)
    u = np.where(z <= 0, 0.0, G) if activation else G
    dx, dweight, dbias, _ = reference.backward(u, X, mean, var, weight, bias, frozen=frozen)
    for got, want in ((y, np.maximum(z, 0) if activation else z), (grads.input, dx), (grads.residual, u)):
        if got is None:
            assert not residual
            continue
        assert not get(got)[~there].any() and get(got).ndim == ndim
        assert_within(rows(get(got), axis, mask), want, bound(want, 32.0, dtype), "result")
    np.testing.assert_allclose(get(grads.weight), dweight, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(get(grads.bias), dbias, rtol=1e-4, atol=1e-3)
    if not frozen:
        n = len(X)
        assert saved.count == n == saved.moments.count
        np.testing.assert_allclose(get(on_gpu[0]), 0.9 * 0.5 + 0.1 * mean, rtol=1e-5)
        np.testing.assert_allclose(get(on_gpu[1]), 0.9 * 2.0 + 0.1 * var * n / (n - 1), rtol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_as_if_packed(rng, shape, axis):
    for activation, residual in ((None, False), ("relu", True), (None, True)):
        check(rng, shape, axis, np.float32, activation, residual)
    check(rng, shape, axis, np.float32, "relu", False, frozen=True)


# What fits into one launch, and the numbers that let it.
ONE = {
    "slab": (((6, 3, 8), 1), {"SMALL": 1 << 20}),
    "again": (((5, 2, 3, 3), 1), {"SMALL": 1 << 20, "AGAIN": 1 << 14}),
    "alone": (((4, 9, 8), 2), {"SMALL": 1 << 20, "PERSISTENT": True}),
    "persistent": (((40, 8), 1), {"PERSISTENT": True}),
}


@pytest.fixture(params=ONE)
def one(request, monkeypatch):
    """Choose a kernel that does it in one launch, and see that it is chosen; returns a shape and the channel axis."""
    (shape, axis), numbers = ONE[request.param]
    for name, value in numbers.items():
        monkeypatch.setattr(tuning, name, value)
    choice.forget()
    found, genuine = [], launch.one_launch
    monkeypatch.setattr(launch, "one_launch", lambda *args: found.append(genuine(*args)) or found[-1])
    yield shape, axis
    assert found and {f.name for f in found} == {request.param}


def test_one_launch_is_as_if_packed(rng, one):
    for activation, residual in ((None, False), ("relu", True)):
        check(rng, *one, np.float32, activation, residual)
    check(rng, *one, np.float32, "relu", False, frozen=True)


def test_one_launch_of_hard_numbers(rng, one):
    test_hard_numbers(rng, *one)


def test_one_launch_moves_what_may_move(rng, one):
    shape, axis = one
    x, mask, _, _ = draw(rng, shape, axis)
    for valid in (0, 1, 2):
        few = np.zeros(mask.shape, bool)
        few.flat[:valid] = True
        mean, var = (put(np.full(shape[axis], v, np.float32)) for v in (0.5, 2.0))
        y, saved = fastbn.batch_norm_train(put(x), None, None, mean, var, axis=axis, mask=put(few), unbiased=False)
        assert saved.count == valid and np.isfinite(get(y)).all() and (get(mean) != 0.5).any() == (valid == 2)
        if valid == 2:
            np.testing.assert_allclose(get(var), 1.8 + 0.1 * rows(x, axis, few).var(0), rtol=1e-5)
        dx = get(fastbn.backward(put(x), saved).input)
        assert np.isfinite(dx).all() and not dx[whole(~few, axis, shape)].any()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.float32], ids=str)
@pytest.mark.parametrize("kernel", ["slab", "persistent"])
def test_one_launch_of_every_dtype(rng, dtype, kernel, monkeypatch):
    monkeypatch.setattr(tuning, "SMALL" if kernel == "slab" else "PERSISTENT", 1 << 20)
    choice.forget()
    check(rng, *(((4, 2, 16), 1) if kernel == "slab" else ((12, 16), 1)), dtype, "relu", False)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.float32], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((4, 2, 16), 1), ((6, 16), 1)], ids=str)
def test_every_dtype(rng, shape, axis, dtype):
    check(rng, shape, axis, dtype, None, False)


@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 8), 1), ((40, 4), 1)], ids=str)
def test_hard_numbers(rng, shape, axis):
    """Large means, constant channels, and squares that leave float32, with the first places masked."""
    x, mask, weight, bias = draw(rng, shape, axis)
    there = whole(mask, axis, shape)
    for values, eps in ((x * 0.1 + 1e4, 1e-5), (x * 1e19, 1e-5), (np.full(shape, 1e30), 1e-5)):
        values = values.astype(np.float32)
        values[~there] = np.nan
        y, _ = fastbn.batch_norm_train(put(values), put(weight), put(bias), axis=axis, mask=put(mask), eps=eps)
        mean, var = reference.statistics(rows(values, axis, mask))
        want = reference.apply(rows(values, axis, mask), mean, var, weight, bias, eps=eps)
        np.testing.assert_allclose(rows(get(y), axis, mask), want, atol=4e-5)


@pytest.mark.parametrize(("shape", "axis"), [((6, 3, 8), 1), ((6, 8, 3), 2)], ids=str)
def test_lengths_and_masks_from_wherever(rng, shape, axis):
    x = rng.standard_normal(shape).astype(np.float32)
    lengths = np.array([8, 3, 0, 1, 5, 8])
    mask = np.arange(8) < lengths[:, None]
    want = get(fastbn.batch_norm_train(put(x), axis=axis, mask=put(mask))[0])
    for options in (
        {"lengths": put(lengths)}, {"lengths": put(lengths.astype(np.int32))}, {"lengths": list(lengths)},
        {"mask": mask}, {"mask": put(mask), "out": GpuArray.of(np.full(shape, np.nan, np.float32))},
    ):  # fmt: skip
        assert np.array_equal(get(fastbn.batch_norm_train(put(x), axis=axis, **options)[0]), want)
    m = fastbn.Moments.of(put(x), axis, lengths=put(lengths))
    np.testing.assert_allclose(m.mean, rows(x, axis, mask).mean(0), atol=1e-6)
    assert m.count == 25


def test_masks_broadcast_in_every_memory_order(rng):
    x = rng.standard_normal((4, 3, 2, 5)).astype(np.float32)
    row = np.array([True, False])
    full = np.ascontiguousarray(np.broadcast_to(row[:, None], (4, 2, 5)))
    want = get(fastbn.batch_norm_train(put(x), mask=put(full))[0])
    np.testing.assert_array_equal(get(fastbn.batch_norm_train(put(x), mask=put(row[:, None]))[0]), want)
    for order in (np.asfortranarray(x), np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)):
        np.testing.assert_allclose(get(fastbn.batch_norm_train(put(order), mask=put(full))[0]), want, atol=1e-6)
    clean, _ = fastbn.batch_norm_train(put(x))
    np.testing.assert_array_equal(get(fastbn.batch_norm_train(put(x), mask=True)[0]), get(clean))


def test_none_and_one_valid(rng):
    x = rng.standard_normal((4, 3, 8)).astype(np.float32)
    for valid in (0, 1):
        mask = np.zeros((4, 8), bool)
        mask[2, 5] = valid
        mean, var, bias = put(np.full(3, 0.5, np.float32)), put(np.full(3, 2.0, np.float32)), np.float32([1, 2, 3])
        y, saved = fastbn.batch_norm_train(put(x), None, put(bias), mean, var, mask=put(mask))
        assert (get(mean) == 0.5).all() and (get(var) == 2.0).all() and saved.count == valid
        want = np.where(mask[:, None], bias[:, None], 0)
        assert np.array_equal(get(y), want.astype(np.float32))
        dx = get(fastbn.backward(put(x), saved).input)
        assert not dx[whole(~mask, 1, x.shape)].any() and np.isfinite(dx).all()
        assert fastbn.Moments.of(put(x), mask=mask).count == fastbn.Moments.of(x, mask=mask).count == valid
        if valid:
            with pytest.raises(ValueError, match="x: expected more than 1"):
                fastbn.batch_norm_train(put(x), mask=mask)


def test_a_batch_of_one_or_none_has_a_mask_all_the_same():
    x, none = put(np.ones((1, 3), np.float32)), np.zeros(1, bool)
    assert not get(fastbn.batch_norm_train(x, mask=none)[0]).any()
    with pytest.raises(ValueError, match="x: expected more than 1"):
        fastbn.batch_norm_train(x, mask=~none)
    empty, wrong = put(np.ones((0, 3), np.float32)), np.ones(2, bool)
    for call in (fastbn.batch_norm_train, fastbn.Moments.of):
        for mask in (wrong, put(wrong)):
            with pytest.raises(ValueError, match="mask: expected a shape that broadcasts"):
                call(empty, mask=mask)
    assert fastbn.Moments.of(empty, mask=none[:0]).mean.shape == (3,)


@pytest.mark.parametrize("alone", [0, 1 << 17])
def test_tally_of_large_masks(alone, monkeypatch):
    monkeypatch.setattr(tuning, "TALLY", alone)
    rng = np.random.default_rng(3)
    for size, density in ((1, 1.0), (63, 0.5), (5000, 0.01), (70_001, 0.7), (9000, 0.0)):
        mask = rng.random(size) < density
        tally = get(launch.mask_of(flat(mask), 0).tally.owner.owner)
        assert tally[0] == mask.sum() and masks.PARTS == 64
        if tally[0]:
            assert mask[tally[1:]].all() and (size < 5000 or len(set(tally[1:])) == 4)


def flat(mask) -> Flat:
    from fastbn.cuda.libraries import wrap

    return wrap("mask", put(mask), ("bool",)).flat()


def test_the_layer_counts_without_looking(rng):
    bn, x = fastbn.BatchNorm(3), rng.standard_normal((4, 3, 8)).astype(np.float32)
    mask = np.arange(8) < np.array([8, 2, 0, 5])[:, None]
    host = fastbn.BatchNorm(3)
    for layer, place in ((bn, put), (host, lambda a: a)):
        layer(place(x), mask=place(mask))
        layer.backward(place(x))
        layer.eval()(place(x), lengths=place(np.array([8, 2, 0, 5])))
    for key, value in host.state_dict().items():
        np.testing.assert_allclose(bn.state_dict()[key], value, rtol=1e-5, atol=1e-6)


X, M = np.zeros((4, 3, 5), np.float32), np.ones((4, 5), bool)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"mask": M.astype(np.int32)}, TypeError, "mask"),
        ({"mask": np.ones((4, 3), bool)}, ValueError, "mask"),
        ({"mask": np.ones((1, 4, 5), bool)}, ValueError, "mask"),
        ({"mask": M, "lengths": np.ones(4, np.int64)}, ValueError, "mask, lengths"),
        ({"lengths": np.ones(3, np.int64)}, ValueError, "lengths"),
        ({"lengths": np.ones(4, np.float32)}, TypeError, "lengths"),
        ({"lengths": np.ones(4, np.int64), "axis": 0}, ValueError, "lengths"),
    ],
)
def test_errors_name_the_argument(options, error, named):
    with pytest.raises(error, match=rf"^{named}: expected"):
        fastbn.batch_norm_train(put(X), **{k: put(v) for k, v in options.items()})
    with pytest.raises(ValueError, match="lengths: expected 0 <= length"):
        fastbn.batch_norm_train(put(X), lengths=[1, 2, 3, 9])
