import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from fastbn_export.protos import tensors_of
from onnx import TensorProto, helper, numpy_helper

from tests.export.folding import Model, feeds_for, run


def sparse(name):
    values = helper.make_tensor(name, TensorProto.FLOAT, [2], [1.0, 2.0])
    return helper.make_sparse_tensor(values, helper.make_tensor(f"{name}_at", TensorProto.INT64, [2], [0, 3]), [4])


def model_with(place):
    """A Conv and its normalization, beside an If whose bodies add something that is sparse in one place."""
    m = Model()
    y = m.op("Relu", m.bn(m.op("Conv", m.input(2, 3, 6, 6, name="x"), m.weight(4, 3, 3, 3)), 4))
    m.constant(np.array(True), "condition")
    m.constant(np.arange(4, dtype=np.float32), "dense")
    bodies = []
    for branch in ("then", "else"):
        add = helper.make_node("Add", ["dense", f"s_{branch}"], [f"d_{branch}"])
        out = helper.make_tensor_value_info(f"d_{branch}", TensorProto.FLOAT, [4])
        graph = helper.make_graph([add], branch, [], [out])
        if place == "body":
            graph.sparse_initializer.append(sparse(f"s_{branch}"))
        else:
            graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), f"s_{branch}"))
        bodies.append(graph)
    z = m.op("If", "condition", then_branch=bodies[0], else_branch=bodies[1])
    if place == "attribute":
        z = m.op("Add", z, m.op("Constant", sparse_value=sparse("value")))
    m.output(y, shape=[2, 4, 4, 4])
    m.output(z, shape=[4])
    return m.build()


@pytest.mark.parametrize("place", ["body", "attribute"])
@pytest.mark.parametrize("keep", [None, "*"])
def test_sparse_tensors_stay_where_they_are(tmp_path, place, keep):
    model = model_with(place)
    result = fold(model, keep=keep)  # onnx infers no shapes from sparse initializers, so `check` is too strict
    assert result.report.left == (keep is not None)
    onnx.checker.check_model(result.model)
    feeds = feeds_for(model)
    for old, new in zip(run(model, feeds), run(result.model, feeds), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)
    result.save(tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx")
    assert written == result.model
    kept = [t for t in tensors_of(model) if t.name.startswith(("s_", "value"))]
    assert len(kept) >= 2 and all(any(t == other for other in tensors_of(written)) for t in kept)


def beside_the_convolution(model):
    """A model that adds a sparse initializer with the name that a new bias would take."""
    model.graph.sparse_initializer.append(sparse("conv.bias"))
    model.graph.node.append(helper.make_node("Add", ["z", "conv.bias"], ["sum"]))
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 4]))
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, [2, 4]))
    return model


def test_a_new_constant_avoids_their_names():
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6, name="x"), m.weight(4, 3, 3, 3), name="conv")
    model = beside_the_convolution(m.build(m.bn(y, 4)))
    result = fold(model)
    assert result.report.folded == 1
    onnx.checker.check_model(result.model)
    feeds = feeds_for(model)
    for old, new in zip(run(model, feeds), run(result.model, feeds), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)


def test_a_new_constant_avoids_names_of_the_training_info():
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6, name="x"), m.weight(4, 3, 3, 3), name="conv")
    model = m.build(m.bn(y, 4))
    algorithm = model.training_info.add().algorithm
    algorithm.name = "training"
    algorithm.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "conv.bias"))
    algorithm.node.append(helper.make_node("Identity", ["conv.bias"], ["conv.bias_1"]))
    names = {t.name for t in fold(model).model.graph.initializer}
    assert "conv.bias_2" in names and not names & {"conv.bias", "conv.bias_1"}


@pytest.mark.parametrize("place", ["initializer", "body", "attribute"])
def test_the_reason_where_a_parameter_is_sparse(place):
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6, name="x"), m.weight(4, 3, 3, 3))
    rest = [m.constant(np.abs(a)) for a in m.statistics(4)[1:]]
    name = m.op("Constant", sparse_value=sparse("value")) if place == "attribute" else "s"
    if place == "body":
        bodies = []
        for branch in ("then", "else"):
            node = helper.make_node("BatchNormalization", [y, "s", *rest], [f"y_{branch}"])
            out = helper.make_tensor_value_info(f"y_{branch}", TensorProto.FLOAT, [2, 4, 4, 4])
            bodies.append(helper.make_graph([node], branch, [], [out]))
            bodies[-1].sparse_initializer.append(sparse("s"))
        y = m.op("If", m.constant(np.array(True)), then_branch=bodies[0], else_branch=bodies[1])
    else:
        y = m.op("BatchNormalization", y, name, *rest)
    m.output(y, shape=[2, 4, 4, 4])
    graph = helper.make_graph(m.nodes, "g", m.inputs, m.outputs, m.initializers)
    if place == "initializer":
        graph.sparse_initializer.append(sparse("s"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    reasons = {entry.reason for entry in fold(model).report.entries}
    assert reasons == {"the scale of the normalization is a sparse tensor, whose numbers are not read"}


def test_an_operator_that_holds_a_list_of_them():
    model = model_with("none")
    node = model.graph.node.add(domain="other", op_type="Table", output=["table"])
    node.attribute.add(name="rows", type=onnx.AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse("a"), sparse("b")])
    model.opset_import.add(domain="other", version=1)
    folded = fold(model)
    assert folded.report.folded == 1
    assert [n for n in folded.model.graph.node if n.op_type == "Table"] == [node]
