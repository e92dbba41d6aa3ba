"""The promises of fold itself: control, report, and a judge that sees wrong numbers."""

from __future__ import annotations

import json

import fastbn_export
import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from onnx import numpy_helper

from . import folding
from .folding import Model, chain, check


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


def test_skip_takes_a_single_name_too():
    assert [e.folded for e in check(chain(), skip="block1.bn").report.entries] == [True, False, True]


@pytest.mark.parametrize("skip", [3, [1], None])
def test_skip_of_another_type(skip):
    with pytest.raises(TypeError, match="skip: expected names"):
        fold(chain(), skip=skip)


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


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_copies_are_no_entries_of_the_original(blocks):
    """Residual blocks, x = bn(conv(x) + x): the next block folds into a copy of this one's normalization."""
    m = Model()
    x = m.input(1, 4, 3, 3)
    for i in range(blocks):
        y = m.op("Add", m.op("Conv", x, m.weight(4, 4, 1, 1)), x)
        x = m.op("BatchNormalization", y, *map(m.constant, m.statistics(4)), name=f"bn{i}")
    report = check(m.build(x), duplicate=True).report
    assert [e.name for e in report.entries] == [f"bn{i}" for i in range(blocks)]
    assert report.ops_before["BatchNormalization"] == report.folded + report.left == blocks


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
