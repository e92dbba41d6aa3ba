"""Layer, group and instance norm on the GPU: the CPU's own table, with every kernel that a shape can have."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn.cuda import choice, driver, plan_sets, tuning
from tests import test_family as family
from tests.cuda import device
from tests.cuda.device import GpuArray, get, put, through_gpu
from tests.tolerances import BF16, DTYPES


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    through_gpu(monkeypatch)
    monkeypatch.setattr(tuning, "WARP_VECTORS", 40)
    monkeypatch.setattr(tuning, "READ_AGAIN", 160)
    choice.forget()


@pytest.fixture
def use(monkeypatch):
    """Make the plan choose one kernel; sets of more than a few vectors are a block's."""

    def choose(kernel):
        monkeypatch.setattr(tuning, "HELD", kernel == "held")
        monkeypatch.setattr(tuning, "HELD_WARP", 4)
        monkeypatch.setattr(tuning, "SLAB_CHANNELS", 10**9 if kernel == "split" else 0)
        monkeypatch.setattr(tuning, "SMALL", -1 if kernel == "split" else 0)
        choice.forget()

    return choose


# Warps, whole blocks, unaligned ones that read twice, and sets that must be split; runs of whole vectors and not.
SHAPES = [(1, 8, 5), (3, 8), (2, 4, 40), (1, 4, 96)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", family.KINDS)
def test_the_cpus_table(rng, name, shape, use):
    for kernel in ("held", "kept", "split") if shape == SHAPES[2] else ("held", "kept"):
        use(kernel)
        family.test_forward_and_backward(rng, name, shape, np.dtype(np.float32))


def test_every_way_to_work_off_sets_is_reached(use):
    use("kept")
    found = set()
    for name, d in (("layer", (24, 1, 5, 1)), ("each", (18, 1, 40, 1)), ("one", (2, 8, 8, 40)), ("run", (2, 2, 4, 96))):
        p = plan_sets.sets(plan_sets.Sizes(*d), "f32", True, True, 1, 64 << 10, 4)
        found.add((p.affine, p.W, p.team == p.threads, p.kept))
        assert name == "layer" or p.affine == name
    assert found == {
        ("each", 1, False, False), ("each", 4, False, True), ("one", 4, False, True), ("run", 4, True, True),
    }  # fmt: skip
    assert plan_sets.sets(plan_sets.Sizes(1, 1, 163, 1), "f32", True, True, 1, 64 << 10, 4).team == 0
    use("split")
    assert plan_sets.sets(plan_sets.Sizes(2, 8, 8, 40), "f32", True, True, 1, 64 << 10, 4).team == 0


def test_sets_that_a_block_may_not_keep_are_split(rng, use, monkeypatch):
    use("kept")
    monkeypatch.setattr(choice, "fits", lambda kernel, blocks, shared: False)
    for name, d in (("layer", (3, 1, 16, 1)), ("group", (2, 2, 4, 40))):
        assert choice.sets(plan_sets.Sizes(*d), "f32", True, True, False, driver.Limits(4, 64 << 10)).team == 0
        family.test_forward_and_backward(rng, name, (2, 4, 40), np.dtype(np.float32))


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.float32], ids=str)
@pytest.mark.parametrize(("name", "shape"), [("layer", (3, 16)), ("group", (1, 8, 8))])
def test_every_dtype(rng, name, shape, dtype, use):
    for kernel in ("held", "kept", "split") if name == "group" else ("held", "kept"):
        use(kernel)
        family.test_forward_and_backward(rng, name, shape, dtype)


@pytest.mark.parametrize(("name", "axis"), [("layer", 1), ("instance", 1), ("group", 2)])
def test_memory_orders_and_channel_axes(rng, name, axis):
    kind, x, weight, bias = family.make(rng, name, (1 + (name == "layer"), 8, 4), np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)
    want, dx = kind.want(x, weight, bias)[0], kind.want_gradients(g, x, weight)[0]
    x, g, want, dx = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in (x, g, want, dx))
    options = {} if name == "layer" else {"axis": axis}
    for mine, out in ((x, None), (np.asfortranarray(x), np.empty_like(x)), (x, np.empty_like(np.asfortranarray(x)))):
        y, saved = kind(mine, weight, bias, out=out, **options)
        np.testing.assert_allclose(y, want, atol=1e-5)
        for grad in (g, np.asfortranarray(g)):
            np.testing.assert_allclose(device.backward(grad, saved).input, dx, atol=2e-5)


@pytest.mark.parametrize("kernel", ["held", "kept", "split"])
@pytest.mark.parametrize("name", ["layer", "instance", "one group"])
def test_hard_numbers(rng, name, kernel, use):
    """Large means, constant sets, squares that leave float32."""
    use(kernel)
    kind, _, weight, bias = family.make(rng, name, (1, 4, 16), np.float32)
    x = (rng.standard_normal((1, 4, 16)) + 1e4).astype(np.float32)
    for values in (x, ((x - 1e4) * 1e25).astype(np.float32)):
        want, terms = kind.want(values, weight, bias)
        assert np.abs(kind(values, weight, bias)[0] - want).max() <= 4e-6 * terms.max()
    for value in (1e-30, 1e30):
        y, _ = kind(np.full((1, 4, 16), value, np.float32), weight, bias)
        assert np.array_equal(y, kind.want(np.zeros((1, 4, 16)), np.zeros_like(weight), bias)[0].astype(np.float32))


def test_nan_saved_empty_and_in_place(rng):
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    x[1, 2, 3] = np.nan
    for kind in ("layer", "instance"):
        bad = np.isnan(family.Kind(kind, x.shape)(x, None, None)[0])
        assert bad[1, 2].all() and bad.sum() == 8
    for name in ("layer", "group"):
        for shape in ((0, 8, 5), (3, 8, 0)):
            family.test_empty(name, shape)
        kind, x, weight, bias = family.make(rng, name, (1, 4, 16), np.float32)
        g = rng.standard_normal(x.shape).astype(np.float32)
        _, saved = kind(x, weight, bias)
        assert saved.mean.shape == (1, 4) and saved.count == 16
        want = device.backward(g, saved)
        got = device.backward(g, saved, out=g)
        assert got.input is g and np.array_equal(g, want.input) and np.array_equal(got.weight, want.weight)


def test_no_channels():
    for shape in ((2, 0, 3), (0, 0, 3), (2, 0)):
        y, saved = fastbn.instance_norm(put(np.empty(shape, np.float32)))
        assert get(y).shape == shape and saved.count == 0
        assert get(fastbn.backward(put(np.empty(shape, np.float32)), saved).input).shape == shape


def test_number_of_groups_may_be_a_small_integer(rng):
    x = rng.standard_normal((2, 300, 2)).astype(np.float32)
    want, _ = fastbn.group_norm(x, 100)
    np.testing.assert_allclose(get(fastbn.group_norm(put(x), np.int8(100))[0]), want, atol=1e-5)


def test_memory_that_is_not_aligned(rng):
    kind, x, weight, bias = family.make(rng, "layer", (4, 3, 16), np.float32)
    skewed = [GpuArray.of(a, skew) for a, skew in ((x, 1), (weight, 3), (bias, 0))]
    y, saved = fastbn.layer_norm(*skewed)
    want, _ = kind.want(x, weight, bias)
    assert np.abs(get(y) - want).max() <= 1e-5
    g = rng.standard_normal(x.shape).astype(np.float32)
    dx = kind.want_gradients(g, x, weight)[0]
    assert np.abs(get(fastbn.backward(GpuArray.of(g, 2), saved).input) - dx).max() <= 1e-5


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda x: fastbn.layer_norm(x, put(np.ones(4, np.float32))), ValueError, "weight"),
        (lambda x: fastbn.layer_norm(x, np.ones(5, np.float32)), TypeError, "weight"),
        (lambda x: fastbn.layer_norm(x, None, put(np.ones(5))), TypeError, "bias"),
        (lambda x: fastbn.layer_norm(x, axis=3), ValueError, "axis"),
        (lambda x: fastbn.layer_norm(x, eps=0.0), ValueError, "eps"),
        (lambda x: fastbn.layer_norm(x, out=x), ValueError, "out"),
        (lambda x: fastbn.instance_norm(x, axis=0), ValueError, "axis"),
        (lambda x: fastbn.instance_norm(put(np.ones((2, 3, 1), np.float32))), ValueError, "x"),
        (lambda x: fastbn.group_norm(x, 4), ValueError, "num_groups"),
        (lambda x: fastbn.group_norm(x, 2.0), TypeError, "num_groups"),
        (lambda x: fastbn.group_norm(put(np.ones((1, 6), np.float32)), 6), ValueError, "x"),
        (lambda x: fastbn.backward(put(np.ones((1, 6, 5), np.float32)), fastbn.layer_norm(x)[1]), ValueError, "grad"),
    ],
)
def test_errors_name_the_argument(call, error, named):
    with pytest.raises(error, match=rf"^{named}\w*: expected"):
        call(put(np.zeros((2, 6, 5), np.float32)))


def test_layers(rng, monkeypatch):
    monkeypatch.setattr(device.Pretended, "put", lambda self, values, like: GpuArray.of(values), raising=False)
    x = rng.standard_normal((2, 4, 8)).astype(np.float32)
    for make in (
        lambda: fastbn.LayerNorm(8),
        lambda: fastbn.GroupNorm(2, 4),
        lambda: fastbn.InstanceNorm(4, affine=True, track_running_stats=True),
    ):
        host, gpu = make(), make()
        for _ in range(2):
            want, got = host(x), gpu(put(x))
        np.testing.assert_allclose(get(got), want, atol=2e-6)
        a, b = host.backward(x), gpu.backward(put(x))
        np.testing.assert_allclose(get(b.weight), a.weight, atol=1e-5)
        for key, value in host.state_dict().items():
            np.testing.assert_allclose(gpu.state_dict()[key], value, rtol=1e-5, atol=1e-6)
        assert isinstance(gpu.eval()(put(x)), GpuArray) and isinstance(gpu(x), np.ndarray)


def test_bfloat16_rounds_once(rng):
    """The affine is applied in float32, before the one rounding."""
    kind, x, weight, bias = family.make(rng, "layer", (4, 3, 16), BF16)
    want, terms = kind.want(x, weight, bias)
    error = np.abs(kind(x, weight, bias)[0].astype(np.float64) - want)
    assert (error <= np.abs(want) * 2.0**-8 + terms * 1e-6).all()
