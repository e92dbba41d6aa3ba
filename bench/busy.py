"""Two threads beside a busy neighbour, and alone: ``python -m bench.busy``.

A second thread must never cost much when its core is taken: nobody waits for a thread that the machine does not run.
Medians of one thread and of two are compared, first on a quiet machine, then with one process that spins on the last
core. Results go to ``bench/results/busy-<machine>.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bench import machine
from bench.cases import RESNET50, Case
from bench.copying import stream_copy
from bench.data import Data
from bench.interleave import Worker

CASES = [
    Case(op, RESNET50[1], layout) for op in ("train", "backward") for layout in ("channels_first", "channels_last")
]
CASES += [Case(op, RESNET50[3]) for op in ("train", "backward")]
CASES += [Case("train", (8192, 1024)), Case("infer", RESNET50[1])]
RESNET50_CASE = Case("infer", RESNET50[1])
SPIN = "import os\nos.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\nwhile True: pass"


def compare(case: Case, workers: list[Worker]) -> dict[str, Any]:
    """Return minimum and median of one and of two threads, seconds."""
    for worker in workers:
        ready = worker.ask(case=list(case))  # sets up and checks
        if "error" not in ready:
            raise SystemExit(f"{case.id}: {ready}")
    times: dict[str, list[float]] = {"1": [], "2": []}
    for _ in range(9):
        for worker in workers:
            times[worker.env["FASTBN_NUM_THREADS"]] += worker.ask(seconds=0.1, most=100)["times"]
    return {t: {"min": min(values), "p50": sorted(values)[len(values) // 2]} for t, values in times.items()}


def copies() -> dict[str, Any]:
    """Return how much faster two threads copy a tensor than one: no kernel that moves memory can gain more for long."""
    data = Data(RESNET50_CASE)
    x, y = data.x.reshape(-1), data.out.reshape(-1)
    half = x.size // 32 * 16

    def two() -> None:
        other = threading.Thread(target=stream_copy, args=(x[:half], y[:half]))
        other.start()
        stream_copy(x[half:], y[half:])
        other.join()

    best = [float("inf"), float("inf")]
    for _ in range(30):
        for n, call in enumerate((lambda: stream_copy(x, y), two)):
            start = time.perf_counter()
            call()
            best[n] = min(best[n], time.perf_counter() - start)
    return {"case": f"copy-{RESNET50_CASE.id}", "busy": False, "unit": "s", "speedup_min": best[0] / best[1]}


def main() -> None:
    """Measure and write."""
    rows = [copies()]
    print(f"copy  {rows[0]['speedup_min']:.2f}")
    for busy in (False, True):
        spinner = subprocess.Popen([sys.executable, "-c", SPIN]) if busy else None
        workers = [Worker("fastbn", threads) for threads in (1, 2)]
        try:
            time.sleep(0.5)
            for case in CASES:
                found = compare(case, workers)
                row = {"case": case.id, "busy": busy, "unit": "s"} | {f"threads_{t}": v for t, v in found.items()}
                row["speedup_min"] = found["1"]["min"] / found["2"]["min"]
                row["speedup_p50"] = found["1"]["p50"] / found["2"]["p50"]
                rows.append(row)
                print(f"{'busy' if busy else 'quiet':6}{case.id:48} {row['speedup_min']:.2f} {row['speedup_p50']:.2f}")
        finally:
            for worker in workers:
                worker.close()
            if spinner is not None:
                spinner.kill()
                spinner.wait()
    path = Path(__file__).parent / "results" / f"busy-{machine.slug()}.json"
    result = {"machine": machine.name(), "versions": machine.versions(), "date": machine.today(), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    machine.without_options(__doc__)
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("needs two cores")
    main()
