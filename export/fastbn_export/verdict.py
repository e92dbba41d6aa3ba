"""What a verification found, output by output: for people (str), for programs (attributes) and for files (to_dict)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["OutputReport", "VerifyReport"]


@dataclass(frozen=True)
class OutputReport:
    """One output of the two models, over all samples.

    Attributes
    ----------
    name, dtype : str
        Of the reference's output.
    max_abs, max_rel : float or None
        Error of the candidate against the float64 truth: absolute, and relative to the largest value.
    reference_abs : float or None
        The same absolute error of the reference.
    difference : float or None
        Largest difference of candidate and reference, each run in its own types.
    algebra : float or None
        Largest difference of the two models when both are evaluated in float64.
    same_in_float64 : bool or None
        Whether that difference is none but the rounding of changed weights; None where float64 was not possible.
    ok : bool
        Whether the output is the same.
    reason : str
        Why not.
    """

    name: str
    dtype: str
    max_abs: float | None
    max_rel: float | None
    reference_abs: float | None
    difference: float | None
    algebra: float | None
    ok: bool
    reason: str = ""
    same_in_float64: bool | None = None


@dataclass(frozen=True)
class VerifyReport:
    """The verdict of :func:`verify`.

    Attributes
    ----------
    ok : bool
        Whether the candidate may stand in for the reference.
    outputs : list of OutputReport
        What was measured.
    samples : int
        How many inputs were tried.
    inputs : dict of str to str
        What they looked like.
    checks : list of str
        Which comparisons could be made.
    notes : list of str
        What could not, and why; why the verdict is what it is.
    """

    ok: bool
    outputs: list[OutputReport] = field(default_factory=list)
    samples: int = 0
    inputs: dict[str, str] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def only_rounding(self) -> bool:
        """Whether what failed, failed in its own types alone, and is the same function in float64."""
        wrong = [output for output in self.outputs if not output.ok]
        return bool(wrong) and all(output.same_in_float64 for output in wrong)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and dicts, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        shapes = ", ".join(f"{name}: {what}" for name, what in self.inputs.items())
        lines = [f"{'same' if self.ok else 'NOT the same'} on {self.samples} samples ({shapes or 'no inputs'})"]
        lines += [f"checked: {', '.join(self.checks) or 'nothing'}"]
        if self.ok and not self.checks and not self.outputs:  # nothing was run, so nothing is claimed
            lines = ["checked: nothing"]
        for output in self.outputs:
            numbers = {
                "error": output.max_abs,
                "relative": output.max_rel,
                "original's error": output.reference_abs,
                "difference": output.difference,
            }
            shown = ", ".join(f"{what} {number:.3g}" for what, number in numbers.items() if number is not None)
            verdict = "ok" if output.ok else f"FAILED: {output.reason}"
            lines.append(f"  {output.name} ({output.dtype}): {verdict}; {shown or 'not run'}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])
