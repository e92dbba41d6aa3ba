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


TURNS = [((11, 5, 7), 1), ((11, 7, 5), -1), ((11, 6), 1), ((9, 1, 6), 1), ((8, 3, 4, 5), 1)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("masks", "renorm"), [("mask", None), (None, (1.5, 0.4)), ("lengths", (1.5, 0.4))], ids=str)
@pytest.mark.parametrize(("shape", "axis"), TURNS, ids=str)
def test_masked_and_renormalised_ghosts_are_calls_of_their_own(rng, shape, axis, masks, renorm, dtype):
    C, p = shape[axis], np.float64 if dtype == np.float64 else np.float32
    if masks == "lengths" and len(shape) != 3:
        masks = "mask"
    x, g, residual = rng.standard_normal((3, *shape)).astype(dtype)
    weight, bias = rng.uniform(0.5, 2, (2, C)).astype(p)
    mask = np.ones(np.moveaxis(x, axis, -1).shape[:-1], bool)
    if masks == "mask":
        mask = rng.random(mask.shape) < 0.7
        mask[3:6] = False  # a ghost without a valid value
        mask[0], mask[6] = True, True
    lengths = rng.integers(1, mask.shape[1] + 1, shape[0]) if masks == "lengths" else None
    given = {"mask": mask, "lengths": lengths, None: None}[masks]
    start = [rng.standard_normal(C).astype(p), rng.uniform(0.5, 2, C).astype(p)]
    moved = [s.copy() for s in start]
    common = {"axis": axis, "activation": "relu", "renorm": renorm, "on_single": "running"}
    out = np.empty_like(x)
    y, saved = fastbn.batch_norm_train(
        x, weight, bias, *moved, residual=residual, ghost=3, out=out, **common, **({masks: given} if masks else {})
    )
    assert y is out
    grads, wants, each = fastbn.backward(g, saved), [], []
    for a, b in itertools.pairwise(bounds(shape[0], 3)):
        part = {masks: given[a:b]} if masks else {}
        own = [s.copy() for s in start]
        want, one = fastbn.batch_norm_train(x[a:b], weight, bias, *own, residual=residual[a:b], **common, **part)
        assert np.array_equal(y[a:b], want)
        wants.append(fastbn.backward(g[a:b], one))
        assert np.array_equal(grads.input[a:b], wants[-1].input)
        assert np.array_equal(grads.residual[a:b], wants[-1].residual)
        each.append(one)
    for k in (1, 2):
        np.testing.assert_allclose(grads[k], np.sum([w[k] for w in wants], 0), rtol=1e-5, atol=1e-6)
    for one in each:
        if one.count > 1:
            fastbn.update_running(*start, one.moments)
    assert saved.updated == sum(one.count > 1 for one in each)
    np.testing.assert_allclose(moved, start, rtol=1e-6)
    assert saved.count == sum(one.count for one in each) and saved.mean.shape == (len(each), C)


def test_a_mask_of_all_changes_nothing(rng):
    x, g = rng.standard_normal((2, 7, 3, 4)).astype(np.float32)
    want, saved = fastbn.batch_norm_train(x, ghost=2)
    got, own = fastbn.batch_norm_train(x, ghost=2, mask=np.ones((7, 4), bool))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fastbn.backward(g, own).input, fastbn.backward(g, saved).input, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(own.moments.m2, saved.moments.m2)
    to = np.empty_like(g)
    assert fastbn.backward(g, own, out=to).input is to


def test_masked_ghosts_go_all_or_none(rng):
    x = rng.standard_normal((6, 3)).astype(np.float32)
    out, before = np.full_like(x, 7), [np.zeros(3, np.float32), np.ones(3, np.float32)]
    one = np.array([True, True, True, True, True, False])
    with pytest.raises(ValueError, match=r"^x: expected more than 1 value"):
        fastbn.batch_norm_train(x, None, None, *before, ghost=2, mask=one, out=out)
    x[5] = np.inf
    with pytest.raises(ValueError, match=r"^x: expected finite"):
        options = {"ghost": 2, "renorm": (2, 1), "nonfinite": "raise", "out": out}
        fastbn.batch_norm_train(x, None, None, *before, **options)
    assert (out == 7).all() and not before[0].any() and (before[1] == 1).all()
    y, saved = fastbn.batch_norm_train(x, None, None, *before, ghost=2, mask=one, on_single="running", out=out)
    assert saved.updated == 2 and np.isfinite(y).all()
    assert saved.moments.count == 5
    np.testing.assert_allclose(saved.moments.variance(), x[:5].var(0), rtol=1e-5)


def test_cumulative_average_of_masked_ghosts(rng):
    x = rng.standard_normal((7, 3, 4))
    mask = np.ones((7, 4), bool)
    mask[0, 2:], mask[2:4] = False, False
    mask[2, 0] = True  # one value: normalised by the running statistics, which it does not move
    one, each = (fastbn.BatchNorm(3, momentum=None, ghost=g, on_single="running", dtype=np.float64) for g in (2, None))
    one(x, mask=mask)
    for part in (slice(2), slice(4, 7)):
        each(x[part], mask=mask[part])
    assert one.num_batches_tracked == each.num_batches_tracked == 2
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


@pytest.mark.parametrize("out", [False, True])
def test_ghosts_of_one_value_go_by_the_running_statistics(rng, out):
    """On rows as under a mask, and as on a GPU."""
    m, v = rng.standard_normal(3).astype(np.float32), rng.random(3).astype(np.float32) + 0.5
    x, before = rng.standard_normal((5, 3)).astype(np.float32), (m.copy(), v.copy())
    target = np.empty_like(x) if out else None
    y, saved = fastbn.batch_norm_train(x, None, None, m, v, ghost=1, on_single="running", out=target)
    assert np.array_equal(y, fastbn.batch_norm_infer(x, m, v)) and (target is None or y is target)
    assert saved.updated == 0 and np.array_equal(m, before[0]) and np.array_equal(v, before[1])
    assert saved.mean.shape == (5, 3) and saved.moments.count == 5
    np.testing.assert_allclose(fastbn.backward(x, saved).input, x / np.sqrt(v + 1e-5), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^on_single: expected running statistics"):
        fastbn.batch_norm_train(x, ghost=1, on_single="running")
    layer = fastbn.BatchNorm(3, ghost=1, on_single="running", momentum=None)
    layer(x)
    assert layer.num_batches_tracked == 0 and not layer.running_mean.any()


def test_sizes_may_be_small_integers(rng):
    x = rng.standard_normal((300, 3, 2)).astype(np.float32)
    for options in ({}, {"mask": np.arange(300)[:, None] != 7}):
        want, _ = fastbn.batch_norm_train(x, ghost=100, **options)
        assert np.array_equal(fastbn.batch_norm_train(x, ghost=np.int8(100), **options)[0], want)
    x = x.transpose(1, 0, 2)
    assert np.array_equal(fastbn.group_norm(x, np.int8(100))[0], fastbn.group_norm(x, 100)[0])


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"ghost": 0}, ValueError, "ghost"),
        ({"ghost": 2.0}, TypeError, "ghost"),
        ({"ghost": True}, TypeError, "ghost"),
        ({"ghost": 1}, ValueError, "ghost"),
        ({"ghost": 2, "axis": 0}, ValueError, "axis"),
        ({"ghost": 2, "renorm": (1, 0)}, ValueError, "renorm"),  # no running statistics
        ({"ghost": 2, "axis": 0, "mask": True}, ValueError, "axis"),
        ({"ghost": 2, "mask": np.ones(3, bool)}, ValueError, "mask"),
        ({"ghost": 2, "mask": True, "residual": np.zeros((4, 2), np.float32)}, ValueError, "residual"),
        ({"ghost": 2, "mask": True, "out": np.zeros((4, 2), np.float32)}, ValueError, "out"),
    ],
)
def test_errors_name_the_argument(options, error, named):
    with pytest.raises(error, match=rf"^{named}: expected"):
        fastbn.batch_norm_train(np.zeros((4, 3), np.float32), **options)


def test_each_ghost_is_judged_on_its_own():
    """Finite ones may be far apart; one may be beyond float32 where the whole batch is not."""
    far = np.array([3e19, 3e19, -3e19, -3e19], np.float32)[:, None]
    beyond = np.array([2.5e19, -2.5e19, 0, 0, 0, 0], np.float32)[:, None]
    for mask in (None, "all"):
        for x, accepted in ((far, True), (beyond, False)):
            moved = [np.zeros(1, np.float32), np.ones(1, np.float32)]
            options = {} if mask is None else {"mask": np.ones(len(x), bool)}
            if accepted:
                fastbn.batch_norm_train(x, None, None, *moved, ghost=2, nonfinite="raise", **options)
            else:
                with pytest.raises(ValueError, match=r"^x: expected finite batch statistics"):
                    fastbn.batch_norm_train(x, None, None, *moved, ghost=2, nonfinite="raise", **options)
                assert moved[0] == 0 and moved[1] == 1


@pytest.mark.parametrize("out", [[1.0], np.zeros(30, np.float32), np.zeros((6, 5))], ids=str)
def test_a_wrong_out_is_named(out):
    with pytest.raises((ValueError, TypeError), match=r"^out: expected"):
        fastbn.batch_norm_train(np.ones((6, 5), np.float32), ghost=2, out=out)
    with pytest.raises((ValueError, TypeError), match=r"^out: expected"):
        fastbn.instance_norm(np.ones((6, 5, 4), np.float32), axis=2, out=out)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_ghosts_that_moved_are_counted(rng, momentum):
    layer, x = fastbn.BatchNorm(4, momentum=momentum, ghost=2), rng.standard_normal((6, 4)).astype(np.float32)
    layer(x)
    assert layer.saved.updated == 3 and layer.num_batches_tracked == 3
    layer(x, mask=np.zeros(6, bool))
    assert layer.saved.updated == 0 and layer.num_batches_tracked == 3
    layer(x, mask=np.arange(6) < 4)
    assert layer.saved.updated == 2 and layer.num_batches_tracked == 5
