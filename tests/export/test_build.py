"""Every layer as onnxruntime computes it equals NumPy; what does not fit is named."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from fastbn_export.build import build
from fastbn_export.layers import (
    AveragePool,
    Conv,
    Flatten,
    GlobalAveragePool,
    Linear,
    MaxPool,
    ReLU,
    Sigmoid,
    Softmax,
)
from numpy.testing import assert_allclose

import fastbn

from . import folding
from .plain_fold import norm

RNG = np.random.default_rng(0)


def run(model, x):
    return folding.run(model, {"input": x})[0]


def data(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def declared(model):
    return [d.dim_value or d.dim_param for d in model.graph.output[0].type.tensor_type.shape.dim]


def convolved(x, layer):
    """Convolve by definition, in float64: one output value at a time."""
    rank = x.ndim - 2
    sizes = {n: [getattr(layer, n)] * rank for n in ("stride", "padding", "dilation")}
    weight = np.asarray(layer.weight, np.float64)
    x = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *[(p, p) for p in sizes["padding"]]])
    span = [d * (k - 1) + 1 for d, k in zip(sizes["dilation"], weight.shape[2:], strict=True)]
    out = [(n - s) // step + 1 for n, s, step in zip(x.shape[2:], span, sizes["stride"], strict=True)]
    y = np.empty((len(x), len(weight), *out))
    per_group, inputs = len(weight) // layer.groups, weight.shape[1]
    for m in range(len(weight)):
        first = m // per_group * inputs
        for place in np.ndindex(*out):
            window = tuple(
                slice(i * step, i * step + s, d)
                for i, step, s, d in zip(place, sizes["stride"], span, sizes["dilation"], strict=True)
            )
            y[(slice(None), m, *place)] = np.einsum(
                "ni,i->n",
                x[(slice(None), slice(first, first + inputs), *window)].reshape(len(x), -1),
                weight[m].ravel(),
            )
    return y if layer.bias is None else y + np.asarray(layer.bias).reshape(-1, *[1] * rank)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2}])
def test_convolution_by_definition(rank, options):
    layer = Conv(data(4, 4 // options.get("groups", 1), *[3] * rank), data(4), **options)
    x = data(2, 4, *[7] * rank)
    model = build([layer], (None, 4, *[7] * rank), fold=False)
    y = run(model, x)
    assert_allclose(y, convolved(x, layer), rtol=1e-5, atol=1e-5)
    assert declared(model) == ["batch", *y.shape[1:]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 4, 5, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_over_the_last_axis(dtype, shape, bias):
    layer = Linear(data(4, 3, dtype=dtype), data(4, dtype=dtype) if bias else None)
    x = data(*shape, dtype=dtype)
    y = run(build([layer], (None, *shape[1:]), fold=False), x)
    want = x.astype(np.float64) @ np.asarray(layer.weight).T + (0 if layer.bias is None else layer.bias)
    assert y.dtype == dtype
    assert_allclose(y, want, rtol=2e-2 if dtype == np.float16 else 1e-5, atol=1e-2 if dtype == np.float16 else 1e-6)


@pytest.mark.parametrize("axis", [1, 2, -1])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("fold", [False, True])
def test_batch_norm_objects_in_inference_along_any_axis(axis, activation, fold):
    x = data(6, 3, 4) * 2 + 1
    bn = fastbn.BatchNorm(x.shape[axis], axis=axis, activation=activation)
    for _ in range(3):
        bn(data(*x.shape) * 3 - 1)
    bn.weight[:] = RNG.uniform(0.5, 2, bn.weight.shape)
    y = run(build([bn], (None, 3, 4), fold=fold), x)
    bn.eval()
    assert_allclose(y, bn(x), rtol=1e-5, atol=1e-5)


def test_batch_norm_without_weight_and_bias_and_other_types():
    bn = fastbn.BatchNorm(3, affine=False)
    bn(data(8, 3))
    x = data(4, 3)
    bn.eval()
    assert_allclose(run(build([bn], (None, 3), fold=False), x), bn(x), rtol=1e-5, atol=1e-6)
    layers = [Linear(data(3, 2, dtype=np.float64)), bn]
    assert run(build(layers, (None, 2), fold=False), data(4, 2, dtype=np.float64)).dtype == np.float64
    halves = build([Linear(data(3, 2, dtype=np.float16)), norm(RNG, 3)], (None, 2), fold=False)
    assert {t.data_type for t in halves.graph.initializer} == {onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT}
    assert run(halves, data(4, 2, dtype=np.float16)).dtype == np.float16


def test_activations_pools_and_flatten():
    x = data(2, 3, 6, 6)
    windows = x.reshape(2, 3, 3, 2, 3, 2)
    shape = (None, 3, 6, 6)
    cases = [
        (ReLU(), np.maximum(x, 0)),
        (Sigmoid(), 1 / (1 + np.exp(-x))),
        (Softmax(1), np.exp(x) / np.exp(x).sum(1, keepdims=True)),
        (MaxPool(2), windows.max((3, 5))),
        (AveragePool(2), windows.mean((3, 5))),
        (GlobalAveragePool(), x.mean((2, 3), keepdims=True)),
        (Flatten(), x.reshape(2, -1)),
        (Flatten(2), x.reshape(6, -1)),
    ]
    for layer, want in cases:
        assert_allclose(run(build([layer], shape, fold=False), x), want, rtol=1e-5, atol=1e-6, err_msg=str(layer))


def test_average_pool_counts_padding_or_not():
    x = np.ones((1, 1, 4), np.float32)
    counted = run(build([AveragePool(2, padding=1)], (None, 1, 4), fold=False), x)
    not_counted = run(build([AveragePool(2, padding=1, count_include_pad=False)], (None, 1, 4), fold=False), x)
    assert counted[0, 0].tolist() == [0.5, 1, 0.5] and not_counted[0, 0].tolist() == [1, 1, 1]


def test_a_whole_network_folds_and_stays_the_same():
    layers = [
        Conv(data(4, 3, 3, 3), padding=1),
        norm(RNG, 4, activation="relu"),
        MaxPool(2),
        Conv(data(6, 4, 3, 3)),
        norm(RNG, 6),
        ReLU(),
        GlobalAveragePool(),
        Flatten(),
        Linear(data(5, 6)),
        norm(RNG, 5),
        Softmax(),
    ]
    plain, folded = (build(layers, ("n", 3, 12, 12), fold=fold) for fold in (False, True))
    assert sum(node.op_type == "BatchNormalization" for node in plain.graph.node) == 3
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)
    x = data(2, 3, 12, 12)
    assert_allclose(run(folded, x), run(plain, x), rtol=1e-4, atol=1e-5)


def test_dynamic_sizes_keep_or_get_a_name():
    layers = [Conv(data(2, 1, 3), padding=1), Conv(data(2, 2, 3), stride=2)]
    model = build(layers, (-1, 1, "time"), fold=False)
    assert declared(model) == ["batch", 2, "layers[1].size_2"]
    assert run(model, data(3, 1, 9)).shape == (3, 2, 4)


def bad_norm(**changes):
    return SimpleNamespace(**{**vars(norm(RNG, 3)), **changes})


WRONG = {
    "no layers": ([], (None, 3), "layers: expected at least one"),
    "an unknown layer": ([object()], (None, 3), r"layers\[0\]: expected a fastbn.BatchNorm"),
    "features": ([ReLU(), Linear(np.ones((2, 4)))], (None, 3), r"layers\[1\]: expected 4 features"),
    "weight rank": ([Linear(np.ones(3))], (None, 3), r"layers\[0\].weight: expected shape"),
    "bias size": ([Linear(np.ones((2, 3)), np.ones(3))], (None, 3), r"layers\[0\].bias: expected shape \(2,\)"),
    "integer weights": ([Linear(np.ones((2, 3), int))], (None, 3), r"layers\[0\].weight: expected float16"),
    "mixed weights": (
        [Linear(np.ones((3, 3))), Linear(np.ones((3, 3), np.float32))],
        (None, 3),
        "weights of one dtype",
    ),
    "channels": ([Conv(np.ones((2, 4, 3)))], (None, 3, 8), r"layers\[0\]: expected 4 channels"),
    "conv rank": ([Conv(np.ones((2, 3, 3)))], (None, 3, 8, 8), r"layers\[0\]: expected an input of rank 3"),
    "groups": ([Conv(np.ones((3, 1, 3)), groups=2)], (None, 2, 8), r"layers\[0\].groups: expected a divisor"),
    "stride": ([Conv(np.ones((3, 2, 3)), stride=0)], (None, 2, 8), r"layers\[0\].stride: expected 1 integers >= 1"),
    "kernel": ([Conv(np.ones((3, 2, 9)))], (None, 2, 8), r"layers\[0\]: expected room"),
    "norm channels": ([norm(RNG, 3)], (None, 4), r"layers\[0\]: expected 3 channels"),
    "norm axis": ([bad_norm(axis=2)], (None, 3), r"layers\[0\]: expected an axis"),
    "norm without statistics": ([bad_norm(running_mean=None)], (None, 3), "track_running_stats"),
    "norm activation": ([bad_norm(activation="tanh")], (None, 3), "activation"),
    "norm bias": ([bad_norm(bias=np.ones(2))], (None, 3), r"layers\[0\].bias: expected shape \(3,\)"),
    "pool rank": ([MaxPool(2)], (None, 3), r"layers\[0\]: expected an input"),
    "pool padding": ([MaxPool(2, padding=2)], (None, 3, 8), "at most half"),
    "global pool": ([GlobalAveragePool()], (None, 3), "spatial axes"),
    "softmax axis": ([Softmax(2)], (None, 3), r"layers\[0\].axis"),
    "flatten axis": ([Flatten(3)], (None, 3), r"layers\[0\].axis"),
    "rank 1": ([ReLU()], (3,), "input_shape: expected at least two axes"),
    "size 0": ([ReLU()], (None, 0), "input_shape: expected sizes > 0"),
    "size True": ([ReLU()], (None, True), "input_shape: expected sizes > 0"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_does_not_fit_is_named(case):
    layers, shape, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        build(layers, shape)
