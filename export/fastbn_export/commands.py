"""The commands that read and write models: what they print, what they write, and with which exit status they end."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fastbn.errors import ArgumentValueError
from fastbn_export.checked import CheckedFold, Fold, fold_checked
from fastbn_export.console import bytes_text, json_text, line, print_table, working
from fastbn_export.files import (
    ModelFileError,
    atomic_path,
    check_distinct,
    check_output,
    disk_size,
    external_files,
    load_model,
    save_model,
)
from fastbn_export.fold import FoldResult
from fastbn_export.fold import fold as fold_model
from fastbn_export.recalibrate import recalibrate as recalibrate_model
from fastbn_export.report import FoldReport
from fastbn_export.samples import read_npz, required_inputs
from fastbn_export.validity import check_structure
from fastbn_export.verdict import VerifyReport
from fastbn_export.verify import Checker
from fastbn_export.verify import verify as verify_models

__all__ = ["fold", "inspect", "recalibrate", "verify"]

DONE, FAILED = 0, 1


def fold(arguments: argparse.Namespace) -> int:
    """Fold IN to OUT, checked; print what changed and what stays."""
    source, out = Path(arguments.input), Path(arguments.output)
    _check_outputs(out, arguments.report, source, arguments.inputs)
    light = _load_valid(source, external_data=False)
    beside, size = external_files(source, light), disk_size(source, light)
    _keep_weights(beside, out, arguments.report)
    model = source if beside else light  # a path: external weights stay on disk until they are needed
    folder = partial(fold_model, keep=arguments.keep, duplicate=arguments.duplicate)
    checked, seconds = _fold(model, folder, None if arguments.no_verify else _options(arguments))
    if checked.verdict.ok:
        _save(checked.result, out)
    if arguments.report:
        _write_json(arguments.report, checked.to_dict())
    _print_fold(checked, source, size, out, seconds)
    if checked.verdict.ok:
        return DONE
    hint = "" if checked.verdict.checks else " (--no-verify writes it unchecked)"  # the original does not run here
    line(f"the check failed: {out} was not written{hint}")
    return FAILED


def _check_outputs(out: str | Path | None, report: str | None, *reads: str | Path | None) -> None:
    """Refuse outputs that are inputs or each other; an empty name of a report asks for none."""
    for path in (out, report):
        if path:
            check_output(path, *reads)
    check_distinct([out, report or None])


def _keep_weights(beside: set[Path], *outputs: str | Path | None) -> None:
    """Refuse outputs that would overwrite a file with weights of an input."""
    for out in (Path(path) for path in outputs if path):
        if taken := beside & {out.resolve(), out.with_name(f"{out.name}.data").resolve()}:
            raise ModelFileError(f"{out}: expected another name: the input has its weights in {taken.pop().name}")


def _fold(model: Path | onnx.ModelProto, folder: Fold, options: dict[str, Any] | None) -> tuple[CheckedFold, float]:
    """Return the fold, checked unless there are no options for that, and the seconds the first fold alone took."""
    seconds: list[float] = []

    def timed(model: Path | onnx.ModelProto, skip: Sequence[str] = ()) -> FoldResult:
        start = time.perf_counter()
        result = folder(model, skip=skip)
        seconds.append(time.perf_counter() - start)
        return result

    if options is None:
        with working("folding"):
            return CheckedFold(timed(model), VerifyReport(True, notes=["not verified, as asked"])), seconds[0]
    with working("folding and checking"), Checker(model, **options) as checker:
        return fold_checked(model, checker, timed), seconds[0]


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("inputs", "samples", "seed", "rtol", "atol", "timeout")}


def _load_valid(path: Path, external_data: bool = True) -> onnx.ModelProto:
    return _valid(load_model(path, external_data=external_data), str(path))


def _valid(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    check_structure(model, name)
    return model


def _read_once(path: str) -> tuple[str | onnx.ModelProto, set[Path]]:
    """Return a model and the files beside it that hold weights of it; itself in place of a pipe's path."""
    light = load_model(path, external_data=False)
    return path if Path(path).is_file() else light, external_files(path, light)


def _save(result: FoldResult, out: Path) -> None:
    try:
        result.save(out)
    except OSError as error:
        raise ModelFileError(f"{out}: cannot be written: {error.strerror or error}") from None


def _write_json(path: str, content: dict[str, Any]) -> None:
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def _print_fold(checked: CheckedFold, source: Path, size: int, out: Path, seconds: float) -> None:
    report = checked.report
    before, after = report.ops_before, report.ops_after
    rows: list[tuple[object, ...]] = [
        (op, before.get(op, 0), after.get(op, 0), f"{after.get(op, 0) - before.get(op, 0):+d}")
        for op in sorted({*before, *after})
        if before.get(op, 0) != after.get(op, 0)
    ]
    rows += [
        _row("all operators", sum(before.values()), sum(after.values())),
        _row("parameters", report.parameters_before, report.parameters_after),
    ]
    if checked.verdict.ok:
        rows.append(("file size", bytes_text(size), bytes_text(disk_size(out)), ""))
    print_table(f"{source.name} -> {out.name}", ["", "before", "after", "change"], rows)
    line(f"{report.folded} of {len(report.entries)} batch normalizations folded in {seconds:.2f} s")
    for name in checked.undone:
        line(f"warning: the fold of {name} did not pass the check and was undone")
    _print_left(report)
    line(str(checked.verdict))


def _row(what: str, before: int, after: int) -> tuple[object, ...]:
    return (what, before, after, f"{after - before:+d}")


def _print_left(report: FoldReport) -> None:
    left = [entry for entry in report.entries if not entry.folded]
    if left:
        print_table("left as they are", ["batch normalization", "why"], [(e.name, e.reason or "") for e in left])


def inspect(arguments: argparse.Namespace) -> int:
    """Print every batch normalization of a model and what folding would do with it."""
    model = _load_valid(Path(arguments.model))
    with working("folding"):
        report = fold_model(model, duplicate=arguments.duplicate).report
    if arguments.json:
        line(json_text(report.to_dict()))
        return DONE
    rows = [(entry.name, entry.kind, *_fate(entry)) for entry in report.entries]
    if rows:
        print_table(str(arguments.model), ["batch normalization", "kind", "fate", "where, or why not"], rows)
    line(f"{report.folded} of {len(report.entries)} batch normalizations can be folded")
    return DONE


def _fate(entry: Any) -> tuple[str, str]:
    if not entry.folded:
        return "stays", entry.reason or ""
    where = ", ".join(entry.absorber) or "nothing to do: it was the identity"
    through = f" through {', '.join(entry.path)}" if entry.path else ""
    return f"folds {entry.direction or ''}".strip(), where + through


def verify(arguments: argparse.Namespace) -> int:
    """Compare two models and print the errors."""
    models: list[Any] = [arguments.reference, arguments.candidate]
    if arguments.report:
        _check_outputs(None, arguments.report, *models, arguments.inputs)
        read = [_read_once(path) for path in models]
        _keep_weights({file for _, beside in read for file in beside}, arguments.report)
        models = [model for model, _ in read]
    with working("running both models"):
        report = verify_models(*models, **_options(arguments))
    if arguments.report:
        _write_json(arguments.report, report.to_dict())
    line(str(report))
    return DONE if report.ok else FAILED


def recalibrate(arguments: argparse.Namespace) -> int:
    """Write IN with statistics re-estimated from the examples in DATA."""
    _check_outputs(arguments.output, None, arguments.input, arguments.data)
    source, beside = _read_once(arguments.input)
    _keep_weights(beside, arguments.output)
    model = _valid(load_model(source) if isinstance(source, str) else source, arguments.input)
    names = [value.name for value in required_inputs(model)]
    data = {name: array for name, array in read_npz(arguments.data).items() if name in names}
    if set(data) != set(names):
        raise ArgumentValueError(arguments.data, f"arrays named {names}", f"none for {sorted(set(names) - set(data))}")
    counts = {name: len(array) if array.ndim else 0 for name, array in data.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ArgumentValueError(arguments.data, "the same number of examples, at least one, for each input", counts)
    batches = list(_batches(data, next(iter(counts.values())), arguments.batch))
    with working("running the model on the data"):
        result = recalibrate_model(model, batches)
    save_model(result, arguments.output)
    line(f"{arguments.output}: statistics of {next(iter(counts.values()))} examples")
    return DONE


def _batches(data: dict[str, np.ndarray[Any, Any]], count: int, size: int) -> Iterator[dict[str, Any]]:
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in data.items()}
