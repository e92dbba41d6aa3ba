"""bench.gpu: silent success without a GPU, and its whole course with the clock and the GPU pretended."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu, gpu_cases, gpu_family, gpu_peers, gpu_timing
from bench.gpu_cases import Case
from tests.cuda.conftest import SIMULATED

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


@pytest.mark.skipif(not SIMULATED, reason="needs the simulator")
@pytest.mark.parametrize("broken", [False, True])
def test_its_whole_course(broken, monkeypatch, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from fastbn import device, device_arguments, device_mask
    from fastbn.cuda import libraries

    monkeypatch.setattr(libraries.Torch, "stream", lambda self, value: 0)
    for module in (device, device_arguments, device_mask):
        monkeypatch.setattr(module, "on_device", lambda value: isinstance(value, torch.Tensor))
    on_cpu = functools.partial(gpu_peers.buffers, device="cpu")
    monkeypatch.setattr(gpu.peers, "buffers", on_cpu)
    if broken:
        monkeypatch.setitem(gpu_peers.ALLOWED, "float32", 1e-9)
    properties = SimpleNamespace(name="pretended", total_memory=1 << 30, multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(gpu.timing, "microseconds", lambda torch, calls: (calls[0](), 10.0)[1])
    monkeypatch.setattr(gpu.timing, "copy_gb_s", lambda torch: 4000.0)
    monkeypatch.setattr(gpu, "launch_cost", lambda torch: {})
    monkeypatch.setattr(gpu, "sanitize", lambda: "not run")
    small = [("layer", (3, 12), 1), ("group", (2, 4, 3, 3), 2), ("masked", (5, 2, 4), 1)]
    monkeypatch.setattr(gpu_family, "CHECKED", small)
    monkeypatch.setattr(gpu_family, "DTYPES", ("float32", "bfloat16"))
    monkeypatch.setattr(gpu_family, "TIMED", [(6, 16)])
    monkeypatch.setattr(gpu_family, "draw", lambda *args, genuine=gpu_family.draw: genuine(*args[:-1], "cpu"))
    monkeypatch.setattr(gpu_timing, "sets", lambda nbytes: 2)
    monkeypatch.setattr(gpu, "CHECKED", [(9, 8)])
    monkeypatch.setattr(gpu, "DTYPES", ("float32",))
    cases = [Case("train", "NC", "float32", (64, 8)), Case("backward_fused", "NCHW", "float32", (64, 2, 2, 2))]
    monkeypatch.setattr(gpu, "cases", lambda: cases)
    monkeypatch.setattr(gpu_peers, "PEERS", gpu_peers.PEERS | {"x_compile": gpu_peers.torch_native})
    with torch.no_grad():
        status = gpu.run(torch, 60.0, tmp_path / "gpu.json")
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert status == int(broken) and bool(result["wrong"]) == broken
    assert set(result) >= {"machine", "versions", "copy_gb_s", "rows"}
    for row in result["rows"]:
        assert set(row) >= {
            "op", "layout", "dtype", "shape", "us", "floor_pct", "x_torch", "x_cudnn", "x_compile", "max_err",
        }  # fmt: skip
        assert (row["us"] is None) == broken and (broken or row["x_torch"] == 1.0)
    assert "x cuDNN" in capsys.readouterr().out
