"""Kernels as they are compiled for CPUs without AVX-512, and without AVX2: other masks, other half types."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numba
import pytest
from numba.core.registry import cpu_target

if numba.config.DISABLE_JIT or platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("compiles for other x86 CPUs", allow_module_level=True)

# LLVM's names; Numba takes what the name implies as given, and we look for what is named.
FEATURES = {"haswell": "+avx,+avx2,+fma,+f16c,+popcnt", "nehalem": "+sse4.2,+popcnt"}

WHOLE = """
import numpy as np
from tests.oracle import case, check_backward, check_train

rng = np.random.default_rng(1)
for dtype, shape in ((np.float16, (3, 5, 17, 7)), (np.float32, (37, 13))):  # channels-first, rows
    c = case(rng, shape, dtype, activation="relu", residual=True)
    check_backward(c, check_train(c)[1], rng.standard_normal(shape).astype(dtype))
"""


@pytest.fixture(params=sorted(FEATURES))
def environment(request, tmp_path):
    """Variables for a process whose kernels are compiled for a CPU."""
    ours = cpu_target.target_context.codegen()._tm_features.split(",")
    if not set(FEATURES[request.param].split(",")) <= set(ours):
        pytest.skip("this CPU is an older one")
    return os.environ | {
        "NUMBA_CPU_NAME": request.param, "NUMBA_CPU_FEATURES": FEATURES[request.param],
        "FASTBN_CACHE_DIR": str(tmp_path),
    }  # fmt: skip


def run(environment, *arguments):
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_vectors(environment):
    run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cpu/test_simd.py")


def test_kernels(environment):
    run(environment, "-c", WHOLE)
