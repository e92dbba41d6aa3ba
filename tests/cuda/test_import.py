"""Without a GPU nothing of CUDA is touched, and a device array gets a clear error."""

from __future__ import annotations

import importlib.util
import os

import pytest

FAKE = """
import numpy as np, fastbn
class Fake:
    shape, dtype, ndim = (4, 3), np.dtype("float32"), 2
    __cuda_array_interface__ = {"shape": (4, 3), "typestr": "<f4", "data": (0, False), "version": 3}
try:
    fastbn.batch_norm_train(Fake())
except fastbn.DeviceError as error:
    print(error)
"""


def test_import_touches_no_cuda(python):
    done = python("import sys, fastbn; print([m for m in sys.modules if m.startswith('fastbn.cuda')])")
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_a_device_array_without_a_driver_is_told_what_to_install(python):
    message = python(FAKE).stdout
    assert message.startswith("x: expected a NumPy array on this machine, got a CUDA array: it needs")
    assert 'pip install "numba-cuda[cu13]"' in message
    if importlib.util.find_spec("numba_cuda") is None:
        assert "needs numba-cuda, which is not installed" in message
