"""Options of training on a GPU: one table of calls, each done on the host and on the GPU, and compared."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import fastbn
from fastbn.cuda import choice, driver, launch_ghosts, tuning
from tests.cuda.device import GpuArray, Pretended, get, put, through_gpu


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(Pretended, "put", lambda self, values, like: GpuArray.of(values), raising=False)
    through_gpu(monkeypatch)


# (shape, axis): channels first, rows, short runs, one channel
SHAPES = [((7, 3, 8), 1), ((7, 4, 3), -1), ((9, 6), 1), ((6, 1, 16), 1), ((5, 2, 3, 3), 1)]
OPTIONS = [
    {"ghost": 2},
    {"ghost": 3, "momentum": 0.3, "unbiased": False},
    {"ghost": 50},
    {"renorm": (1.5, 0.4)},
    {"renorm": (3.0, 5.0), "update_stats": False},
    {"ghost": 2, "renorm": (1.5, 0.4)},
    {"nonfinite": "skip_update"},
    {"nonfinite": "raise"},
    {"nonfinite": "skip_update", "unbiased": False, "ghost": 3},
    {"on_single": "running"},
]


def both(call, *arrays, **options):
    """Do a call on the host and on the GPU, on copies; return two of (result, saved, the arrays)."""
    found = []
    for place in (lambda a: a, put):
        mine = [None if a is None else place(a.copy()) for a in arrays]
        placed = {k: place(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        found.append((*call(*mine, **placed), mine))
    return found


def same(got, want, name, scale=1.0):
    assert (got is None) == (want is None), name
    if want is not None:
        np.testing.assert_allclose(get(got), want, rtol=2e-5, atol=5e-6 * scale, err_msg=name)


def compare(rng, shape, axis, options, dtype=np.float32, running=True, **more):
    """Compare output, statistics, gradients and what moved."""
    C, p = shape[axis], np.float64 if dtype == np.float64 else np.float32
    x, g = (rng.standard_normal((2, *shape)) * 1.5 + 0.3).astype(dtype)
    weight, bias, mean = rng.uniform(0.5, 2, (3, C)).astype(p)
    state = (mean, rng.uniform(0.5, 2, C).astype(p)) if running else (None, None)
    (y, saved, here), (gpu_y, gpu_saved, there) = both(
        fastbn.batch_norm_train, x, weight, bias, *state, axis=axis, **options, **more
    )
    assert isinstance(gpu_y, GpuArray) and get(gpu_y).dtype == dtype
    same(gpu_y, y, "y")
    for k in (3, 4):
        same(there[k], here[k], "running statistics")
    assert (gpu_saved.count, gpu_saved.updated) == (saved.count, saved.updated)
    for name in ("mean", "variance"):
        same(getattr(gpu_saved, name), getattr(saved, name), name)
    same(gpu_saved.moments.m2, saved.moments.m2, "moments", 100)
    grads, gpu_grads = fastbn.backward(g, saved), fastbn.backward(put(g), gpu_saved)
    for name, got, want in zip(fastbn.Gradients._fields, gpu_grads, grads, strict=True):
        same(got, want, f"gradient of {name}", 20 if name in ("weight", "bias") else 4)
    return gpu_saved


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_as_on_the_host(rng, shape, axis, options):
    compare(rng, shape, axis, options)


@pytest.fixture
def launches(monkeypatch):
    """Let small tensors take one launch; returns the names of the kernels that are launched."""
    for name, value in {"SMALL": 1 << 20, "AGAIN": 1 << 14}.items():
        monkeypatch.setattr(tuning, name, value)
    choice.forget()
    names, genuine = [], driver.Kernel.compiled.fget
    watched = property(lambda self: names.append(self.function.__name__) or genuine(self))
    monkeypatch.setattr(driver.Kernel, "compiled", watched)
    return names


@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_small_ghosts_are_one_launch(rng, shape, axis, launches):
    residual = rng.standard_normal(shape).astype(np.float32)
    for options in ({"ghost": 2}, {"ghost": 2, "nonfinite": "skip_update", "unbiased": False}):
        for more in ({}, {"activation": "relu", "residual": residual}):
            launches.clear()
            compare(rng, shape, axis, options, **more)
            odd = shape[0] % 2  # the last ghost takes the remainder
            assert launches.count("slab_train") == launches.count("slab_backward") == 1 + odd
            assert launches.count("adjust_move") == 1 + odd
            assert len(launches) == 4 + 3 * odd
    compare(rng, shape, axis, {"ghost": 3}, dtype=np.float16)
    compare(rng, shape, axis, {"ghost": 2, "renorm": (1.5, 0.4)})


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("shape", [(8, 16), (7, 136), (65, 8)], ids=str)
def test_ghosts_of_rows_are_one_launch(rng, shape, small, launches, monkeypatch):
    """Whatever the size of a ghost, where all of them have tiles enough to fill the GPU."""
    monkeypatch.setattr(tuning, "PERSISTENT", True)
    monkeypatch.setattr(tuning, "SMALL", small)
    monkeypatch.setattr(tuning, "AGAIN", 0)  # a block a channel takes a minute here
    choice.forget()
    residual = rng.standard_normal(shape).astype(np.float32)
    size = 20 if shape[0] > 20 else 2
    for more in ({}, {"activation": "relu", "residual": residual}):
        launches.clear()
        compare(rng, shape, 1, {"ghost": size}, **more)
        assert "rows_train" in launches and "rows_backward" in launches
        odd = shape[0] % size != 0  # the last ghost is another one, by whatever kernel
        for name in ("train", "backward"):
            assert sum(kernel.endswith(name) for kernel in launches) == 1 + odd
    compare(rng, shape, 1, {"ghost": size}, dtype=np.float16)


@pytest.mark.parametrize("hard", [1e-30, 1e4, 1e30])
def test_ghosts_of_rows_that_are_summed_again(rng, hard, launches, monkeypatch):
    monkeypatch.setattr(tuning, "PERSISTENT", True)
    choice.forget()
    x = rng.standard_normal((6, 8)).astype(np.float32)
    x[2:4] = x[2:4] * np.float32(min(hard, 1.0)) + np.float32(hard)  # one ghost alone
    (y, saved, _), (gpu_y, gpu_saved, _) = both(fastbn.batch_norm_train, x, None, None, ghost=2)
    assert launches.count("rows_train") == 1
    same(gpu_y, y, "y")
    for name in ("mean", "variance"):
        same(getattr(gpu_saved, name), getattr(saved, name), name)


@pytest.mark.parametrize(("shape", "kernel"), [((8, 3, 16), "slab_train"), ((8, 16), "rows_train")], ids=str)
def test_small_ghosts_are_the_bits_of_a_loop(rng, shape, kernel, launches, monkeypatch):
    monkeypatch.setattr(tuning, "PERSISTENT", True)
    choice.forget()
    x = rng.standard_normal(shape).astype(np.float32)

    def call():
        running = put(np.zeros(shape[1], np.float32)), put(np.ones(shape[1], np.float32))
        y, saved = fastbn.batch_norm_train(put(x), None, None, *running, ghost=2)
        grads = fastbn.backward(put(x), saved)
        return [get(a).tobytes() for a in (y, saved.mean, saved.invstd, grads.input, *running)]

    want = call()
    monkeypatch.setattr(launch_ghosts, "_find", lambda *args: None)
    launches.clear()
    assert call() == want and launches.count(kernel) == 4


def test_a_bad_ghost_in_one_launch_moves_nothing(rng, launches):
    x = rng.standard_normal((8, 3, 16)).astype(np.float32)
    x[2, 1, 0] = np.inf
    for options in ({"nonfinite": "skip_update"}, {}):
        (_, saved, here), (_, gpu_saved, there) = both(
            fastbn.batch_norm_train, x, np.ones(3, np.float32), None, np.zeros(3, np.float32), np.ones(3, np.float32),
            ghost=2, **options
        )  # fmt: skip
        assert gpu_saved.updated == saved.updated == (3 if options else 4)
        for k in (3, 4):
            np.testing.assert_allclose(get(there[k]), here[k], rtol=2e-5)


@pytest.mark.parametrize("options", [{"ghost": 2}, {"renorm": (1.5, 0.4)}, {"ghost": 3, "renorm": (2, 1)}], ids=str)
def test_activation_residual_and_out(rng, options):
    shape = (7, 3, 8)
    residual = rng.standard_normal(shape).astype(np.float32)
    for more in ({"activation": "relu"}, {"residual": residual}, {"activation": "relu", "residual": residual}):
        compare(rng, shape, 1, options, **more)
    out = GpuArray.of(np.full(shape, np.nan, np.float32))
    start = [put(np.zeros(3, np.float32)), put(np.ones(3, np.float32))]
    x = rng.standard_normal(shape).astype(np.float32)
    y, saved = fastbn.batch_norm_train(put(x), None, None, *start, out=out, **options)
    assert y is out and np.isfinite(get(out)).all()
    grads = fastbn.backward(put(x), saved)
    assert grads.weight is None and grads.bias is None


@pytest.mark.parametrize("options", [{"ghost": 2}, {"ghost": 2, "renorm": (1.5, 0.4)}, {"renorm": (2, 1)}], ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((7, 3, 8), 1), ((7, 8, 3), 2)], ids=str)
def test_under_a_mask(rng, shape, axis, options):
    places = np.moveaxis(np.empty(shape), axis, -1).shape[:-1]
    mask = rng.random(places) < 0.7
    mask[0], mask[-1] = True, True
    mask[2:4] = False  # a ghost without a valid value
    lengths = np.array([8, 3, 5, 2, 8, 6, 1])
    compare(rng, shape, axis, options, mask=mask)
    compare(rng, shape, axis, options, lengths=lengths)
    compare(rng, shape, axis, options | {"nonfinite": "skip_update"}, lengths=lengths)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_dtypes(rng, dtype):
    C, shape = 3, (6, 3, 8)
    x = rng.standard_normal(shape).astype(dtype)
    p = np.float64 if dtype == np.float64 else np.float32
    state = [np.full(C, 0.2, p), np.full(C, 1.5, p)]
    for options in ({"ghost": 2}, {"renorm": (1.5, 0.4)}):
        (y, _, here), (gpu_y, _, there) = both(fastbn.batch_norm_train, x, None, None, *state, **options)
        np.testing.assert_allclose(get(gpu_y).astype(p), y.astype(p), atol=2e-3 if dtype == np.float16 else 1e-12)
        for k in (3, 4):
            np.testing.assert_allclose(get(there[k]), here[k], rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_not_finite(rng, bad):
    x = rng.standard_normal((6, 3, 5)).astype(np.float32)
    x[1, 2, 3] = bad
    start = [np.full(3, 0.25, np.float32), np.full(3, 3.0, np.float32)]
    for options, moved in (({}, 0), ({"ghost": 3}, 1), ({"renorm": (2, 1)}, 0)):
        (y, saved, here), (gpu_y, gpu_saved, there) = both(
            fastbn.batch_norm_train, x, None, None, *start, nonfinite="skip_update", **options
        )
        assert gpu_saved.updated == saved.updated == moved
        np.testing.assert_allclose(get(gpu_y), y, rtol=1e-5, atol=2e-6)
        for k in (3, 4):
            np.testing.assert_allclose(get(there[k]), here[k], rtol=1e-6)
    for options in ({}, {"ghost": 3}, {"renorm": (2, 1)}, {"mask": put(np.ones((6, 5), bool))}):
        moving, out = [put(a) for a in start], put(np.full_like(x, 7))
        with pytest.raises(ValueError, match=r"^x: expected finite batch statistics, got NaN or inf in channel 2$"):
            fastbn.batch_norm_train(put(x), None, None, *moving, nonfinite="raise", out=out, **options)
        assert (get(out) == 7).all() and (get(moving[0]) == 0.25).all()


def test_finite_data_with_a_variance_out_of_range(rng):
    huge = (rng.standard_normal((6, 3, 5)) * 1e25).astype(np.float32)
    moving = [put(np.full(3, 0.25, np.float32)), put(np.full(3, 3.0, np.float32))]
    saved = fastbn.batch_norm_train(put(huge), None, None, *moving, nonfinite="skip_update")[1]
    assert saved.updated == 0 and (get(moving[1]) == 3).all()


def test_one_value_per_channel(rng):
    x = rng.standard_normal((1, 3)).astype(np.float32)
    weight, bias, mean, var = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
    (y, saved, _), (gpu_y, gpu_saved, there) = both(
        fastbn.batch_norm_train, x, weight, bias, mean, var, on_single="running"
    )
    same(gpu_y, y, "y")
    assert gpu_saved.updated == 0 and gpu_saved.count == 1 and np.array_equal(get(there[3]), mean)
    np.testing.assert_allclose(gpu_saved.moments.mean, x[0], rtol=1e-6)
    for got, want in zip(fastbn.backward(put(x), gpu_saved)[:3], fastbn.backward(x, saved)[:3], strict=True):
        same(got, want, "gradient")
    x = rng.standard_normal((5, 3)).astype(np.float32)
    mask = np.array([True, True, True, False, True])
    for options in ({"mask": mask, "ghost": 2}, {"ghost": 1, "renorm": (2, 1)}, {"mask": mask & (np.arange(5) == 2)}):
        for place in (lambda a: a, put):  # masks from both sides
            given = {k: place(v) if k == "mask" else v for k, v in options.items()}
            here = [mean.copy(), var.copy()]
            there = [put(mean), put(var)]
            want, own = fastbn.batch_norm_train(x, weight, bias, *here, on_single="running", **options)
            got, gpu_own = fastbn.batch_norm_train(put(x), put(weight), put(bias), *there, on_single="running", **given)
            same(got, want, "y")
            same(there[0], here[0], "running mean")
            assert gpu_own.updated == own.updated and gpu_own.count == own.count
            same(fastbn.backward(put(x), gpu_own).input, fastbn.backward(x, own).input, "gradient")


def test_the_layer(rng):
    x, g = rng.standard_normal((2, 7, 3, 4)).astype(np.float32)
    for options in (
        {"ghost": 2}, {"ghost": 2, "momentum": None}, {"renorm": (1.5, 0.5)}, {"nonfinite": "skip_update"},
        {"nonfinite": "raise", "momentum": None}, {"on_single": "running"},
    ):  # fmt: skip
        here, there = fastbn.BatchNorm(3, **options), fastbn.BatchNorm(3, **options)
        for _ in range(2):
            same(there(put(x)), here(x), "y")
            same(there.backward(put(g)).input, here.backward(g).input, "gradient")
        assert there.num_batches_tracked == here.num_batches_tracked
        for key, value in here.state_dict().items():
            np.testing.assert_allclose(there.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_statistics_gathered_elsewhere(rng):
    x = rng.standard_normal((8, 3)).astype(np.float32)
    here, there = (
        [np.zeros(3, np.float32), np.ones(3, np.float32)],
        [put(np.zeros(3, np.float32)), put(np.ones(3, np.float32))],
    )
    for unbiased, moments in itertools.product(
        (True, False), (fastbn.Moments.of(x), fastbn.Moments(0, [0] * 3, [0] * 3))
    ):
        fastbn.update_running(*here, moments, momentum=0.3, unbiased=unbiased)
        fastbn.update_running(*there, moments, momentum=0.3, unbiased=unbiased)
        np.testing.assert_allclose([get(a) for a in there], here, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^moments: expected more than 1"):
        fastbn.update_running(*there, fastbn.Moments(1, [0] * 3, [0] * 3))
    with pytest.raises(ValueError, match=r"^running_mean: expected one number per channel"):
        fastbn.update_running(*there, fastbn.Moments(3, [0] * 2, [0] * 2))


X = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"ghost": 0}, ValueError, "ghost"),
        ({"ghost": 2.0}, TypeError, "ghost"),
        ({"ghost": 1}, ValueError, "ghost"),
        ({"ghost": 2, "axis": 0}, ValueError, "axis"),
        ({"ghost": 2, "renorm": (1, 0)}, ValueError, "renorm"),
        ({"renorm": (0.5, 1)}, ValueError, "renorm"),
        ({"ghost": 2, "mask": np.ones(3, bool)}, ValueError, "mask"),
        ({"ghost": 2, "mask": np.array([True, True, True, False])}, ValueError, "x"),
        ({"on_single": "none"}, ValueError, "on_single"),
        ({"nonfinite": "none"}, ValueError, "nonfinite"),
        ({"ghost": 2, "residual": np.zeros((4, 2), np.float32)}, ValueError, "residual"),
        ({"ghost": 2, "out": np.zeros((4, 2), np.float32)}, ValueError, "out"),
    ],
    ids=str,
)
def test_errors_are_those_of_the_host(options, error, named):
    placed = {k: put(v) if k in ("residual", "out") else v for k, v in options.items()}
    for x, given in ((X, options), (put(X), placed)):
        with pytest.raises(error, match=rf"^{named}: expected"):
            fastbn.batch_norm_train(x, **given)
    with pytest.raises(ValueError, match=r"^on_single: expected running statistics"):
        fastbn.batch_norm_train(put(X[:1]), on_single="running")
    with pytest.raises(ValueError, match=r"^x: expected more than 1 value"):
        fastbn.batch_norm_train(put(X[:1]), nonfinite="skip_update")


def test_empty():
    for options in ({"ghost": 2}, {"nonfinite": "raise"}, {"on_single": "running"}):
        moving = [put(np.full(3, 0.25, np.float32)), put(np.full(3, 0.75, np.float32))]
        y, saved = fastbn.batch_norm_train(put(np.empty((0, 3), np.float32)), None, None, *moving, **options)
        assert get(y).shape == (0, 3) and saved.count == 0 and (get(moving[0]) == 0.25).all()
