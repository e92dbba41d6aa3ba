"""Random operators that move axes about."""

from __future__ import annotations

from typing import Any

import numpy as np

from .fuzz_model import Fuzz, Shape, maker


@maker(4)
def _transpose(f: Fuzz, x: str, s: Shape) -> Any:
    if f.chance(0.2):
        return f.op("Transpose", x), s[::-1]
    perm = [int(i) for i in f.rng.permutation(len(s))]
    return f.op("Transpose", x, perm=perm), tuple(s[i] for i in perm)


@maker(4)
def _reshape(f: Fuzz, x: str, s: Shape) -> Any:
    i = int(f.rng.integers(len(s)))
    if f.chance(0.5) and len(s) > 2:
        i = min(i, len(s) - 2)
        new = (*s[:i], s[i] * s[i + 1], *s[i + 2 :])
    else:
        factors = [k for k in (2, 3) if s[i] % k == 0]
        if not factors or len(s) > 4:
            return None
        k = f.pick(*factors)
        new = (*s[:i], *f.pick((k, s[i] // k), (s[i] // k, k)), *s[i + 1 :])
    target = [0 if j < len(s) and j < i and f.chance(0.3) else d for j, d in enumerate(new)]
    if f.chance(0.3):
        target[int(f.rng.integers(len(target)))] = -1
    return f.op("Reshape", x, f.ints(*target)), new


@maker(2)
def _shuffle(f: Fuzz, x: str, s: Shape) -> Any:
    """Split an axis, transpose, merge: behind a linear operator by chance."""
    if len(s) not in (3, 4):
        return None
    i = int(f.rng.integers(1, len(s)))
    factors = [k for k in (2, 3) if s[i] % k == 0]
    if not factors:
        return None
    if f.chance(0.7):
        x = f.op("Conv", x, f.parameter(s[1], s[1], *[1] * (len(s) - 2)))
    k = f.pick(*factors)
    split = (*s[:i], k, s[i] // k, *s[i + 1 :])
    perm = list(range(len(split)))
    if f.chance(0.7):
        perm[i], perm[i + 1] = i + 1, i
    else:
        perm = [int(j) for j in f.rng.permutation(len(split))]
    y = f.op("Transpose", f.op("Reshape", x, f.ints(*split)), perm=perm)
    return f.op("Reshape", y, f.ints(*s)), s


@maker(1)
def _flatten(f: Fuzz, x: str, s: Shape) -> Any:
    axis = int(f.rng.integers(0, len(s) + 1))
    axis = min(axis, len(s) - 1)
    return f.op("Flatten", x, axis=axis), (int(np.prod(s[:axis])), int(np.prod(s[axis:])))


@maker(2)
def _squeeze(f: Fuzz, x: str, s: Shape) -> Any:
    ones = [i for i, d in enumerate(s) if d == 1]
    if ones and len(s) > 2:
        return f.with_axes("Squeeze", x, ones[0]), tuple(d for i, d in enumerate(s) if i != ones[0])
    if len(s) > 3:
        return None
    axis = int(f.rng.integers(-1, len(s) + 1))
    place = axis % (len(s) + 1)
    return f.with_axes("Unsqueeze", x, axis if f.opset >= 11 else place), (*s[:place], 1, *s[place:])
