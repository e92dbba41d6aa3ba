"""The disk cache: per user, never stale, never in the way. Importing fastbn compiles nothing and imports little."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import fastbn
from fastbn.cpu import _jit, _parts

if numba.config.DISABLE_JIT:
    pytest.skip("there is nothing to cache without the JIT", allow_module_level=True)

# One kernel of each kind, then what the dispatchers say: compiled here (misses) or loaded (hits).
CALL = """
import numpy as np, fastbn
from fastbn.cpu import planes
x = np.ones((4, 3, 300), np.float32)
y = fastbn.batch_norm_infer(x, np.zeros(3, "f4"), np.ones(3, "f4"))
assert y.shape == x.shape
stats = planes.infer.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""

# Loading imports none of what compiling does: 0.3 s of the first call.
LITTLE = """
import sys
assert "numba.np.arrayobj" not in sys.modules
"""


def counts(result):
    return tuple(int(n) for n in result.stdout.split())


def test_the_second_process_loads_what_the_first_compiled(python, tmp_path):
    assert counts(python(CALL, FASTBN_CACHE_DIR=tmp_path)) == (0, 1)
    files = sorted(path.name for path in tmp_path.rglob("*.nb*"))
    assert files and {p.parent.parent for p in tmp_path.rglob("*.nbc")} == {tmp_path / _jit.source_digest()}
    assert counts(python(CALL + LITTLE, FASTBN_CACHE_DIR=tmp_path)) == (1, 0)
    assert sorted(path.name for path in tmp_path.rglob("*.nb*")) == files


def cut(whole):
    return whole[: len(whole) // 2]


def with_a_hole(whole):
    """Where machine code lies: LLVM would end the process, or it would run the zeros."""
    before, head, code = whole.partition(b"\x7fELF")
    return before + head + bytes(512) + code[512:] if head else whole


@pytest.mark.parametrize("damaged", [lambda whole: b"", lambda whole: b"not machine code", cut, with_a_hole])
def test_a_damaged_file_is_compiled_again_without_a_word(damaged, python, tmp_path):
    python(CALL, FASTBN_CACHE_DIR=tmp_path)
    for path in tmp_path.rglob("*.nb*"):
        path.write_bytes(damaged(path.read_bytes()))
    assert counts(python(CALL, FASTBN_CACHE_DIR=tmp_path)) == (0, 1)
    assert counts(python(CALL, FASTBN_CACHE_DIR=tmp_path)) == (1, 0)  # and kept again


VARIANT = """
import numpy as np, fastbn
x, mean, var = -np.ones((4, 3, 300), "f4"), np.zeros(3, "f4"), np.ones(3, "f4")
relu = {activation!r}
y = fastbn.batch_norm_infer(x, mean, var, activation=relu)
assert (y[0, 0, 0] < 0) == (relu is None), y[0, 0, 0]
"""


def test_two_processes_that_write_at_once(python, tmp_path):
    """Neither sees a file of the other, one ends first, and the other's index, or what else it has, stays."""
    plain, relu = (VARIANT.format(activation=activation) for activation in (None, "relu"))
    for code, place in ((plain, "a"), (relu, "b")):
        python(code, FASTBN_CACHE_DIR=tmp_path / place)
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.nbi"))
    for code in (plain, relu):
        python(code, FASTBN_CACHE_DIR=tmp_path / "a")


# A file system that only reads, for root too.
READ_ONLY = """
import os, tempfile
def refuse(*a, **k):
    raise OSError(30, "Read-only file system")
tempfile.TemporaryFile = tempfile.mkstemp = os.replace = os.makedirs = refuse
"""


def test_a_folder_that_was_filled_ahead_may_be_read_only(python, tmp_path):
    python(CALL, FASTBN_CACHE_DIR=tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.nb*")}
    assert counts(python(READ_ONLY + CALL, FASTBN_CACHE_DIR=tmp_path)) == (1, 0)
    other = CALL.replace("f4", "f8").replace("np.float32", "np.float64")  # is not in it
    assert counts(python(READ_ONLY + other, FASTBN_CACHE_DIR=tmp_path)) == (0, 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.nb*")} == files
    empty = tmp_path / "empty"
    empty.mkdir()
    code = "from fastbn.cpu import _jit; assert _jit.cache_folder() is None"
    python(READ_ONLY + code, FASTBN_CACHE_DIR=empty)


@pytest.mark.parametrize("variable", ["FASTBN_CACHE_DIR", "XDG_CACHE_HOME", "HOME"])
@pytest.mark.skipif(sys.platform != "linux", reason="folders of Linux")
def test_where_the_cache_lies(variable, python, tmp_path):
    code = "from fastbn.cpu import _jit; print(_jit.cache_folder())"
    env = {"FASTBN_CACHE_DIR": None, "NUMBA_CACHE_DIR": None, "XDG_CACHE_HOME": None, "HOME": tmp_path / "home"}
    clean = {k: v for k, v in os.environ.items() if k not in env}
    env = {k: str(v) for k, v in (env | {variable: tmp_path}).items() if v is not None}
    got = subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, check=True)
    inside = {"FASTBN_CACHE_DIR": ".", "XDG_CACHE_HOME": "fastbn", "HOME": ".cache/fastbn"}[variable]
    assert (
        Path(got.stdout.strip()) == (tmp_path / inside / _jit.source_digest()).resolve()
        or Path(got.stdout.strip()) == tmp_path / inside / _jit.source_digest()
    )


def unwritable(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    return {"a file in place of the folder": file, "no such device": Path("/proc/fastbn"), "below a file": file / "x"}


@pytest.mark.parametrize("where", ["a file in place of the folder", "no such device", "below a file"])
def test_nothing_writable_is_no_error(where, python, tmp_path):
    """Import and calls work, without a warning (the interpreter runs with -W error)."""
    result = python(CALL, FASTBN_CACHE_DIR=unwritable(tmp_path)[where])
    assert counts(result)[0] == 0 and result.stderr == ""


def test_no_home_at_all(python):
    code = "from fastbn.cpu import _jit; assert _jit.cache_folder() is None; import fastbn"
    python(code, FASTBN_CACHE_DIR="", NUMBA_CACHE_DIR="", XDG_CACHE_HOME="", HOME="/proc/nobody")


def test_a_folder_that_vanishes_is_no_error(python, tmp_path):
    code = f"import shutil, fastbn.cpu.launch; shutil.rmtree({str(tmp_path / 'cache')!r})\n{CALL}"
    assert counts(python(code, FASTBN_CACHE_DIR=tmp_path / "cache"))[0] == 0


def test_a_folder_may_be_named_from_where_a_process_begins(python, tmp_path):
    """Kernels that are compiled after it has gone elsewhere are found again by the next one."""
    for hits in (0, 1):
        elsewhere = tmp_path / str(hits)
        elsewhere.mkdir()
        code = f"import os, fastbn.cpu._jit\nos.chdir({str(tmp_path)!r})\nfastbn.cpu._jit.cache_folder()\n"
        result = python(f"{code}os.chdir({str(elsewhere)!r})\n{CALL}", FASTBN_CACHE_DIR="kernels")
        assert counts(result)[0] == hits and not list(elsewhere.iterdir())


def test_any_changed_source_changes_the_folder(python, tmp_path):
    package = tmp_path / "fastbn"
    shutil.copytree(Path(fastbn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "import fastbn; from fastbn.cpu import _jit; print(fastbn.__file__, _jit.source_digest())"

    def digest():
        file, digest = python(code, FASTBN_CACHE_DIR=tmp_path / "cache").stdout.split()
        assert Path(file).parent == package
        return digest

    seen = [digest()]
    assert digest() == seen[0] == _jit.source_digest()
    for name in ("cpu/sweep.py", "cpu/tuning.py"):
        with open(package / name, "a", encoding="utf-8") as file:
            file.write("# another comment\n")
        seen.append(digest())
    assert len(set(seen)) == 3


@pytest.mark.parametrize("setting", ["NUMBA_BOUNDSCHECK", "NUMBA_DEBUGINFO", "NUMBA_OPT"])
def test_what_a_setting_slows_down_is_kept_apart(setting, python, tmp_path):
    """Processes without it loaded the slow code for good."""
    assert counts(python(CALL, FASTBN_CACHE_DIR=tmp_path, **{setting: "1"})) == (0, 1)
    assert counts(python(CALL, FASTBN_CACHE_DIR=tmp_path)) == (0, 1)


def test_a_users_numba_settings_are_left_alone(python, tmp_path):
    code = """
import numba, os
before = numba.config.CACHE_DIR
import fastbn
from fastbn.cpu import planes
assert numba.config.CACHE_DIR == before == os.environ.get("NUMBA_CACHE_DIR", "")
if locators := os.environ.get("NUMBA_CACHE_LOCATOR_CLASSES"):
    assert getattr(numba.config, "CACHE_LOCATOR_CLASSES", locators) == locators
"""
    python(code, FASTBN_CACHE_DIR=tmp_path)
    first = python(code + CALL, FASTBN_CACHE_DIR=tmp_path, NUMBA_CACHE_LOCATOR_CLASSES="InTreeCacheLocator")
    assert counts(first) == (0, 1) and counts(python(CALL, FASTBN_CACHE_DIR=tmp_path)) == (1, 0)


def test_no_kernel_is_compiled_in_two_variants():
    """Serial and parallel share one compiled body (threads are ours): no cache entry can be taken for the other."""
    from fastbn.cpu import planes, rows, rows_swept

    for module in (planes, rows, rows_swept):
        for name, value in vars(module).items():
            if isinstance(value, numba.core.registry.CPUDispatcher):
                assert not value.targetoptions.get("parallel", False), name
                assert value.targetoptions.get("nogil"), name
                assert not value.targetoptions.get("fastmath", False), name


IMPORT = """
import sys, time
import numpy, numba
before = set(sys.modules)
compiled = []
from numba.core import event
listener = event.RecordingListener()
with event.install_listener("numba:compile", listener):
    import fastbn
    import fastbn.cpu.launch
assert not listener.buffer, "importing compiles"
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = {"onnx", "onnx_ir", "onnxruntime", "rich", "matplotlib", "torch", "sklearn", "ml_dtypes", "scipy"}
heavy.add("fastbn_export")
assert not loaded & heavy, loaded & heavy
assert not [name for name in sys.modules if name.startswith(("numba.cuda.cudadrv", "fastbn.cuda"))]
assert "numba.np.ufunc.omppool" not in sys.modules and "numba.np.ufunc.workqueue" not in sys.modules
import threading
assert threading.active_count() == 1
"""


def test_import_compiles_nothing_and_loads_little(python):
    python(IMPORT)


def test_import_does_not_read_the_gpu(python):
    python("import sys, fastbn; assert 'numba.cuda' not in sys.modules")


def test_results_do_not_depend_on_the_cache(python, tmp_path):
    code = """
import hashlib, numpy as np, fastbn
x = np.random.default_rng(0).standard_normal((4, 3, 300)).astype(np.float32)
y = fastbn.batch_norm_infer(x, np.zeros(3, "f4"), np.ones(3, "f4"))
print(hashlib.sha256(y.tobytes()).hexdigest())
"""
    results = {python(code, FASTBN_CACHE_DIR=tmp_path).stdout for _ in range(2)}
    x = np.random.default_rng(0).standard_normal((4, 3, 300)).astype(np.float32)
    y = fastbn.batch_norm_infer(x, np.zeros(3, np.float32), np.ones(3, np.float32))
    import hashlib

    assert results == {hashlib.sha256(y.tobytes()).hexdigest() + "\n"}


ALIGNED = """
import numpy as np, fastbn
from fastbn.cpu import planes
x = np.ones((4, 8, 32), np.float32)
fastbn.batch_norm_infer(x, np.zeros(8, "f4"), np.ones(8, "f4"))
(code,), (machine,) = planes.infer.inspect_llvm().values(), planes.infer.inspect_asm().values()
kernel = next(line for line in code.splitlines() if line.startswith("define") and "planes5infer" in line)
group = kernel.rsplit("#", 1)[1].split()[0]
assert f"attributes #{group} = {{ nounwind alignstack=64" in code, group
spills = [line for line in machine.splitlines() if "zmm" in line and "(%rsp)" in line]
assert not [line for line in spills if "vmovup" in line or "vmovdqu" in line], spills
"""


@pytest.mark.skipif(not _parts.KERNEL_OPTIONS, reason="Numba's inside has changed")
def test_vectors_on_the_stack_lie_on_lines(python, tmp_path):
    """One of them on two pages made bfloat16 training 4.6 times as slow, in one process in thirty."""
    python(ALIGNED, FASTBN_CACHE_DIR=tmp_path)


STREAMED = """
import re, numpy as np, fastbn
from fastbn.cpu import planes
x = np.ones((4, 8, 128), np.float16)
fastbn.batch_norm_train(x)
(machine,) = planes.train.inspect_asm().values()
stores = re.findall(r"(\\S*mov\\S*)\\s+%[yz]mm\\d+, \\S*\\(%r\\w+,%r\\w+,2\\)", machine)
assert any("movnt" in s for s in stores), stores
assert not [s for s in stores if "movaps" in s or "movdqa" in s], stores
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86's instructions")
def test_every_store_past_the_caches_is_one(python, tmp_path):
    """Ordinary stores of whole tensors are unaligned: an aligned one was to be streamed, and LLVM forgot."""
    python(STREAMED, FASTBN_CACHE_DIR=tmp_path)


BESIDE = """
import fastbn, numba, numpy
from numba.core.postproc import PostProcessor
from numba.core.registry import cpu_target
from numba.core.types import BaseFunction
from numba.extending import overload

context, ask, process = cpu_target.target_context, BaseFunction.get_call_type, PostProcessor.run
fastbn.batch_norm_train(numpy.ones((8, 4), "f4"))
assert not {"refresh", "get_abi_sizeof"} & set(vars(context)) and BaseFunction.get_call_type is ask
assert PostProcessor.run is process

def twice(x):
    raise NotImplementedError

@overload(twice)
def _twice(x):
    return lambda x: x + x

assert numba.njit(lambda x: twice(x))(2) == 4
"""


def test_numba_is_left_as_it_was(python, tmp_path):
    """Numba remembers while a kernel is compiled, and has imported little where code is on the disk; then as ever."""
    python(BESIDE, FASTBN_CACHE_DIR=tmp_path)
    python(BESIDE, FASTBN_CACHE_DIR=tmp_path)


OWNER = """
import numpy as np
from numba.core.runtime import rtsys
from fastbn.cpu._jit import helper, jit

@helper
def inner(n):
    return np.ones(n).sum()

@jit
def outer(n):
    s = 0.0
    for i in range(n):
        s += inner(i + 1)
    return s

assert outer(10) == 55.0
stats = rtsys.get_allocation_stats()
assert stats.alloc >= 10 and stats.alloc == stats.free, stats
"""


def test_a_part_that_owns_memory_gives_it_back(python, tmp_path):
    """Others are compiled without marks of where their variables end."""
    python(OWNER, FASTBN_CACHE_DIR=tmp_path, NUMBA_NRT_STATS=1)
