"""The verdict on one output, from what both models gave in their own types and in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from fastbn_export.compare import FLOAT64_FLOOR, FLOOR, RELATIVE, Tolerance, agree, error, worst
from fastbn_export.verdict import OutputReport

__all__ = ["Judge"]

_AS_GOOD = 4.0
"""How much worse than the original's own error the candidate's may be."""

_AS_REDRAWN = 2.5
"""The same of the largest error of the original in several roundings, which is no matter of luck."""

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
        redraws: Iterable[Arrays | None] = (),
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
        redraws : iterable of lists of ndarray
            What the reference gave in its own types with other roundings; read no further than needed, and only if
            the two are the same in float64.
        """
        reason, same = "", None
        if (own is None) != (have is None) or (truth is None) != (theirs is None):
            reason = "only one of the two models has it"
        elif _count(own) != _count(have) or _count(truth) != _count(theirs):  # an item of a sequence
            reason = "on some samples only one of the two models has it"
        else:
            reasons = []
            if truth is not None and theirs is not None:
                dtype = (own or truth)[0].dtype.name
                reasons.append(self._algebra(truth, theirs, noise, FLOOR.get(dtype, FLOAT64_FLOOR)))
                same = not reasons[0]
            if own is not None and have is not None:
                reasons.append(self._run(own, have, truth, redraws if same and self.user is None else ()))
            reason = "; ".join(reason for reason in reasons if reason)
        return replace(_measure(name, own, have, truth, theirs, reason), same_in_float64=same)

    def _algebra(self, truth: Arrays, theirs: Arrays, noise: list[Any], floor: float) -> str:
        if self.user is not None:
            reason = agree(theirs, truth, user=self.user)
        else:
            shaken = [error(a, b) for draw in noise if _fits(draw, theirs) for a, b in zip(draw, theirs, strict=True)]
            reason = agree(theirs, truth, relative=floor, noise=shaken, per_channel=self.per_channel)
        return f"in float64 {reason}" if reason else ""

    def _run(self, own: Arrays, have: Arrays, truth: Arrays | None, redraws: Iterable[Arrays | None]) -> str:
        """Accept what is close to the original, or about as close to the truth as it is, in one of its roundings."""
        reason = agree(have, own, relative=self.relative, user=self.user)
        if reason is None or truth is None or not _fits(truth, own[: len(truth)]):
            return reason or ""
        base = [*truth, *own[len(truth) :]]  # float64 may have been too slow for all samples
        noise: list[Any] = []
        for factor, draw in chain([(_AS_GOOD, own)], ((_AS_REDRAWN, draw) for draw in redraws)):
            if draw is None or not _fits(draw, base):
                continue
            noise += [error(a, b) for a, b in zip(draw, base, strict=True)]
            reason = agree(
                have,
                base,
                relative=self.relative,
                noise=noise,
                factor=factor,
                per_channel=self.per_channel,
                user=self.user,
            )
            if reason is None:
                return ""
        return reason or ""


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
