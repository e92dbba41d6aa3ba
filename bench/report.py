"""From results to the README: the tables between its markers, and the plots; ``python -m bench.report`` writes both.

No number in the README is written by hand.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import cases, machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MACHINES = 2  # in the README: those measured last
BEGIN, END = "<!-- benchmark table: written by python -m bench -->", "<!-- end of benchmark table -->"
LIBRARIES = {
    "torch": "PyTorch", "torch_compile": "torch.compile", "onednn": "oneDNN", "onnxruntime": "onnxruntime",
    "jax": "XLA (jax)",
}  # fmt: skip
README_CASES = [
    ("training, 32x256x56x56", "train-32x256x56x56-channels_first-float32"),
    ("training, 32x1024x14x14", "train-32x1024x14x14-channels_first-float32"),
    ("training, 32x256x56x56 channels last", "train-32x256x56x56-channels_last-float32"),
    ("training + residual + ReLU, 32x256x56x56", "train_fused-32x256x56x56-channels_first-float32"),
    ("backward, 32x256x56x56", "backward-32x256x56x56-channels_first-float32"),
    ("inference, 32x256x56x56", "infer-32x256x56x56-channels_first-float32"),
    ("training, 64x100", "train-64x100-channels_first-float32"),
]

OP_NAMES = {"train": "training", "infer": "inference"}
GROWING = 40  # of the growth cases, the rest are the extremes

Cases = dict[str, dict[str, dict[str, Any]]]


def by_case(result: dict[str, Any], threads: int = 1) -> Cases:
    """Index the rows: case, then library."""
    found: Cases = defaultdict(dict)
    for row in result["rows"]:
        if row["threads"] == threads:
            found[row["case"]][row["library"]] = row
    return found


def seconds(t: float) -> str:
    """Format a time."""
    return f"{t * 1e3:.2f} ms" if t >= 1e-3 else f"{t * 1e6:.1f} µs"


def table(result: dict[str, Any]) -> str:
    """Return the README's table in Markdown."""
    found = by_case(result)
    others = [lib for lib in LIBRARIES if any(lib in found[case] for _, case in README_CASES if case in found)]
    lines = [
        f"| {result['machine']} | fastbn | of a streaming copy | " + " | ".join(LIBRARIES[o] for o in others) + " |",
        "|---|---|---|" + "---|" * len(others),
    ]
    for label, case in README_CASES:
        rows = found.get(case, {})
        if "fastbn" not in rows:
            continue
        ours = rows["fastbn"]["min"]
        cells = [f"{rows[o]['min'] / ours:.1f}x the time" if o in rows else "" for o in others]
        lines.append(f"| {label} | {seconds(ours)} | {ours / rows['copy']['min']:.2f} | " + " | ".join(cells) + " |")
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items() if k in ("torch", "onnxruntime", "numba"))
    lines.append("")
    slug = machine.slug(result["machine"])
    pictures = [
        f"[{name}](bench/results/{name}-{slug}.png)" for name in PLOTS if (RESULTS / f"{name}-{slug}.png").exists()
    ]
    shown = f" Plots: {', '.join(pictures)}." if pictures else ""
    lines.append(f"{versions}; {result['date']}. All rows: [`bench/results/`](bench/results/{slug}.json).{shown}")
    return "\n".join(lines)


def tables(result: dict[str, Any], folder: Path = RESULTS) -> str:
    """Return the README's tables: of this result and of the other machines that were measured last."""
    names = [name for _, name in README_CASES]
    others = [json.loads(path.read_text()) for path in folder.glob("[0-9]*-core-*.json")]
    others = [r for r in others if r["machine"] != result["machine"] and any(n in by_case(r) for n in names)]
    latest = sorted(others, key=lambda r: str(r["date"]))[-(MACHINES - 1) :]
    shown = sorted([result, *latest], key=lambda r: str(r["machine"]))
    head = "float32, one thread; minima of interleaved runs, each library in its own process, outputs preallocated.\n\n"
    return head + "\n\n".join(table(r) for r in shown)


def replace_between(text: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """Put a table between the markers."""
    if begin not in text or end not in text:
        raise SystemExit(f"README.md: expected the markers {begin!r} and {end!r}")
    head, rest = text.split(begin, 1)
    return head + begin + "\n" + new + "\n" + end + rest.split(end, 1)[1]


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw, for the quick cases, each library's time over the floor (bytes that must move / copy speed)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {c: rows for c, rows in by_case(result).items() if "fastbn" in rows and "copy" in rows}
    found = {c: rows for c, rows in found.items() if rows["fastbn"]["copy_s"] > 1e-4}  # memory-bound ones
    shown = {c.id for c in cases.quick()}  # all of them make a picture that nobody can read
    found = {c: rows for c, rows in found.items() if c in shown}
    if not found:
        return
    names = ["fastbn", *(lib for lib in LIBRARIES if any(lib in rows for rows in found.values()))]
    figure, axes = pyplot.subplots(figsize=(9, 0.32 * max(4, len(found)) + 1.2))
    height = 0.8 / len(names)
    for n, library in enumerate(names):
        points = [
            (i + n * height, rows[library]["min"] / (rows[library]["copy_s"] * rows[library]["floor_copies"]))
            for i, rows in enumerate(found.values())
            if library in rows
        ]
        axes.barh(*zip(*points, strict=True), height=height, label=LIBRARIES.get(library, library))
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks([i + 0.4 for i in range(len(found))], list(found), fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set_xlabel("time / time to move the bytes at copy speed (1 = memory's limit)")
    axes.set_title(f"{result['machine']}, one thread")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_growth(result: dict[str, Any], path: Path) -> None:
    """Draw the time per element against the tensor's size: training and inference, runs of a channel and rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = by_case(result)
    sizes = {c.id: c for c in cases.growth()[:GROWING] if "fastbn" in found.get(c.id, {})}
    if not sizes:
        return
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, rows in zip(panels, (False, True), strict=True):
        for op, style in (("train", "-"), ("infer", "--")):
            chosen = [c for c in sizes.values() if c.op == op and c.rows is rows]
            for library, color in (("fastbn", "C0"), ("torch", "C1"), ("copy", "0.6")):
                points = [
                    (c.nbytes, found[c.id][library]["min"] / c.elements * 1e9) for c in chosen if library in found[c.id]
                ]
                if points and not (library == "copy" and op == "train"):
                    label = "copy" if library == "copy" else f"{LIBRARIES.get(library, library)}, {OP_NAMES[op]}"
                    panel.plot(*zip(*points, strict=True), style, color=color, marker=".", label=label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(
            [1 << p for p in (13, 17, 20, 23, 26, 30)], ["8 KB", "128 KB", "1 MB", "8 MB", "64 MB", "1 GB"]
        )
        panel.set_title("(N, 64): rows" if rows else "(8, 16, H, W): runs")
        panel.set_xlabel("tensor")
    panels[0].set_ylabel("ns per element")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"{result['machine']}, float32, one thread")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


PLOTS = {"floor": plot, "growth": plot_growth}


def geometric_mean(values: list[float]) -> float:
    """Return the geometric mean; NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def write(result: dict[str, Any]) -> None:
    """Print all cases and write the README's tables and the plots."""
    for case, rows in by_case(result).items():
        if "fastbn" in rows and "copy" in rows:
            ours, copied = rows["fastbn"]["min"], rows["copy"]["min"]
            peers = "  ".join(f"{o} {rows[o]['min'] / ours:.2f}x" for o in LIBRARIES if o in rows)
            floor = rows["copy"]["floor_copies"]
            print(f"{case:58} {seconds(ours):>10} {ours / copied:5.2f} copies (floor {floor})  {peers}")
    readme = ROOT / "README.md"
    slug = machine.slug(result["machine"])
    for name, draw in PLOTS.items():
        draw(result, RESULTS / f"{name}-{slug}.png")
    readme.write_text(replace_between(readme.read_text(encoding="utf-8"), tables(result)), encoding="utf-8")


if __name__ == "__main__":
    source = sys.argv[1] if len(sys.argv) > 1 else RESULTS / f"{machine.slug()}.json"
    write(json.loads(Path(source).read_text()))
