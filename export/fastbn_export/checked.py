"""Fold, check, and where the check fails find the fold to blame, undo that one, and let the rest stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from fastbn_export.fold import FoldResult
from fastbn_export.report import FoldReport
from fastbn_export.verdict import VerifyReport
from fastbn_export.verify import Checker

__all__ = ["CheckedFold", "fold_checked"]

_MOST_BLAMED = 8
"""Folds undone before giving up: so many wrong ones are not an accident of one operator."""

_MOST_CHECKS = 24
"""Partly folded models checked in search of wrong folds. Each costs a fold and a check: seconds, on a large model. One
culprit among 64 is found in 7, and who waited for 24 in vain is better served by the reason than by more of them."""

Model: TypeAlias = "onnx.ModelProto | Path"

Fold = Callable[..., FoldResult]
"""``fold(model, skip=names)``."""


@dataclass(frozen=True)
class CheckedFold:
    """A folded model and the proof.

    Attributes
    ----------
    result : FoldResult
        The folded model, to be used only if ``verdict.ok``, and the report; an undone fold has its reason in there.
    verdict : VerifyReport
        The check of the folded model.
    undone : list of str
        Names of the batch normalizations whose fold was to blame.
    """

    result: FoldResult
    verdict: VerifyReport
    undone: list[str] = field(default_factory=list)

    @property
    def model(self) -> onnx.ModelProto:
        """The folded model."""
        return self.result.model

    @property
    def report(self) -> FoldReport:
        """What was folded where, and why the rest stays."""
        return self.result.report

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dicts, ready for JSON."""
        return {**self.report.to_dict(), "verification": self.verdict.to_dict(), "undone": list(self.undone)}


def fold_checked(model: Model, checker: Checker, fold: Fold) -> CheckedFold:
    """Fold a model and verify the result; undo the folds that are to blame where it is not the same function.

    Parameters
    ----------
    model : onnx.ModelProto or path
        The original, which ``checker`` has for its reference.
    checker : Checker
        Runs the comparisons.
    fold : callable
        ``fold(model, skip=names)`` returns a FoldResult with the named ones left alone.

    Returns
    -------
    CheckedFold
        Its verdict is not ok when no single folds could be blamed, or too many were, or the model does not even
        agree with itself (it draws random numbers, or cannot be run).
    """
    result = fold(model, skip=())
    verdict = checker.check(result)
    undone: list[str] = []
    first_failure = _failure(verdict)
    if not verdict.ok and result.report.folded and checker.check(model).ok:
        search = _Search(model, checker, fold, in_float64=not verdict.only_rounding)
        while not verdict.ok and len(undone) < _MOST_BLAMED:
            culprit = search.first_wrong(_folded(result.report), undone)
            if culprit is None:
                break
            undone.append(culprit)
            result = fold(model, skip=undone)
            verdict = checker.check(result)
        if search.left == 0 and not verdict.ok:
            note = f"the search for the folds to blame was ended after {_MOST_CHECKS} checks, {len(undone)} undone"
            verdict = replace(verdict, notes=[*verdict.notes, note])
    for entry in result.report.entries:
        if entry.name in undone:
            entry.reason = f"its fold did not pass the check and was undone ({first_failure})"
    return CheckedFold(result, verdict, undone)


def _folded(report: FoldReport) -> list[str]:
    return list(dict.fromkeys(entry.name for entry in report.entries if entry.folded))


class _Search:
    """Looks for wrong folds, in a bounded number of checks.

    Parameters
    ----------
    model, checker, fold
        As :func:`fold_checked`.
    in_float64 : bool
        Whether float64 is what failed. Where it passed the whole it passes the parts, and is most of a check's time:
        which fold loses precision is seen by running the models in their own types.
    """

    def __init__(self, model: Model, checker: Checker, fold: Fold, in_float64: bool):
        self.model, self.checker, self.fold = model, checker, fold
        self.options = {} if in_float64 else {"in_float64": False}
        self.left = _MOST_CHECKS

    def first_wrong(self, names: list[str], undone: list[str]) -> str | None:
        """Return the last name of the shortest prefix of ``names`` that fails when it alone is folded; by bisection.

        None when folding nothing fails as well, or no checks are left.
        """
        if not names or not self._passes(names, 0, undone):
            return None
        right, wrong = 0, len(names)
        while wrong - right > 1 and self.left:
            middle = (right + wrong) // 2
            if self._passes(names, middle, undone):
                right = middle
            else:
                wrong = middle
        return names[wrong - 1] if wrong - right == 1 else None

    def _passes(self, names: list[str], count: int, undone: list[str]) -> bool:
        if not self.left:
            return False
        self.left -= 1
        return self.checker.check(self.fold(self.model, skip=[*undone, *names[count:]]), **self.options).ok


def _failure(verdict: VerifyReport) -> str:
    reasons = [f"{output.name}: {output.reason}" for output in verdict.outputs if not output.ok]
    return "; ".join([*reasons, *([] if reasons else verdict.notes)])
