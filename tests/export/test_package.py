import subprocess
import sys

import fastbn_export
import pytest
from fastbn_export import layers


def test_the_package_exports_the_layers():
    assert set(layers.__all__) - {"Layer"} <= set(fastbn_export.__all__)
    for name in set(layers.__all__) - {"Layer"}:
        assert getattr(fastbn_export, name) is getattr(layers, name)


def test_the_errors_that_public_functions_raise_are_there(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(fastbn_export.ModelFileError):
        fastbn_export.fold(tmp_path / "no.onnx")
    assert issubclass(fastbn_export.RunError, RuntimeError)


def test_everything_in_all_is_there_and_is_no_module():
    for name in fastbn_export.__all__:
        assert callable(getattr(fastbn_export, name)), name


def test_nothing_else_is_there():
    with pytest.raises(AttributeError, match="no attribute 'Layers'"):
        _ = fastbn_export.Layers


def test_layers_do_not_load_onnx():
    code = "import sys, fastbn_export; fastbn_export.Linear; assert not {'onnx', 'onnx_ir'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
