"""The machine code of the kernels, compiled without a GPU: no spills, 128-bit accesses, no float64 in float32 kernels.

Skipped where the CUDA packages (866 MB) are not installed; ``python -m bench.gpu_compile --check`` checks all kernels.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_compile

ROOT = Path(__file__).resolve().parents[2]


def _installed():
    if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda") is None:
        return False
    return all(shutil.which(gpu_compile.tool(name)) for name in ("cuobjdump", "nvdisasm"))


@pytest.mark.skipif(not _installed(), reason="needs numba-cuda[cu13], cuobjdump and nvdisasm")
@pytest.mark.parametrize(
    "prefix", ["planes f32 W4:", "rows f16 W8 relu residual", "persistent f32 W4 5", "finalize f32"]
)
def test_machine_code_is_no_worse_than_the_table_says(prefix):
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-m", "bench.gpu_compile", "--check", "--sm90", prefix]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert prefix in done.stdout


def test_complaints():
    good = {"registers": 32, "spills": 0, "global_128": 4, "float64": 0}
    name = "sm_90 planes f32 W4: sums"
    assert gpu_compile.complaints({name: good}, {name: good}) == []
    for worse in ({"registers": 41}, {"spills": 2}, {"global_128": 3}, {"float64": 1}):
        assert len(gpu_compile.complaints({name: good | worse}, {name: good})) == 1
    assert "not in the table" in gpu_compile.complaints({name: good}, {})[0]


def test_the_table_holds_what_is_promised():
    if not gpu_compile.TABLE.exists():
        pytest.skip("no table yet")
    rows = json.loads(gpu_compile.TABLE.read_text())
    assert {name.split()[0] for name in rows} == {"sm_80", "sm_90"}
    assert gpu_compile.complaints(rows, rows) == []
