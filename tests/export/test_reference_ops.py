"""The float64 evaluator of the checks equals onnxruntime on what onnx's own gets wrong or does slowly."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from fastbn_export._reference_ops import CORRECTED
from numpy.testing import assert_allclose
from onnx import helper
from onnx.reference import ReferenceEvaluator

from .onnx_models import graph, value

RNG = np.random.default_rng(0)


def both(node, x, constants=(), opset=17):
    model = graph([node], [value("x", shape=x.shape)], [value("y")], constants, opset=opset)
    ours = ReferenceEvaluator(model, new_ops=CORRECTED).run(None, {"x": x})[0]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return ours, session.run(None, {"x": x})[0]


POOLS = [
    {},
    {"strides": [2, 3]},
    {"pads": [1, 0, 1, 1]},
    {"pads": [1, 1, 1, 1], "strides": [2, 2]},
    {"auto_pad": "SAME_UPPER"},
    {"ceil_mode": 1, "strides": [2, 2]},
]


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("options", POOLS, ids=str)
def test_pools(op, options):
    x = RNG.normal(size=(2, 3, 7, 8)).astype(np.float32)
    ours, theirs = both(helper.make_node(op, ["x"], ["y"], kernel_shape=[3, 2], **options), x)
    assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_pools_with_dilation_and_counted_padding_in_one_and_three_dimensions():
    x = RNG.normal(size=(1, 2, 9)).astype(np.float32)
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3], dilations=[2], pads=[1, 1])
    assert_allclose(*both(node, x))
    x = RNG.normal(size=(1, 2, 4, 4, 4)).astype(np.float32)
    node = helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[2] * 3, pads=[1] * 6, count_include_pad=1)
    assert_allclose(*both(node, x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("opset", [7, 8, 9, 14, 15, 17])
def test_batch_norm_of_every_opset_in_inference(opset):
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    constants = [(name, RNG.uniform(0.5, 1.5, 3).astype(np.float32)) for name in "sbmv"]
    node = helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y"], epsilon=1e-3)
    assert_allclose(*both(node, x, constants, opset), rtol=1e-5, atol=1e-6)


def test_batch_norm_per_activation():
    x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    s, b, m, v = (RNG.uniform(0.5, 1.5, (3, 4)).astype(np.float32) for _ in range(4))
    node = helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y"], spatial=0)
    constants = list(zip("sbmv", (s, b, m, v), strict=True))
    model = graph([node], [value("x", shape=x.shape)], [value("y")], constants, opset=8)
    (have,) = ReferenceEvaluator(model, new_ops=CORRECTED).run(None, {"x": x})
    assert_allclose(have, s * (x - m) / np.sqrt(v + 1e-5) + b, rtol=1e-5, atol=1e-6)


def test_batch_norm_in_training():
    x = RNG.normal(size=(5, 3, 4)).astype(np.float32)
    constants = [(name, RNG.uniform(0.5, 1.5, 3).astype(np.float32)) for name in "sbmv"]
    node = helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y", "rm", "rv"], training_mode=1, momentum=0.8)
    model = graph([node], [value("x", shape=x.shape)], [value(n) for n in ("y", "rm", "rv")], constants)
    y, mean, var = ReferenceEvaluator(model, new_ops=CORRECTED).run(None, {"x": x})
    p = dict(constants)
    assert_allclose(mean, 0.8 * p["m"] + 0.2 * x.mean((0, 2)), rtol=1e-5)
    assert_allclose(var, 0.8 * p["v"] + 0.2 * x.var((0, 2)), rtol=1e-5)
    z = (x - x.mean((0, 2), keepdims=True)) / np.sqrt(x.var((0, 2), keepdims=True) + 1e-5)
    assert_allclose(y, z * p["s"][:, None] + p["b"][:, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("opset", "axis"), [(10, None), (13, None), (13, 1), (13, -1), (19, 1), (21, None), (21, -1)])
@pytest.mark.parametrize("code", [np.uint8, np.int8])
def test_quantisation_of_every_opset(opset, axis, code):
    x = RNG.normal(size=(4, 3, 5)).astype(np.float32) * 3
    size = () if axis is None else (x.shape[axis],)
    constants = [("s", RNG.uniform(0.01, 0.1, size).astype(np.float32)), ("z", RNG.integers(0, 9, size).astype(code))]
    options = {} if axis is None else {"axis": axis}
    quantise = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **options)
    back = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **options)
    model = graph([quantise, back], [value("x", shape=x.shape)], [value("y", shape=x.shape)], constants, opset=opset)
    (ours,) = ReferenceEvaluator(model, new_ops=CORRECTED).run(None, {"x": x})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert_allclose(ours, session.run(None, {"x": x})[0], rtol=1e-6, atol=1e-7)


CONVS = [
    {},
    {"strides": [2, 3], "pads": [1, 0, 2, 1]},
    {"dilations": [2, 1], "pads": [2, 1, 2, 1]},
    {"group": 2},
    {"group": 4, "strides": [2, 1]},
    {"auto_pad": "SAME_UPPER"},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", CONVS, ids=str)
def test_convolution(options, bias):
    x = RNG.normal(size=(2, 4, 9, 8)).astype(np.float32)
    weight = RNG.normal(size=(8, 4 // options.get("group", 1), 3, 2)).astype(np.float32)
    constants = [("w", weight), ("b", RNG.normal(size=8).astype(np.float32))]
    node = helper.make_node("Conv", ["x", "w", *(["b"] if bias else [])], ["y"], **options)
    assert_allclose(*both(node, x, constants), rtol=1e-4, atol=1e-5)


TRANSPOSED = [
    *({k: v for k, v in options.items() if k != "auto_pad"} for options in CONVS[:5]),
    {"strides": [2, 2], "output_padding": [1, 0]},
    {"strides": [2, 2], "output_padding": [1, 1], "pads": [1, 1, 0, 1], "group": 2},
]


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
def test_transposed_convolution(options):
    x = RNG.normal(size=(2, 4, 5, 6)).astype(np.float32)
    groups = options.get("group", 1)
    weight = RNG.normal(size=(4, 6 // min(groups, 2), 3, 2)).astype(np.float32)
    outputs = weight.shape[1] * groups
    constants = [("w", weight), ("b", RNG.normal(size=outputs).astype(np.float32))]
    node = helper.make_node("ConvTranspose", ["x", "w", "b"], ["y"], **options)
    assert_allclose(*both(node, x, constants), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks(rank):
    x = RNG.normal(size=(1, 4, *[5] * rank)).astype(np.float32)
    weight = RNG.normal(size=(4, 4, *[2] * rank)).astype(np.float32)
    for op in ("Conv", "ConvTranspose"):
        node = helper.make_node(op, ["x", "w"], ["y"], strides=[2] * rank)
        assert_allclose(*both(node, x, [("w", weight)]), rtol=1e-4, atol=1e-5)
