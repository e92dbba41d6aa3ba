"""A fork beside a thread that compiles."""

from __future__ import annotations

import os

import numba
import pytest

COMPILING = """
import os, threading, time, warnings
import numpy as np, fastbn.cpu.launch
from numba.core.compiler_lock import global_compiler_lock

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork beside threads
held = threading.Event()

def compiling():
    with global_compiler_lock:
        held.set()
        time.sleep(0.5)

thread = threading.Thread(target=compiling)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    fastbn.batch_norm_train(np.ones((8, 4), "f4"))
    os._exit(0)
give_up = time.monotonic() + 60
while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < give_up:
    time.sleep(0.05)
if not ended[0]:
    os.kill(child, 9)
assert ended == (child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")
def test_a_fork_amid_a_compilation(python):
    """The child waited for the compilation's end, for which it does not have the thread."""
    python(COMPILING)
