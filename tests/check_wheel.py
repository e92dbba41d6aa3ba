"""What a user installs: build the wheel, install it outside of the tree beside numpy and numba alone, and look at it.

Run by ``make wheel-test``; prints one line a check and "N passed, M failed", exit status 1 if any failed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"fastbn": ROOT / "fastbn", "fastbn_export": ROOT / "export" / "fastbn_export"}
NEEDED = ("numpy", "numba", "llvmlite")  # with the folders of shared libraries that stand beside them


def run(*command: object, check: bool = True, **env: object) -> subprocess.CompletedProcess[str]:
    """Run a command far from the tree."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    clean |= {k: str(v) for k, v in env.items()}
    line = [str(part) for part in command]
    result = subprocess.run(line, cwd=tempfile.gettempdir(), env=clean, capture_output=True, text=True, timeout=600)
    assert not check or result.returncode == 0, f"{' '.join(line)}\n{result.stdout}{result.stderr}"
    return result


class Installed:
    """A wheel and a virtual environment that holds it, numpy and numba, and nothing else."""

    def __init__(self, folder: Path):
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
        run(*pip, "wheel", "--no-deps", "-w", folder, ROOT)
        (self.wheel,) = folder.glob("*.whl")
        self.venv = folder / "venv"
        venv.create(self.venv, with_pip=False, symlinks=os.name != "nt")
        self.bin = self.venv / ("Scripts" if os.name == "nt" else "bin")
        run(*pip, "--python", self.bin / "python", "install", "--no-deps", "--no-index", self.wheel)
        (self.site,) = {path.parent for path in self.venv.rglob("fastbn-*.dist-info")}
        for name in NEEDED:  # linked, not installed: seconds instead of a download
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.origin is not None, f"{name} is not installed here"
            source = Path(spec.origin).parent
            for path in (source, source.parent / f"{name}.libs"):
                if path.exists():
                    (self.site / path.name).symlink_to(path, target_is_directory=True)

    def python(self, code: str, **env: object) -> str:
        """Run code there with warnings as errors; return what it printed."""
        return run(self.bin / "python", "-W", "error", "-c", code, **env).stdout

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run the ``fastbn`` command there."""
        return run(self.bin / "fastbn", *arguments, check=False)


def exactly_two_packages(it: Installed) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(it.wheel).namelist()}
    names = {name for name in names if not name.endswith(".dist-info")}
    assert names == set(PACKAGES), names


def every_source_is_there_and_nothing_else(it: Installed) -> None:
    inside = {n for n in zipfile.ZipFile(it.wheel).namelist() if not n.split("/")[0].endswith(".dist-info")}
    for package, folder in PACKAGES.items():
        here = {f"{package}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}
        there = {n for n in inside if n.startswith(f"{package}/") and n.endswith(".py")}
        assert here == there, here ^ there
    assert {n for n in inside if not n.endswith(".py")} == {f"{package}/py.typed" for package in PACKAGES}


def both_packages_are_typed(it: Installed) -> None:
    assert all((it.site / package / "py.typed").is_file() for package in PACKAGES)


def numpy_and_numba_are_all_it_needs(it: Installed) -> None:
    archive = zipfile.ZipFile(it.wheel)
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = message_from_string(archive.read(name).decode())
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split(">")[0].strip() for line in needed) == ["numba", "numpy"], needed
    extras = {"export", "demo", "torch", "cuda", "bench", "test"}
    assert extras <= set(metadata.get_all("Provides-Extra", [])), "an extra is missing"
    assert any("licenses/LICENSE" in n for n in archive.namelist()), "the licence is missing"


def fastbn_works_without_the_exporters_libraries(it: Installed) -> None:
    code = """
import importlib.util, sys
assert not any(importlib.util.find_spec(name) for name in ("onnx", "onnx_ir", "onnxruntime", "rich", "ml_dtypes"))
import numpy as np, fastbn
x = np.random.default_rng(0).standard_normal((8, 3, 300), dtype=np.float32) * 3 + 1
bn = fastbn.BatchNorm(3, activation="relu")
y = bn(x)
grads = bn.backward(np.ones_like(y))
assert np.isfinite(grads.input).all() and y.min() == 0 and bn.num_batches_tracked == 1
plain, _ = fastbn.batch_norm_train(x)
assert abs(plain.mean()) < 1e-5 and abs(plain.std() - 1) < 1e-4
print(fastbn.__file__)
"""
    assert Path(it.python(code).strip()).is_relative_to(it.site)


def fastbn_export_says_what_it_needs(it: Installed) -> None:
    code = """
try:
    import fastbn_export
    fastbn_export.fold
except ImportError as error:
    print(error)
"""
    assert "fastbn[export]" in it.python(code)


def the_command_says_which_install_brings_fold(it: Installed) -> None:
    for arguments in (("fold", "in.onnx", "out.onnx"), ("verify", "a.onnx", "b.onnx"), ("inspect", "a.onnx")):
        result = it.command(*arguments)
        assert result.returncode == 2, (arguments, result.returncode, result.stderr)
        assert "fastbn[export]" in result.stderr and "pip install" in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.stderr, result.stderr
        assert not Path(tempfile.gettempdir(), "out.onnx").exists()


def the_command_works_without_extras_where_it_can(it: Installed) -> None:
    assert it.command("--help").returncode == 0
    doctor = it.command("doctor")
    assert doctor.returncode == 0 and "numba" in doctor.stdout, doctor.stdout + doctor.stderr
    assert it.command("nonsense").returncode == 2


CHECKS: list[Callable[[Installed], None]] = [
    exactly_two_packages,
    every_source_is_there_and_nothing_else,
    both_packages_are_typed,
    numpy_and_numba_are_all_it_needs,
    fastbn_works_without_the_exporters_libraries,
    fastbn_export_says_what_it_needs,
    the_command_says_which_install_brings_fold,
    the_command_works_without_extras_where_it_can,
]


def main() -> int:
    """Run all checks; return the exit status."""
    failed = 0
    with tempfile.TemporaryDirectory(prefix="fastbn-wheel-") as folder:
        it = Installed(Path(folder))
        for check in CHECKS:
            name = check.__name__.replace("_", " ")
            try:
                check(it)
            except Exception as error:
                failed += 1
                print(f"FAILED  {name}: {type(error).__name__}: {error}")
            else:
                print(f"passed  {name}")
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
