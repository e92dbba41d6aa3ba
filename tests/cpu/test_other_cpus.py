"""Kernels as they are compiled for CPUs without AVX-512, and without AVX2: other masks, other half types."""

from __future__ import annotations

import platform
from pathlib import Path

import numba
import pytest
from numba.core.registry import cpu_target

if numba.config.DISABLE_JIT or platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("compiles for other x86 CPUs", allow_module_level=True)

ROOT = Path(__file__).parents[2]
# LLVM's names; Numba takes what the name implies as given, and we look for what is named.
FEATURES = {"haswell": "+avx,+avx2,+fma,+f16c,+popcnt", "nehalem": "+sse4.2,+popcnt"}

VECTORS = """
import pytest
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/cpu/test_simd.py"]))
"""
WHOLE = """
import numpy as np
from tests.oracle import case, check_backward, check_train

rng = np.random.default_rng(1)
for dtype, shape in ((np.float16, (3, 5, 17, 7)), (np.float32, (37, 13))):  # channels-first, rows
    c = case(rng, shape, dtype, activation="relu", residual=True)
    check_backward(c, check_train(c)[1], rng.standard_normal(shape).astype(dtype))
"""
SETS = """
from tests.cpu import test_sets

test_sets.SIZES[:] = [(29, 1, 16, 1), (3, 2, 8, 49), (3, 5, 5, 49), (30, 3, 3, 4)]  # the first: weights of one line
exec(test_sets.GUARDED)
"""


@pytest.fixture(params=sorted(FEATURES))
def environment(request, tmp_path):
    """Variables for a process whose kernels are compiled for a CPU."""
    ours = cpu_target.target_context.codegen()._tm_features.split(",")
    if not set(FEATURES[request.param].split(",")) <= set(ours):
        pytest.skip("this CPU is an older one")
    return {
        "NUMBA_CPU_NAME": request.param, "NUMBA_CPU_FEATURES": FEATURES[request.param], "FASTBN_CACHE_DIR": tmp_path,
    }  # fmt: skip


@pytest.mark.parametrize("code", [VECTORS, WHOLE, SETS], ids=["vectors", "kernels", "sets"])
def test_other_registers(python, monkeypatch, environment, code):
    monkeypatch.chdir(ROOT)  # for what it imports of the tests
    done = python(code, check=False, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
