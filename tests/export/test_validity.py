"""What a model must be before a command touches it."""

from __future__ import annotations

import onnx
import pytest
from fastbn_export import cli
from fastbn_export.files import ModelFileError
from fastbn_export.validity import check_structure

from .folding import chain


def without_shape():
    model = chain(1)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def test_an_output_needs_no_shape():
    model = without_shape()
    before = model.SerializeToString()
    check_structure(model, "m")
    assert model.SerializeToString() == before


@pytest.mark.parametrize("command", ["fold", "inspect", "verify"])
def test_commands_take_outputs_without_a_shape(command, tmp_path):
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    path.write_bytes(without_shape().SerializeToString())
    second = {"fold": [str(out)], "verify": [str(path)], "inspect": []}[command]
    assert cli.main([command, str(path), *second]) == 0
    if command == "fold":
        folded = onnx.load(out)
        assert "BatchNormalization" not in {node.op_type for node in folded.graph.node}
        assert folded.graph.output[0] == without_shape().graph.output[0]


def test_an_output_needs_a_type():
    model = chain(1)
    model.graph.output[0].ClearField("type")
    with pytest.raises(ModelFileError, match="expected a valid ONNX model"):
        check_structure(model, "m")
