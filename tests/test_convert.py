"""Layers from other frameworks: the same numbers in inference, in training, and in the statistics afterwards."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from tests.test_semantics import import_keras


@pytest.fixture
def arrays(rng):
    scale, var = rng.uniform(0.5, 2, (2, 5)).astype(np.float32)
    shift, mean = rng.standard_normal((2, 5)).astype(np.float32)
    return scale, shift, mean, var


def by_hand(x, scale, shift, mean, var, eps):
    return (x.astype(np.float64) - mean) / np.sqrt(var.astype(np.float64) + eps) * scale + shift


def check(bn, x, arrays, old_weight, eps):
    """Check a layer with the channels last against the rules: old value's weight, biased variance, eps inside."""
    scale, shift, mean, var = arrays
    over = tuple(range(x.ndim - 1))
    bn.axis = -1
    np.testing.assert_allclose(bn.eval()(x), by_hand(x, *arrays, eps), rtol=1e-5, atol=1e-5)
    y = bn.train()(x)
    np.testing.assert_allclose(y, by_hand(x, scale, shift, x.mean(over), x.var(over), eps), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        bn.running_mean, old_weight * mean + (1 - old_weight) * x.mean(over), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(bn.running_var, old_weight * var + (1 - old_weight) * x.var(over), rtol=1e-5)


def test_keras(rng, arrays):
    x = (rng.standard_normal((3, 4, 5)) * 2).astype(np.float32)
    names = dict(zip(("gamma", "beta", "moving_mean", "moving_variance"), arrays, strict=True))
    for weights in (names, list(arrays)):
        bn = fastbn.from_keras(weights)
        assert bn.axis == -1 and bn.eps == 1e-3 and bn.momentum == pytest.approx(0.01) and not bn.unbiased
        check(bn, x, arrays, 0.99, 1e-3)
    assert np.array_equal(arrays[2], names["moving_mean"]), "the given arrays stay as they are"


def test_keras_without_gamma_or_beta(rng, arrays):
    x = rng.standard_normal((4, 5)).astype(np.float32)
    scale, shift, mean, var = arrays
    no_gamma = fastbn.from_keras([shift, mean, var], scale=False)
    np.testing.assert_allclose(no_gamma.eval()(x), by_hand(x, 1, shift, mean, var, 1e-3), rtol=1e-5, atol=1e-5)
    no_beta = fastbn.from_keras({"gamma": scale, "moving_mean": mean, "moving_variance": var}, center=False)
    np.testing.assert_allclose(no_beta.eval()(x), by_hand(x, scale, 0, mean, var, 1e-3), rtol=1e-5, atol=1e-5)
    grads = no_beta.backward(x)
    assert grads.weight is not None and grads.bias is None and set(no_beta.state_dict()) >= {"weight", "running_var"}
    assert fastbn.from_keras([mean, var], scale=False, center=False).affine is False


def test_flax(rng, arrays):
    scale, shift, mean, var = arrays
    bn = fastbn.from_flax({"scale": scale, "bias": shift}, {"mean": mean, "var": var}, momentum=0.9)
    assert bn.axis == -1 and bn.eps == 1e-5
    check(bn, rng.standard_normal((3, 4, 5)).astype(np.float32), arrays, 0.9, 1e-5)
    bare = fastbn.from_flax(None, {"mean": mean, "var": var}, use_bias=False, use_scale=False)
    assert bare.weight is None and bare.bias is None and bare.momentum == pytest.approx(0.01)


class OnGpu:
    """An array of a GPU that NumPy does not get unasked, as CuPy's."""

    __cuda_array_interface__ = None

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")


class Jax(OnGpu):
    """As JAX's arrays: the type has CUDA's interface, an array on the CPU has not; NumPy gets them from anywhere."""

    @property
    def __cuda_array_interface__(self):
        raise AttributeError

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


def test_flax_as_jax_holds_it(arrays):
    scale, shift, mean, var = map(Jax, arrays)
    bn = fastbn.from_flax({"scale": scale, "bias": shift}, {"mean": mean, "var": var})
    for key, want in zip(("weight", "bias", "running_mean", "running_var"), arrays, strict=True):
        assert type(bn.state_dict()[key]) is np.ndarray and np.array_equal(bn.state_dict()[key], want)


def test_onnx(rng, arrays):
    bn = fastbn.from_onnx(*arrays)
    assert bn.axis == 1 and bn.momentum == pytest.approx(0.1) and bn.eps == 1e-5
    check(bn, rng.standard_normal((3, 4, 5)).astype(np.float32), arrays, 0.9, 1e-5)
    half = fastbn.from_onnx(*(a.astype(np.float16) for a in arrays))
    assert half.dtype == np.float32 and half.weight.dtype == np.float32
    assert fastbn.from_onnx(*(a.astype(np.float64) for a in arrays)).dtype == np.float64


@pytest.mark.parametrize("training", [0, 1])
def test_onnx_operator(rng, arrays, training):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    x = rng.standard_normal((3, 5, 4)).astype(np.float32)
    inputs, outputs = ["X", "scale", "B", "mean", "var"], ["Y", "new_mean", "new_var"][: 3 if training else 1]
    node = helper.make_node("BatchNormalization", inputs, outputs, momentum=0.7, epsilon=1e-2, training_mode=training)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in inputs + outputs]
    graph = helper.make_graph([node], "g", values[:5], values[5:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    want = ReferenceEvaluator(model).run(None, dict(zip(inputs, (x, *arrays), strict=True)))
    bn = fastbn.from_onnx(*arrays, momentum=0.7, epsilon=1e-2).train(bool(training))
    got = [bn(x), bn.running_mean, bn.running_var]
    for mine, theirs in zip(got, want, strict=False):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
    assert onnx is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Keras with NumPy 2
def test_keras_itself(rng, arrays):
    keras = import_keras()
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    layer = keras.layers.BatchNormalization(momentum=0.8, epsilon=0.01)
    layer.build(x.shape)
    layer.set_weights(arrays)
    bn = fastbn.from_keras(layer.get_weights(), momentum=0.8, epsilon=0.01)
    for training in (False, True, False):
        want = np.asarray(layer(x, training=training))
        np.testing.assert_allclose(bn.train(training)(x), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(bn.running_var, np.asarray(layer.moving_variance), rtol=1e-4)


def test_flax_itself(rng, arrays):
    linen = pytest.importorskip("flax.linen")
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    scale, shift, mean, var = arrays
    state = {"params": {"scale": scale, "bias": shift}, "batch_stats": {"mean": mean, "var": var}}
    own = linen.BatchNorm(use_running_average=False).init(pytest.importorskip("jax").random.key(0), x)
    assert fastbn.from_flax(own["params"], own["batch_stats"]).num_features == 5
    bn = fastbn.from_flax(state["params"], state["batch_stats"], momentum=0.8)
    want = linen.BatchNorm(use_running_average=True, momentum=0.8).apply(state, x)
    np.testing.assert_allclose(bn.eval()(x), want, rtol=1e-4, atol=1e-4)
    want, moved = linen.BatchNorm(use_running_average=False, momentum=0.8).apply(state, x, mutable=["batch_stats"])
    np.testing.assert_allclose(bn.train()(x), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(bn.running_mean, moved["batch_stats"]["mean"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bn.running_var, moved["batch_stats"]["var"], rtol=1e-4)


V = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: fastbn.from_keras([V, V, V]), ValueError, "weights"),
        (lambda: fastbn.from_keras(V), ValueError, "weights"),
        (lambda: fastbn.from_keras({"gamma": V, "beta": V, "moving_mean": V}), ValueError, "weights"),
        (lambda: fastbn.from_keras([V, V, V, V[:2]]), ValueError, "moving_variance"),
        (lambda: fastbn.from_keras([V, V, V, V], momentum=1.5), ValueError, "momentum"),
        (lambda: fastbn.from_keras([V, V, V, V], axis=[1]), TypeError, "axis"),
        (lambda: fastbn.from_flax({"scale": V}, {"mean": V, "var": V}), ValueError, "params"),
        (lambda: fastbn.from_flax({"scale": V, "bias": V}, V), TypeError, "batch_stats"),
        (lambda: fastbn.from_onnx(V, None, V, V), TypeError, "B"),
        (lambda: fastbn.from_onnx(V, V, V.astype(int), V), TypeError, "input_mean"),
        (lambda: fastbn.from_onnx(V, V, V[:, None], V), ValueError, "input_mean"),
        (lambda: fastbn.from_onnx(V, [[1.0], [2.0, 3.0]], V, V), TypeError, "B"),
        (lambda: fastbn.from_onnx(V, V, V, np.ma.ones(3)), TypeError, "input_var"),
        (lambda: fastbn.from_onnx(V, V, V, V, epsilon=-1), ValueError, "epsilon"),
        (lambda: fastbn.from_keras([V, V, V, V], epsilon="1e-3"), TypeError, "epsilon"),
        (lambda: fastbn.from_keras({"gamma": V, 2: V}), ValueError, "weights"),
        (lambda: fastbn.from_onnx(V, V, V, OnGpu(V)), fastbn.DeviceError, "input_var"),
    ],
)
def test_errors_name_the_argument(call, error, named):
    with pytest.raises(error, match=rf"^{named}: expected"):
        call()


def test_another_number_of_arrays_is_said():
    with pytest.raises(ValueError, match=r"^weights: expected 4 arrays, .*, got 7 arrays$"):
        fastbn.from_keras([V] * 7)  # a renormalising layer's
