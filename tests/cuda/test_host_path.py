"""Everything between a call and the GPU, with the real numba-cuda and a driver that runs nothing.

Compiling, linking (the device runtime of the grid barrier too), opting in to shared memory, streams, cooperative
launches, the machine code on disk: what the simulator leaves out and what the first call on a GPU would find. Skipped
without the CUDA packages or a C compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cuda.test_compile import _installed

HERE = Path(__file__).parent
START = """
import threading
import numpy as np
from numba import cuda
import fastbn
from fastbn.cuda import launcher, libraries

def array(*shape, dtype=np.float32): return cuda.device_array(shape, dtype)
def step(name, call):
    print(name, flush=True)
    return call()

w = array(64)
x, y = array(65536, 64), array(65536, 64)
"""
CODE = """
libraries.Numba.stream = lambda self, value: STREAM
STREAM = 0
step("rows", lambda: fastbn.batch_norm_train(x, w, w, array(64), array(64), out=y))
step("alone", lambda: fastbn.batch_norm_train(array(64, 64), w, w))
step("again", lambda: fastbn.batch_norm_train(array(8, 64, 7, 7), w, w))
planes = array(2, 64, 28, 28)
step("slab", lambda: fastbn.batch_norm_train(planes, w, w))
step("infer", lambda: fastbn.batch_norm_infer(planes, w, w, w, w))
STREAM = 0x7F0000001000
step("stream", lambda: fastbn.batch_norm_infer(planes, w, w, w, w))
STREAM = 0
_, saved = step("layer", lambda: fastbn.layer_norm(array(300, 768), array(768), array(768)))
step("layer_gradient", lambda: fastbn.backward(array(300, 768), saved))
other = array(2, 64, 28, 28)
call = lambda: fastbn.batch_norm_infer(planes, w, w, w, w, out=other)  # allocates nothing, so that no context is made
thread = threading.Thread(target=lambda: step("thread", call))
thread.start(); thread.join()
assert all(type(l) is launcher.Launcher for k in KERNELS for l in k._launchers.values())
print("end")
"""
REFUSED = """
import warnings
for turn in ("first", "second"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, saved = step("rows:" + turn, lambda: fastbn.batch_norm_train(x, w, w, array(64), array(64), out=y))
        step("gradient:" + turn, lambda: fastbn.backward(y, saved))
        step("slab:" + turn, lambda: fastbn.batch_norm_train(array(64, 96, 28, 28)))
        _, saved = step("layer:" + turn, lambda: fastbn.layer_norm(array(50, 20000), array(20000), array(20000)))
        step("layer_gradient:" + turn, lambda: fastbn.backward(array(50, 20000), saved))
    assert len(caught) == (EXPECTED if turn == "first" else 0), [str(w.message) for w in caught]
    assert all("several launches instead" in str(w.message) for w in caught), [str(w.message) for w in caught]
print("end")
"""
STREAMS = """
from types import SimpleNamespace
def streams(*arrays): return {a.__cuda_array_interface__["stream"] for a in arrays}

x, y = (array(64, 64).bind(cuda.external_stream(0x7F0000001000)) for _ in range(2))
y, saved = step("own", lambda: fastbn.batch_norm_train(x, w, w))
grads = fastbn.backward(y, saved)
_, layer = fastbn.layer_norm(x)
assert streams(y, saved.mean, grads.input, grads.weight, layer.variance) == {0x7F0000001000}
assert step("moments", lambda: saved.moments).count == 64
empty = array(0, 64).bind(cuda.external_stream(0x7F0000001000))
assert streams(step("zeros", lambda: fastbn.batch_norm_train(empty)[1].mean)) == {0x7F0000001000}
step("mask", lambda: fastbn.batch_norm_train(x, w, w, mask=np.arange(64) < 9))
other = cuda.external_stream(0x7F0000002000)
step("elsewhere", lambda: fastbn.batch_norm_train(x, w, w, mask=array(64, dtype=np.bool_).bind(other)))
sequences, lengths = array(4, 8, 16).bind(cuda.external_stream(0x7F0000001000)), array(4, dtype=np.int32).bind(other)
step("lengths", lambda: fastbn.batch_norm_train(sequences, lengths=lengths))
from fastbn.cuda import driver
assert not driver.foreign_allocator()
driver.foreign_allocator = lambda: True
step("lent", lambda: fastbn.batch_norm_train(x, w, w) and None)
step("put", lambda: fastbn.batch_norm_train(x, mask=np.arange(64) < 9) and None)
driver.foreign_allocator = lambda: False
foreign = SimpleNamespace(__cuda_array_interface__=w.__cuda_array_interface__)
assert libraries.NUMBA.host(foreign).shape == (64,)
print("end")
"""
KERNELS = """
from fastbn.cuda import driver
KERNELS = []
made = driver.Kernel.__init__
def keep(self, *args):
    made(self, *args)
    KERNELS.append(self)
driver.Kernel.__init__ = keep
"""


@pytest.mark.skipif(not (_installed() and shutil.which("gcc")), reason="needs the CUDA packages and gcc")
def test_calls_reach_the_driver_as_they_should(tmp_path):
    begun = time.perf_counter()
    steps = run(tmp_path)
    check(steps)
    compiled, kept = time.perf_counter() - begun, sorted((tmp_path / "kept").rglob("*.sm_90"))
    assert [path.name.split("-")[0] for path in kept] == [
        "flat_normalise", "held_train", "rows_train", "rows_train", "sets_settle", "slab_train", "slab_train",
        "staged_backward",
    ]  # fmt: skip
    changed = [path.stat().st_mtime_ns for path in kept]
    kept[0].write_bytes(b"cut off")
    check(run(tmp_path))  # the others come from the disk, and what is no kernel is compiled again
    assert [path.stat().st_mtime_ns == then for path, then in zip(kept, changed, strict=True)] == [False] + [True] * 7
    assert time.perf_counter() - begun < 2 * compiled


@pytest.mark.skipif(not (_installed() and shutil.which("gcc")), reason="needs the CUDA packages and gcc")
@pytest.mark.parametrize(("what", "warned"), [("attribute", 6), ("together", 2)])
def test_what_the_driver_refuses_is_done_by_split_kernels(what, warned, tmp_path):
    code = START + f"EXPECTED = {warned}\n" + REFUSED
    steps = run(tmp_path, code, FASTBN_REFUSES=what)
    assert "end" in steps
    for name in ("rows", "gradient", "slab", "layer", "layer_gradient"):
        for turn in ("first", "second"):
            done = steps[f"{name}:{turn}"]
            assert "together" not in [s[0] for s in done] or (turn == "first" and what == "together")
            split = what == "attribute" or name in ("rows", "gradient")
            assert len([s for s in done if s[0] == "launch"]) >= (3 if split else 1)
            assert turn == "first" or what == "attribute" or split == (len(done) >= 3 and name != "layer_gradient")


@pytest.mark.skipif(not (_installed() and shutil.which("gcc")), reason="needs the CUDA packages and gcc")
def test_results_are_on_the_stream_of_x(tmp_path):
    steps = run(tmp_path, START + STREAMS)
    done = [s for name in ("own", "moments", "zeros", "mask") for s in steps[name]]
    assert "end" in steps and {s[-1] for s in done} == {"0x7f0000001000"}
    assert [s[0] for s in steps["moments"]] == ["down", "synchronised"]
    assert ("up", 64) in [s[:2] for s in steps["mask"]]
    lent = [s for s in steps["lent"] if s[0] in ("wait", "launch")]
    own = [s[0] for s in lent if s[-1] == "0x7f0000001000"]  # weight, bias; y, statistics
    assert own.count("wait") == 2 + 2 and own[-1] == "launch" and lent[-1][-1] == "(nil)"
    assert [s[0] for s in lent if s[-1] == "(nil)"] == ["wait"] * 2  # as they are given back
    assert [s[0] for s in steps["put"][:2]] == ["wait", "wait"] and ("up", 64) in [s[:2] for s in steps["put"]]
    for name, others in (("elsewhere", 3), ("lengths", 1)):  # weight and bias are on the default stream
        assert [s[0] for s in steps[name]].count("wait") == others
        assert {s[-1] for s in steps[name]} == {"0x7f0000001000"}


def run(tmp_path, code=KERNELS + START + CODE, **environment):
    library = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-o", library, HERE / "pretended" / "driver.c", "-ldl"]
    subprocess.run(command, check=True)
    environment |= {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    environment |= {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(tmp_path)}
    environment |= {"FASTBN_CACHE_DIR": str(tmp_path / "kept")}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code], cwd=HERE.parents[1], env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps, name = {}, ""
    for line in done.stdout.splitlines():
        words = line.split()
        if len(words) == 1:
            name = words[0]
            steps[name] = []
        else:
            steps[name].append((words[0], *[int(w) for w in words[2:6]], words[6]))
    return steps


def check(steps):
    assert "synchronised" not in steps
    assert [s[0] for s in steps["rows"]] == ["attribute", "attribute", "together"]
    assert steps["rows"][0][1:3] == (8, 232448 - 4096)  # all that a block may have, less its static part
    assert steps["rows"][1][1:3] == (9, 100)  # and all of L1 for it, so that as many blocks fit as can
    assert [s[:4] for s in steps["alone"] if s[0] == "launch"] == [("launch", 1, 1, 512)]
    assert [s[:5] for s in steps["again"]] == [("launch", 64, 1, 128, 0)]
    assert [(s[0], s[5]) for s in steps["stream"]] == [("launch", "0x7f0000001000")]
    assert [s[:3] for s in steps["slab"] if s[0] == "launch"] == [("launch", 64, 1)]
    assert len(steps["infer"]) == 1 and [s[0] for s in steps["layer"]] == ["launch"]
    assert steps["layer"][0][1:5] == (300, 1, 64, 0)  # a set in the registers of two warps
    assert [s[1:4] for s in steps["layer_gradient"]] == [(132, 1, 96), (192, 1, 256)]  # and their sums
    assert [s[0] for s in steps["thread"]] == ["launch"] * 2  # once more after the thread got a context
    assert "end" in steps
