"""Which batch normalizations to leave alone, as the user says it: names, glob patterns or a function of the name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fastbn.errors import ArgumentTypeError

__all__ = ["Keep", "keeper"]

Keep = str | Sequence[str] | Callable[[str], bool] | None
"""Which batch normalizations to leave alone: a name, a glob pattern, several of them, or a function of the name."""


def keeper(keep: Any, skip: Any = ()) -> Callable[[str], bool]:
    """Return a function of the name that says whether a batch normalization is to be left alone.

    Parameters
    ----------
    keep : str, sequence of str, callable or None
        Names or glob patterns, or such a function.
    skip : str or iterable of str
        Names, taken literally.

    Raises
    ------
    ArgumentTypeError
        One of them is none of the above.
    """
    skipped = frozenset(_strings("skip", "names as strings", skip))
    if keep is None:
        return skipped.__contains__
    if callable(keep):
        return lambda name: name in skipped or bool(keep(name))
    if not isinstance(keep, Iterable):
        raise ArgumentTypeError("keep", "a name, a pattern, a sequence of them or a callable", type(keep).__name__)
    patterns = _strings("keep", "names or patterns as strings", keep)
    return lambda name: name in skipped or any(name == p or fnmatch.fnmatchcase(name, p) for p in patterns)


def _strings(argument: str, expected: str, given: Any) -> list[str]:
    """A single string is one name, not its letters."""
    strings = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else None
    if strings is None or not all(isinstance(s, str) for s in strings):
        raise ArgumentTypeError(argument, expected, repr(given))
    return strings
