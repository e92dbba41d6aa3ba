"""When are two outputs the same: errors against a tolerance per channel, NaN and infinity at the same places only.

Two rules. *Algebra*: both models lifted to float64 may differ by no more than the rounding of the changed weights,
measured by rounding them at random, or than the output's own type can show. *Run*: in its own dtype the candidate may
be as far from the original as that dtype allows, or as far from the float64 truth as the original is (times four).

The original's error is one draw of a random size, and where one direction dominates, as in a deep net that is badly
conditioned, one draw is more than four times another in one of six cases. So where the Run rule fails and Algebra does
not, the original is run up to eight times more with its factors an ulp off (`moved`), and 2.5 times the largest of
its errors is allowed. Only the original is moved, by what its own arithmetic does to it: a candidate that loses
precision does not excuse itself. Without a float64 truth, and under the user's own tolerance, there are no more draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOAT64_FLOOR", "FLOOR", "RELATIVE", "Tolerance", "agree", "error", "flatten", "spread", "worst"]

Array = NDArray[Any]

RELATIVE = {"float64": 1e-9, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""What a run in each dtype may lose, relative to the largest value of the output."""

FLOOR = {"float32": 2.0**-24, "float16": 2.0**-12, "bfloat16": 2.0**-9}
"""What an output of each dtype can hardly show, relative to its largest value: allowed on top of the noise."""

FLOAT64_FLOOR = 1e-10
"""What two float64 evaluations in another order may differ by, relative to the largest value."""

_SAFETY = 8.0
"""How far the rounding of the weights may exceed what random roundings of them did."""

_ENOUGH = 12
"""Values that a channel must have for its largest one to be a usable estimate."""


@dataclass(frozen=True)
class Tolerance:
    """The user's elementwise tolerance, ``|candidate - truth| <= atol + rtol * |truth|``, in place of both rules."""

    rtol: float
    atol: float


def flatten(names: Sequence[str], values: Sequence[Any]) -> list[tuple[str, Array]]:
    """Name every array among outputs that may be sequences or maps."""
    flat: list[tuple[str, Array]] = []
    for name, value in zip(names, values, strict=True):
        if isinstance(value, dict):
            flat += flatten([f"{name}[{key}]" for key in value], list(value.values()))
        elif isinstance(value, list):
            flat += flatten([f"{name}[{index}]" for index in range(len(value))], value)
        elif value is not None:
            flat.append((name, np.asarray(value)))
    return flat


def _is_float(array: Array) -> bool:
    return array.dtype.kind in "fc" or array.dtype.name == "bfloat16"


def _wide(array: Array) -> Array:
    return array if array.dtype.kind == "c" else array.astype(np.float64)


def mask_of(candidate: Array, base: Array) -> Array:
    """Return where a value is not finite in either and not the same in both."""
    if not _is_float(base) or not _is_float(candidate):
        return np.zeros(base.shape, bool)
    a, b = _wide(candidate), _wide(base)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.asarray(~(np.isfinite(a) & np.isfinite(b)) & ~same)


def error(candidate: Array, base: Array) -> Array:
    """Return |candidate - base|, 0 where both are the same NaN or infinity; for non-floats 1 where they differ."""
    if not _is_float(base) or not _is_float(candidate):
        return np.asarray(candidate != base).astype(np.float64)
    a, b = _wide(candidate), _wide(base)
    usable = np.isfinite(a) & np.isfinite(b)
    difference = np.zeros(a.shape)
    np.subtract(a, b, out=a if a.dtype.kind == "c" else difference, where=usable)
    if a.dtype.kind == "c":
        difference[usable] = np.abs(a[usable])
    return np.abs(difference)


def spread(arrays: Sequence[Array], per_channel: bool) -> Array:
    """Return the largest magnitude over many arrays of one output, for each channel if each has enough values.

    Returns
    -------
    ndarray
        Of a shape that broadcasts against the arrays: (1, C, 1, ...) or ().
    """
    arrays = [np.where(np.isfinite(a), np.abs(a), 0.0) for a in map(_wide, arrays)]
    first = arrays[0]
    channels = {a.shape[1] for a in arrays} if first.ndim > 1 else set()
    per_channel = per_channel and len(channels) == 1 and first.size > 0
    if per_channel and sum(a.size for a in arrays) // first.shape[1] >= _ENOUGH:
        axes = tuple(axis for axis in range(first.ndim) if axis != 1)
        return np.asarray(np.max([a.max(axis=axes, keepdims=True, initial=0.0) for a in arrays], axis=0))
    return np.asarray(max((float(a.max(initial=0.0)) for a in arrays), default=0.0))


def worst(errors: Sequence[Array]) -> float:
    """Return the largest of many errors."""
    return max((float(e.max(initial=0.0)) for e in errors), default=0.0)


def agree(
    candidate: Sequence[Array],
    base: Sequence[Array],
    *,
    relative: float = FLOAT64_FLOOR,
    noise: Sequence[Array] = (),
    factor: float = _SAFETY,
    per_channel: bool = True,
    user: Tolerance | None = None,
) -> str | None:
    """Judge all samples of one output; None when they agree, otherwise the reason why not.

    Parameters
    ----------
    candidate, base : sequences of ndarray
        The output in each sample.
    relative : float
        Tolerance relative to the largest value of ``base``.
    noise : sequence of ndarray
        Errors that are known to be harmless; ``factor`` times the largest of their channel is allowed too.
    factor : float
        See ``noise``.
    per_channel : bool
        Judge the noise of each channel (axis 1) by itself.
    user : Tolerance, optional
        The user's tolerance in place of the others.
    """
    for have, want in zip(candidate, base, strict=True):
        if have.shape != want.shape:
            return f"shape {list(want.shape)} became {list(have.shape)}"
        if (bad := int(mask_of(have, want).sum())) > 0:
            return f"{bad} of {want.size} values are not finite in one of the two only"
    errors = [error(have, want) for have, want in zip(candidate, base, strict=True)]
    if not _is_float(base[0]):
        return _count(errors, noise, factor)
    allowed = relative * spread(base, False) + (factor * spread(noise, per_channel) if noise else 0.0)
    for off, want in zip(errors, base, strict=True):
        limit = np.broadcast_to(allowed, off.shape)
        if user is not None:
            magnitude = np.where(np.isfinite(_wide(want)), np.abs(_wide(want)), 0.0)
            limit = user.atol + user.rtol * magnitude
        over = off > limit
        if over.any():
            place = np.unravel_index(int(np.argmax(off - limit)), off.shape)
            at = [int(i) for i in place]
            return (
                f"{over.sum()} of {off.size} values are off, at {at} by {off[place]:.3g} (allowed {limit[place]:.3g})"
            )
    return None


def _count(errors: Sequence[Array], noise: Sequence[Array], factor: float) -> str | None:
    """Integers, booleans and strings must be equal, but for as many as rounding is known to flip."""
    wrong = int(sum(e.sum() for e in errors))
    allowed = factor * max((float(n.sum()) for n in noise), default=0.0)
    return f"{wrong} of {sum(e.size for e in errors)} values differ" if wrong > allowed else None
