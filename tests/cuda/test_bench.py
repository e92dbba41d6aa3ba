"""bench.gpu: silent success without a GPU; its course with clock and GPU pretended; processes that fail or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu, gpu_cases, gpu_family, gpu_peers, gpu_processes, gpu_report, gpu_timing, gpu_trials, gpu_work
from bench.gpu_cases import Case
from tests.cuda.conftest import SIMULATED
from tests.cuda.pretended.gpu import pretend

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("no GPU is present")


def test_cases_and_floors():
    found = gpu_cases.cases()
    assert len(set(found)) == len(found)
    assert {(c.layout, c.dtype) for c in found} >= {
        (layout, dtype) for layout in ("NCHW", "NHWC", "NC") for dtype in ("float32", "float16", "bfloat16")
    }
    case = Case("train", "NCHW", "float32", (64, 256, 56, 56))
    assert case.floor_bytes == 2 * 64 * 256 * 56 * 56 * 4
    assert case._replace(op="backward_fused", dtype="float16").floor_bytes == 5 * 64 * 256 * 56 * 56 * 2
    assert gpu_timing.sets(1 << 20) == 16 and gpu_timing.sets(4 << 30) == 2
    stages = [job["stage"] for job in gpu_work.jobs()]
    assert stages[0] == "machine" and set(stages) - set(gpu.ENDS) == {"machine", "copy", "launch"}
    assert stages.index("copy") < stages.index("time") < stages.index("compile")
    json.dumps(gpu_work.jobs())


def ten(torch, calls):
    """Ten microseconds for every call."""
    (calls if callable(calls) else calls[0])()
    return 10.0


@pytest.fixture
def pretended(monkeypatch):
    """CPU tensors for CUDA's, ten microseconds for every time."""
    torch = pytest.importorskip("torch")
    if not SIMULATED:
        pytest.skip("needs the simulator")
    pretend(torch, monkeypatch.setattr)
    for name in ("microseconds", "gpu_microseconds", "host_microseconds"):
        monkeypatch.setattr(gpu_timing, name, ten)
    monkeypatch.setattr(gpu, "sanitize", lambda end, options: "not run")
    with torch.no_grad():
        yield torch


class InHand:
    """Stands for a worker: does the jobs at once, in this process, and has its reports read from a pipe."""

    def __init__(self, torch):
        self.torch, self.code = torch, 0

    def __call__(self, todo, first):
        read, write = os.pipe()
        with open(write, "w") as pipe:  # short enough for a pipe's own memory
            todo = json.loads(json.dumps(todo))
            gpu_work.work(self.torch, todo, first, lambda said: pipe.write(json.dumps(said) + "\n"))
        return SimpleNamespace(wait=lambda seconds: self.code), read


def course(torch, path):
    about = {"compiled": "none", "launch": "direct", "said": {}}
    status = gpu.run(600.0, path, gpu_work.jobs(), InHand(torch), [], about)
    return status, json.loads(path.read_text())


FIELDS = {"op", "layout", "dtype", "shape", "us", "floor_pct", "x_torch", "x_cudnn", "x_compile", "max_err"}


@pytest.mark.parametrize("broken", [False, True])
def test_its_whole_course(broken, pretended, monkeypatch, tmp_path, capsys):
    if broken:
        monkeypatch.setitem(gpu_peers.ALLOWED, "float32", 1e-9)
    status, result = course(pretended, tmp_path / "gpu.json")
    assert status == int(broken) and bool(result["wrong"]) == broken
    assert set(result) >= {"machine", "versions", "copy_gb_s", "rows"} and result["machine"]["gpu"] == "pretended"
    assert set(result["launch"]) >= {"train_us", "train_torch_us"} and result["unfinished"] == {"checks": 0, "cases": 0}
    assert len(result["rows"]) == 2 + 2 * 2
    for row in result["rows"]:
        bad = broken and row["dtype"] == "float32"
        assert set(row) >= FIELDS and (row["us"] is None) == bad and (bad or row["x_torch"] == 1.0)
        assert (row["floor_pct"] is None) == bad
    assert broken or result["rows"][0]["x_compile"] == 1.0
    said = capsys.readouterr().out
    assert "x cuDNN" in said and said.splitlines()[-1].startswith(f"{len(pretended_checks())} checks")


def pretended_checks():
    return [job for job in gpu_work.jobs() if job["stage"].startswith("check")]


def test_a_case_that_fails_is_a_row_with_its_error(pretended, monkeypatch, tmp_path):
    genuine = gpu_work.check_case

    def fails(torch, case, seed):
        if case.op == "train" and case.shape[0] == 64:
            raise RuntimeError("an illegal memory access")
        return genuine(torch, case, seed)

    monkeypatch.setattr(gpu_work, "check_case", fails)
    monkeypatch.setattr(gpu_peers, "PEERS", gpu_peers.PEERS | {"x_cudnn": lambda *args: 1 / 0})
    status, result = course(pretended, tmp_path / "gpu.json")
    assert status == 1 and len(result["wrong"]) == 2  # once more without kernels in one launch
    assert all("illegal memory access" in text for text in result["wrong"])
    first, second = result["rows"][:2]
    assert "illegal" in first["error"] and first["us"] is None and set(first) >= FIELDS
    assert second["us"] == 10.0 and second["x_cudnn"] is None and second["x_torch"] == 1.0


def test_a_gpu_that_no_longer_answers_ends_the_process_not_the_run(pretended, monkeypatch, tmp_path):
    died = []

    def dies(torch, case, seed):
        died.append(case)
        if len(died) == 1:
            raise RuntimeError("an illegal memory access")
        return 0.0, True

    monkeypatch.setattr(gpu_work, "check_case", dies)
    monkeypatch.setattr(gpu_work, "usable", lambda torch, failed=True: len(died) != 1)
    status, result = course(pretended, tmp_path / "gpu.json")
    assert status == 1 and len(result["wrong"]) == 1 and result["rows"][0]["us"] == 10.0


def test_a_wrong_kernel_is_timed_without_it(pretended, monkeypatch, tmp_path):
    from fastbn.cuda import tuning

    def free():
        return tuning.SLAB_CHANNELS != 1 << 30

    monkeypatch.setattr(gpu_work, "kernel_of", lambda case: "slab" if free() else "planes")
    monkeypatch.setattr(gpu_work, "check_case", lambda *args: (float(free()), True))
    status, result = course(pretended, tmp_path / "gpu.json")
    row = result["rows"][0]
    assert status == 1 and row["error"].startswith("slab: wrong") and row["kernel"] == "planes" and row["us"] == 10.0


def test_a_peer_that_fails_costs_no_row(pretended, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_peers, "PEERS", dict.fromkeys(gpu_peers.PEERS, lambda *args: 1 / 0))
    monkeypatch.setattr(gpu_family, "_torch", lambda *args: 1 / 0)
    status, result = course(pretended, tmp_path / "gpu.json")
    assert status == 0 and all(row["us"] == 10.0 and row["x_torch"] is None for row in result["rows"])
    assert result["launch"]["train_us"] == 10.0 and result["launch"]["train_torch_us"] is None


def test_a_gpu_that_a_peer_broke_is_noticed(pretended, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(gpu_work, "usable", lambda torch, failed: asked.append(failed) or len(asked) != 1)
    status, result = course(pretended, tmp_path / "gpu.json")  # another process goes on behind the first job
    assert status == 0 and result["unfinished"] == {"checks": 0, "cases": 0} and not any(asked)


def test_trials_of_constants(pretended, monkeypatch, tmp_path, capsys):
    from fastbn.cuda import tuning

    seen, genuine = [], gpu_trials._error

    def error(torch, case):
        seen.append((tuning.DEPTH, tuning.APPLY_DEPTH))
        if tuning.DEPTH == 9:
            raise ValueError("no such kernel")
        return "wrong, error 7" if tuning.APPLY_DEPTH == 1 else genuine(torch, case)

    before = tuning.DEPTH, tuning.APPLY_DEPTH
    monkeypatch.setattr(gpu_trials, "_error", error)
    status, result = course(pretended, tmp_path / "gpu.json")
    assert status == 0 and before == (tuning.DEPTH, tuning.APPLY_DEPTH)
    assert seen == [(2, before[1]), (9, before[1]), (before[0], 1)]
    first, second = result["trials"]
    assert first["others"] == {"2": 10.0, "9": "ValueError: no such kernel"} and first["us"] == [10.0, 10.0]
    assert second["others"] == {"1": "wrong, error 7"} and second["constant"] == "APPLY_DEPTH"
    said = capsys.readouterr().out
    assert "trial: DEPTH 4, train NC float32 64x8: 10.0 us; times of that, 2: 1.000, 9: ValueError" in said


def test_trials_name_constants(monkeypatch):
    monkeypatch.undo()  # the small blocks of the simulator
    from fastbn.cuda import tuning

    for case, name, values in gpu_trials.TRIALS:
        now = getattr(tuning, name)
        assert all(type(v) is type(now) and v != now for v in values) and case.op in gpu_cases.MOVED


def test_torch_that_cannot_be_used_is_said(monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise OSError("libcudart.so.13: no such file")

    monkeypatch.setitem(sys.modules, "torch", Broken())
    assert gpu.missing() == "no GPU is present for torch: OSError: libcudart.so.13: no such file"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu.missing().startswith("no GPU is present for torch: ModuleNotFoundError")


def test_time_that_runs_out_leaves_jobs_undone(pretended, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ENDS", dict.fromkeys(gpu.ENDS, -1.0))
    status, result = course(pretended, tmp_path / "gpu.json")
    assert status == 0 and result["rows"] == [] and result["unfinished"]["cases"] == 2


WORKER = """
import json, os, sys, time
first, pipe = int(sys.argv[1]), os.fdopen(int(sys.argv[3]), "w")
def tell(**said): print(json.dumps(said), file=pipe, flush=True)
for number in range(first, 6):
    tell(begun=number)
    if number == 1: os.abort()
    if number == 3: time.sleep(60)
    tell(done=number, result={"number": number})
"""


def test_processes_that_die_or_hang_cost_one_job():
    def start(first):
        return gpu_processes.start_worker([sys.executable, "-c", WORKER, str(first)])

    said = list(gpu_processes.supervise(start, 6, time.time() + 60, patience=2.0))
    assert [s["done"] for s in said] == list(range(6))
    assert "ended with -6" in said[1]["error"] and "nothing happened" in said[3]["error"]
    assert all(said[i]["result"] == {"number": i} for i in (0, 2, 4, 5))


def test_a_process_that_never_starts_is_not_tried_for_ever():
    def start(first):
        return gpu_processes.start_worker([sys.executable, "-c", "import sys; sys.exit(3)"])

    said = list(gpu_processes.supervise(start, 1000, time.time() + 60))
    assert len(said) == gpu_processes.IDLE and all("ended with 3" in s["error"] for s in said)


def test_the_kernels_are_compiled_by_several_processes(monkeypatch):
    started = []

    class Pretended(SimpleNamespace):
        def communicate(self, timeout=None):
            return b"", b"no libnvvm"

    def start(command, **options):
        started.append(command)
        return Pretended(returncode=1)

    monkeypatch.setattr(gpu_processes.subprocess, "Popen", start)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert "no libnvvm" in gpu_processes.compile_kernels((9, 0), 10.0)
    assert [c[-1] for c in started] == ["0/3", "1/3", "2/3"] and "--sm90" in started[0]


def test_the_first_contact_decides_how_kernels_are_launched(monkeypatch, capsys):
    codes = {(): 1, ("--numba-launch",): 0}
    monkeypatch.setattr(gpu, "first_contact", lambda options: (codes[tuple(options)], "said"))
    assert gpu.choose_launch()[0] == ["--numba-launch"]
    codes[()] = 0
    assert gpu.choose_launch()[0] == []
    assert "launches by numba: right" in capsys.readouterr().out


def test_the_small_calls(pretended, monkeypatch):
    assert gpu_work.small(pretended) == []
    monkeypatch.setattr(gpu_work, "do", lambda torch, job: 1 / 0)
    assert len(gpu_work.small(pretended)) == 10
    monkeypatch.setattr(gpu_work, "usable", lambda torch, failed=True: False)
    assert "cannot be used any more" in gpu_work.small(pretended)[-1]


def test_rows_without_numbers_are_printed():
    result = {"wrong": ["a"] * 50, "warnings": ["b"], "rows": [], "machine": {}, "versions": {}, "copy_gb_s": None}
    result |= {
        "launch": {},
        "first_contact": {"compiled": "", "launch": ""},
        "sanitizer": "",
        "checked": 0,
        "worst": 0.0,
    }
    gpu_report.take(result, {"stage": "time", "case": ["train", "NC", "float32", [2, 3]]}, {"error": "hung"})
    gpu_report.take(result, {"stage": "compile", "case": ["train", "NC", "float32", [9, 9]]}, {"error": "hung"})
    gpu_report.take(
        result, {"stage": "compile", "case": ["train", "NC", "float32", [9, 9]]}, {"result": {"x_compile": 1}}
    )
    gpu_report.finish(result, [])
    gpu_report.show(result)
    assert len(result["rows"]) == 1 and result["rows"][0]["us"] is None


@pytest.mark.skipif(not SIMULATED, reason="needs the simulator")
def test_the_command_itself_and_all_its_processes(tmp_path):
    pytest.importorskip("torch")
    environment = os.environ | {"FASTBN_PRETEND_GPU": "1", "NUMBA_ENABLE_CUDASIM": "1"}
    environment |= {"PYTHONPATH": f"{ROOT / 'tests' / 'cuda' / 'pretended'}:{ROOT}:{ROOT / 'export'}"}
    environment |= {"FASTBN_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "bench.gpu", "--seconds", "300", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["wrong"] == [] and len(result["rows"]) == 6 and result["first_contact"]["launch"] == "direct"
    assert all(row["us"] > 0 and row["floor_pct"] > 0 for row in result["rows"])
    assert result["unfinished"] == {"checks": 0, "cases": 0} and "0 wrong" in done.stdout.splitlines()[-1]
