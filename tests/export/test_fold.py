"""The promises of fold itself: control, report, names, scopes, files."""

from __future__ import annotations

import json
import os

import fastbn_export
import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from fastbn_export.store import load, save
from onnx import helper, numpy_helper

from . import folding
from .folding import Model, check, feeds_for, folded, ops, run


def chain(n=3, **options):
    m = Model(**options)
    x = m.input(1, 4, 4, 4)
    for i in range(n):
        arrays = [m.constant(a) for a in m.statistics(4)]
        x = m.op("Conv", x, m.weight(4, 4, 1, 1), name=f"conv{i}")
        x = m.op("Relu", m.op("BatchNormalization", x, *arrays, name=f"block{i}.bn"))
    return m.build(x)


def test_the_package_exports_the_function_even_after_the_module_was_imported():
    assert fastbn_export.fold is fold
    assert callable(fastbn_export.fold)
    with pytest.raises(AttributeError):
        _ = fastbn_export.nonsense


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (None, []),
        ("block1.bn", ["block1.bn"]),
        ("block*.bn", ["block0.bn", "block1.bn", "block2.bn"]),
        (["block0.*", "*2.bn"], ["block0.bn", "block2.bn"]),
        (lambda name: name.endswith("1.bn"), ["block1.bn"]),
        ("nothing", []),
        ([], []),
    ],
)
def test_keep(keep, left):
    result = check(chain(), keep=keep)
    assert [e.name for e in result.report.entries if not e.folded] == left
    assert all(e.reason == "kept by request" for e in result.report.entries if not e.folded)


def test_skip_undoes_one():
    assert [e.folded for e in check(chain(), skip=["block1.bn"]).report.entries] == [True, False, True]


@pytest.mark.parametrize("keep", [3, [1], object()])
def test_keep_of_another_type(keep):
    with pytest.raises(TypeError, match="keep: expected"):
        fold(chain(), keep=keep)


@pytest.mark.parametrize("model", [None, 3, b"abc"])
def test_model_of_another_type(model):
    with pytest.raises(TypeError, match=r"model: expected an onnx\.ModelProto or a path"):
        fold(model)


def test_model_without_a_graph():
    with pytest.raises(ValueError, match="model: expected a graph"):
        fold(onnx.ModelProto())


def test_nothing_to_fold_is_an_equal_copy():
    m = Model()
    model = m.build(m.op("Relu", m.input(2, 3)))
    result = fold(model)
    assert result.model == model and result.model is not model and result.report.entries == []


def test_report():
    report = check(chain(2), keep="block1.bn").report
    assert (report.folded, report.left) == (1, 1)
    assert report.ops_before == {"BatchNormalization": 2, "Conv": 2, "Relu": 2}
    assert report.ops_after == {"BatchNormalization": 1, "Conv": 2, "Relu": 2}
    assert report.parameters_before == 64 and report.parameters_after == 32 + 4 + 16
    first = json.loads(report.to_json())["entries"][0]
    assert first == {
        "name": "block0.bn",
        "kind": "BatchNormalization",
        "folded": True,
        "absorber": ["conv0 (Conv)"],
        "direction": "upstream",
        "path": [],
        "reason": None,
        "scope": "",
    }


def test_names_and_shared_weights():
    m = Model()
    x, w = m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1, name="w")
    first = m.bn(m.op("Conv", x, w, outputs=["c1"]), 4)
    second = m.bn(m.op("Conv", x, w, outputs=["c2"]), 4)
    third = m.op("Relu", m.op("Conv", x, w, outputs=["c3"]))
    model = m.build(first, second, third)
    result = check(model)
    assert folded(result) and [n.output[0] for n in result.model.graph.node] == [first, second, "c3", third]
    weights = {n.input[1] for n in result.model.graph.node if n.op_type == "Conv"}
    assert len(weights) == 3 and "w" in weights
    untouched = {t.name: t for t in result.model.graph.initializer}["w"]
    assert untouched == {t.name: t for t in model.graph.initializer}["w"]


def test_a_single_weight_keeps_its_name():
    m = Model()
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1, name="w"), m.weight(4, name="b"))
    result = check(m.build(m.bn(y, 4)))
    assert sorted(t.name for t in result.model.graph.initializer) == ["b", "w"]


def test_generated_names_avoid_existing_ones():
    m = Model()
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1), name="conv")
    m.constant(np.zeros(1, "f"), "conv.bias")
    y = m.op("Add", m.bn(y, 4), "conv.bias")
    assert folded(check(m.build(y)))


def test_metadata_survives():
    model = chain(1)
    model.doc_string, model.producer_name, model.domain, model.model_version = "doc", "me", "d", 7
    model.metadata_props.add(key="k", value="v")
    model.graph.doc_string = "graph"
    model.graph.node[0].doc_string = "conv"
    model.graph.node[0].metadata_props.add(key="n", value="m")
    model.graph.value_info.append(helper.make_tensor_value_info(model.graph.node[1].output[0], 1, [1, 4, 4, 4]))
    out = fold(model).model
    for field in ("doc_string", "producer_name", "domain", "model_version", "ir_version"):
        assert getattr(out, field) == getattr(model, field)
    assert out.metadata_props == model.metadata_props and out.graph.doc_string == "graph"
    assert out.graph.node[0].doc_string == "conv" and out.graph.node[0].metadata_props[0].value == "m"
    assert [v.name for v in out.graph.value_info] == [model.graph.node[1].output[0]] == [out.graph.node[0].output[0]]


def test_what_the_editor_does_not_know_survives(tmp_path):
    model = chain(1)
    last = model.graph.output[0].name
    values = numpy_helper.from_array(np.array([1.0, 2.0], "f"), "sparse")
    indices = numpy_helper.from_array(np.array([0, 3], np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    model.graph.node.append(helper.make_node("Add", [last, "sparse"], ["sum"]))
    model.graph.output[0].name = "sum"
    model.training_info.add().algorithm.name = "training"
    note = model.graph.quantization_annotation.add(tensor_name=model.graph.node[1].output[0])
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="sparse")
    result = fold(model)
    result.save(tmp_path / "out.onnx")
    for out in (result.model, onnx.load(tmp_path / "out.onnx")):
        onnx.checker.check_model(out)
        assert result.report.folded == 1 and out.graph.sparse_initializer == model.graph.sparse_initializer
        assert out.training_info == model.training_info
        assert list(out.graph.quantization_annotation) == [note]


def linear_with_readers():
    m = Model()
    y = m.op("Conv", m.input(2, 4, 5, 5), m.weight(4, 4, 1, 1))
    return m.build(m.bn(y, 4), m.op("Relu", y))


def test_other_readers():
    result = check(linear_with_readers())
    assert "has other readers" in str(result.report.entries[0].reason)
    result = check(linear_with_readers(), duplicate=True)
    assert folded(result) and ops(result.model).count("Conv") == 2


def test_graph_output_in_between():
    m = Model()
    y = m.op("Conv", m.input(2, 4, 5, 5), m.weight(4, 4, 1, 1))
    model = m.build(m.bn(y, 4), y)
    assert "is also a graph output" in str(check(model).report.entries[0].reason)
    assert folded(check(model, duplicate=True))


def test_shape_is_no_reader():
    m = Model()
    y = m.op("Conv", m.input("N", 4, 5, 5), m.weight(4, 4, 1, 1))
    batch = m.op("Slice", m.op("Shape", y), m.ints(0), m.ints(1))
    shape = m.op("Concat", batch, m.ints(4, -1), axis=0)
    assert folded(check(m.build(m.op("Reshape", m.bn(y, 4), shape))))


def test_cast_like_is_no_reader_of_what_it_is_cast_like():
    m = Model(opset=17)
    y = m.op("Conv", m.input(1, 3, 6, 6), m.weight(4, 3, 3, 3))
    ones = m.op("Expand", m.op("CastLike", m.constant(np.float64(1)), y), m.ints(4))
    zeros = [m.constant(np.zeros(4, "f")) for _ in range(2)]
    result = check(m.build(m.op("BatchNormalization", y, ones, *zeros, m.constant(np.full(4, 2, "f")))))
    assert folded(result) and ops(result.model) == ["Conv"]


def test_identity_between_fixed_names():
    ones, zeros = np.ones(4, "f"), np.zeros(4, "f")
    m = Model()
    result = check(m.build(m.bn(m.input(2, 4, 3), 4, parameters=(ones, zeros, zeros, ones), epsilon=0.0)))
    assert "two names that must both stay" in str(result.report.entries[0].reason)
    m = Model()
    y = m.bn(m.op("Relu", m.input(2, 4, 3)), 4, parameters=(ones, zeros, zeros, ones - np.float32(1e-3)))
    assert folded(check(m.build(y)))


def test_an_identity_in_float32_is_none_in_float64():
    """Parameters of float32 beside data of float64, since opset 15: a scale of 1 - 2.5e-8 shows."""
    ones, zeros = np.ones(4, "f"), np.zeros(4, "f")
    m = Model(dtype=np.float64)
    model = m.build(m.bn(m.op("Relu", m.input(2, 4, 3)), 4, parameters=(ones, zeros, zeros, ones), epsilon=5e-8))
    assert fold(model).report.left == 1
    m = Model()
    model = m.build(m.bn(m.op("Relu", m.input(2, 4, 3)), 4, parameters=(ones, zeros, zeros, ones), epsilon=5e-8))
    assert fold(model).report.left == 0


def test_growth_is_refused():
    """Two MatMuls without a bias would need two Adds in the place of one normalization."""
    m = Model()
    x = m.input(2, 3, 5)
    y = m.op("Concat", m.op("MatMul", x, m.weight(5, 2)), m.op("MatMul", x, m.weight(5, 2)), axis=2)
    result = check(m.build(m.bn(m.op("Transpose", y, perm=[0, 2, 1]), 4)))
    assert "more operators than it removes" in str(result.report.entries[0].reason)


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 14, 15, 17, 21, 22])
def test_every_opset(opset):
    m = Model(opset=opset, ir_version=8)
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 3, 3))
    assert folded(check(m.build(m.bn(y, 4))))


@pytest.mark.parametrize("ir_version", [3, 4])
def test_old_ir(ir_version):
    m = Model(opset=8, ir_version=ir_version)
    x, w = m.input(2, 3, 4, 4), m.weight(4, 3, 3, 3)
    result = check(m.build(m.bn(m.op("Conv", x, w), 4), m.op("Relu", m.bn(m.op("Conv", x, w), 4))))
    assert folded(result)
    if ir_version == 3:
        inputs = {i.name for i in result.model.graph.input}
        assert {t.name for t in result.model.graph.initializer} <= inputs and len(inputs) == 5


# Scopes


def body(name, seed, source, inputs=(), activation="Relu"):
    b = Model(seed=seed)
    b.count = 100 * seed
    y = b.op(activation, b.bn(b.op("Conv", source, "w", pads=[1] * 4), 4))
    return b, y


def test_if_bodies_and_captured_weights():
    m = Model()
    m.input(2, 4, 6, 6, name="x")
    m.weight(4, 4, 3, 3, name="w")
    graphs = {}
    for seed, branch in ((1, "then_branch"), (2, "else_branch")):
        b, y = body(branch, seed, "x")
        info = [helper.make_tensor_value_info(y, 1, [2, 4, 6, 6])]
        graphs[branch] = helper.make_graph(b.nodes, branch, [], info, b.initializers)
    m.count = 900
    condition = m.input(name="c", dtype=np.int64)
    y = m.op("If", m.op("Cast", condition, to=9), **graphs)
    result = check(m.build(m.op("Relu", y)))
    assert folded(result) and [e.scope != "" for e in result.report.entries] == [True, True]


def test_loop_body():
    m = Model()
    x = m.input(2, 4, 6, 6, name="x")
    m.weight(4, 4, 3, 3, name="w")
    b, y = body("body", 1, "v")
    go_on = b.op("Identity", "go")
    state = [
        helper.make_tensor_value_info(n, t, s) for n, t, s in (("i", 7, []), ("go", 9, []), ("v", 1, [2, 4, 6, 6]))
    ]
    outs = [helper.make_tensor_value_info(n, t, s) for n, t, s in ((go_on, 9, []), (y, 1, [2, 4, 6, 6]))]
    graph = helper.make_graph(b.nodes, "body", state, outs, b.initializers)
    m.count = 900
    y = m.op("Loop", m.constant(np.int64(3)), m.constant(np.bool_(True)), x, body=graph)
    m.output(y, shape=[2, 4, 6, 6])
    assert folded(check(m.build()))


def test_a_copy_that_reads_the_middle_of_a_run():
    """The copy of the last Div reads what the run computes half-way: the run must not vanish around it."""
    m = Model()
    y = m.op("Div", m.op("Mul", m.input(2, 5, 4), m.weight(5, 1)), m.constant(np.full((5, 1), 2, np.float32)))
    turned = m.bn(m.op("Transpose", y, perm=[2, 1, 0]), 5)
    check(m.build(m.bn(y, 5, parameters=m.positive(5)), m.op("Relu", turned)), duplicate=True)


@pytest.mark.parametrize("duplicate", [False, True])
def test_a_copy_for_a_reader_that_reads_twice(duplicate):
    """Of two pieces of one value only one gets the shift: no copy of its operator is right for both."""
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6), m.weight(4, 3, 3, 3))
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    pieces = m.op("Split", m.op("Concat", y, y, axis=1), outputs=2, axis=1)
    z = m.bn(m.op("Add", *pieces), 4, parameters=(one, np.arange(4, dtype="f"), zero, one), epsilon=0.0)
    check(m.build(m.op("Relu", z)), duplicate=duplicate)


def test_a_body_does_not_reach_outside():
    m = Model()
    m.input(2, 4, 6, 6, name="x")
    outer = m.op("Conv", "x", m.weight(4, 4, 1, 1))
    graphs = {}
    for seed, branch in ((1, "then_branch"), (2, "else_branch")):
        b = Model(seed=seed)
        b.count = 100 * seed
        y = b.bn(outer, 4) if seed == 1 else b.op("Relu", "x")
        info = [helper.make_tensor_value_info(y, 1, [2, 4, 6, 6])]
        graphs[branch] = helper.make_graph(b.nodes, branch, [], info, b.initializers)
    m.count = 900
    result = check(m.build(m.op("If", m.constant(np.bool_(True)), **graphs)))
    assert "border of a control-flow body" in str(result.report.entries[0].reason)


def with_function(inside, opset=17):
    m = Model()
    x = m.input(2, 4, 6, 6, name="x")
    f = Model(seed=5)
    f.count = 900
    arrays = [f.rng.standard_normal((4, 4, 1, 1)).astype("f"), *f.statistics(4)]
    if inside:
        names, inputs = [f.op("Constant", value=numpy_helper.from_array(a)) for a in arrays], ["X"]
    else:
        names = ["W", "S", "B", "M", "V"]
        inputs = ["X", *names]
    y = f.op("BatchNormalization", f.op("Conv", "X", names[0]), *names[1:])
    imports = [helper.make_opsetid("", opset)]
    m.functions.append(helper.make_function("local", "Block", inputs, [y], f.nodes, imports))
    for _ in range(2):
        args = [] if inside else [m.weight(4, 4, 1, 1), *map(m.constant, m.statistics(4))]
        x = m.op("Relu", m.op("Block", x, *args, domain="local"))
    m.output(x, shape=[2, 4, 6, 6])
    return m.build()


def test_inside_a_function():
    result = check(with_function(True))
    assert folded(result) and "local::Block" in result.report.ops_after
    assert result.report.entries[0].scope == "function Block"


def test_a_function_of_its_parameters_is_inlined():
    result = check(with_function(False))
    assert folded(result) and result.report.ops_after == {"Conv": 2, "Relu": 2}


# Sources


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-2])
def test_epsilon(epsilon):
    m = Model()
    gamma, beta, mean, _ = m.statistics(4)
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    small = (gamma, beta, mean, np.full(4, 1e-3, "f"))
    assert folded(check(m.build(m.bn(y, 4, parameters=small, epsilon=epsilon))))


def left_reason(model):
    result = fold(model)
    assert result.model == model
    return result.report.entries[0].reason


def test_training_forms_are_left():
    m = Model(opset=15)
    arrays = [m.constant(a) for a in m.statistics(4)]
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    outs = m.op("BatchNormalization", y, *arrays, training_mode=1, outputs=3)
    assert "training form" in left_reason(m.build(outs[0]))
    m = Model(opset=9)
    arrays = [m.constant(a) for a in m.statistics(4)]
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    outs = m.op("BatchNormalization", y, *arrays, outputs=5)
    assert "training form" in left_reason(m.build(outs[0]))


def test_per_activation_forms():
    m = Model(opset=8, ir_version=4)
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    parameters = [m.constant(np.ones((4, 4, 4), "f")) for _ in range(4)]
    y = m.op("BatchNormalization", y, *parameters, spatial=0)
    assert "spatial=0" in left_reason(m.build(y))
    m = Model(opset=8, ir_version=4)
    y = m.op("Gemm", m.input(2, 3), m.weight(3, 4), m.weight(4))
    assert folded(check(m.build(m.bn(y, 4, spatial=0))))


def test_parameters_from_outside():
    m = Model()
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    _, beta, mean, variance = map(m.constant, m.statistics(4))
    assert "is a graph input" in left_reason(m.build(m.op("BatchNormalization", y, m.input(4), beta, mean, variance)))


@pytest.mark.parametrize("reader", ["Unsqueeze", "ReduceMean", "Relu"])
def test_a_vector_has_no_channel_axis(reader):
    """It is one channel by the specification; its shape is not stated where it is computed."""
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(5)), 1, parameters=m.positive(1))
    more = {"Unsqueeze": [m.ints(1)]}.get(reader, [])
    y = m.op(reader, y, *more, **({"axes": [0]} if reader == "ReduceMean" else {}))
    assert "no axis 1" in str(check(m.build(y)).report.entries[0].reason)


def test_negative_variance_is_left():
    m = Model()
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    gamma, beta, mean, variance = m.statistics(4)
    assert "not finite" in left_reason(m.build(m.bn(y, 4, parameters=(gamma, beta, mean, -variance))))


def written_out(kind):
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6), m.weight(4, 3, 3, 3))
    mean, std, gamma, beta = (m.constant(m.rng.uniform(0.5, 1.5, (1, 4, 1, 1)).astype("f")) for _ in range(4))
    if kind == "div":
        y = m.op("Div", m.op("Sub", y, mean), std)
    elif kind == "sqrt":
        y = m.op("Div", m.op("Sub", y, mean), m.op("Sqrt", m.op("Add", std, m.constant(np.float32(1e-3)))))
    elif kind == "reciprocal":
        y = m.op("Mul", m.op("Sub", y, mean), m.op("Reciprocal", m.op("Sqrt", std)))
    elif kind == "pow":
        y = m.op("Mul", m.op("Sub", y, mean), m.op("Pow", std, m.constant(np.float32(-0.5))))
    elif kind == "unsqueeze":
        gamma = m.op("Unsqueeze", m.weight(4), m.ints(1, 2))
    elif kind == "expand":
        gamma = m.op("Expand", gamma, m.ints(2, 4, 4, 4))
    return m.build(m.op("Relu", m.op("Add", m.op("Mul", gamma, y), beta)))


@pytest.mark.parametrize("kind", ["plain", "div", "sqrt", "reciprocal", "pow", "unsqueeze", "expand"])
def test_written_out(kind):
    result = check(written_out(kind))
    assert ops(result.model) == ["Conv", "Relu"] and result.report.entries[0].kind == "decomposed"


@pytest.mark.parametrize("readers", [1, 2])
def test_written_out_with_an_identity_in_between(readers):
    m = Model()
    y = m.op("Mul", m.op("Conv", m.input(1, 3, 6, 6), m.weight(4, 3, 3, 3)), m.weight(4, 1, 1))
    y = m.op("Identity", y)
    outputs = [m.op("Add", y, m.weight(4, 1, 1)), *(m.op("Relu", y) for _ in range(readers - 1))]
    left = ["Conv", "Identity"] if readers == 1 else ["Conv", "Identity", "Add", "Relu"]
    assert ops(check(m.build(*outputs)).model) == left


@pytest.mark.parametrize("constant", [np.float32(0), np.float32(2), np.arange(4, dtype="f").reshape(4, 1, 1)])
def test_a_constant_added_behind_a_normalization_goes_into_it(constant):
    m = Model()
    y = m.op("Add", m.constant(constant), m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4))
    result = check(m.build(m.op("Relu", y)))
    assert ops(result.model) == ["Sigmoid", "BatchNormalization", "Relu"] and result.report.left == 1


def test_written_out_channels_last():
    m = Model()
    y = m.op("Transpose", m.op("Conv", m.input(2, 3, 6, 6), m.weight(4, 3, 3, 3)), perm=[0, 2, 3, 1])
    y = m.op("Add", m.op("Mul", y, m.weight(4)), m.weight(4))
    assert ops(check(m.build(y)).model) == ["Conv", "Transpose"]


# Files


def test_paths_and_save(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(chain(), path)
    before = path.read_bytes()
    for where in (path, str(path)):
        result = fold(where)
        result.save(tmp_path / "out.onnx")
        assert onnx.load(tmp_path / "out.onnx") == result.model == fold(chain()).model
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "out.onnx"]


def test_save_of_large_tensors(tmp_path):
    m = Model()
    y = m.bn(m.op("Conv", m.input(1, 64, 2, 2), m.weight(64, 64, 3, 3), pads=[1] * 4), 64)
    model = m.build(m.op("Conv", m.op("Relu", y), m.weight(64, 64, 1, 1)))
    result = fold(model)
    result.save(tmp_path / "a.onnx")
    written = onnx.load(tmp_path / "a.onnx")
    assert written == result.model
    onnx.checker.check_model(written, full_check=True)


@pytest.mark.parametrize("keep", [None, "*"])
def test_a_failed_save_leaves_nothing(tmp_path, keep):
    """Neither of a folded model nor of one that is as it was; a pipe stays a pipe."""
    result = fold(chain(), keep=keep)
    with pytest.raises(OSError, match="nowhere"):
        result.save(tmp_path / "nowhere" / "out.onnx")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):
        result.save(tmp_path / "pipe")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def external(tmp_path):
    m = Model()
    y = m.bn(m.op("Conv", m.input(1, 64, 2, 2), m.weight(64, 64, 3, 3), pads=[1] * 4), 64)
    model = m.build(m.op("Conv", m.op("Relu", y), m.weight(64, 64, 1, 1)))
    path = tmp_path / "model.onnx"
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="weights.bin", size_threshold=64)
    return model, path


def test_external_data(tmp_path):
    model, path = external(tmp_path)
    result = fold(path)
    assert folded(result)
    feeds = feeds_for(model)
    np.testing.assert_allclose(run(result.model, feeds)[0], run(model, feeds)[0], atol=1e-4)


def test_external_data_beyond_the_limit_of_one_file(tmp_path, monkeypatch):
    model, path = external(tmp_path)
    monkeypatch.setattr("fastbn_export.store.LIMIT", 10_000)
    fold(path).save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size > 100_000 > (tmp_path / "out.onnx").stat().st_size
    feeds = feeds_for(model)
    np.testing.assert_allclose(run(onnx.load(tmp_path / "out.onnx"), feeds)[0], run(model, feeds)[0], atol=1e-4)


def test_broken_external_data(tmp_path):
    _, path = external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"expected [0-9]+ bytes at 0, got a file of 5 bytes"):
        fold(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ValueError, match=r"no such file: 'weights\.bin'"):
        fold(path)


def test_external_data_outside_the_folder(tmp_path):
    _, path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="inside the model's folder"):
        fold(path)


def test_load_and_save_are_inverse(tmp_path):
    model = chain()
    _, edited = load(model)
    save(edited, tmp_path / "same.onnx")
    assert onnx.load(tmp_path / "same.onnx") == model


@pytest.mark.parametrize("count", [2000])
def test_long_chains_do_not_recurse(count):
    m = Model()
    y = m.op("Conv", m.input(1, 4, 2, 2), m.weight(4, 4, 1, 1))
    for _ in range(count):
        y = m.op("Identity", y)
    graph = helper.make_graph(
        m.nodes, "g", m.inputs, [helper.make_tensor_value_info(m.bn(y, 4), 1, [1, 4, 2, 2])], m.initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert folded(fold(model))


def test_the_judge_sees_a_wrong_number(monkeypatch):
    """The canary: a fold corrupted on purpose must not pass `check`."""
    original = folding.fold

    def corrupted(model, **options):
        result = original(model, **options)
        tensor = result.model.graph.initializer[0]
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
        return result

    monkeypatch.setattr(folding, "fold", corrupted)
    with pytest.raises(AssertionError):
        check(chain(1))
