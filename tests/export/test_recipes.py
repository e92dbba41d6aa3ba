"""The recipes run as they stand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from fastbn_export.files import load_model

RECIPES = Path(__file__).parents[2] / "export" / "recipes"


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def norms_in(path):
    return sum(node.op_type == "BatchNormalization" for node in load_model(path).graph.node)


def test_numpy(tmp_path, capsys):
    assert load("numpy_to_onnx").main(str(tmp_path / "m.onnx")) == 0
    assert norms_in(tmp_path / "m.onnx") == 0
    assert float(capsys.readouterr().out.rsplit(": ", 1)[1]) > 0.95


def test_torch_is_not_needed_to_say_that_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert load("torch_to_onnx").main(str(tmp_path / "m.onnx")) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_torch(tmp_path):
    pytest.importorskip("torch")
    assert load("torch_to_onnx").main(str(tmp_path / "m.onnx")) == 0
    assert norms_in(tmp_path / "m.onnx") == 0
