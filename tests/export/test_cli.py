"""The command: exit status, what is written, and one line for whatever is wrong."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
from fastbn_export import commands
from fastbn_export.build import build
from fastbn_export.cli import main
from fastbn_export.console import print_table
from fastbn_export.files import load_model, save_model
from fastbn_export.fold import FoldResult, fold
from fastbn_export.layers import Linear, ReLU, Sigmoid

from .onnx_models import corrupt
from .plain_fold import norm


def network(seed=0):
    rng = np.random.default_rng(seed)
    first, last = (Linear(rng.normal(size=(5, 5)).astype(np.float32)) for _ in range(2))
    return build([first, norm(rng, 5), Sigmoid(), last, ReLU(), norm(rng, 5)], (None, 5), fold=False)


@pytest.fixture
def folder(tmp_path):
    save_model(network(), tmp_path / "in.onnx")
    return tmp_path


@pytest.fixture
def fastbn(folder, monkeypatch, capsys):
    """Run a command in the folder; return (status, output, errors)."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        status = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def norms_in(path):
    return sum(node.op_type == "BatchNormalization" for node in load_model(path).graph.node)


def test_fold_writes_what_it_checked_and_says_what_it_did(fastbn, folder):
    before = (folder / "in.onnx").read_bytes()
    status, out, err = fastbn("fold", "in.onnx", "out.onnx", "--report", "r.json")
    assert (status, err) == (0, "")
    assert (folder / "in.onnx").read_bytes() == before and norms_in("out.onnx") == 1
    for text in (
        "BatchNormalization",
        "parameters",
        "file size",
        "1 of 2",
        "left as they are",
        "layers[5]",
        "same on 3",
    ):
        assert text in out
    report = json.loads((folder / "r.json").read_text())
    assert report["folded"] == 1 and report["verification"]["ok"] and report["undone"] == []
    assert sorted(os.listdir(folder)) == ["in.onnx", "out.onnx", "r.json"]
    assert fastbn("verify", "in.onnx", "out.onnx", "--report", "v.json")[0] == 0
    assert json.loads((folder / "v.json").read_text())["ok"]


def test_long_names(fastbn, folder):
    np.savez(folder / "d.npz", input=np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32))
    assert fastbn("fold", "in.onnx", "o" * 250, "--report", "r" * 250)[::2] == (0, "")
    assert fastbn("recalibrate", "in.onnx", "c" * 250, "--data", "d.npz")[::2] == (0, "")


def test_fold_keeps_what_it_is_told_to(fastbn):
    assert fastbn("fold", "in.onnx", "out.onnx", "--keep", "layers*")[0] == 0
    assert norms_in("out.onnx") == 2


def test_fold_unchecked(fastbn):
    status, out, _ = fastbn("fold", "in.onnx", "out.onnx", "--no-verify")
    assert status == 0 and "not verified, as asked" in out and "same on" not in out


def test_fold_with_inputs_and_tolerances(fastbn, folder):
    np.savez(folder / "x.npz", input=np.ones((2, 5), np.float32))
    options = ("--inputs", "x.npz", "--rtol", "1e-3", "--atol", "1e-5", "--samples", "2", "--seed", "7")
    status, out, _ = fastbn("fold", "in.onnx", "out.onnx", *options)
    assert status == 0 and "same on 1 samples (input: float32[2, 5])" in out


def test_external_weights_are_read_and_never_written_over(fastbn, folder):
    rng = np.random.default_rng(0)
    wide = build([Linear(rng.normal(size=(64, 64)).astype(np.float32)), norm(rng, 64)], (None, 64), fold=False)
    save_model(wide, folder / "wide.onnx", external=True)
    (folder / "wide.onnx").rename(folder / "renamed.onnx")
    before = (folder / "wide.onnx.data").read_bytes()
    status, out, _ = fastbn("fold", "renamed.onnx", "out.onnx")
    assert status == 0 and "same on 3" in out
    assert norms_in("out.onnx") == 0
    for name in ("wide.onnx", "wide.onnx.data"):
        status, _, err = fastbn("fold", "renamed.onnx", name)
        assert status == 2 and "the input has its weights in wide.onnx.data" in err
    np.savez(folder / "x.npz", input=np.ones((2, 64), np.float32))
    for command in (
        ("fold", "renamed.onnx", "new.onnx", "--report", "wide.onnx.data"),
        ("verify", "renamed.onnx", "renamed.onnx", "--report", "wide.onnx.data"),
        ("recalibrate", "renamed.onnx", "wide.onnx.data", "--data", "x.npz"),
    ):
        status, _, err = fastbn(*command)
        assert status == 2 and "the input has its weights in wide.onnx.data" in err
    assert (folder / "wide.onnx.data").read_bytes() == before
    (folder / "wide.onnx.data").write_bytes(before[:-8])
    status, _, err = fastbn("inspect", "renamed.onnx")
    assert status == 2 and "external data" in err and err.count("\n") == 1
    (folder / "wide.onnx.data").unlink()
    assert fastbn("fold", "renamed.onnx", "new.onnx")[0] == 2
    assert not (folder / "new.onnx").exists()


@pytest.fixture
def pipe(folder):
    """Make a path as the shell's ``<(cat in.onnx)`` does: the bytes of the model, once."""
    ends = []

    def make():
        reader, writer = os.pipe()
        ends.append(reader)
        with os.fdopen(writer, "wb") as stream:
            stream.write((folder / "in.onnx").read_bytes())
        return f"/dev/fd/{reader}"

    yield make
    for end in ends:
        os.close(end)


def test_models_from_pipes_are_read_once(fastbn, folder, pipe):
    np.savez(folder / "d.npz", input=np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32))
    status, out, err = fastbn("fold", pipe(), "out.onnx")
    assert (status, err) == (0, "") and "1 of 2" in out and norms_in("out.onnx") == 1
    assert fastbn("fold", "in.onnx", "same.onnx")[1].split("file size")[1][:20] == out.split("file size")[1][:20]
    for command in (
        ("verify", pipe(), pipe()),
        ("verify", pipe(), "out.onnx", "--report", "r.json"),
        ("inspect", pipe()),
        ("recalibrate", pipe(), "again.onnx", "--data", "d.npz"),
    ):
        status, _, err = fastbn(*command)
        assert (status, err) == (0, ""), command


def break_fold(monkeypatch, always):
    """Make every fold wrong; with ``always`` even the fold of nothing."""

    def wrong(model, *, skip=(), **options):
        result = fold(model, skip=skip, **options)
        broken = corrupt(result.model, lambda a: a * 1.01) if result.report.folded or always else result.model
        return FoldResult(broken, result.report)

    monkeypatch.setattr(commands, "fold_model", wrong)


def test_a_wrong_fold_is_undone_and_told(fastbn, monkeypatch):
    break_fold(monkeypatch, always=False)
    status, out, _ = fastbn("fold", "in.onnx", "out.onnx")
    assert status == 0 and "warning" in out and "undone" in out and norms_in("out.onnx") == 2


def test_a_failed_check_writes_nothing(fastbn, folder, monkeypatch):
    break_fold(monkeypatch, always=True)
    (folder / "out.onnx").write_text("old")
    status, out, _ = fastbn("fold", "in.onnx", "out.onnx", "--report", "r.json")
    assert status == 1 and "was not written" in out
    assert (folder / "out.onnx").read_text() == "old"
    assert json.loads((folder / "r.json").read_text())["verification"]["ok"] is False


def test_fold_says_how_to_write_what_onnxruntime_cannot_run(fastbn, folder):
    model = network()
    for node in model.graph.node:
        if node.op_type == "Sigmoid":
            node.domain = "elsewhere"
    model.opset_import.add(domain="elsewhere", version=1)
    save_model(model, folder / "custom.onnx")
    status, out, _ = fastbn("fold", "custom.onnx", "out.onnx")
    assert status == 1 and "onnxruntime cannot run the original" in out and not (folder / "out.onnx").exists()
    assert "--no-verify" in out
    assert fastbn("fold", "custom.onnx", "out.onnx", "--no-verify")[0] == 0 and norms_in("out.onnx") == 1


def test_verify_of_different_models_is_1(fastbn, folder):
    save_model(network(1), folder / "other.onnx")
    status, out, _ = fastbn("verify", "in.onnx", "other.onnx")
    assert status == 1 and "NOT the same" in out


def test_inspect_shows_every_one_and_writes_nothing(fastbn, folder):
    status, out, _ = fastbn("inspect", "in.onnx")
    assert status == 0 and "layers[1].BatchNormalization" in out and "folds upstream" in out and "stays" in out
    assert json.loads(fastbn("inspect", "in.onnx", "--json")[1])["left"] == 1
    assert os.listdir(folder) == ["in.onnx"]


def test_recalibrate(fastbn, folder):
    np.savez(folder / "d.npz", input=np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32), labels=[1])
    status, out, _ = fastbn("recalibrate", "in.onnx", "out.onnx", "--data", "d.npz", "--batch", "7")
    assert status == 0 and "100 examples" in out and norms_in("out.onnx") == 2
    assert fastbn("verify", "in.onnx", "out.onnx")[0] == 1


def test_doctor(fastbn):
    status, out, _ = fastbn("doctor")
    assert status == 0
    for text in ("numba", "onnxruntime", "cpu features", "threads", "blocks are made for", "kernel cache", "cuda"):
        assert text in out


def test_warmup_runs_every_task(fastbn, monkeypatch):
    done = []
    monkeypatch.setattr("fastbn_export.warmup.tasks", lambda: [("a", lambda: done.append("a")), ("b", lambda: None)])
    status, out, _ = fastbn("warmup")
    assert status == 0 and done == ["a"] and "2 kernels" in out


def cycle(path):
    model = network()
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]
    path.write_bytes(model.SerializeToString())


BAD = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["bend"], "invalid choice"),
    "missing argument": (["fold", "in.onnx"], "required: OUT.onnx"),
    "unknown option": (["fold", "in.onnx", "o", "--quick"], "unrecognized arguments: --quick"),
    "samples 0": (["fold", "in.onnx", "o", "--samples", "0"], "expected a whole number >= 1"),
    "samples no number": (["fold", "in.onnx", "o", "--samples", "x"], "--samples"),
    "negative seed": (["fold", "in.onnx", "o", "--seed", "-1"], "expected a whole number >= 0"),
    "negative tolerance": (["verify", "in.onnx", "in.onnx", "--rtol", "-1"], "expected a number >= 0"),
    "timeout 0": (["verify", "in.onnx", "in.onnx", "--timeout", "0"], "expected seconds > 0"),
    "missing file": (["fold", "none.onnx", "o"], "none.onnx: no such file"),
    "file of no ONNX": (["fold", "text.onnx", "o"], "truncated file or another format"),
    "truncated file": (["fold", "cut.onnx", "o"], "truncated file or another format"),
    "cyclic graph": (["fold", "cycle.onnx", "o"], "expected a valid ONNX model"),
    "folder for a file": (["inspect", "."], "got a folder"),
    "verify of nothing": (["verify", "in.onnx", "none.onnx"], "none.onnx: no such file"),
    "recalibrate text": (["recalibrate", "text.onnx", "o", "--data", "x.npz"], "truncated file or another format"),
    "name too long": (["fold", "in.onnx", "o" * 256], "file name too long"),
    "report's name too long": (["fold", "in.onnx", "o", "--report", "r" * 256], "file name too long"),
    "output is a folder": (["fold", "in.onnx", "."], "got a folder"),
    "output in no folder": (["fold", "in.onnx", "none/o"], "no such folder"),
    "output under a file": (["fold", "in.onnx", "text.onnx/o"], "no such folder"),
    "output is the input": (["fold", "in.onnx", "./in.onnx"], "never touched"),
    "report in no folder": (["fold", "in.onnx", "o", "--report", "none/r.json"], "no such folder"),
    "report is the input": (["fold", "in.onnx", "o", "--report", "in.onnx"], "never touched"),
    "report is the output": (["fold", "in.onnx", "o", "--report", "./o"], "got one name twice"),
    "output is the data": (["fold", "in.onnx", "x.npz", "--inputs", "x.npz"], "never touched"),
    "report is the data": (["fold", "in.onnx", "o", "--inputs", "x.npz", "--report", "x.npz"], "never touched"),
    "report is a model": (["verify", "in.onnx", "cut.onnx", "--report", "cut.onnx"], "never touched"),
    "recalibrated is the data": (["recalibrate", "in.onnx", "x.npz", "--data", "x.npz"], "never touched"),
    "npy for npz": (["fold", "in.onnx", "o", "--inputs", "x.npy"], "got a single array"),
    "no npz": (["fold", "in.onnx", "o", "--inputs", "text.onnx"], "text.onnx: expected an npz"),
    "missing npz": (
        ["fold", "in.onnx", "o", "--inputs", "none.npz"],
        "none.npz: expected an npz file, got no such file",
    ),
    "npz of other names": (["fold", "in.onnx", "o", "--inputs", "other.npz"], "none for ['input']"),
    "pickles in npz": (["fold", "in.onnx", "o", "--inputs", "pickle.npz"], "pickle.npz: expected an npz"),
    "data of other names": (["recalibrate", "in.onnx", "o", "--data", "other.npz"], "none for ['input']"),
    "demo into a file": (["demo", "--out", "text.onnx"], "expected a folder to write into"),
    "demo without MNIST": (["demo", "--out", "d", "--data", "."], "train-images-idx3-ubyte"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_is_wrong_is_one_line_and_status_2(fastbn, folder, case):
    (folder / "text.onnx").write_text("weights and biases\n" * 20)
    (folder / "cut.onnx").write_bytes((folder / "in.onnx").read_bytes()[:-40])
    cycle(folder / "cycle.onnx")
    np.savez(folder / "other.npz", x=np.ones(3))
    np.savez(folder / "pickle.npz", input=np.array([print], object))
    np.savez(folder / "x.npz", input=np.ones((2, 5), np.float32))
    np.save(folder / "x.npy", np.ones((2, 5), np.float32))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    arguments, message = BAD[case]
    status, out, err = fastbn(*arguments)
    assert (status, out.count("error")) == (2, 0)
    assert message in err and err.startswith("fastbn") and err.count("\n") == 1, err
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_an_unforeseen_error_is_one_line_too(fastbn, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(commands, "fold_model", fail)
    status, _, err = fastbn("inspect", "in.onnx")
    assert status == 2 and "RuntimeError: two lines" in err and err.count("\n") == 1
    monkeypatch.setenv("FASTBN_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        fastbn("inspect", "in.onnx")


def test_a_handler_of_the_caller_stays(fastbn):
    for handler in (signal.SIG_IGN, lambda *_: None, signal.SIG_DFL):
        before = signal.signal(signal.SIGTERM, handler)
        try:
            assert fastbn("inspect", "in.onnx")[0] == 0
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, before)


def test_a_table_in_a_pipe_is_not_wrapped(capsys):
    """Some characters are two columns wide."""
    pytest.importorskip("rich")
    print_table("t", ["name", "why"], [["層" * 40, "upstream: a shift does not pass Relu"], ["a", "b"]])
    printed = capsys.readouterr().out
    assert "層" * 40 in printed and "upstream: a shift does not pass Relu" in printed
