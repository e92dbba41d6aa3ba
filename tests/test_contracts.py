"""The contract of the package: public names, signatures, docstrings, and what must never be imported."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import fastbn

PACKAGE = Path(fastbn.__file__).parent

# Signatures that users, the examples and the acceptance checks call. What came later is keyword-only, with a default.
SIGNATURES = {
    "batch_norm_train": lambda x, weight=None, bias=None, running_mean=None, running_var=None, *, momentum=0.1,
    eps=1e-5, axis=1, activation=None, residual=None, mask=None, out=None: ...,
    "batch_norm_infer": lambda x, running_mean, running_var, weight=None, bias=None, *, eps=1e-5, axis=1,
    activation=None, residual=None, out=None: ...,
    "layer_norm": lambda x, weight=None, bias=None, *, axis=-1, eps=1e-5, out=None: ...,
    "instance_norm": lambda x, weight=None, bias=None, *, axis=1, eps=1e-5, out=None: ...,
    "group_norm": lambda x, num_groups, weight=None, bias=None, *, axis=1, eps=1e-5, out=None: ...,
    "backward": lambda grad_output, saved, *, out=None: ...,
    "Moments.of": lambda x, axis=1, mask=None: ...,
    "Moments.variance": lambda self, ddof=0: ...,
    "Moments.merge": lambda self, other: ...,
    "Moments": lambda count, mean, m2: ...,
    "BatchNorm": lambda num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, *, axis=1,
    activation=None, dtype=np.float32: ...,
    "BatchNorm.backward": lambda self, grad_output, *, out=None: ...,
    "BatchNorm.train": lambda self, mode=True: ...,
    "BatchNorm.eval": lambda self: ...,
    "BatchNorm.freeze": lambda self, mode=True: ...,
    "BatchNorm.state_dict": lambda self: ...,
    "BatchNorm.load_state_dict": lambda self, state: ...,
}  # fmt: skip
PUBLIC = [name for name in fastbn.__all__ if not isinstance(getattr(fastbn, name), type)]
CLASSES = [name for name in fastbn.__all__ if isinstance(getattr(fastbn, name), type)]


def find(path):
    value = fastbn
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(("path", "contract"), SIGNATURES.items(), ids=SIGNATURES)
def test_signatures(path, contract):
    parameters = list(inspect.signature(find(path)).parameters.values())
    promised = list(inspect.signature(contract).parameters.values())
    for got, want in zip(parameters, promised, strict=False):
        assert (got.name, got.kind, got.default) == (want.name, want.kind, want.default)
    assert len(parameters) >= len(promised)
    for extra in parameters[len(promised) :]:
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY and extra.default is not inspect.Parameter.empty, extra


def test_gradients_and_moments_have_the_promised_names():
    _, saved = fastbn.batch_norm_train(np.ones((4, 3, 2)))
    grads = fastbn.backward(np.ones((4, 3, 2)), saved)
    assert grads.input.shape == (4, 3, 2) and grads.weight is grads.bias is grads.residual is None
    moments = fastbn.Moments.of(np.ones((4, 3)))
    assert moments.count == 4 and moments.mean.shape == moments.m2.shape == moments.variance().shape == (3,)


def test_all_is_sorted_and_complete():
    assert fastbn.__all__ == sorted(fastbn.__all__)
    assert all(hasattr(fastbn, name) for name in fastbn.__all__)
    modules = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    loose = {n for n in vars(fastbn) if not n.startswith("_")} - set(fastbn.__all__) - modules
    assert not loose, "names that are public by accident"


def test_version_is_the_distributions():
    from importlib.metadata import version

    assert fastbn.__version__ == version("fastbn")


@pytest.mark.parametrize("name", PUBLIC)
def test_functions_document_shapes_errors_and_results(name):
    function, text = find(name), inspect.getdoc(find(name))
    assert text, name
    parameters = [p for p in inspect.signature(function).parameters if p != "self"]
    for section in ("Parameters", "Raises") if parameters else ():
        assert re.search(rf"^{section}\n-+$", text, re.M), f"{name}: no section {section}"
    returns = inspect.signature(function).return_annotation
    assert returns in (None, "None") or re.search(r"^Returns\n-+$", text, re.M), f"{name}: no section Returns"
    if not parameters:
        return
    described = re.search(r"^Parameters\n-+\n(.*?)(?:\n\n[A-Z]\w+\n-+|\Z)", text, re.M | re.S).group(1)
    names = {n.strip() for line in re.findall(r"^(\w[\w, ]*?)(?: :.*)?$", described, re.M) for n in line.split(",")}
    assert set(parameters) <= names, f"{name}: {set(parameters) - names} not described"


@pytest.mark.parametrize("name", CLASSES)
def test_classes_and_their_methods_are_documented(name):
    kind = find(name)
    assert inspect.getdoc(kind) and kind.__doc__, name
    for attribute, value in vars(kind).items():
        if not attribute.startswith("_") and inspect.isfunction(value):
            assert value.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sources_keep_the_house_rules(path):
    """A docstring first, no file above 350 lines, nothing of the exporter or its libraries."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "modules open with what they must give"
    assert text.count("\n") <= 350, "one idea a file"
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert not imported & {"onnx", "onnx_ir", "onnxruntime", "fastbn_export", "rich", "matplotlib", "sklearn"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1 - len((ast.get_docstring(node) or "").splitlines())
            assert length <= 70, f"{node.name} does not fit a screen"


def test_typed():
    assert (PACKAGE / "py.typed").exists()
