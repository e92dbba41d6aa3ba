"""PyTorch's CPU tensors for CUDA's and few small cases, so that bench.gpu can be gone through where there is no GPU."""

from __future__ import annotations

import functools
import time
from types import SimpleNamespace

from bench import gpu_family, gpu_peers, gpu_timing, gpu_trials, gpu_work
from bench.gpu_cases import Case

CASES = [Case("train", "NC", "float32", (64, 8)), Case("backward_fused", "NCHW", "float32", (64, 2, 2, 2))]
FAMILY = [("layer", (3, 12), 1), ("group", (2, 4, 3, 3), 2), ("masked", (5, 2, 4), 1), ("ghosts", (6, 2, 4), 3)]


class Event:
    """CUDA's events."""

    def __init__(self, enable_timing=True):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def pretend(torch, put=setattr):
    """Change what bench.gpu and fastbn see; ``put`` as ``setattr``, or a fixture's that undoes it."""
    from fastbn import device, device_arguments, device_mask, dispatch
    from fastbn.cuda import libraries

    put(libraries.Torch, "stream", lambda self, value: 0)
    for module in (device, device_arguments, device_mask, dispatch):
        put(module, "on_device", lambda value: isinstance(value, torch.Tensor))
    properties = SimpleNamespace(name="pretended", total_memory=1 << 30, multi_processor_count=1)
    put(torch.cuda, "get_device_properties", lambda index: properties)
    put(torch.cuda, "get_device_name", lambda index: "Pretended GPU")
    put(torch.cuda, "is_available", lambda: True)
    put(torch.cuda, "synchronize", lambda: None)
    put(torch.cuda, "empty_cache", lambda: None)
    put(torch.cuda, "Event", Event)
    put(gpu_peers, "buffers", functools.partial(gpu_peers.buffers, device="cpu"))
    put(gpu_timing, "copy_gb_s", lambda torch: 4000.0)
    put(gpu_timing, "sets", lambda nbytes: 2)
    put(gpu_family, "CHECKED", FAMILY)
    put(gpu_family, "DTYPES", ("float32", "bfloat16"))
    put(gpu_family, "TIMED", [(6, 16)])
    put(gpu_family, "draw", lambda *args, genuine=gpu_family.draw: genuine(*args[:-1], "cpu"))
    put(gpu_trials, "TRIALS", [(CASES[0], "DEPTH", (2, 9)), (CASES[1], "APPLY_DEPTH", (1,))])
    put(gpu_work, "CHECKED", [(9, 8)])
    put(gpu_work, "DTYPES", ("float32",))
    put(gpu_work, "FIRST", gpu_work.FIRST[:1])
    put(gpu_work, "cases", lambda: CASES)
    put(gpu_peers, "PEERS", gpu_peers.PEERS | {"x_compile": gpu_peers.torch_native})
