"""Results without ``out=`` against results in memory of the caller: ``python -m bench.fresh``.

What a fresh result costs depends on where its memory comes from (``fastbn.recycled``). One thread; minima of
interleaved runs, each way in a process of its own. Results go to ``bench/results/fresh-<machine>.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench import machine
from bench.cases import RESNET50, Case
from bench.interleave import Worker, measure

SHAPES = [(64, 2000), (32, 64, 20, 20), (32, 64, 35, 35), *RESNET50[1:4], (8192, 1024)]
CASES = [Case(op, shape) for shape in SHAPES for op in ("infer", "train", "backward")]
CASES += [Case(op, RESNET50[1], "channels_last") for op in ("infer", "train", "backward")]


def main() -> None:
    """Measure and write."""
    workers, rows = [Worker(peer, 1) for peer in ("copy", "fastbn", "fastbn_fresh")], []
    try:
        for case in CASES:
            found = measure(case, workers)
            given, fresh, copy = (found[peer]["min"] for peer in ("fastbn", "fastbn_fresh", "copy"))
            rows.append({"case": case.id, "unit": "s", "given": given, "fresh": fresh, "copy": copy})
            times = f"{fresh / given:.2f} of the time into out=, {fresh / copy:.2f} copies"
            print(f"{case.id:50} {1e3 * fresh:9.3f} ms  {times}")
    finally:
        for worker in workers:
            worker.close()
    path = Path(__file__).parent / "results" / f"fresh-{machine.slug()}.json"
    result = {"machine": machine.name(), "versions": machine.versions(), "date": machine.today(), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    machine.without_options(__doc__)
    main()
