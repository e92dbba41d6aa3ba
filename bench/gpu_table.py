"""From the results of a GPU to the README: ``python -m bench.gpu_table [FILE]`` writes the table between its markers.

No number in the README is written by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.report import geometric_mean, replace_between

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "nvidia-h200.json"
BEGIN, END = "<!-- GPU table: written by python -m bench.gpu_table -->", "<!-- end of GPU table -->"
OPS = {"train": "training", "backward": "backward", "infer": "inference"}
PEERS = {"x_torch": "PyTorch", "x_cudnn": "cuDNN", "x_compile": "torch.compile"}


def several(values: list[float], digits: int = 1) -> str:
    """Say the geometric mean of some ratios and, in brackets, the least and the largest."""
    if not values:
        return "-"
    mean, least, most = (f"{v:.{digits}f}" for v in (geometric_mean(values), min(values), max(values)))
    return f"{mean} ({least}-{most})"


def line(rows: list[dict[str, Any]], name: str) -> str:
    """Return one line of the table: what ``rows`` have in common."""
    there = [row for row in rows if row.get("us")]
    floor = [f"{min(r['floor_pct'] for r in there):.0f}-{max(r['floor_pct'] for r in there):.0f} %"]
    copies = several([r["us"] / r["us_copy"] for r in there if r.get("us_copy")])
    ratios = [several([r[peer] for r in there if r.get(peer)]) for peer in PEERS]
    return "| " + " | ".join([name, *floor, copies, *ratios]) + " |"


def table(result: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    shapes = "ResNet-50's five shapes, batch 64"
    lines = [
        f"| {shapes} | of the floor | copies | " + " | ".join(f"{peer} / ours" for peer in PEERS.values()) + " |",
        "|---|---|---|" + "---|" * len(PEERS),
    ]
    rows = [row for row in result["rows"] if len(row["shape"]) == 4 and row["shape"][0] == 64]
    for op, said in OPS.items():
        for layout in ("NCHW", "NHWC"):
            for dtype in ("float32", "bfloat16", "float16"):
                some = [r for r in rows if (r["op"], r["layout"], r["dtype"]) == (op, layout, dtype)]
                if some:
                    lines.append(line(some, f"{said}, {layout}, {dtype}"))
    cost, versions = result["launch"], result["versions"]
    told = (
        f"{result['machine']['gpu']}, a large copy {result['copy_gb_s']:.0f} GB/s; PyTorch {versions['torch']}, cuDNN "
        f"{versions['cudnn']}. Floor: the bytes that must move, at that rate; copies: times that a copy of one such "
        f"tensor takes (small ones do not reach the rate). Ratios: mean (least-largest). A small call costs the host "
        + ", ".join(f"{cost[f'{op}_us']:.1f} µs in {OPS[op]} (PyTorch {cost[f'{op}_torch_us']:.1f})" for op in OPS)
        + "."
    )
    notes = [f"\n{result['note']}"] if result.get("note") else []
    return "\n".join([*lines, "", told, *notes])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS, help="results of a GPU (default: %(default)s)")
    readme = ROOT / "README.md"
    found = table(json.loads(parser.parse_args().file.read_text()))
    readme.write_text(replace_between(readme.read_text(encoding="utf-8"), found, BEGIN, END), encoding="utf-8")
