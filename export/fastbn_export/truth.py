"""The float64 evaluation of a reference, of candidates, and of candidates with their changed weights rounded anew."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx

from fastbn_export.compare import flatten
from fastbn_export.float64 import changed, fingerprints, lift_array
from fastbn_export.protos import parameter_count
from fastbn_export.samples import Feeds
from fastbn_export.worker import Rounding, RunError, Worker

__all__ = ["MOST_PARAMETERS", "Lifted", "Truth"]

_ENGINES = ("onnxruntime", "reference")
"""onnxruntime has no float64 kernel for Conv and others; onnx's evaluator has all, slowly."""

MOST_PARAMETERS = 1 << 28
"""Constants above which a model is not lifted, nor held in memory beside the child's copy."""

_BUDGET = 20.0
"""Seconds for the float64 runs of a candidate, about: fewer samples are evaluated where they would take longer."""

_DRAWS, _FEW_PARAMETERS = 6, 1 << 20
"""Few constants have few roundings, which may cancel in one draw; many take time, and average by themselves."""

_ENOUGH = 12
"""Values of each output that the rounding noise is estimated from, at least."""

Rows = list[list[Any]]
"""Outputs, sample by sample."""


@dataclass(frozen=True)
class Lifted:
    """What the float64 models give: of the reference, of the candidate, and of its random roundings (draw by draw)."""

    truth: Rows
    candidate: Rows
    noise: list[Rows]


class Truth:
    """Float64 outputs of one reference, kept, and of candidates, on demand.

    Parameters
    ----------
    worker : Worker
        Where models run; it has the two models in its files "reference" and "candidate".
    reference : onnx.ModelProto
        The model that tells the truth.
    shake : float
        Roundings are taken this many times larger than they are (for models that round and compare by themselves,
        where a rounding error rarely shows, but then as a jump).
    """

    def __init__(self, worker: Worker, reference: onnx.ModelProto, shake: float = 1.0):
        self.worker = worker
        self.reference = reference
        self.known = fingerprints(reference)
        self.shake = shake
        self.engine = ""
        self.notes: list[str] = []
        self._kept: dict[str, Rows | RunError] = {}

    def runs(self, feeds: list[Feeds]) -> bool:
        """Return whether the reference can be evaluated in float64 on these inputs; they are the ones to compare on."""
        self._kept.clear()
        return any(isinstance(self._of_reference(engine, feeds), list) for engine in self._engines())

    def compare(self, candidate: onnx.ModelProto, feeds: list[Feeds]) -> Lifted | None:
        """Evaluate reference and candidate by the same engine; None, with the reason in ``notes``, where none can."""
        self.notes, self.engine = [], ""
        failures = []
        for engine in self._engines():
            truth = self._of_reference(engine, feeds)
            if isinstance(truth, RunError):
                failures.append(f"{engine}: {_short(truth)}")
                continue
            used = feeds[: len(truth)]
            try:
                theirs = self._evaluate(engine, "candidate", used)
                noise = self._roundings(engine, candidate, used, theirs)
            except RunError as failure:
                failures.append(f"{engine}, candidate: {_short(failure)}")
                continue
            if len(used) < len(feeds):
                self.notes.append(f"float64 on {len(used)} of {len(feeds)} samples, to save time")
            self.engine = engine
            return Lifted(truth, theirs, noise)
        self.notes.append("no float64 truth (" + "; ".join(failures or ["too many parameters"]) + ")")
        return None

    def assume(self, feeds: list[Feeds]) -> Lifted | None:
        """As `compare`, of a candidate that is taken for the same in float64 and not evaluated."""
        self.notes, self.engine = [], ""
        for engine in self._engines():
            truth = self._of_reference(engine, feeds)
            if not isinstance(truth, RunError):
                return Lifted(truth, truth, [])
        return None

    def _engines(self) -> tuple[str, ...]:
        return _ENGINES if parameter_count(self.reference) <= MOST_PARAMETERS else ()

    def _of_reference(self, engine: str, feeds: list[Feeds]) -> Rows | RunError:
        if engine not in self._kept:
            try:
                self._kept[engine] = self._evaluate(engine, "reference", feeds, budget=_BUDGET / 4)
            except RunError as failure:
                self._kept[engine] = failure
        return self._kept[engine]

    def _evaluate(
        self, engine: str, file: str, feeds: list[Feeds], rounding: Rounding | None = None, budget: float = float("inf")
    ) -> Rows:
        self.worker.load("lifted", file, engine=engine, lifted=True, rounding=rounding)
        start = time.monotonic()
        rows = []
        for feed in feeds:
            rows.append(self.worker.run("lifted", {name: lift_array(value) for name, value in feed.items()}))
            if time.monotonic() - start > budget * len(rows) / len(feeds) and time.monotonic() - start > budget / 2:
                break
        self.worker.drop("lifted")
        return rows

    def _roundings(self, engine: str, candidate: onnx.ModelProto, feeds: list[Feeds], outputs: Rows) -> list[Rows]:
        if not changed(candidate, self.known):
            return []
        names = [value.name for value in candidate.graph.output]
        sizes: Counter[str] = Counter()  # over all samples, which need not be of one size
        for row in outputs:
            sizes.update({name: array.size for name, array in flatten(names, row) if array.size})
        smallest = min(sizes.values(), default=len(feeds))
        least = _DRAWS if parameter_count(candidate) <= _FEW_PARAMETERS else 2
        draws = min(max(least, -(-_ENOUGH // smallest)), _ENOUGH)
        return [
            self._evaluate(engine, "candidate", feeds, Rounding("reference", seed, self.shake)) for seed in range(draws)
        ]


def _short(failure: RunError) -> str:
    lines = str(failure).strip().splitlines()
    text = lines[0] if lines else type(failure).__name__
    return text if len(text) <= 160 else text[:157] + "..."
