"""The exporter's speed and benefit: ``python -m bench.fold``, two minutes at most.

Three questions: what does folding cost beside reading and writing the model, and beside the peers that are installed
(seconds: the minimum of interleaved repetitions, file to file; peak memory: one run in a process of its own); does the
cost stay linear; and what does the folded model gain in onnxruntime at its default level, on graphs that it does not
fold by itself. Rows go to ``bench/results/fold-<machine>.json``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import fold_models, machine

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("onnx", "onnx-ir", "onnxruntime", "onnxscript", "onnxslim", "onnxsim", "numpy")
Tool = Callable[[str, str], object]


def _copy(source: str, out: str) -> None:
    onnx.save(onnx.load(source), out)


def _fastbn(source: str, out: str) -> None:
    from fastbn_export import fold

    fold(source).save(out)


def _onnxruntime(source: str, out: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = out
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _onnxscript(source: str, out: str) -> None:
    import onnxscript.optimizer
    import onnxscript.rewriter

    onnx.save(onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(onnx.load(source))), out)


def _onnxslim(source: str, out: str) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), out)


def _onnxsim(source: str, out: str) -> None:
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], out)


TOOLS: dict[str, tuple[str, Tool]] = {
    "load + save": ("onnx", _copy),
    "fastbn": ("fastbn_export", _fastbn),
    "onnxruntime": ("onnxruntime", _onnxruntime),
    "onnxscript": ("onnxscript", _onnxscript),
    "onnxslim": ("onnxslim", _onnxslim),
    "onnxsim": ("onnxsim", _onnxsim),
}


def counts(path: Path) -> tuple[int, int]:
    """Return the BatchNormalization operators of a model and all its operators, constants left out."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    ops = [node.op_type for node in nodes if node.op_type not in ("Constant", "ConstantOfShape")]
    return ops.count("BatchNormalization"), len(ops)


def once(tool: str, source: str, out: str) -> dict[str, Any]:
    """Run a tool in this process and return its peak memory in bytes, and that of a process that only imports it."""
    module, run = TOOLS[tool]
    importlib.import_module({"fastbn_export": "fastbn_export.fold"}.get(module, module))
    imported = _most_memory()
    run(source, out)
    return {"peak_rss": _most_memory(), "imports_rss": imported}


def _most_memory() -> int:
    """Return the peak of this program; getrusage would count that of the parent before it became this one as well."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def peak(tool: str, source: Path, out: Path) -> dict[str, Any]:
    """Return `once` of a fresh process, or why it failed."""
    command = [sys.executable, "-m", "bench.fold", "--once", tool, str(source), str(out)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.TimeoutExpired:
        return {"failed": "more than 60 s"}
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def seconds(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the least time of each of several functions, called in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def tools_on(name: str, model: onnx.ModelProto, folder: Path, rounds: int = 5) -> list[dict[str, Any]]:
    """Measure every installed tool on one model."""
    source = folder / "model.onnx"
    onnx.save(model, source)
    before = counts(source)
    rows: dict[str, dict[str, Any]] = {}
    for tool, (module, _) in TOOLS.items():
        if importlib.util.find_spec(module):
            out = folder / f"{tool}.onnx"
            rows[tool] = {"kind": "fold", "model": name, "tool": tool} | peak(tool, source, out)
            if "failed" not in rows[tool]:
                rows[tool] |= {"batch_norms": [before[0], counts(out)[0]], "operators": [before[1], counts(out)[1]]}
    ready = [tool for tool, row in rows.items() if "failed" not in row]
    runs = {tool: _bound(TOOLS[tool][1], str(source), str(folder / f"{tool}.onnx")) for tool in ready}
    for tool, time_s in seconds(runs, rounds).items():
        rows[tool]["seconds"] = time_s
    return list(rows.values())


def _bound(run: Tool, source: str, out: str) -> Callable[[], object]:
    return lambda: run(source, out)


def linearity(sizes: tuple[int, ...] = (1000, 10_000), rounds: int = 2) -> list[dict[str, Any]]:
    """Measure the fold alone, in memory, on chains of different lengths."""
    from fastbn_export import fold

    models = {n: fold_models.convolutions(n) for n in sizes}
    left = {n: fold(models[n]).report.left for n in sizes[:1]}
    assert not any(left.values()), f"expected every batch normalization to fold, {left} stay"
    best = seconds({str(n): lambda m=model: fold(m) for n, model in models.items()}, rounds)
    return [
        {"kind": "linear", "batch_norms": n, "seconds": best[str(n)], "per_batch_norm": best[str(n)] / n} for n in sizes
    ]


def benefit(name: str, model: onnx.ModelProto, folder: Path, rounds: int = 40) -> dict[str, Any]:
    """Time the original and the folded model in onnxruntime at its default level, one thread."""
    import numpy as np
    import onnxruntime
    from fastbn_export import fold

    result = fold(model)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    sessions = {}
    for which, proto in (("original", model), ("folded", result.model)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(folder / f"{which}.onnx")  # what the session really runs
        options.log_severity_level = 4
        sessions[which] = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    outputs = [session.run(None, {"input": x})[0] for session in sessions.values()]
    error = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[0]).max())
    assert error < 1e-4, f"{name}: folded and original differ by {error}"
    best = seconds({w: lambda s=session: s.run(None, {"input": x}) for w, session in sessions.items()}, rounds)
    ran = [counts(folder / f"{which}.onnx")[1] for which in sessions]
    return {
        "kind": "benefit", "model": name, "batch_norms": [len(result.report.entries), result.report.left],
        "operators_run": ran, "original_s": best["original"], "folded_s": best["folded"],
        "folded_over_original": best["folded"] / best["original"], "error": error,
    }  # fmt: skip


def measure() -> list[dict[str, Any]]:
    """Return all rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        light = {f"light {model}": fold_models.light(model) for model in fold_models.LIGHT}
        light["resnet50, 100 MB"] = fold_models.with_weights(fold_models.light("resnet50"))
        rows: list[dict[str, Any]] = []
        for model, proto in track(light.items(), "folding"):
            rows += tools_on(model, proto, folder)
        light.clear()
        rows += linearity()
        rows += [benefit(model, make(), folder) for model, make in track(fold_models.RUN_TIME.items(), "running")]
    return [row | {"commit": machine.commit()} for row in rows]


def show(rows: list[dict[str, Any]]) -> None:
    """Print three tables."""
    console = Console(width=120)
    table = Table(
        "model", "tool", "seconds", "of load + save", "peak (imports)", "BN", "operators", title="file to file"
    )
    alone = {row["model"]: row.get("seconds") for row in rows if row.get("tool") == "load + save"}
    for row in (row for row in rows if row["kind"] == "fold"):
        if "failed" in row:
            table.add_row(row["model"], row["tool"], row["failed"][:40])
            continue
        ratio = row["seconds"] / alone[row["model"]]
        size = f"{row['peak_rss'] / 2**20:.0f} ({row['imports_rss'] / 2**20:.0f}) MiB"
        changes = [f"{a} -> {b}" for a, b in (row["batch_norms"], row["operators"])]
        table.add_row(row["model"], row["tool"], f"{row['seconds']:.3f}", f"{ratio:.2f}", size, *changes)
    console.print(table)
    table = Table("batch normalizations", "seconds", "µs for each", title="fold alone, Conv + BN + Relu")
    for row in (row for row in rows if row["kind"] == "linear"):
        table.add_row(str(row["batch_norms"]), f"{row['seconds']:.2f}", f"{row['per_batch_norm'] * 1e6:.0f}")
    console.print(table)
    table = Table("model", "original", "folded", "folded / original", "operators run", title="in onnxruntime")
    for row in (row for row in rows if row["kind"] == "benefit"):
        times = [f"{row[key] * 1e3:.3f} ms" for key in ("original_s", "folded_s")]
        ran = "{} -> {}".format(*row["operators_run"])
        table.add_row(row["model"], *times, f"{row['folded_over_original']:.2f}", ran)
    console.print(table)


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {"python": machine.versions()["python"]}
    for library in LIBRARIES:
        if importlib.util.find_spec(library.replace("-", "_")):
            found[library] = importlib.metadata.version(library)
    return found


def main(arguments: list[str]) -> None:
    """Measure, print and write the results; ``--once TOOL IN OUT`` is for the child processes."""
    if arguments[:1] == ["--once"]:
        print(json.dumps(once(*arguments[1:4])))
        return
    machine.without_options(__doc__)
    rows = measure()
    show(rows)
    result = {"machine": machine.name(), "versions": versions(), "date": machine.today(), "rows": rows}
    path = RESULTS / f"fold-{machine.slug()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
