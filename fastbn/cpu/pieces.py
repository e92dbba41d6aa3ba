# mypy: ignore-errors
"""Where the valid positions of a mask lie, as ``packing`` takes them: a few passes over the mask, in its own bytes.

The mask is flat, N samples of P positions each, at least one of both, 0 where one does not count. NumPy's diff and
nonzero take 8-35 times as long.
"""

from __future__ import annotations

from fastbn.cpu._jit import jit


@jit
def count(mask, runs, values):
    """Write to runs[n] and values[n] how many runs and valid positions the samples before n have."""
    N = runs.size - 1
    P = mask.size // N
    runs[0] = values[0] = 0
    for n in range(N):
        row = mask[n * P : (n + 1) * P]
        found = ones = int(row[0] != 0)
        for i in range(1, P):
            ones += row[i] != 0
            found += (row[i] != 0) & (row[i - 1] == 0)
        runs[n + 1], values[n + 1] = runs[n] + found, values[n] + ones


@jit
def singly(mask, N, start):
    """Write each valid position to ``start``, which has room for one more."""
    P, k = mask.size // N, 0
    for n in range(N):
        row = mask[n * P : (n + 1) * P]
        for i in range(P):
            start[k] = i
            k += row[i] != 0


@jit
def by_run(mask, N, per, start, place):
    """Write where each run begins and, behind all before it, its values: ``per`` a position."""
    P, k = mask.size // N, 0
    place[0] = 0
    for n in range(N):
        row = mask[n * P : (n + 1) * P]
        i = 0
        while i < P:
            if row[i] == 0:
                i += 1
                continue
            first = i
            while i < P and row[i] != 0:
                i += 1
            start[k], place[k + 1] = first * per, place[k] + (i - first) * per
            k += 1
