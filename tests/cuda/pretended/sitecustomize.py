"""Run by Python at its start where this folder is on its path: every process of bench.gpu finds a pretended GPU."""

import os

if os.environ.get("FASTBN_PRETEND_GPU"):
    import torch

    from bench import gpu_timing
    from tests.cuda import simulator  # noqa: F401  (before any kernel)
    from tests.cuda.conftest import NUMBERS
    from tests.cuda.pretended.gpu import pretend

    pretend(torch)
    gpu_timing.ROUNDS, gpu_timing.SECONDS = 1, 0.0
    gpu_timing.host_microseconds = lambda torch, call: (call(), 10.0)[1]
    from fastbn.cuda import tuning

    for name, value in NUMBERS.items():
        setattr(tuning, name, value)
