"""Is the candidate the same function as the reference? Judged against float64, in a process that may crash.

Both models are (1) lifted to float64 and compared there, where only the rounding of changed weights may show, and
(2) run in their own types by onnxruntime with all graph optimizations off, where the candidate may be as far from
the float64 truth as the reference is: a correct fold is often closer to it. The reference's error is one draw of many
that rounding could have made; if the candidate is farther off, others are drawn before it fails (`redraws`). At
onnxruntime's default level it would compare two folds: it folds Conv + BatchNormalization itself, sometimes wrongly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import onnx

from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn_export import samples as sampling
from fastbn_export.compare import RELATIVE, Tolerance, flatten
from fastbn_export.files import external_files, load_model
from fastbn_export.float64 import narrowest
from fastbn_export.fold import FoldResult
from fastbn_export.interface import difference
from fastbn_export.judge import Judge
from fastbn_export.protos import nodes_of, parameter_count
from fastbn_export.redraws import Redraws
from fastbn_export.truth import MOST_PARAMETERS, Lifted, Truth
from fastbn_export.variations import Run, vary
from fastbn_export.verdict import OutputReport, VerifyReport
from fastbn_export.worker import RunError, RunTimeout, Worker

__all__ = ["Checker", "OutputReport", "VerifyReport", "as_model", "verify"]

_STEPS = {
    *("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "Round", "Floor", "Ceil", "Sign"),
    *("ArgMax", "ArgMin", "TopK", "Hardmax", "NonZero", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"),
    *("NonMaxSuppression", "Unique", "Mod", "Binarizer"),
}
"""Operators that turn a rounding error into a jump."""

_STEP_SHAKE = 16.0


def verify(
    reference: onnx.ModelProto | str | os.PathLike[str],
    candidate: onnx.ModelProto | str | os.PathLike[str],
    *,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | os.PathLike[str] | None = None,
    samples: int = 3,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
    timeout: float = 120.0,
) -> VerifyReport:
    """Compare two models on the same inputs; they should be the same function.

    Parameters
    ----------
    reference, candidate : onnx.ModelProto or path
        The original and its folded form.
    inputs : mapping of str to array_like, sequence of mappings, or path to npz, optional
        What to run them on. Default: ``samples`` random inputs that fit the declared types and shapes; where there
        are several, not all with the same sizes of dynamic dimensions, nor all with the defaults of optional inputs.
    samples, seed : int
        How many random inputs, and their seed.
    rtol, atol : float, optional
        Accept ``|candidate - truth| <= atol + rtol * |truth|`` elementwise. Default: no more than the dtype and the
        reference's own error justify (`compare`).
    timeout : float
        Seconds that loading or running one model once may take.

    Returns
    -------
    VerifyReport
        Its ``ok`` is the verdict; ``print`` it for the rest.

    Raises
    ------
    ModelFileError, ArgumentValueError, ArgumentTypeError
        An unreadable file, unusable inputs or options. A model that crashes is no exception but a verdict.
    """
    with Checker(
        reference, inputs=inputs, samples=samples, seed=seed, rtol=rtol, atol=atol, timeout=timeout
    ) as checker:
        return checker.check(candidate)


class Checker:
    """Checks any number of candidates against one reference, which is run once.

    Parameters
    ----------
    reference : onnx.ModelProto or path
        The original.
    **options
        As :func:`verify`.
    """

    def __init__(
        self,
        reference: onnx.ModelProto | str | os.PathLike[str],
        *,
        inputs: Any = None,
        samples: int = 3,
        seed: int = 0,
        rtol: float | None = None,
        atol: float | None = None,
        timeout: float = 120.0,
    ):
        _check_number("samples", samples, 1, Integral)
        _check_number("seed", seed, 0, Integral)
        for name, value in (("rtol", rtol), ("atol", atol), ("timeout", timeout)):
            if value is not None:
                _check_number(name, value, 0, Real)
        self.worker = Worker(timeout)
        try:
            self.reference = self._take("reference", reference)
            self.given = None if inputs is None else sampling.given(self.reference, inputs)
        except BaseException:
            self.worker.__exit__()
            raise
        self.samples, self.seed = samples, seed
        self.dtype = narrowest(self.reference)
        self.user = None
        if rtol is not None or atol is not None:
            self.user = Tolerance(RELATIVE[self.dtype] if rtol is None else rtol, atol or 0.0)
        self.stepped = any(node.op_type in _STEPS for node in nodes_of(self.reference))
        self.notes: list[str] = []
        self.feeds: list[sampling.Feeds] | None = None
        self.own: list[list[Any]] | None = None
        self.impatient = False
        self.redraws = Redraws(self.worker)
        self.truth = Truth(self.worker, self.reference, _STEP_SHAKE if self.stepped else 1.0)

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.worker.__exit__(*exception)

    def _take(self, key: str, model: Any) -> onnx.ModelProto:
        """Give a model to the worker, and return it, without its weights if they are too many to hold them twice."""
        if isinstance(model, FoldResult):
            path = self.worker.path(key)
            model.save(path)
            model = path
        if isinstance(model, (str, os.PathLike)):
            light = load_model(model, external_data=False)
            if parameter_count(light) > MOST_PARAMETERS and os.path.isfile(model):
                self.worker.use(key, model)
                return light
            model = model if external_files(model, light) else light  # a pipe can be read once
        full = as_model(model)
        self.worker.put(key, full)
        return full

    def check(
        self, candidate: onnx.ModelProto | FoldResult | str | os.PathLike[str], *, in_float64: bool = True
    ) -> VerifyReport:
        """Compare one candidate with the reference; see :func:`verify`.

        Without ``in_float64`` the candidate is taken for the same in float64, and only run in its own types, which is
        much faster: for the parts of a model that passed there.
        """
        model = self._take("candidate", candidate)
        if changed := difference(self.reference, model):
            return VerifyReport(False, notes=[changed])
        self._prepare()
        if self.feeds is None:
            return VerifyReport(
                False, notes=[*self.notes, "nothing could be checked; pass inputs that the model accepts"]
            )
        notes = list(self.notes)
        lifted = self.truth.compare(model, self.feeds) if in_float64 else self.truth.assume(self.feeds)
        notes += self.truth.notes
        ours: list[list[Any]] | None = None
        if self.own is not None:
            ours, failure = self._run_candidate(self.feeds)
            if failure:
                return self._report(False, [], [*notes, failure])
        outputs = self._judge(ours, lifted)
        checks = ["onnxruntime without optimizations"] * (ours is not None)
        checks += [f"float64 by {self.truth.engine}"] * (lifted is not None and in_float64)
        if not checks:
            notes.append("nothing could be checked")
        elif not self._says_something(self.own or (lifted.truth if lifted is not None else [])):
            notes.append("no output has a finite value on these inputs: a wrong fold would not show")
        return self._report(bool(checks) and all(o.ok for o in outputs), checks, notes, outputs)

    def _report(
        self, ok: bool, checks: list[str], notes: list[str], outputs: Sequence[OutputReport] = ()
    ) -> VerifyReport:
        feeds = self.feeds or []
        return VerifyReport(ok, list(outputs), len(feeds), _shapes(feeds[0]) if feeds else {}, checks, notes)

    def _prepare(self) -> None:
        """Find inputs that the reference runs on, and keep what it makes of them; once."""
        if self.feeds is not None or self.notes:
            return
        lists = (
            iter([self.given]) if self.given is not None else sampling.guesses(self.reference, self.samples, self.seed)
        )
        failure: RunError | None = None
        fallback: list[sampling.Feeds] | None = None
        for feeds in lists:
            fallback = fallback or feeds
            try:
                own = self._run("reference", feeds)
                if self.given is None:
                    feeds, own = self._varied(feeds, own, self._try)
                self.feeds, self.own = feeds, own
                return
            except RunError as error_:
                failure = failure or error_
                if not self.worker.is_loaded("reference"):
                    break
        self.notes.append(f"onnxruntime cannot run the original: {failure}")
        timed_out = isinstance(failure, RunTimeout)  # and so would the slower evaluators
        if fallback is not None and not timed_out:
            self._prepare_in_float64(fallback)

    def _prepare_in_float64(self, feeds: list[sampling.Feeds]) -> None:
        """Find inputs that the float64 form of the reference runs on, where its own form cannot be run."""
        if not self.truth.runs(feeds):
            return
        self.feeds = feeds
        if self.given is not None:
            return
        varied, _ = self._varied(feeds, feeds, lambda feed: [feed] if self.truth.runs([feed]) else None)
        self.feeds = next((tried for tried in (varied, feeds) if self.truth.runs(tried)), None)

    def _varied(self, feeds: list[sampling.Feeds], own: list[Any], run: Run) -> tuple[list[sampling.Feeds], list[Any]]:
        return vary(self.reference, feeds, own, run, self.seed)

    def _try(self, feed: sampling.Feeds) -> list[Any] | None:
        """Run the reference; None where it refuses, or where it took too long once."""
        if self.impatient:
            return None
        try:
            return self.worker.run("reference", feed)
        except RunError as failure:
            self.impatient = isinstance(failure, RunTimeout)
            return None

    def _run(self, key: str, feeds: list[sampling.Feeds]) -> list[list[Any]]:
        if not self.worker.is_loaded(key):
            self.worker.load(key, key)
        return [self.worker.run(key, feed) for feed in feeds]

    def _run_candidate(self, feeds: list[sampling.Feeds]) -> tuple[list[list[Any]], str]:
        """Return the outputs of the candidate, and what it failed at, where the reference did not; "" for nothing."""
        outputs: list[list[Any]] = []
        where = ""
        try:
            self.worker.load("candidate", "candidate")
            for feed in feeds:
                where = f" on {', '.join(f'{k}: {v}' for k, v in _shapes(feed).items())}, where the original can"
                outputs.append(self.worker.run("candidate", feed))
        except RunError as failure:
            return outputs, f"the candidate cannot be run{where}: {failure}"
        return outputs, ""

    def _judge(self, ours: list[list[Any]] | None, lifted: Lifted | None) -> list[OutputReport]:
        """Turn outputs sample by sample into verdicts output by output."""
        parts = (self.own if ours is not None else None, ours, *(_rows(lifted)))
        own, have, truth, theirs = (self._columns(part) for part in parts)
        noise = [self._columns(draw) for draw in (lifted.noise if lifted is not None else [])]
        judge = Judge(self.dtype, self.stepped, self.user)
        return [
            judge.output(
                key,
                own.get(key),
                have.get(key),
                truth.get(key),
                theirs.get(key),
                [n.get(key) for n in noise],
                self._redrawn(key),
            )
            for key in dict.fromkeys([*own, *have, *truth, *theirs])
        ]

    def _redrawn(self, key: str) -> Iterator[list[Any] | None]:
        """Yield one output of the original as other roundings give it; nothing is run until somebody asks."""
        for rows in self.redraws.rows(self.feeds or []):
            yield self._columns(rows).get(key)

    def _says_something(self, rows: list[list[Any]]) -> bool:
        """Whether any output holds a value that another could differ from."""
        arrays = [a for column in self._columns(rows).values() for a in column]
        return any(a.size and (a.dtype.kind in "biuOSU" or bool(np.isfinite(a).any())) for a in arrays)

    def _columns(self, rows: list[list[Any]] | None) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {}
        for row in rows or []:
            for key, array in flatten([value.name for value in self.reference.graph.output], row):
                columns.setdefault(key, []).append(array)
        return columns


def _check_number(name: str, value: Any, least: int, kind: Any) -> None:
    expected = f"{'a whole number' if kind is Integral else 'a number'} >= {least}"
    if not isinstance(value, kind):
        raise ArgumentTypeError(name, expected, repr(value))
    if not value >= least:  # NaN is not
        raise ArgumentValueError(name, expected, value)


def _rows(lifted: Lifted | None) -> tuple[Any, Any]:
    return (None, None) if lifted is None else (lifted.truth, lifted.candidate)


def as_model(model: onnx.ModelProto | str | os.PathLike[str]) -> onnx.ModelProto:
    """Return the model itself, or the one in the file."""
    if isinstance(model, onnx.ModelProto):
        return model
    if isinstance(model, (str, os.PathLike)):
        return load_model(model)
    raise ArgumentTypeError("model", "onnx.ModelProto or a path", type(model).__name__)


def _shapes(feed: sampling.Feeds) -> dict[str, str]:
    return {name: _looks(array) for name, array in feed.items()}


def _looks(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
