"""The command as a process of its own: without the extras, as a program, and ended by a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import onnx
import pytest
from fastbn_export.files import save_model

from .onnx_models import endless
from .test_cli import network


@pytest.fixture
def folder(tmp_path):
    save_model(network(), tmp_path / "in.onnx")
    return tmp_path


NO_EXTRAS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "onnx onnx_ir onnxruntime ml_dtypes google rich sklearn matplotlib".split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
from fastbn_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", [["fold", "a", "b"], ["verify", "a", "b"], ["inspect", "a"], ["demo"]])
def test_without_the_extra_a_command_names_it(tmp_path, command):
    done = subprocess.run(
        [sys.executable, "-c", NO_EXTRAS, *command], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert 'pip install "fastbn[' in done.stderr


def test_doctor_needs_numpy_and_numba_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", NO_EXTRAS, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "numba" in done.stdout and done.stderr == ""


def test_as_a_program(folder):
    run = [sys.executable, "-m", "fastbn_export.cli"]
    done = subprocess.run(
        [*run, "fold", "in.onnx", "out.onnx"], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == 0 and "1 of 2" in done.stdout, done.stderr
    onnx.checker.check_model(str(folder / "out.onnx"), full_check=True)
    assert subprocess.run([*run, "--version"], capture_output=True, text=True, check=True).stdout.startswith("fastbn ")


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_signal_leaves_no_temporary_files(folder, number, told):
    save_model(endless(), folder / "endless.onnx")
    (folder / "t").mkdir()
    run = [sys.executable, "-m", "fastbn_export.cli", "fold", "endless.onnx", "out.onnx"]
    environment = {**os.environ, "TMPDIR": str(folder / "t")}
    process = subprocess.Popen(run, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 60
    while not list((folder / "t").glob("fastbn-*/*.onnx")) and time.monotonic() < give_up:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, f"fastbn fold: {told}\n")
    assert os.listdir(folder / "t") == [] and not (folder / "out.onnx").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams with a shell")
def test_closed_streams(folder):
    """Standard error may be closed, as for daemons: what was asked for is done, and output is kept clean."""

    def run(command, *closed):
        shell = " ".join([f"'{sys.executable}' -m fastbn_export.cli", command, *closed])
        return subprocess.run(["sh", "-c", shell], capture_output=True, text=True, cwd=folder, check=False)

    done = run("inspect in.onnx --json", "2>&-")
    assert done.returncode == 0 and len(json.loads(done.stdout)["entries"]) == 2
    done = run("inspect none.onnx --json", "2>&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert run("fold in.onnx out.onnx", "<&-", ">&-", "2>&-").returncode == 0
    onnx.checker.check_model(str(folder / "out.onnx"), full_check=True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_names_that_the_output_cannot_write(folder, encoding):
    """Such as a Windows console's, or a pipe's there; the model was written already when the command failed."""
    model = network()
    for node in model.graph.node:
        node.name += " é層\U0001f600"
    save_model(model, folder / "in.onnx")

    def run(*command):
        program = [sys.executable, "-m", "fastbn_export.cli", *command]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(program, capture_output=True, cwd=folder, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode(encoding.partition(":")[0])

    assert "1 of 2" in run("fold", "in.onnx", os.fsdecode(b"out\xff.onnx"))
    entries = json.loads(run("inspect", "in.onnx", "--json"))["entries"]
    assert all(entry["name"].endswith(" é層\U0001f600") for entry in entries)
    assert "BatchNormalization" in run("inspect", "in.onnx")


def test_a_reader_that_leaves_does_not_fail_a_check(folder):
    """The status was 1 where a table met the closed pipe, as if OUT had not been written."""
    reads, writes = os.pipe()
    os.close(reads)
    run = [sys.executable, "-m", "fastbn_export.cli", "fold", "in.onnx", "out.onnx"]
    done = subprocess.run(run, stdout=writes, stderr=subprocess.PIPE, text=True, cwd=folder, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "") and (folder / "out.onnx").exists()
