"""Measure, keep the results, write README: ``python -m bench [--full | --growth] [--threads N] [--only REGEX]``.

Libraries that are not installed are left out. Results go to ``bench/results/<machine>.json``, one row a case and
library; rows of cases that were not measured this time are kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from rich.progress import track

from bench import cases, machine, report
from bench.interleave import Worker, measure

RESULTS = Path(__file__).parent / "results"
QUICK = {"copy": "numba", "fastbn": "numba", "torch": "torch", "onnxruntime": "onnxruntime"}
FULL = QUICK | {"torch_compile": "torch", "onednn": "torch", "jax": "jax"}


def rows_of(case: cases.Case, found: dict[str, dict[str, Any]], threads: int) -> list[dict[str, Any]]:
    """Turn what was measured for one case into result rows; seconds."""
    copied = found["copy"]["min"]
    common = {
        "case": case.id, "op": case.op, "shape": list(case.shape), "layout": case.layout, "dtype": case.dtype,
        "floor_copies": case.floor, "copy_s": copied, "threads": threads, "unit": "s", "commit": machine.commit(),
    }  # fmt: skip
    return [
        common | {"library": peer} | {key: r[key] for key in ("min", "p20", "p50", "p80", "calls", "error")}
        for peer, r in found.items()
        if "min" in r
    ]


def merge(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Put new rows beside the kept ones and write the file."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {(r["case"], r["library"], r["threads"]) for r in rows}
    kept = [r for r in old if (r["case"], r["library"], r["threads"]) not in new]
    result = {
        "machine": machine.name(), "versions": machine.versions(), "date": machine.today(),
        "rows": sorted(kept + rows, key=lambda r: (r["case"], r["threads"], r["library"])),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all shapes and all libraries")
    parser.add_argument("--growth", action="store_true", help="time against size, from 8 KB to 1 GB")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="only cases whose name matches this regular expression")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    chosen = cases.full() if args.full else cases.growth() if args.growth else cases.quick()
    wanted = [c for c in chosen if re.search(args.only, c.id)]
    peers = [p for p, module in (FULL if args.full else QUICK).items() if importlib.util.find_spec(module)]
    workers = [Worker(peer, args.threads) for peer in peers]
    rows: list[dict[str, Any]] = []
    try:
        for case in track(wanted, "measuring"):
            found = measure(case, workers, rounds=args.rounds)
            for peer, r in found.items():
                if "failed" in r:
                    print(f"{peer} on {case.id}: {r['failed']}")
            rows += rows_of(case, found, args.threads)
    finally:
        for worker in workers:
            worker.close()
    result = merge(RESULTS / f"{machine.slug()}.json", rows)
    report.write(result)


if __name__ == "__main__":
    main()
