"""ChannelAffine and the rule that follows an axis through a reshape, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fastbn_export.affine import ChannelAffine, follow, same_size
from hypothesis import given, settings
from hypothesis import strategies as st


def apply(affine, x):
    return x * affine.broadcast(affine.scale, x.ndim) + affine.broadcast(affine.shift, x.ndim)


def random_map(rng, size, axis):
    return ChannelAffine(rng.standard_normal(size), rng.standard_normal(size), axis)


def test_after_is_composition():
    rng = np.random.default_rng(0)
    first, then, x = random_map(rng, 3, 1), random_map(rng, 3, 1), rng.standard_normal((2, 3, 4))
    np.testing.assert_allclose(apply(then.after(first), x), apply(then, apply(first, x)))


def test_within_is_the_identity_elsewhere():
    rng = np.random.default_rng(1)
    piece, x = random_map(rng, 2, 0), rng.standard_normal((5, 3))
    whole = apply(piece.within(1, 5), x)
    np.testing.assert_array_equal(whole[[0, 3, 4]], x[[0, 3, 4]])
    np.testing.assert_array_equal(whole[1:3], apply(piece, x[1:3]))


def test_of_repeats_scalars():
    a = ChannelAffine.of(2.0, [1.0, 2.0, 3.0], 1)
    assert a.size == 3 and a.has_scale and a.has_shift and not a.is_uniform and not a.is_identity


@st.composite
def reshapes(draw):
    factors = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))

    def grouped():
        cuts = sorted(draw(st.sets(st.integers(1, len(factors)), max_size=len(factors))) | {0, len(factors)})
        return tuple(int(np.prod(factors[a:b])) for a, b in itertools.pairwise(cuts))

    source, target = grouped(), grouped()
    return source, target, draw(st.integers(0, len(source) - 1)), draw(st.booleans())


@given(reshapes(), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_follow_is_exact_or_none(case, seed):
    source, target, axis, coarse = case
    rng = np.random.default_rng(seed)
    a = random_map(rng, source[axis], axis)
    if coarse:
        a = ChannelAffine(np.round(a.scale), np.zeros(a.size), axis)
    x = rng.standard_normal(source)
    found = follow(a, source, target)
    expected = apply(a, x).reshape(target)
    if found is not None:
        np.testing.assert_array_equal(apply(found, x.reshape(target)), expected)
        return
    for b in range(len(target)):  # None only where no axis of the target can have the map
        one = np.ones(source) * a.broadcast(a.scale, len(source)) + 1j * a.broadcast(a.shift, len(source))
        moved = np.moveaxis(one.reshape(target), b, 0).reshape(target[b], -1)
        assert np.any(moved != moved[:, :1]), (source, target, axis, b)


@pytest.mark.parametrize(
    ("source", "target", "axis", "expected"),
    [
        (("N", 4, "H", "W"), ("N", 4, None), 1, 1),
        (("N", 4, "H", "W"), ("N", 4, "P"), 1, 1),
        ((None, 7, 4), (None, 4), 2, 1),
        (("B", "T", 4), ("P", 4), 2, 1),
        (("B", "T", 8), ("B", "T", 2, 4), 2, None),
        (("B", 4, "T"), ("B", "T", 4), 1, None),
        (("B", 4, "T"), (None, 4), 1, None),
        (("B", 4, "T"), (None, 4, "T"), 1, 1),
    ],
)
def test_follow_unknown_dimensions(source, target, axis, expected):
    a = random_map(np.random.default_rng(0), source[axis], axis)
    found = follow(a, source, target)
    assert (None if found is None else found.axis) == expected


def test_same_size():
    assert same_size(("N", 2, 3), (6, "N")) and same_size((), (1,))
    assert not same_size((None,), (None,)) and not same_size(("N",), ("M",)) and not same_size((0, 2), (0, 3))
