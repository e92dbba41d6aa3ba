"""The public functions and the layer with arrays on a GPU: the same names, the same kind back."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import fastbn
from fastbn import reference
from fastbn.functional import frozen
from tests.cuda.device import GpuArray, Pretended, get, put, through_gpu


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(Pretended, "put", lambda self, values, like: GpuArray.of(values), raising=False)
    through_gpu(monkeypatch)


def test_functions_return_the_same_kind(rng):
    x, grad = rng.standard_normal((2, 6, 3, 10)).astype(np.float32)
    w, rm, rv = np.ones(3, np.float32), put(np.zeros(3, np.float32)), put(np.ones(3, np.float32))
    y, saved = fastbn.batch_norm_train(put(x), put(w), put(w), rm, rv)
    mean, var = reference.statistics(x)
    np.testing.assert_allclose(get(y), reference.apply(x, mean, var, w, w), atol=4e-6)
    np.testing.assert_allclose(get(rm), 0.1 * mean, rtol=1e-5, atol=1e-7)
    grads = fastbn.backward(put(grad), saved)
    assert all(isinstance(a, GpuArray) for a in (y, saved.mean, saved.variance, *grads[:3]))
    assert isinstance(fastbn.batch_norm_infer(put(x), rm, rv), GpuArray)
    y, saved = frozen(put(x), rm, rv)
    assert isinstance(y, GpuArray) and saved.moments.count == 60
    found = fastbn.Moments.of(put(x))
    np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-7)


def test_running_statistics_may_stay_or_be_biased(rng):
    x = rng.standard_normal((6, 3, 10)).astype(np.float32)
    rm, rv = put(np.zeros(3, np.float32)), put(np.ones(3, np.float32))
    _, saved = fastbn.batch_norm_train(put(x), None, None, rm, rv, update_stats=False)
    assert not get(rm).any() and (get(rv) == 1).all() and saved.updated == 0
    fastbn.batch_norm_train(put(x), None, None, rm, rv, unbiased=False, momentum=1.0)
    np.testing.assert_allclose(get(rv), reference.statistics(x)[1], rtol=1e-6)


def test_running_statistics_that_are_another_array_are_refused(rng):
    x, buffer = put(rng.standard_normal((6, 3, 10)).astype(np.float32)), np.ones((2, 4, 3), np.float32)
    on_gpu = GpuArray.of(buffer)
    vectors = [GpuArray(on_gpu.host[0, i]) for i in range(4)]
    fastbn.batch_norm_train(x, *vectors)
    for options in ({}, {"ghost": 2}):
        with pytest.raises(ValueError, match=r"^running_var: expected memory apart from weight"):
            fastbn.batch_norm_train(x, *vectors[:3], GpuArray(on_gpu.host[0, 0]), **options)
        with pytest.raises(ValueError, match=r"^running_mean: expected memory apart from bias"):
            fastbn.batch_norm_train(x, *vectors[:2], GpuArray(on_gpu.host[0].reshape(-1)[4:7]), vectors[3], **options)
    assert (on_gpu.host[1] == 1).all() and (on_gpu.host[0, :2] == 1).all()


def test_an_output_that_is_memory_of_a_vector_is_refused(rng):
    """Kernels read it while they write, and backward would read what was written."""
    buffer = GpuArray.of(rng.uniform(0.5, 1.0, 4 * 18).astype(np.float32))
    x, out, part = put(rng.standard_normal((6, 3)).astype(np.float32)), buffer[:18].reshape((6, 3)), buffer[15:18]
    own = [put(np.ones(3, np.float32)) for _ in range(4)]
    saved, kept = fastbn.batch_norm_train(x, part, part)[1], fastbn.layer_norm(x, part)[1]
    before = buffer.host.copy()
    calls = {
        "weight": [
            lambda: fastbn.batch_norm_train(x, part, out=out),
            lambda: fastbn.batch_norm_train(x, part, ghost=2, out=out),
            lambda: fastbn.batch_norm_infer(x, *own[:2], part, out=out),
            lambda: frozen(x, *own[:2], part, out=out),
            lambda: fastbn.layer_norm(x, part, out=out),
            lambda: fastbn.group_norm(x, 1, part, out=out),
            lambda: fastbn.backward(x, saved, out=out),
            lambda: fastbn.backward(x, kept, out=out),
        ],
        "bias": [
            lambda: fastbn.batch_norm_train(x, None, part, out=out),
            lambda: fastbn.layer_norm(x, None, part, out=out),
        ],
        "running_var": [
            lambda: fastbn.batch_norm_infer(x, own[0], part, out=out),
            lambda: fastbn.batch_norm_infer(out, own[0], part, out=out),
        ],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=f"^out: expected memory apart from {name}, got overlapping memory"):
                call()
    for options in ({"out": out}, {"out": out, "ghost": 2}):
        with pytest.raises(ValueError, match=r"^running_var: expected memory apart from out \(it is updated"):
            fastbn.batch_norm_train(x, None, None, own[0], part, **options)
    with pytest.raises(ValueError, match=r"^running_mean: expected memory apart from x \(it is updated"):
        fastbn.batch_norm_train(out, None, None, part, own[0])
    with pytest.raises(ValueError, match=r"^running_mean: expected memory apart from residual \(it is updated"):
        fastbn.batch_norm_train(x, None, None, part, own[0], residual=out)
    assert np.array_equal(buffer.host, before)


def test_inference_in_place_leaves_no_gradients_that_need_x(rng):
    x = put(rng.standard_normal((6, 3, 10)).astype(np.float32))
    rm, rv, w = put(np.zeros(3, np.float32)), put(np.ones(3, np.float32)), put(np.ones(3, np.float32))
    for weight, activation in ((w, None), (None, "relu")):
        _, saved = frozen(x, rm, rv, weight, activation=activation, out=x)
        with pytest.raises(ValueError, match=r"^saved: expected an x that was not overwritten"):
            fastbn.backward(x, saved)
        with pytest.raises(ValueError, match=r"^saved: expected an x that was not overwritten"):
            _ = saved.moments
    _, saved = frozen(x, rm, rv, out=x)
    np.testing.assert_allclose(get(fastbn.backward(x, saved).input), get(x), rtol=1e-4)


def test_arrays_on_a_gpu_beside_one_on_the_host_are_refused():
    with pytest.raises(fastbn.DeviceError, match="copy the array to the host"):
        fastbn.batch_norm_infer(np.ones((6, 3), np.float32), put(np.ones(3, np.float32)), np.ones(3, np.float32))


def test_the_layer_follows_its_input(rng):
    x, grad = rng.standard_normal((2, 6, 3, 10)).astype(np.float32)
    here, there = fastbn.BatchNorm(3, activation="relu"), fastbn.BatchNorm(3, activation="relu")
    for _ in range(2):
        want, got = here(x), there(put(x))
        np.testing.assert_allclose(get(got), want, atol=1e-5)
        np.testing.assert_allclose(get(there.backward(put(grad)).input), here.backward(grad).input, atol=1e-5)
    assert isinstance(there.running_mean, GpuArray) and there.num_batches_tracked == 2
    for key, value in there.state_dict().items():
        assert isinstance(value, np.ndarray)
        np.testing.assert_allclose(value, here.state_dict()[key], rtol=1e-5, atol=1e-6)
    there.load_state_dict(here.state_dict())
    np.testing.assert_allclose(get(there.eval()(put(x))), here.eval()(x), atol=1e-5)
    np.testing.assert_allclose(there(x), here(x), atol=1e-6)
    assert isinstance(there.running_mean, np.ndarray)


@pytest.mark.parametrize("options", [{}, {"activation": "relu", "residual": True}, {"ghost": 2}, {"mask": True}])
def test_memory_is_given_back_at_once(rng, options, monkeypatch):
    """Not when Python looks for cycles: a tensor may be a good part of the GPU's memory."""
    made, genuine = [], GpuArray.__init__

    def init(self, host, strides=None):
        genuine(self, host, strides)
        made.append(weakref.ref(self))

    def call():
        x, grad = (put(rng.standard_normal((4, 3, 8)).astype(np.float32)) for _ in range(2))
        given = {k: put(np.ones((4, 8), bool)) if k == "mask" else v for k, v in options.items()}
        given |= {"residual": put(x.host)} if "residual" in given else {}
        _, saved = fastbn.batch_norm_train(x, put(np.ones(3, np.float32)), put(np.zeros(3, np.float32)), **given)
        fastbn.backward(grad, saved)
        _, saved = fastbn.layer_norm(x)
        fastbn.backward(grad, saved)

    monkeypatch.setattr(GpuArray, "__init__", init)
    gc.collect()
    gc.disable()
    try:
        call()
        assert len(made) > 10 and [ref() for ref in made if ref() is not None] == []
    finally:
        gc.enable()
