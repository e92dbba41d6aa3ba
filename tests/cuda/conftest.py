"""Run with ``NUMBA_ENABLE_CUDASIM=1 pytest tests/cuda``; without the simulator most of it is left out.

The kernels run with small blocks and few of them, so that shapes of a few hundred elements reach every path.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" and importlib.util.find_spec("numba_cuda") is not None

collect_ignore: list[str] = []
if not SIMULATED:
    collect_ignore += [
        "test_arrays.py", "test_devices.py", "test_flat.py", "test_launch.py", "test_launcher.py", "test_masks.py",
        "test_persistent.py", "test_plan.py", "test_public.py", "test_sets.py", "test_simulator.py", "test_stored.py",
        "test_torch.py", "test_memory_order.py", "test_sets_held.py", "test_signals.py", "test_torch_known.py",
        "test_training.py",
    ]  # fmt: skip
else:
    from tests.cuda import simulator  # noqa: F401  (before any kernel)


NUMBERS = {
    "THREADS": 64, "BLOCKS": 2, "DEPTH": 4, "APPLY_DEPTH": 3, "SLAB": ((0, 64),), "PERSISTENT_THREADS": 64,
    "PERSISTENT": False, "SMALL": 0, "AGAIN": 0, "SLAB_CHANNELS": 10**9,
    "GANG": False, "GANG_THREADS": 32, "GANG_LAYERS": (2,), "GANG_RUN": 16, "GANG_MEETING": 20,
    "BUNDLE": False, "BUNDLE_THREADS": 64, "BUNDLE_LAYERS": 2, "BUNDLE_RUN": 16, "BUNDLE_LEAST": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small blocks and grids."""
    if not SIMULATED:
        return
    from fastbn.cuda import choice, tuning

    for name, value in NUMBERS.items():
        monkeypatch.setattr(tuning, name, value)
    choice.forget()
