"""Time one case in several libraries at once: rounds of short bursts in turn, each library in its own process.

Interference then hits all alike; the minimum and the percentiles over all rounds are kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from bench.cases import Case

FRESH = ("torch_compile", "onednn", "jax")  # libraries that cannot write into a given output
KEEP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}  # touched memory is used again


class Worker:
    """A child process that runs one peer."""

    def __init__(self, peer: str, threads: int):
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "FASTBN_NUM_THREADS")
        self.env = os.environ | dict.fromkeys(names, str(threads))
        self.env["NPROC"] = str(threads)  # XLA's pool; XLA_FLAGS left both cores at work
        if peer in FRESH:
            self.env |= KEEP
        self.peer = peer
        self.start()

    def start(self) -> None:
        """Start the process; also after a library has ended it."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", self.peer], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=self.env,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            code = self.process.returncode
            self.start()
            return {"failed": f"the process ended with {code}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def percentile(times: list[float], q: float) -> float:
    """Return the q-quantile (nearest rank)."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def measure(
    case: Case, workers: Iterable[Worker], rounds: int = 7, seconds: float = 0.1, most: int = 200
) -> dict[str, dict[str, Any]]:
    """Return, by peer, min/p20/p50/p80 in seconds and the checked error, or why there is nothing."""
    found: dict[str, dict[str, Any]] = {}
    ready: list[Worker] = []
    for worker in workers:
        answer = worker.ask(case=list(case))
        found[worker.peer] = answer
        if "error" in answer:
            ready.append(worker)
    times: dict[str, list[float]] = {w.peer: [] for w in ready}
    for _ in range(rounds):
        for worker in ready:
            times[worker.peer] += worker.ask(seconds=seconds, most=most).get("times", [])
    for peer, all_times in times.items():
        if all_times:
            quantiles = {f"p{q}": percentile(all_times, q / 100) for q in (20, 50, 80)}
            found[peer] |= {"min": min(all_times), **quantiles, "calls": len(all_times)}
    return found
