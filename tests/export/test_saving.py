"""Paths in and out: what is saved is the result, whole or not at all, with external data too."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from fastbn_export.store import load, save

from .folding import Model, chain, feeds_for, folded, run


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
