"""Ghost batches: as if each had been passed on its own, in order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import ghosts
from fastbn.blocks import ASIDE, Blocks

SHAPES = [((10, 5, 7), 1), ((10, 7, 5), 2), ((11, 6), 1), ((9, 1, 6), 1), ((9, 70, 300), 1), ((12, 40, 41, 8), -1)]


def bounds(samples, size):
    count = max(1, samples // size)
    return [*range(0, count * size, size), samples]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_as_if_each_had_been_passed_on_its_own(rng, shape, axis, size):
    if len(shape) == 2 and size == 1:
        pytest.skip("one value per channel")
    C = shape[axis]
    x, g, residual = rng.standard_normal((3, *shape)).astype(np.float32)
    weight, bias = rng.uniform(0.5, 2, (2, C)).astype(np.float32)
    for options in ({}, {"activation": "relu"}, {"activation": "relu", "residual": residual}, {"residual": residual}):
        one, each = [[np.zeros(C, np.float32), np.ones(C, np.float32)] for _ in range(2)]
        y, saved = fastbn.batch_norm_train(x, weight, bias, *one, axis=axis, ghost=size, **options)
        grads = fastbn.backward(g, saved)
        edges, dweight, dbias = bounds(shape[0], size), np.zeros(C), np.zeros(C)
        for i, (a, b) in enumerate(itertools.pairwise(edges)):
            mine = {k: v[a:b] if k == "residual" else v for k, v in options.items()}
            want, own = fastbn.batch_norm_train(x[a:b], weight, bias, *each, axis=axis, **mine)
            np.testing.assert_allclose(y[a:b], want, rtol=1e-5, atol=2e-6)
            np.testing.assert_allclose(saved.mean[i], own.mean, rtol=1e-5, atol=1e-6)
            wants = fastbn.backward(g[a:b], own)
            near = np.abs(want) > 1e-5 if options.get("activation") else np.ones(want.shape, bool)
            scale = max(1.0, np.abs(wants.input).max())
            np.testing.assert_allclose(grads.input[a:b] * near, wants.input * near, rtol=1e-4, atol=1e-5 * scale)
            if "residual" in options:
                np.testing.assert_allclose(grads.residual[a:b] * near, wants.residual * near)
            dweight, dbias = dweight + wants.weight, dbias + wants.bias
        assert saved.updated == len(edges) - 1
        np.testing.assert_allclose(grads.weight, dweight, rtol=1e-4, atol=2e-3)
        np.testing.assert_allclose(grads.bias, dbias, rtol=1e-4, atol=2e-3)
        np.testing.assert_allclose(one, each, rtol=1e-5, atol=1e-6)


@given(samples=st.integers(1, 40), size=st.integers(1, 50), each=st.integers(1, 3))
def test_the_cut_covers_the_batch_once(samples, size, each):
    pieces = ghosts.cut(samples, size, Blocks(samples, each, 2, 3))
    values = [d.N * d.S for _, d in pieces for _ in range(d.B)]
    assert len(values) == max(1, samples // size) and sum(values) == samples * each * 3
    assert min(values) >= min(size, samples) * each * 3 and max(values) < 2 * size * each * 3
    covered = [range(samples * each * 6)[part] for part, _ in pieces]
    assert [i for part in covered for i in part] == list(range(samples * each * 6))


def test_every_way_to_work_off_blocks_is_the_same(rng):
    small, large = (8, 6, 5), (8, 64, 3 * ASIDE // 64)
    for shape in (small, large):
        x = rng.standard_normal(shape)
        got, saved = fastbn.batch_norm_train(x, ghost=2)
        for k in range(4):
            want, own = fastbn.batch_norm_train(x[2 * k : 2 * k + 2])
            np.testing.assert_allclose(got[2 * k : 2 * k + 2], want, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(saved.invstd[k], own.invstd, rtol=1e-12)


def test_moments_are_those_of_the_whole_batch(rng):
    x = rng.standard_normal((11, 3, 4))
    saved = fastbn.batch_norm_train(x, ghost=3)[1]
    whole = fastbn.Moments.of(x)
    assert saved.moments.count == whole.count == 44 and saved.mean.shape == (3, 3)
    np.testing.assert_allclose(saved.moments.m2, whole.m2, rtol=1e-12)


def test_any_memory_order(rng):
    x = rng.standard_normal((6, 4, 5)).astype(np.float32)
    want, saved = fastbn.batch_norm_train(x, ghost=2)
    dx = fastbn.backward(x, saved).input
    for mine in (np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], x[::-1].copy()[::-1]):
        for out in (None, np.empty_like(x), np.empty_like(np.asfortranarray(x))):
            got, own = fastbn.batch_norm_train(mine, ghost=2, out=out)
            assert out is None or got is out
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(fastbn.backward(mine, own).input, dx, rtol=1e-5, atol=1e-6)


def test_inference_knows_no_ghosts(rng):
    x = rng.standard_normal((7, 3)).astype(np.float32)
    bn = fastbn.BatchNorm(3, ghost=2)
    bn(x)
    assert bn.num_batches_tracked == 3
    plain = fastbn.BatchNorm(3)
    plain.load_state_dict(bn.state_dict())
    assert np.array_equal(bn.eval()(x), plain.eval()(x))
    untracked = fastbn.BatchNorm(3, ghost=2, track_running_stats=False).eval()
    assert np.array_equal(untracked(x), fastbn.batch_norm_train(x)[0])


def test_cumulative_average_counts_ghosts(rng):
    x = rng.standard_normal((7, 3))
    one, each = (fastbn.BatchNorm(3, momentum=None, ghost=g, dtype=np.float64) for g in (2, None))
    one(x)
    for part in np.split(x, [2, 4]):
        each(part)
    assert one.num_batches_tracked == each.num_batches_tracked == 3
    np.testing.assert_allclose(one.running_mean, each.running_mean, rtol=1e-12)
    np.testing.assert_allclose(one.running_var, each.running_var, rtol=1e-12)


def test_bad_ghosts_do_not_move_the_statistics(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    x[2] = np.nan
    m, v = np.zeros(3, np.float32), np.ones(3, np.float32)
    saved = fastbn.batch_norm_train(x, None, None, m, v, ghost=2, nonfinite="skip_update")[1]
    assert saved.updated == 3 and np.isfinite(m).all()
    with pytest.raises(ValueError, match=r"^x: expected finite"):
        fastbn.batch_norm_train(x, None, None, m, v, ghost=2, nonfinite="raise")


def test_empty_and_single(rng):
    m, v = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert fastbn.batch_norm_train(np.empty((0, 3), np.float32), None, None, m, v, ghost=2)[0].shape == (0, 3)
    x = rng.standard_normal((1, 3)).astype(np.float32)
    y, _ = fastbn.batch_norm_train(x, None, None, m, v, ghost=2, on_single="running")
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"ghost": 0}, ValueError, "ghost"),
        ({"ghost": 2.0}, TypeError, "ghost"),
        ({"ghost": True}, TypeError, "ghost"),
        ({"ghost": 1}, ValueError, "ghost"),
        ({"ghost": 2, "axis": 0}, ValueError, "axis"),
        ({"ghost": 2, "renorm": (1, 0)}, ValueError, "renorm"),
    ],
)
def test_errors_name_the_argument(options, error, named):
    with pytest.raises(error, match=rf"^{named}: expected"):
        fastbn.batch_norm_train(np.zeros((4, 3), np.float32), **options)
