"""What a change leaves alone: names, shared constants, metadata."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from onnx import helper, numpy_helper

from .folding import Model, chain, check, folded


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


@pytest.mark.parametrize("case", ["updates the scale", "reads the scale", "reads inside", "updates another"])
def test_training_of_what_a_fold_took_away_goes_with_it(case):
    model = chain(1)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, "f"), "other"))
    conv, norm = model.graph.node[:2]
    name = {"inside": conv.output[0], "another": "other"}.get(case.split()[-1], norm.input[1])
    for source in ("other", name):
        info = model.training_info.add()
        info.algorithm.name = "training"
        info.algorithm.node.append(helper.make_node("Identity", [source if "reads" in case else "other"], ["new"]))
        info.update_binding.add(key=source if "updates" in case else "other", value="new")
    result = fold(model)
    kept = list(model.training_info)[: 2 if name == "other" else 1]
    assert result.report.folded == 1 and list(result.model.training_info) == kept
    assert fold(model, keep="*").model == model


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
