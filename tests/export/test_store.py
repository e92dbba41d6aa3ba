import numpy as np
import onnx
import pytest
from fastbn_export import store
from fastbn_export.files import ModelFileError
from fastbn_export.fold import fold
from onnx import TensorProto, helper, numpy_helper

from tests.export.folding import Model, feeds_for, run


def model_with_constants():
    """A MatMul by a Constant node, a BatchNormalization, and an If whose bodies have initializers."""
    m = Model()
    y = m.bn(m.op("MatMul", m.input(2, 8), m.weight(8, 8)), 8)
    model = m.build(m.op("MatMul", m.op("Relu", y), m.weight(8, 8)))
    graph = model.graph
    for index, tensor in enumerate(list(graph.initializer)):
        if list(tensor.dims) == [8, 8]:
            graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
            del graph.initializer[index]
            break
    body = [
        helper.make_graph(
            [helper.make_node("Add", [graph.output[0].name, f"w{branch}"], [f"out{branch}"])],
            branch,
            [],
            [helper.make_tensor_value_info(f"out{branch}", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(numpy_helper.to_array(graph.initializer[0]).reshape(-1)[:8].copy(), f"w{branch}")],
        )
        for branch in ("then", "else")
    ]
    graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    graph.node.append(helper.make_node("If", ["condition"], ["final"], then_branch=body[0], else_branch=body[1]))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("final", TensorProto.FLOAT, [2, 8]))
    return model


def saved_outside(model, path):
    """Save with every tensor external, those of Constant nodes and bodies too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    onnx.save(copy, path, save_as_external_data=True, location="w.bin", size_threshold=0, convert_attribute=True)
    return path


@pytest.mark.parametrize("limit", [store.LIMIT, 0])
@pytest.mark.parametrize("keep", [None, "*"])
def test_external_data_of_constants_bodies_and_small_tensors_moves_along(tmp_path, monkeypatch, limit, keep):
    monkeypatch.setattr(store, "LIMIT", limit)
    model = model_with_constants()
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = saved_outside(model, tmp_path / "in" / "m.onnx")
    result = fold(path, keep=keep)
    assert result.report.folded == (keep is None)
    result.save(tmp_path / "out" / "m.onnx")
    (tmp_path / "in" / "w.bin").unlink()
    onnx.checker.check_model(tmp_path / "out" / "m.onnx")
    feeds = feeds_for(model)
    expected = run(model, feeds)[0]
    assert run(onnx.load(tmp_path / "out" / "m.onnx"), feeds)[0] == pytest.approx(expected, abs=1e-5)


def in_two_halves(typed=False):
    """A folded Conv beside 40 kB that are an initializer and 40 kB that a Constant node holds."""
    m = Model()
    y = m.op("Relu", m.bn(m.op("Conv", m.input(2, 3, 6, 6, name="x"), m.weight(4, 3, 3, 3)), 4))
    half = np.arange(10_000, dtype=np.float32)
    held = helper.make_tensor("held", TensorProto.FLOAT, [10_000], half, raw=False) if typed else None
    node = m.op("Constant", value=held or numpy_helper.from_array(half, "held"))
    return m.build(y, m.op("Add", m.constant(half, "half"), node))


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("limit", [60_000, 30_000])
def test_the_limit_counts_what_lies_among_the_operators(tmp_path, monkeypatch, typed, limit):
    monkeypatch.setattr(store, "LIMIT", limit)
    model = in_two_halves(typed)
    result = fold(model)
    assert result.report.folded == 1
    result.save(tmp_path / "m.onnx")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["m.onnx"] < limit and sizes["m.onnx.data"] >= (40_000 if limit == 60_000 else 80_000)
    feeds = feeds_for(model)
    for old, new in zip(run(model, feeds), run(onnx.load(tmp_path / "m.onnx"), feeds), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)


@pytest.mark.parametrize("limit", [store.LIMIT, 0])
def test_what_fits_in_no_file_is_refused(tmp_path, monkeypatch, limit):
    """Only tensors can lie beside the model."""
    model = in_two_halves()
    model.graph.node[0].doc_string = "long" * 10_000
    monkeypatch.setattr(store, "LIMIT", limit)
    monkeypatch.setattr(store, "_MOST", 30_000)
    with pytest.raises(OSError, match=r"expected at most 30000 bytes beside the tensors, got .*m\.onnx"):
        fold(model).save(tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_external_data_in_the_proto_is_read_in(tmp_path):
    model = model_with_constants()
    path = saved_outside(model, tmp_path / "m.onnx")
    for keep in (None, "*"):
        proto = fold(path, keep=keep).model
        feeds = feeds_for(model)
        assert run(proto, feeds)[0] == pytest.approx(run(model, feeds)[0], abs=1e-5)


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08"], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_model(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"m\.onnx: expected an ONNX model, got") as caught:
        fold(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ModelFileError, match="no such file"):
        fold(tmp_path / "m.onnx")


def test_external_data_of_a_model_in_memory_lies_in_the_current_folder(tmp_path, monkeypatch):
    path = saved_outside(model_with_constants(), tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    monkeypatch.chdir(tmp_path)
    assert fold(path).report.folded == 1
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelFileError, match=r"model: external data of .*: no such file: 'w\.bin'"):
        fold(proto)
