"""Reading believes nothing, writing leaves the whole file or none."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from fastbn_export.files import ModelFileError, atomic_path, check_distinct, check_output, load_model, save_model
from onnx import TensorProto, helper

from .onnx_models import corrupt, graph, initializers, value


def model(size=1000):
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    return graph(nodes, [value("x", shape=[size])], [value("y", shape=[size])], [("w", np.arange(size, dtype="f4"))])


def test_round_trip(tmp_path):
    path = tmp_path / "m.onnx"
    save_model(model(), path)
    assert load_model(path) == model() and os.listdir(tmp_path) == ["m.onnx"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022) or 0o022)


def test_round_trip_with_external_data(tmp_path):
    path, original = tmp_path / "m.onnx", model()
    save_model(original, path, external=True)
    assert original == model(), "the caller's model is as it was"
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 500
    assert load_model(path) == model()
    onnx.checker.check_model(str(path))
    assert load_model(path, external_data=False).graph.initializer[0].data_location == TensorProto.EXTERNAL


@pytest.fixture
def full_disk():
    """Let no file grow beyond 6000 bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_model_that_does_not_fit_is_not_changed(tmp_path, full_disk):
    """Its tensors are moved to the file one by one, and some may be there already."""
    original = model()
    for name in ("a", "b"):
        original.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(np.ones(600, "f4"), name))
    before = original.SerializeToString()
    with pytest.raises(ModelFileError, match="cannot be written"):
        save_model(original, tmp_path / "m.onnx", external=True)
    assert original.SerializeToString() == before and os.listdir(tmp_path) == []


def test_the_data_file_is_there_before_the_model(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda part, out: (order.append(out.name), replace(part, out)))
    save_model(model(), tmp_path / "m.onnx", external=True)
    assert order == ["m.onnx.data", "m.onnx"]


def truncated(path):
    save_model(model(), path)
    path.write_bytes(path.read_bytes()[:-200])


def wrong_size(path):
    broken = model()
    broken.graph.initializer[0].dims[0] = 10**12
    save_model(broken, path)


UNREADABLE = {
    "missing": (lambda path: None, "no such file"),
    "a folder": (lambda path: path.mkdir(), "got a folder"),
    "empty": (lambda path: path.write_bytes(b""), "without a graph"),
    "text": (lambda path: path.write_text("weights and biases\n" * 50), "truncated file or another format"),
    "truncated": (truncated, "truncated file or another format"),
    "no graph": (lambda path: path.write_bytes(onnx.ModelProto(ir_version=8).SerializeToString()), "without a graph"),
    "absurd sizes": (wrong_size, "expected 4000000000000 bytes"),
}


@pytest.mark.parametrize("case", list(UNREADABLE))
def test_what_is_no_model_is_told(tmp_path, case):
    make, message = UNREADABLE[case]
    make(tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=message):
        load_model(tmp_path / "m.onnx")


def external(path, **entries):
    """Save a model whose external data entry says what it likes."""
    save_model(model(), path, external=True)
    changed = load_model(path, external_data=False)
    tensor = changed.graph.initializer[0]
    said = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, text in said.items():
        if text is not None:
            tensor.external_data.add(key=key, value=text)
    path.write_bytes(changed.SerializeToString())


LIES = {
    "absolute": ({"location": "/etc/passwd"}, "relative to the model"),
    "outside": ({"location": "../secret"}, "inside the model's folder"),
    "outside, dressed up": ({"location": "a/../../secret"}, "inside the model's folder"),
    "outside, Windows": ({"location": "..\\secret"}, "inside the model's folder"),
    "a link out": ({"location": "link"}, "inside the model's folder"),
    "missing": ({"location": "nothing.data"}, "no such file"),
    "a folder": ({"location": "."}, "no such file"),
    "empty name": ({"location": ""}, "relative to the model"),
    "too long": ({"length": "4001"}, "expected 4000 bytes"),
    "negative": ({"offset": "-8"}, "bytes at -8"),
    "past the end": ({"offset": "64"}, "bytes at 64"),
    "no number": ({"length": "many"}, "whole numbers"),
}


@pytest.mark.parametrize("case", list(LIES))
def test_external_data_that_lies(tmp_path, case):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4000))
    (folder / "link").symlink_to(tmp_path / "secret")
    entries, message = LIES[case]
    external(folder / "m.onnx", **entries)
    with pytest.raises(ModelFileError, match=message):
        load_model(folder / "m.onnx")


def test_external_data_without_a_length_is_as_long_as_its_shape(tmp_path):
    external(tmp_path / "m.onnx", length=None, offset=None)
    assert np.array_equal(initializers(load_model(tmp_path / "m.onnx"))["w"], np.arange(1000, dtype="f4"))


def test_outputs_that_cannot_be(tmp_path):
    path = tmp_path / "m.onnx"
    save_model(model(), path)
    (tmp_path / "same").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for out, message in (
        (tmp_path, "got a folder"),
        (tmp_path / "none" / "m.onnx", "no such folder"),
        (path / "m.onnx", "no such folder"),
        (path, "never touched"),
        (tmp_path / "same", "never touched"),
        (tmp_path / "pipe", "got a device or a pipe"),
        (os.devnull, "got a device or a pipe"),
    ):
        with pytest.raises(ModelFileError, match=message):
            check_output(out, None, path)
    for out in (path, tmp_path / "same"):
        with pytest.raises(ModelFileError, match="one name twice"):
            check_distinct([path, None, out])
    check_distinct([path, tmp_path / "other", tmp_path / "new"])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["m.onnx"]


def test_names_as_long_as_the_file_system_takes(tmp_path):
    for name in ("m" * 255, "é" * 127):
        save_model(model(), tmp_path / name)
        assert load_model(tmp_path / name) == model() and os.listdir(tmp_path) == [name]
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["m" * 256, "é" * 128, "m" * 5000])
def test_longer_names_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ModelFileError, match="cannot be written: file name too long"):
        check_output(tmp_path / name)


def test_a_data_file_of_too_long_a_name_leaves_nothing(tmp_path):
    name = "m" * 253
    with pytest.raises(ModelFileError, match="file name too long"):
        save_model(model(), tmp_path / name, external=True)
    assert os.listdir(tmp_path) == []


def test_corrupt_is_a_copy():
    original = model()
    assert corrupt(original, lambda a: a + 1) != original == model()
