"""Kernels of sets with an affine inside, backward (``sets_backward``): every kind of set against float64."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from fastbn import reference
from fastbn.cpu import launch_sets, sets_long, tuning
from tests.cpu.test_sets import BLOCKS, SIZES, codes, draw, expected, forward, split
from tests.oracle import same_bits
from tests.tolerances import DTYPES, arithmetic, assert_within, bound

if numba.config.DISABLE_JIT:
    pytest.skip("kernels exist in compiled code only", allow_module_level=True)


@pytest.fixture
def swept(monkeypatch):
    """Layer norm of any size takes ``sets_long``, by several threads."""
    for name in ("ALWAYS", "ALWAYS_BACK"):
        monkeypatch.setattr(launch_sets, name, 0)
    monkeypatch.setattr(tuning, "PARALLEL", 0)


def backward(x, g, weight, d, out=None):
    stats = forward(x, weight, weight, d)[1]
    dx = np.empty_like(x) if out is None else out
    return dx, *launch_sets.backward(codes(x), codes(g), codes(dx), weight, stats, d)


def check(x, g, weight, d, got):
    dtype, wide = x.dtype, None if weight is None else weight.astype(np.float64).reshape(d[1], -1, 1)
    values, grads = (a.astype(np.float64).reshape(split(d)) for a in (x, g))
    dx, weighed = reference.normalise_backward(grads, values, (2, 3), wide)
    u = np.abs(grads * (1.0 if wide is None else wide))
    xhat = np.abs(reference.normalise(values, (2, 3)))
    means = u.mean((2, 3), keepdims=True) + xhat * (u * xhat).mean((2, 3), keepdims=True)
    terms = (u + means) / np.sqrt(values.var((2, 3), keepdims=True) + 1e-5)
    assert_within(got[0], dx.reshape(-1), bound(dx, 4 * terms, dtype).reshape(-1), "dx")
    if weight is None:
        assert not got[1].any() and not got[2].any()
        return
    kind = arithmetic(dtype)
    size = np.abs(grads).sum((0, 3)).reshape(-1)
    # Of one sample or two xhat itself is seen, near zero only as right as the mean, which is known to 1e-8 deviations.
    rest = 0.1 if d[0] <= 2 and x.size > 1 else 1e-7
    assert_within(
        got[1],
        weighed.sum((0, 3)).reshape(-1),
        bound(0.0, 2 * np.abs(weighed).sum((0, 3)).reshape(-1) + size * rest, kind),
        "dweight",
    )
    assert_within(got[2], grads.sum((0, 3)).reshape(-1), bound(0.0, 2 * size, kind), "dbias")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES, ids=str)
def test_backward(rng, monkeypatch, d, dtype):
    x, weight, _ = draw(rng, d, dtype)
    g = rng.standard_normal(x.size).astype(dtype)
    for w in (weight, None):
        for stream in (0, 1 << 40):
            monkeypatch.setattr(tuning, "STREAM", stream)
            got = backward(x, g, w, d)
            check(x, g, w, d, got)
        mine = g.copy()
        same = backward(x, mine, w, d, mine)
        assert all(same_bits(a, b) for a, b in zip(same, got, strict=True)), "in place"


@pytest.mark.parametrize("d", [*BLOCKS, (40, 2, 6, 131)], ids=str)
def test_same_bits_at_every_address_and_by_any_number_of_threads(rng, threads, monkeypatch, d):
    monkeypatch.setattr(tuning, "STREAM", 0)
    monkeypatch.setattr(tuning, "PARALLEL", 0)
    x, weight, _ = draw(rng, d, np.float32)
    g = rng.standard_normal(x.size).astype(np.float32)
    results = []
    for n, shift in ((1, 0), (2, 3), (5, 7), (3, 1)):
        threads(n)
        placed = [np.empty(x.size + 64, np.float32)[s:][: x.size] for s in (shift, 2 * shift, 3 * shift)]
        placed[0][:], placed[1][:] = x, g
        results.append(backward(placed[0], placed[1], weight, d, placed[2]))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 5, 64, 70, 131])
def test_any_number_of_sets_is_swept(rng, threads, swept, count, dtype):
    d = count, 1, sets_long.CHUNK + 4, 1
    x, weight, bias = draw(rng, d, dtype)
    g = rng.standard_normal(x.size).astype(dtype)
    want, terms = expected(x, weight, bias, d)
    assert_within(forward(x, weight, bias, d)[0], want, bound(want, 4 * terms, dtype), "y")
    got = backward(x, g, weight, d)
    check(x, g, weight, d, got)
    threads(3)
    assert all(same_bits(a, b) for a, b in zip(backward(x, g, weight, d), got, strict=True))


FAR = [
    (70, 1, 40, 1), (9, 3, 6, 5), (4, 5, 5, 49), (50, 3, 3, 4), (4, 2, 6, 131), (2, 1, 4099, 1), (4, 1, 5001, 1),
    (38, 1, 4099, 1),
]  # fmt: skip


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("d", FAR, ids=str)
def test_sums_outside_of_float32(rng, d, in_place):
    """Products and partial sums leave float32's range, the results do not."""
    x, weight, _ = draw(rng, d, np.float32)
    g = (np.float32(1e38) * np.sign(rng.standard_normal(x.size))).astype(np.float32)
    g.reshape(d[0], -1)[1::2] = -g.reshape(d[0], -1)[: d[0] // 2 * 2 : 2]
    x.reshape(d[0], -1)[1::2] = x.reshape(d[0], -1)[: d[0] // 2 * 2 : 2]
    weight = (weight * np.float32(1e-3)).astype(np.float32)
    mine = g.copy()
    check(x, g, weight, d, backward(x, mine, weight, d, mine if in_place else None))


@pytest.mark.parametrize("d", FAR, ids=str)
def test_nan_in_a_gradient_stays_in_its_set_and_its_parameters(rng, d):
    x, weight, _ = draw(rng, d, np.float32)
    g = rng.standard_normal(x.size).astype(np.float32)
    clean = backward(x, g, weight, d)
    g[-1] = np.nan
    dx, dweight, dbias = backward(x, g, weight, d)
    length = x.size // (d[0] * d[1])
    assert np.isnan(dx[-length:]).all() and same_bits(dx[:-length], clean[0][:-length])
    assert np.isnan([dweight[-1], dbias[-1]]).all()
    assert np.isfinite(dweight[:-1]).all() and np.isfinite(dbias[:-1]).all()


def test_many_long_sets_outside_of_float32(rng, swept):
    test_sums_outside_of_float32(rng, (68, 1, 4099, 1), False)
    test_nan_in_a_gradient_stays_in_its_set_and_its_parameters(rng, (68, 1, 4099, 1))
