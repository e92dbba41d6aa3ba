"""Moments of any partition of the data, merged in any order, are those of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import ArgumentTypeError, ArgumentValueError, Moments
from tests.oracle import ALL_SHAPES, normal
from tests.tolerances import DTYPES


def exact(x, axis=1):
    rows = np.moveaxis(np.asarray(x).astype(np.float64), axis, -1).reshape(-1, x.shape[axis])
    return len(rows), rows.mean(0), np.square(rows - rows.mean(0)).sum(0)


def assert_same(moments, count, mean, m2, rtol=1e-6):
    scale = np.sqrt(m2 / max(count, 1))
    assert moments.count == count
    assert (np.abs(moments.mean - mean) <= rtol * scale + 1e-12 * np.abs(mean)).all()
    np.testing.assert_allclose(moments.m2, m2, rtol=2 * rtol)
    assert moments.mean.dtype == moments.m2.dtype == np.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [shape for _, shape in ALL_SHAPES], ids=str)
def test_of_every_kernel_and_dtype(shape, dtype, rng):
    x = normal(rng, shape, dtype)
    assert_same(Moments.of(x), *exact(x), rtol=1e-12 if dtype == np.float64 else 1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_of_any_axis(axis, rng):
    x = normal(rng, (6, 5, 7), np.float64, axis)
    assert_same(Moments.of(x, axis), *exact(x, axis), rtol=1e-12)


@given(
    cuts=st.lists(st.integers(0, 200), max_size=6),
    order=st.randoms(use_true_random=False),
    mean=st.sampled_from([0.0, 1e4, -1e7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_partition_in_any_order_is_the_whole(cuts, order, mean, seed):
    x = np.random.default_rng(seed).standard_normal((200, 3, 2)) + mean
    parts = [Moments.of(part) for part in np.split(x, sorted(cuts))]
    order.shuffle(parts)
    while len(parts) > 1:  # not only left to right: any tree of merges
        a = parts.pop(order.randrange(len(parts)))
        b = parts.pop(order.randrange(len(parts)))
        parts.append(a.merge(b))
    assert_same(parts[0], *exact(x), rtol=1e-8)
    assert_same(Moments.of(x), *exact(x), rtol=1e-8)


def test_merge_is_a_value(rng):
    a, b = Moments.of(rng.standard_normal((9, 2))), Moments.of(rng.standard_normal((5, 2)))
    before = (a.count, a.mean.copy(), a.m2.copy())
    ab, ba = a.merge(b), b.merge(a)
    assert before[0] == a.count and np.array_equal(before[1], a.mean) and np.array_equal(before[2], a.m2)
    np.testing.assert_allclose(ab.mean, ba.mean, rtol=1e-14)
    np.testing.assert_allclose(ab.m2, ba.m2, rtol=1e-14)


def test_nothing_is_the_neutral_element(rng):
    some, none = Moments.of(rng.standard_normal((9, 2))), Moments.of(np.empty((0, 2)))
    assert none.count == 0 and (none.mean == 0).all() and (none.m2 == 0).all()
    for merged in (some.merge(none), none.merge(some)):
        assert merged.count == 9 and np.array_equal(merged.mean, some.mean) and np.array_equal(merged.m2, some.m2)
        assert merged.mean is not some.mean
    assert none.merge(none).count == 0


def test_counts_beyond_64_bits_do_not_overflow():
    merged = Moments(2**62, [1.0], [1.0]).merge(Moments(2**62, [3.0], [1.0]))
    merged = merged.merge(merged)
    assert merged.count == 2**64 and merged.mean[0] == 2.0


def test_variance(rng):
    x = rng.standard_normal((9, 2, 3))
    m = Moments.of(x)
    np.testing.assert_allclose(m.variance(), x.var((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(m.variance(ddof=1), x.var((0, 2), ddof=1), rtol=1e-12)
    assert np.isnan(Moments.of(x[:1, :, :1]).variance(1)).all()
    assert (Moments.of(x[:1, :, :1]).variance() == 0).all()
    assert np.isnan(Moments(0, [0.0], [0.0]).variance()).all()


def test_mask_is_packing(rng):
    x = normal(rng, (7, 3, 11), np.float32)
    mask = rng.random((7, 11)) < 0.6
    assert_same(Moments.of(x, mask=mask), *exact(np.moveaxis(x, 1, -1)[mask]))
    assert Moments.of(x, mask=np.zeros((7, 11), bool)).count == 0
    lengths = np.arange(11) < rng.integers(1, 11, (7, 1))
    assert_same(Moments.of(x, mask=lengths), *exact(np.moveaxis(x, 1, -1)[lengths]))


def test_large_mean(rng):
    x = (rng.standard_normal((64, 5, 33)) + 1e4).astype(np.float32)
    assert_same(Moments.of(x), *exact(x))


def test_constant_and_tiny_channels():
    x = np.full((8, 2, 300), 123.456, np.float32)
    assert (Moments.of(x).m2 == 0).all() and (Moments.of(x).mean == np.float64(np.float32(123.456))).all()
    for shape in ((8, 2, 300), (64, 2), (5000, 60)):  # squares underflow in float32, sums about the pivot cancel
        x = np.full(shape, 1e-25, np.float32)
        x[::2] *= -1
        np.testing.assert_allclose(Moments.of(x).variance(), 1e-50, rtol=1e-6)


def test_running_statistics_from_moments_equal_training(rng):
    x = rng.standard_normal((20, 3))
    rm, rv = np.zeros(3), np.zeros(3)
    fastbn.batch_norm_train(x, running_mean=rm, running_var=rv, momentum=1.0)
    pooled = Moments.of(x[:7]).merge(Moments.of(x[7:]))
    np.testing.assert_allclose(pooled.mean, rm, atol=1e-14)
    np.testing.assert_allclose(pooled.variance(1), rv, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, [0.0], [0.0]), ArgumentValueError, r"^count: expected an integer >= 0, got -1"),
        ((2.5, [0.0], [0.0]), ArgumentTypeError, r"^count: expected an integer, got float"),
        (("2", [0.0], [0.0]), ArgumentTypeError, r"^count: expected an integer, got str"),
        ((1, 0.0, 0.0), ArgumentValueError, r"^mean, m2: expected one number per channel each"),
        ((1, [0.0, 1.0], [0.0]), ArgumentValueError, r"^mean, m2: expected one number per channel each"),
        ((1, [[0.0]], [[0.0]]), ArgumentValueError, r"^mean, m2: expected one number per channel each"),
        ((1, "a", [0.0]), ArgumentTypeError, r"^mean: expected one number per channel, got str"),
        ((1, [0.0], [1j]), ArgumentTypeError, r"^m2: expected one number per channel, got list"),
        ((1, [[0.0], [1.0, 2.0]], [0.0]), ArgumentTypeError, r"^mean: expected one number per channel, got list"),
    ],
)
def test_bad_values(arguments, error, message):
    with pytest.raises(error, match=message):
        Moments(*arguments)


def test_nan_and_inf_stay_in_their_channel_without_a_warning():
    x = np.array([[np.inf, 1e300, np.nan, 1.0], [-np.inf, -1e300, 0.0, 3.0]])
    with np.errstate(all="raise"):
        merged = Moments.of(x).merge(Moments.of(x[::-1]))
    assert not np.isfinite(merged.variance()[:3]).any() and merged.mean[3] == 2.0 and merged.variance()[3] == 1.0


def test_bad_merges():
    one = Moments(1, [0.0], [0.0])
    with pytest.raises(ArgumentTypeError, match=r"^other: expected Moments, got int"):
        one.merge(3)
    with pytest.raises(ArgumentValueError, match=r"^other: expected 1 channels, got 2"):
        one.merge(Moments(1, [0.0, 0.0], [0.0, 0.0]))


def test_repr_says_what_it_holds():
    assert repr(Moments(3, [0.0, 0.0], [1.0, 1.0])) == "Moments(count=3, channels=2)"


def test_an_infinite_mean_whatever_the_order():
    one, other = (Moments.of(np.array(v, np.float32)[:, None]) for v in ([np.inf, 1], [1, 2]))
    assert one.merge(other).mean == other.merge(one).mean == np.inf
    assert np.isnan(one.merge(Moments.of(np.array([[-np.inf], [1]], np.float32))).mean)
