"""Shared fixtures. Kernels are cached where users have them, so that only the first run after a change compiles."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import fastbn
from fastbn import quick, warmup
from fastbn.cpu import _jit, tuning

MANY = 150  # tests in a session from which compiling all kernels first, in two processes, is the shorter way

settings.register_profile(
    "fastbn",
    deadline=None,
    max_examples=25,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fastbn")

_HALF = "from fastbn import warmup\nfor _, call in warmup.tasks()[1::2]: call()"


def pytest_collection_finish(session):
    """Compile all kernels, in two processes or, under pytest-xdist, a part in each worker: all wait for the last."""
    folder = _jit.cache_folder()
    if len(session.items) < MANY or numba.config.DISABLE_JIT or folder is None or session.config.option.collectonly:
        return
    worker = getattr(session.config, "workerinput", {"workerid": "gw0", "workercount": 1})
    number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    done = folder / f"compiled-for-tests-{number}-of-{count}"
    if done.exists():
        return
    other = subprocess.Popen([sys.executable, "-c", _HALF]) if count == 1 else None
    for _, call in warmup.tasks()[number :: max(2, count)]:
        call()
    if other is None or other.wait() == 0:
        done.touch()


@pytest.fixture
def large(monkeypatch):
    """All results count as large: they stream, and behind a residual and a ReLU signs are kept instead of them."""
    for name in ("STREAM", "READ_ONCE", "READ_ONCE_RUNS"):
        monkeypatch.setattr(tuning, name, 0)
    for name in ("train", "infer", "backward"):
        monkeypatch.setattr(quick, name, lambda *a: None)


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)


@pytest.fixture
def threads():
    """Return ``set_num_threads``; the setting is undone afterwards."""
    yield fastbn.set_num_threads
    fastbn.set_num_threads(None)


def run_python(code, *, check=True, timeout=120, **environment):
    """Run code in a new interpreter with warnings as errors; return the completed process."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "FASTBN_NUM"))}
    env.update({k: str(v) for k, v in environment.items() if v is not None})
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, timeout=timeout
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def python():
    """Return ``run_python``."""
    return run_python
