"""Time on the device's own clock: events around many calls, several buffers in turn, the median of several rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

COLD = 400 << 20  # bytes that the buffers of a case have together, so that L2 (60 MB) holds nothing of the last call
ROUNDS = 5
SECONDS = 0.004  # of work in a round, at least
MOST = 200  # calls in a round
QUEUED = 120_000  # cycles of the GPU in which the host queues a call: 60 us


def sets(nbytes: int) -> int:
    """Return how many sets of buffers to go round."""
    return max(2, min(16, -(-COLD // max(1, nbytes))))


def _elapsed(torch: Any, calls: Sequence[Callable[[], Any]], count: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(count):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / count


def microseconds(torch: Any, calls: Sequence[Callable[[], Any]]) -> float:
    """Return the median time of a call; ``calls`` do the same on different buffers."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = _elapsed(torch, calls, len(calls))
    count = max(len(calls), min(MOST, int(SECONDS / max(once, 1e-7))))
    return 1e6 * statistics.median(_elapsed(torch, calls, count) for _ in range(ROUNDS))


def gpu_microseconds(torch: Any, calls: Sequence[Callable[[], Any]], count: int = 40) -> float | None:
    """Return what the GPU alone takes for a call: several queued behind a sleep, in which the host gets ahead.

    None where PyTorch has no such sleep (it is not public).
    """
    sleep = getattr(torch._C, "_cuda_sleep", None)
    if sleep is None:
        return None
    for call in calls:
        call()
    torch.cuda.synchronize()
    found = []
    for _ in range(3):
        sleep(count * QUEUED)
        found.append(_elapsed(torch, calls, count))
    return 1e6 * min(found)


def host_microseconds(torch: Any, call: Callable[[], Any], count: int = 500) -> float:
    """Return what a call costs the host, the GPU keeping up or not: the best of several rounds."""
    best = float("inf")
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - start) / count)
    torch.cuda.synchronize()
    return 1e6 * best


def copy_gb_s(torch: Any, nbytes: int = 2 << 30) -> float:
    """Return the bandwidth of a device-to-device copy, bytes read plus bytes written."""
    source = torch.empty(nbytes // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    us = min(microseconds(torch, [lambda: target.copy_(source)]) for _ in range(3))
    return 2 * nbytes / us * 1e-3
