"""The normalization family as ONNX nodes: what onnxruntime computes is what the layer computes, in every type."""

from __future__ import annotations

import itertools

import fastbn_export
import numpy as np
import onnx
import onnxruntime
import pytest
from fastbn_export import Conv, Linear, ReLU
from fastbn_export.build import build
from numpy.testing import assert_allclose

import fastbn
from fastbn import reference

from . import folding
from .plain_fold import norm

RNG = np.random.default_rng(6)
DTYPES = (np.float16, np.float32, np.float64)
NEAR = {np.float16: 4e-3, np.float32: 5e-6, np.float64: 1e-8}
"""A few roundings of the output; in float64, epsilon is a float32 attribute and counts a few 1e-8 of the variance."""


def run(model, x):
    return folding.run(model, {"input": x})[0]


def ops(model):
    return [node.op_type for node in model.graph.node]


def opset(model):
    return model.opset_import[0].version


def shaken(layer):
    """Give a layer's parameters values that matter."""
    for name, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2)):
        array = getattr(layer, name, None)
        if array is not None:
            array[...] = RNG.uniform(low, high, array.shape)
    return layer


def layers_and_sets(kind, shape, axis, affine, dtype):
    """Return a layer for inputs of a shape, the axes it normalises over, and weight and bias as they broadcast."""
    rank, C = len(shape), shape[axis]
    over = tuple(a for a in range(1, rank) if a != axis % rank)
    if kind == "layer":
        layer = fastbn.LayerNorm(shape[axis:], elementwise_affine=affine, dtype=dtype)
    elif kind == "instance":
        layer = fastbn.InstanceNorm(C, affine=affine, axis=axis, dtype=dtype)
    else:
        layer = fastbn.GroupNorm(2, C, affine=affine, axis=axis, dtype=dtype)
    return shaken(layer), over


def truth(kind, x, layer, over):
    """Compute the layer in float64 by its definition."""
    x = x.astype(np.float64)
    if kind == "layer":
        y = reference.normalise(x, tuple(range(-len(layer.normalized_shape), 0)), None, None, eps=layer.eps)
        return y if layer.weight is None else y * layer.weight + layer.bias
    y = np.moveaxis(x, layer.axis, 1)
    moved = y.shape
    if kind == "group":
        y = y.reshape(len(x), layer.num_groups, -1)
    y = reference.normalise(y, tuple(range(2, y.ndim)), None, None, eps=layer.eps).reshape(moved)
    if layer.weight is not None:
        y = y * layer.weight.reshape(-1, *[1] * (x.ndim - 2)) + layer.bias.reshape(-1, *[1] * (x.ndim - 2))
    return np.moveaxis(y, 1, layer.axis)


SHAPES = {
    "layer": [((5, 6), -1), ((4, 5, 6), -1), ((4, 5, 6), -2), ((2, 3, 4, 6), -3), ((2, 3, 2, 4, 6), -1)],
    "instance": [((4, 6, 5), 1), ((4, 5, 6), -1), ((2, 6, 3, 4), 1), ((2, 3, 6, 4), 2), ((2, 3, 2, 4, 6), -1)],
    "group": [((4, 6), 1), ((4, 6, 5), 1), ((4, 5, 6), -1), ((2, 6, 3, 4), 1), ((2, 3, 2, 4, 6), -1)],
}


@pytest.mark.parametrize(("dtype", "affine"), [(np.float32, False), *((dtype, True) for dtype in DTYPES)])
@pytest.mark.parametrize(("kind", "shape", "axis"), [(k, *case) for k, cases in SHAPES.items() for case in cases])
def test_onnxruntime_computes_what_the_layer_computes(kind, shape, axis, dtype, affine):
    x = (RNG.standard_normal(shape) * 2 + 1).astype(dtype)
    parameters = np.float64 if dtype == np.float64 else np.float32
    layer, over = layers_and_sets(kind, shape, axis, affine, parameters)
    # a product with the identity says which type the model has
    model = build([Linear(np.eye(shape[-1], dtype=dtype)), layer], ("n", *shape[1:]))
    y = run(model, x)
    assert y.dtype == dtype
    assert_allclose(y, truth(kind, x, layer, over), rtol=0, atol=NEAR[dtype] * 4)
    assert_allclose(y, layer(x), rtol=0, atol=NEAR[dtype] * 4)
    name = {"layer": "LayerNormalization", "instance": "InstanceNormalization", "group": "GroupNormalization"}[kind]
    if kind == "instance" and dtype == np.float64:  # of which onnxruntime has no kernel
        name = "GroupNormalization"
    assert ops(model).count(name) == 1
    assert opset(model) == (21 if name == "GroupNormalization" else 17)
    declared = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_value or d.dim_param for d in declared] == ["n", *shape[1:]]


@pytest.mark.parametrize(("shape", "axis"), [((5, 4), 1), ((3, 4, 6), 1), ((3, 6, 4), -1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instance_norm_that_tracks_statistics_is_a_batch_norm(shape, axis, dtype):
    layer = shaken(fastbn.InstanceNorm(4, affine=True, track_running_stats=True, axis=axis, dtype=np.float64)).eval()
    model = build([Linear(np.eye(shape[-1], dtype=dtype)), layer], (None, *shape[1:]), fold=False)
    x = RNG.standard_normal(shape).astype(dtype)
    assert "BatchNormalization" in ops(model)
    assert_allclose(run(model, x), layer(x.astype(np.float64)), rtol=0, atol=NEAR[dtype] * 4)


def test_a_large_mean_costs_group_norm_nothing():
    x = (RNG.standard_normal((2, 4, 50)) + 1e4).astype(np.float32)
    layer = shaken(fastbn.GroupNorm(2, 4))
    assert_allclose(run(build([layer], (None, 4, 50)), x), truth("group", x, layer, ()), atol=5e-6)


def test_layer_norm_without_bias_has_no_third_input():
    layer = shaken(fastbn.LayerNorm(6, bias=False))
    model = build([layer], (None, 6))
    assert [len(node.input) for node in model.graph.node] == [2] and len(model.graph.initializer) == 1
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    assert_allclose(run(model, x), layer(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"ghost": 2},
        {"renorm": (3.0, 5.0)},
        {"on_single": "running"},
        {"nonfinite": "raise"},
        {"momentum": None},
        {"update_stats": False},
        {"unbiased": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("frozen", [False, True])
def test_options_of_training_leave_inference_alone(options, frozen):
    bn = fastbn.BatchNorm(3, **options)
    bn(RNG.standard_normal((6, 3, 4)).astype(np.float32))
    bn.freeze(frozen)
    x = RNG.standard_normal((6, 3, 4)).astype(np.float32)
    model = build([bn], (None, 3, 4), fold=False)  # in training mode still: what is exported is inference
    assert_allclose(run(model, x), bn.eval()(x), rtol=1e-5, atol=2e-6)


def chain(middle, dtype=np.float32):
    """Return layers for (N, 6, 8); onnxruntime has no convolution in float64."""
    first = Conv(RNG.standard_normal((6, 6, 3)).astype(dtype), padding=1)
    if dtype == np.float64:
        first = Linear(RNG.standard_normal((8, 8)))
    return [first, middle, norm(RNG, 6, dtype=dtype), ReLU()]


NORMS = {
    "instance": lambda: fastbn.InstanceNorm(6, affine=True),
    "instance, no affine": lambda: fastbn.InstanceNorm(6),
    "group": lambda: fastbn.GroupNorm(3, 6),
    "group, no affine": lambda: fastbn.GroupNorm(3, 6, affine=False),
    "layer": lambda: fastbn.LayerNorm((6, 8)),
    "layer, no affine": lambda: fastbn.LayerNorm((6, 8), elementwise_affine=False),
    "layer, no bias": lambda: fastbn.LayerNorm((6, 8), bias=False),
    "tracked instance": lambda: fastbn.InstanceNorm(6, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, np.float32) for kind in NORMS),
        *((kind, np.float16) for kind in ("instance", "group", "layer")),
        *((kind, np.float64) for kind in ("instance", "group", "layer, no bias", "tracked instance")),
    ],
)
def test_a_batch_norm_behind_another_normalization_folds_into_its_affine(kind, dtype):
    layers = chain(shaken(NORMS[kind]()), dtype)
    plain, folded = (build(layers, (None, 6, 8), fold=fold) for fold in (False, True))
    assert "BatchNormalization" in ops(plain)
    if kind != "tracked instance":
        assert len(ops(folded)) == 3 and "BatchNormalization" not in ops(folded)
    elif dtype != np.float64:
        assert ops(folded) == ["Conv", "Relu"]
    else:  # two become one; a Linear along another axis cannot take it
        assert ops(folded).count("BatchNormalization") == 1
    report = fastbn_export.verify(plain, folded)
    assert report.ok, report
    x = RNG.standard_normal((4, 6, 8)).astype(dtype)
    assert_allclose(run(folded, x), run(plain, x), rtol=0, atol=NEAR[dtype] * 10)


@pytest.mark.parametrize("kind", ["layer", "group", "instance"])
def test_channels_last_folds_through_the_transposes(kind):
    middle = {
        "layer": lambda: fastbn.LayerNorm(6),
        "group": lambda: fastbn.GroupNorm(3, 6, axis=-1),
        "instance": lambda: fastbn.InstanceNorm(6, affine=True, axis=-1),
    }[kind]()
    layers = [shaken(middle), shaken(fastbn.BatchNorm(6, axis=-1))]
    plain, folded = (build(layers, (None, 8, 6), fold=fold) for fold in (False, True))
    assert "BatchNormalization" not in ops(folded)
    assert fastbn_export.verify(plain, folded).ok


def test_a_batch_norm_in_front_of_another_normalization_stays():
    layers = [shaken(fastbn.BatchNorm(6)), shaken(fastbn.InstanceNorm(6, affine=True))]
    model = build(layers, (None, 6, 8))
    assert ops(model) == ["BatchNormalization", "InstanceNormalization"]


_KNOWS_23 = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 23)
_23 = pytest.param(23, marks=pytest.mark.skipif(not _KNOWS_23, reason="onnxruntime before 1.23 runs opsets up to 22"))


@pytest.mark.parametrize("version", [17, 21, 22, _23])
def test_an_opset_can_be_asked_for(version):
    layers = [fastbn.BatchNorm(3), fastbn.LayerNorm(4), fastbn.InstanceNorm(3), ReLU()]
    model = build(layers, (None, 3, 4), opset=version, fold=False)
    assert opset(model) == version
    x = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    assert_allclose(run(model, x), run(build(layers, (None, 3, 4), fold=False), x), rtol=1e-6, atol=1e-6)


def test_the_declared_opset_is_as_old_as_the_layers_allow():
    assert opset(build([fastbn.BatchNorm(3)], (None, 3))) == 17
    assert opset(build([fastbn.BatchNorm(3)], (None, 3), opset=15)) == 15
    model = build([fastbn.GroupNorm(1, 3)], (None, 3, 4))
    assert opset(model) == 21 and model.ir_version == 10


F16 = np.eye(3, dtype=np.float16)
LARGE = fastbn.LayerNorm(3)
LARGE.weight[1] = 1e6

WRONG = {
    "recurrent": ([fastbn.RecurrentBatchNorm(3, 4)], (None, 4, 3), {}, r"layers\[0\]: .*got RecurrentBatchNorm"),
    "group opset": ([fastbn.GroupNorm(1, 3)], (None, 3, 4), {"opset": 20}, r"opset: expected >= 21 for layers\[0\]"),
    "layer opset": (
        [fastbn.LayerNorm(3)],
        (None, 3),
        {"opset": 16},
        r"opset: expected >= 17 for layers\[0\]: Layer",
    ),
    "instance opset": (
        [fastbn.InstanceNorm(3, dtype=np.float64)],
        (None, 3, 4),
        {"opset": 17},
        r"opset: expected >= 21 .*no InstanceNormalization in float64",
    ),
    "old opset": ([ReLU()], (None, 3), {"opset": 14}, "opset: expected 15 to"),
    "new opset": ([ReLU()], (None, 3), {"opset": 9999}, "opset: expected 15 to"),
    "no opset": ([ReLU()], (None, 3), {"opset": 17.0}, "opset: expected an integer"),
    "true opset": ([ReLU()], (None, 3), {"opset": True}, "opset: expected an integer"),
    "layer shape": ([fastbn.LayerNorm((3, 4))], (None, 4, 3), {}, r"layers\[0\]: expected last axes \(3, 4\)"),
    "layer rank": ([fastbn.LayerNorm((2, 3, 4))], (3, 4), {}, r"layers\[0\]: expected last axes"),
    "layer unknown": ([fastbn.LayerNorm(3)], (None, None), {}, r"layers\[0\]: expected last axes"),
    "instance channels": ([fastbn.InstanceNorm(3)], (None, 4, 5), {}, r"layers\[0\]: expected 3 channels on axis 1"),
    "instance axis": (
        [fastbn.InstanceNorm(3, axis=0)],
        (3, 4, 5),
        {},
        r"layers\[0\]: expected an axis .*first",
    ),
    "instance rank": ([fastbn.InstanceNorm(3)], (None, 3), {}, r"layers\[0\]: expected more than 1 value per channel"),
    "instance of one": ([fastbn.InstanceNorm(3)], (None, 3, 1, 1), {}, r"layers\[0\]: expected more than 1 value"),
    "group of one": ([fastbn.GroupNorm(3, 3)], (1, 3), {}, r"layers\[0\]: expected more than 1 value per group"),
    "group axis": ([fastbn.GroupNorm(3, 3, axis=4)], (None, 3, 4), {}, r"layers\[0\]: expected an axis of a rank 3"),
    "float16 range": (
        [Linear(F16), LARGE],
        (None, 3),
        {},
        r"layers\[1\].weight: expected values in the range .*100000",
    ),
    "bias range": ([Linear(F16, np.full(3, 1e6))], (None, 3), {}, r"layers\[0\].bias: expected values in the range"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_does_not_fit_is_named(case):
    layers, shape, options, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        build(layers, shape, **options)


def test_every_model_passes_the_checker_in_full():
    for kind, dtype in itertools.product(NORMS, (np.float32, np.float64)):
        onnx.checker.check_model(build(chain(shaken(NORMS[kind]()), dtype), (None, 6, 8)), full_check=True)
