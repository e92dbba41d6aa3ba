"""What a mask changes in a channel's statistics: where its pivot is taken, how many values count, what may move.

Factories take ``masked`` as a Python constant: without a mask nothing of it is left in the machine code. ``tally`` is
what ``masks`` works out: the number of valid places, and four of them.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any, NamedTuple

from fastbn.cuda.channel import make_pivot, make_pivot_at
from fastbn.cuda.driver import ARITHMETIC, device, types

int64 = types.int64


class Counted(NamedTuple):
    """The functions of one kind of tensors."""

    pivot: Any  # (x, channel, N, C, S, tally) -> a number near the mean
    values: Any  # (N, S, tally) -> how many values count, as an integer
    moving: Any  # (unbias, flags, tally) -> do running statistics move, and the factor of their variance


def make_counted(kind: str, masked: bool) -> Counted:
    """Return them. ``flags``: 4 running statistics move; under a mask, 8: by the biased variance."""
    A, everywhere, at = ARITHMETIC[kind], make_pivot(kind), make_pivot_at(kind)

    @device
    def pivot(x, c, N, C, S, tally):
        if masked:
            return at(x, c, C, S, tally)
        else:
            return everywhere(x, c, N, C, S)

    @device
    def values(N, S, tally):
        if masked:
            return int64(tally[0])
        else:
            return int64(N) * S

    @device
    def moving(unbias, flags, tally):
        moves = flags & 4 != 0
        if masked:
            moves = moves and tally[0] > 1
            if moves and flags & 8 == 0:
                unbias = A(tally[0]) / A(tally[0] - 1)
        return moves, unbias

    return Counted(pivot, values, moving)
