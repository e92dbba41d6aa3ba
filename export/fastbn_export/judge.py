"""The verdict on one output, from what both models gave in their own types and in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn_export.compare import FLOAT64_FLOOR, FLOOR, RELATIVE, Tolerance, agree, error, worst
from fastbn_export.verdict import OutputReport

__all__ = ["Judge"]

_AS_GOOD = 4.0
"""How much worse than the original's own error the candidate's may be."""

_STEP_TOLERANCE = 5e-2
"""As `compare.RELATIVE`, for models that quantise or compare by themselves: a few steps of 8 bits."""

Arrays = list[Any]
"""One output, sample by sample."""


class Judge:
    """Judges outputs.

    Parameters
    ----------
    dtype : str
        The least precise float type of the reference.
    stepped : bool
        The model turns rounding errors into jumps.
    user : Tolerance or None
        The user's own tolerance.
    """

    def __init__(self, dtype: str, stepped: bool, user: Tolerance | None):
        self.relative = max(RELATIVE[dtype], _STEP_TOLERANCE if stepped else 0.0)
        self.per_channel = not stepped
        self.user = user

    def output(
        self,
        name: str,
        own: Arrays | None,
        have: Arrays | None,
        truth: Arrays | None,
        theirs: Arrays | None,
        noise: list[Any],
    ) -> OutputReport:
        """Judge one output.

        Parameters
        ----------
        name : str
            The output.
        own, have : list of ndarray or None
            What reference and candidate gave in their own types.
        truth, theirs : list of ndarray or None
            What they gave in float64.
        noise : list of lists of ndarray
            What the candidate gave in float64 with its weights rounded at random.
        """
        reasons = []
        if (own is None) != (have is None) or (truth is None) != (theirs is None):
            reasons.append("only one of the two models has it")
        elif _count(own) != _count(have) or _count(truth) != _count(theirs):  # an item of a sequence
            reasons.append("on some samples only one of the two models has it")
        else:
            if truth is not None and theirs is not None:
                dtype = (own or truth)[0].dtype.name
                reasons.append(self._algebra(truth, theirs, noise, FLOOR.get(dtype, FLOAT64_FLOOR)))
            if own is not None and have is not None:
                reasons.append(self._run(own, have, truth))
        return _measure(name, own, have, truth, theirs, "; ".join(reason for reason in reasons if reason))

    def _algebra(self, truth: Arrays, theirs: Arrays, noise: list[Any], floor: float) -> str:
        if self.user is not None:
            reason = agree(theirs, truth, user=self.user)
        else:
            shaken = [error(a, b) for draw in noise if _fits(draw, theirs) for a, b in zip(draw, theirs, strict=True)]
            reason = agree(theirs, truth, relative=floor, noise=shaken, per_channel=self.per_channel)
        return f"in float64 {reason}" if reason else ""

    def _run(self, own: Arrays, have: Arrays, truth: Arrays | None) -> str:
        """Accept what is close to the original, or as close to the truth as the original is."""
        against_own = agree(have, own, relative=self.relative, user=self.user)
        if against_own is None:
            return ""
        if truth is None or len(truth) < len(have) or not _fits(truth, own):
            return against_own
        own_errors = [error(a, b) for a, b in zip(own, truth, strict=True)]
        against_truth = agree(
            have,
            truth,
            relative=self.relative,
            noise=own_errors,
            factor=_AS_GOOD,
            per_channel=self.per_channel,
            user=self.user,
        )
        return against_truth or ""


def _count(arrays: Arrays | None) -> int:
    return 0 if arrays is None else len(arrays)


def _fits(these: Arrays | None, those: Arrays) -> bool:
    return these is not None and [a.shape for a in these] == [b.shape for b in those]


def _measure(
    name: str, own: Arrays | None, have: Arrays | None, truth: Arrays | None, theirs: Arrays | None, reason: str
) -> OutputReport:
    def largest(a: Arrays | None, b: Arrays | None) -> float | None:
        if a is None or b is None or any(x.shape != y.shape for x, y in zip(a, b, strict=False)):
            return None
        return worst([error(x, y) for x, y in zip(a, b, strict=False)])

    max_abs = largest(have, truth)
    scale = worst([error(t, np.zeros_like(t)) for t in truth]) if truth is not None else 0.0
    known = own or truth
    return OutputReport(
        name=name,
        dtype=str(known[0].dtype) if known else "?",
        max_abs=max_abs,
        max_rel=max_abs / scale if max_abs is not None and scale else None,
        reference_abs=largest(own, truth),
        difference=largest(have, own),
        algebra=largest(theirs, truth),
        ok=not reason,
        reason=reason,
    )
