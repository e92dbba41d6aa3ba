"""``fastbn demo``: the founding experiment of batch normalization, on real digits, trained, exported and folded.

Trains the paper's network (`paper_net`) with and without batch normalization, on the digits that scikit-learn bundles
or on MNIST, exports the normalised one, folds it, checks the fold and measures both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from fastbn_export.build import build
from fastbn_export.checked import fold_checked
from fastbn_export.console import line, print_table, progress
from fastbn_export.files import ModelFileError, save_model
from fastbn_export.fold import fold
from fastbn_export.paper_net import BATCH, DEVIATION, LEARNING_RATE, Net, mini_batches
from fastbn_export.pictures import Data, digits, mnist
from fastbn_export.plot import save_accuracies
from fastbn_export.protos import operator_counts
from fastbn_export.verify import Checker
from fastbn_export.worker import Worker

__all__ = ["demo", "train"]

SHOWN = (200, 500, 1000, 2000)
EVERY = 25
PLAIN, NORMALISED = "without BN", "with BN"


def demo(arguments: argparse.Namespace) -> int:
    """Run the experiment; 0 when the folded model passed its check."""
    out = Path(arguments.out)
    _make_folder(out)
    data = digits() if arguments.data is None else mnist(arguments.data)
    line(f"{data.name}: {len(data.train_x)} to train on, {len(data.test_x)} to test")
    line(f"learning rate {LEARNING_RATE}, initial weights N(0, {DEVIATION}²): our choice, the paper gives none")
    curves, nets = train(data, max(SHOWN))
    original = build(nets[NORMALISED].layers(), (None, data.train_x.shape[1]), fold=False)
    with Checker(original, inputs={"input": data.test_x}) as checker:
        checked = fold_checked(original, checker, fold)
    save_accuracies(
        *(out / "accuracy.png", curves, f"{data.name}: three layers of 100 sigmoid units"),
        caption=f"(mini-batches of {BATCH}, learning rate {LEARNING_RATE}, weights N(0, {DEVIATION}²), one run)",
        marked=SHOWN,
    )
    save_model(original, out / "bn.onnx")
    if not checked.verdict.ok:
        line(str(checked.verdict))
        return 1
    save_model(checked.model, out / "bn_folded.onnx")
    rows = [_accuracy_row(curves, step) for step in SHOWN]
    rows += _deployed(data, original, checked.model)
    print_table("batch normalization, trained and deployed", ["", PLAIN, NORMALISED, "BN folded"], rows)
    line(f"written: {', '.join(str(out / name) for name in ('accuracy.png', 'bn.onnx', 'bn_folded.onnx'))}")
    return 0


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelFileError(f"{out}: expected a folder to write into: {(error.strerror or '').lower()}") from None


def train(data: Data, steps: int, seed: int = 0) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Net]]:
    """Train both networks on the same mini-batches from the same weights.

    Returns
    -------
    curves : dict of str to list of (step, test accuracy)
    nets : dict of str to Net
    """
    features, classes = data.train_x.shape[1], 10
    nets = {name: Net(features, classes, name == NORMALISED, seed) for name in (PLAIN, NORMALISED)}
    curves: dict[str, list[tuple[int, float]]] = {
        name: [(0, net.accuracy(data.test_x, data.test_y))] for name, net in nets.items()
    }
    batches: Iterator[NDArray[np.int64]] = mini_batches(len(data.train_x), steps, seed)
    for step, batch in enumerate(progress(batches, "training both networks", steps), start=1):
        x, y = data.train_x[batch], data.train_y[batch]
        for name, net in nets.items():
            net.step(x, y)
            if step % EVERY == 0:
                curves[name].append((step, net.accuracy(data.test_x, data.test_y)))
    return curves, nets


def _accuracy_row(curves: dict[str, list[tuple[int, float]]], step: int) -> tuple[str, ...]:
    shown = (f"{dict(curves[name])[step]:.3f}" for name in (PLAIN, NORMALISED))
    return (f"test accuracy after {step} steps", *shown, "")


def _deployed(data: Data, original: onnx.ModelProto, folded: onnx.ModelProto) -> list[tuple[str, ...]]:
    """Run both models in onnxruntime at its default level, in a process of its own."""
    feeds, one = {"input": data.test_x}, {"input": data.test_x[:1]}
    with Worker() as worker:
        worker.put("original", original)
        worker.put("folded", folded)
        worker.load("truth", "original", lifted=True)
        (truth,) = worker.run("truth", {"input": data.test_x.astype(np.float64)})
        outputs = {}
        for key in ("original", "folded"):
            worker.load(key, key, level="all")
            (outputs[key],) = worker.run(key, feeds)
        whole = _latency(worker, feeds, 100)
        single = _latency(worker, one, 1000)
    right = [f"{np.mean(output.argmax(axis=1) == data.test_y):.3f}" for output in outputs.values()]
    errors = [f"{np.abs(output - truth).max():.1e}" for output in outputs.values()]
    operators = [str(operator_counts(model).total()) for model in (original, folded)]
    return [
        ("test accuracy in onnxruntime", "", *right),
        ("largest error against float64", "", *errors),
        ("operators", "", *operators),
        (f"latency of {len(data.test_x)} pictures, µs", "", *whole),
        ("latency of one picture, µs", "", *single),
    ]


def _latency(worker: Worker, feeds: dict[str, Any], repeats: int) -> list[str]:
    """Return the median time of each model in µs; they take turns, so that a busy moment hits both."""
    seconds: dict[str, list[float]] = {"original": [], "folded": []}
    for _ in range(5):
        for key, times in seconds.items():
            times += worker.time(key, feeds, repeats)
    return [f"{statistics.median(times) * 1e6:.1f}" for times in seconds.values()]
