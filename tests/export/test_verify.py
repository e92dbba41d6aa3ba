"""A right fold passes in every dtype; a fold corrupted on purpose fails; a crash is a verdict."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from fastbn_export.build import build
from fastbn_export.layers import Conv, Linear, ReLU, Sigmoid, Softmax
from fastbn_export.verify import Checker, verify
from onnx import TensorProto, helper, numpy_helper

from .onnx_models import corrupt, endless, graph, value
from .plain_fold import folded, norm


def dense(rng, out, in_, dtype=np.float32, bias=True):
    weight = rng.normal(size=(out, in_)) / np.sqrt(in_)
    return Linear(weight.astype(dtype), rng.normal(size=out).astype(dtype) if bias else None)


def conv(rng, out, in_, dtype=np.float32, **options):
    return Conv(rng.normal(size=(out, in_, 3, 3)).astype(dtype), **options)


def two_layers(dtype=np.float32, seed=0):
    """Return (layers, folded layers, input shape) of a small classifier."""
    rng = np.random.default_rng(seed)
    first, last = dense(rng, 8, 6, dtype), dense(rng, 4, 8, dtype)
    bn = norm(rng, 8, np.float32 if dtype == np.float16 else dtype)
    return [first, bn, Sigmoid(), last], [folded(first, bn), Sigmoid(), last], (None, 6)


def models(dtype=np.float32):
    layers, by_hand, shape = two_layers(dtype)
    return build(layers, shape, fold=False), build(by_hand, shape, fold=False)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_right_fold_passes(dtype):
    report = verify(*models(dtype))
    assert report.ok, str(report)
    assert len(report.checks) == 2
    (output,) = report.outputs
    assert output.max_abs is not None and output.reference_abs is not None
    assert "output" in str(report) and "ok" in str(report)
    assert report.to_dict()["ok"] is True


@pytest.mark.parametrize("data", [np.full((2, 6), np.nan, np.float32), np.zeros((0, 6), np.float32)])
def test_a_check_that_cannot_fail_says_so(data):
    original, by_hand = models()
    broken = corrupt(by_hand, lambda a: a * 2)
    assert "a wrong fold would not show" in str(verify(original, broken, inputs={"input": data}))
    assert not verify(original, by_hand, inputs={"input": np.ones((2, 6), np.float32)}).notes


def scaled_channel(array):
    array[0] *= 1.01
    return array


def shifted(array):
    array[0] += 1e-2 * max(abs(float(array[0])), 1.0)
    return array


CORRUPTIONS = {
    "one weight channel scaled by 1.01": (scaled_channel, "weight"),
    "one bias shifted": (shifted, "bias"),
    "channels in another order": (lambda a: a[::-1], "weight"),
    "bias forgotten": (np.zeros_like, "bias"),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_canary_a_corrupted_fold_fails(name, dtype):
    original, good = models(dtype)
    change, which = CORRUPTIONS[name]
    report = verify(original, corrupt(good, change, which))
    assert not report.ok
    assert "NOT the same" in str(report)


def test_canary_wrong_axis_of_a_square_weight_fails():
    rng = np.random.default_rng(1)
    first, bn = dense(rng, 6, 6), norm(rng, 6)
    scale = (bn.weight / np.sqrt(bn.running_var + bn.eps)).astype(np.float32)
    right = folded(first, bn)
    wrong = Linear(np.asarray(first.weight) * scale, right.bias)
    original = build([first, bn], (None, 6), fold=False)
    assert verify(original, build([right], (None, 6), fold=False)).ok
    assert not verify(original, build([wrong], (None, 6), fold=False)).ok


def test_canary_behind_a_softmax_and_in_a_deep_net():
    """The effect on the output is tiny there; the algebra in float64 sees it all the same."""
    rng = np.random.default_rng(2)
    layers, by_hand = [], []
    for _ in range(6):
        linear, bn = dense(rng, 32, 32), norm(rng, 32)
        layers += [linear, bn, ReLU()]
        by_hand += [folded(linear, bn), ReLU()]
    layers, by_hand = [*layers, Softmax()], [*by_hand, Softmax()]
    original, good = (build(x, (None, 32), fold=False) for x in (layers, by_hand))
    assert verify(original, good).ok
    assert not verify(original, corrupt(good, scaled_channel, "weight")).ok


def test_convolutions_are_judged_in_float64_too():
    """Onnxruntime has no float64 Conv; onnx's evaluator has."""
    rng = np.random.default_rng(3)
    first, bn = conv(rng, 4, 3, padding=1, stride=2), norm(rng, 4)
    original, good = (build(x, (None, 3, 9, 9), fold=False) for x in ([first, bn], [folded(first, bn)]))
    report = verify(original, good)
    assert report.ok and "float64 by reference" in report.checks
    assert not verify(original, corrupt(good, scaled_channel, "weight")).ok


def test_a_fold_closer_to_the_truth_than_the_original_passes():
    """Mean 1e4, variance 1e-4: the original is off by 1e-1, and a difference to it is not the fold's fault."""
    rng = np.random.default_rng(4)
    first, bn = dense(rng, 4, 4, bias=False), norm(rng, 4)
    bn.running_mean[:], bn.running_var[:] = 1e4, 1e-4
    first = Linear(first.weight, bias=np.full(4, 1e4, np.float32))
    report = verify(build([first, bn], (None, 4), fold=False), build([folded(first, bn)], (None, 4), fold=False))
    assert report.ok, str(report)
    assert report.outputs[0].reference_abs > 1e-4


def test_user_tolerance_replaces_ours():
    original, good = models()
    bad = corrupt(good, scaled_channel, "weight")
    assert verify(original, bad, rtol=1.0, atol=1.0).ok
    assert not verify(original, good, rtol=0.0, atol=0.0).ok


def test_user_inputs(tmp_path):
    original, good = models()
    x = np.ones((2, 6), np.float32)
    assert verify(original, good, inputs={"input": x}).samples == 1
    assert verify(original, good, inputs=[{"input": x}, {"input": 2 * x}]).samples == 2
    np.savez(tmp_path / "x.npz", input=x)
    assert verify(original, good, inputs=tmp_path / "x.npz").ok
    for wrong in ({}, {"input": x, "more": x}, {"input": np.ones((2, 5), np.float32)}):
        with pytest.raises(ValueError, match="expected"):
            verify(original, good, inputs=wrong)
    with pytest.raises(TypeError, match="float32"):
        verify(original, good, inputs={"input": np.array([["a"] * 6])})


WRONG_VALUES = [{"samples": 0}, {"rtol": -1.0}, {"atol": float("nan")}, {"seed": -1}, {"timeout": -1}]
WRONG_TYPES = [{"samples": 2.5}, {"seed": "a"}, {"seed": None}, {"rtol": "a"}, {"atol": [1]}, {"inputs": 5}]


@pytest.mark.parametrize("options", WRONG_VALUES)
def test_unusable_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}: expected"):
        verify(*models(), **options)


@pytest.mark.parametrize("options", WRONG_TYPES)
def test_options_of_another_type(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))}: expected"):
        verify(*models(), **options)


def test_another_interface_is_another_function():
    original, good = models()
    good.graph.output[0].name = good.graph.node[-1].output[0] = "other"
    report = verify(original, good)
    assert not report.ok and "outputs differ" in str(report)


def test_not_a_number_and_infinity_belong_at_the_same_places():
    nodes = [helper.make_node("Log", ["x"], ["z"]), helper.make_node("Mul", ["z", "w"], ["y"])]
    io = [value("x", TensorProto.FLOAT, ["n", 4])], [value("y", TensorProto.FLOAT, ["n", 4])]
    x = np.array([[-1.0, 0.0, 1.0, 2.0]], np.float32)
    one, inf = np.ones(4, np.float32), np.array([1, 1, 1, np.inf], np.float32)
    original = graph(nodes, *io, [("w", one)])
    assert verify(original, graph(nodes, *io, [("w", one)]), inputs={"x": x}).ok
    report = verify(original, graph(nodes, *io, [("w", inf)]), inputs={"x": x})
    assert not report.ok and "not finite" in str(report)


def test_integers_strings_and_booleans():
    nodes = [
        helper.make_node("Gather", ["table", "index"], ["row"]),
        helper.make_node("Where", ["flag", "row", "zero"], ["y"]),
        helper.make_node("Identity", ["word"], ["same"]),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1),
    ]
    inputs = [
        value("index", TensorProto.INT64, ["n"]),
        value("flag", TensorProto.BOOL, ["n", 3]),
        value("word", TensorProto.STRING, ["n"]),
    ]
    outputs = [
        value("y", TensorProto.FLOAT, ["n", 3]),
        value("same", TensorProto.STRING, ["n"]),
        value("best", TensorProto.INT64, ["n", 1]),
    ]
    table = np.arange(6, dtype=np.float32).reshape(2, 3) + 1  # two rows: most integers are out of range
    model = graph(nodes, inputs, outputs, [("table", table), ("zero", np.zeros(1, np.float32))])
    report = verify(model, model)
    assert report.ok and {o.name for o in report.outputs} == {"y", "same", "best"}
    other = corrupt(model, lambda a: a[:, ::-1])
    assert not verify(model, other).ok


def test_sequences_are_compared_item_by_item():
    nodes = [helper.make_node("SplitToSequence", ["x"], ["s"], axis=1)]
    out = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    model = graph(nodes, [value("x", TensorProto.FLOAT, ["n", 3])], [out])
    report = verify(model, model)
    assert report.ok and [o.name for o in report.outputs] == ["s[0]", "s[1]", "s[2]"]


def test_a_crash_of_onnxruntime_is_survived_and_told():
    """The optional outputs of opset 9 left empty: legal, and a segmentation fault without optimizations."""
    ones = [(name, np.ones(3, np.float32)) for name in "sbmv"]
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "", "", "", ""])
    io = [value("x", TensorProto.FLOAT, [2, 3, 4])], [value("y", TensorProto.FLOAT, [2, 3, 4])]
    model = graph([node], *io, ones, opset=9)
    report = verify(model, model)
    assert report.ok, str(report)
    assert any("died" in note for note in report.notes) or len(report.checks) == 2
    assert any("float64" in check for check in report.checks)
    assert not verify(model, corrupt(model, scaled_channel)).ok


def test_a_model_that_cannot_run_is_not_ok():
    node = helper.make_node("Nothing", ["x"], ["y"], domain="nowhere")
    made = helper.make_graph([node], "g", [value("x", 1, [2])], [value("y", 1, [2])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=8)
    report = verify(model, model)
    assert not report.ok and any("could be checked" in note for note in report.notes)


def test_a_candidate_that_cannot_run_is_not_ok():
    original, good = models()
    good.graph.node[0].op_type = "Nothing"
    report = verify(original, good)
    assert not report.ok and any("cannot be run" in note for note in report.notes)


def test_a_run_that_takes_too_long_is_ended():
    """A loop of 2^40 turns."""
    model = endless()
    report = verify(model, model, timeout=1.5, samples=1)
    assert not report.ok and any("no answer within" in note for note in report.notes)


def test_one_checker_many_candidates():
    original, good = models()
    with Checker(original) as checker:
        assert checker.check(good).ok
        assert not checker.check(corrupt(good, scaled_channel, "weight")).ok
        assert checker.check(good).ok


def test_bfloat16_is_judged_in_float64_where_onnxruntime_has_no_kernels():
    rng = np.random.default_rng(5)
    w = rng.normal(size=(4, 4)).astype(ml_dtypes.bfloat16)
    s = rng.uniform(0.5, 2, 4).astype(ml_dtypes.bfloat16)
    io = [value("x", TensorProto.BFLOAT16, ["n", 4])], [value("y", TensorProto.BFLOAT16, ["n", 4])]
    first = helper.make_node("MatMul", ["x", "w"], ["h"])
    original = graph([first, helper.make_node("Mul", ["h", "s"], ["y"])], *io, [("w", w), ("s", s)])
    product = (w.astype(np.float64) * s.astype(np.float64)).astype(ml_dtypes.bfloat16)
    good = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], *io, [("w", product)])
    report = verify(original, good)
    assert report.ok, str(report)
    assert not verify(original, corrupt(good, lambda a: a[::-1])).ok


def test_quantised_models_may_jump_where_rounding_does():
    rng = np.random.default_rng(6)
    first, bn = dense(rng, 16, 16), norm(rng, 16)
    original, good = (build(x, (None, 16), fold=False) for x in ([first, bn], [folded(first, bn)]))
    for model in (original, good):
        model.graph.node[-1].output[0] = "float"
        model.graph.node.append(helper.make_node("QuantizeLinear", ["float", "scale", "zero"], ["codes"]))
        model.graph.node.append(helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["output"]))
        constants = (("scale", np.float32(0.05)), ("zero", np.int8(0)))
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants)
    assert verify(original, good).ok
    assert not verify(original, corrupt(good, scaled_channel, "weight")).ok
