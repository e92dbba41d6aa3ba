# mypy: ignore-errors
"""From one number a channel to one for each element of a sample, as the kernels of sets take short runs' affine."""

from __future__ import annotations

from numba import types
from numba.core.extending import overload

from fastbn.cpu._jit import helper
from fastbn.cpu.columns import fill, phase, repeat
from fastbn.cpu.simd import get, lanes, like, load, load_n, store, store_n


@helper
def room(x, period):
    """Elements that ``by_element`` may write: ``period``, a vector, what whole vectors write too much, a ``place``."""
    W = lanes(x)
    return (period + 4 * W - 1) // W * W


@helper
def place(to, y, L):
    """Where numbers by element lie best in ``to``: so that they begin a line where y does, set by set of L elements.

    Elsewhere each load of them is two lines, 1.25x where y begins inside of one.
    """
    return to + phase(y, 0, L)


@helper
def _spread(x, values, each, period, to):
    """to[j] = values[j // each] for j < period, and the first ones again in the vector behind: it may cross a seam."""
    W, i = lanes(x), 0
    if each == 1:
        while i + W <= period:
            store(to, i, load(values, i))
            i += W
        if i < period:
            store_n(to, i, load_n(values, i, period - i), period - i)
    else:
        for c in range(period // each):
            fill(to, c, each, get(values, c))
    repeat(to, period, period + W)
    return to


def by_element(x, values, each, period, S, to):
    """Numbers by element, written to ``to``, from those by channel; they themselves if S, and None of None."""
    raise NotImplementedError("in kernels only")


@overload(by_element)
def _by_element(x, values, each, period, S, to):
    if isinstance(values, types.NoneType) or not isinstance(S, types.NoneType):
        return lambda x, values, each, period, S, to: values
    return lambda x, values, each, period, S, to: _spread(x, like(x, values), each, period, like(x, to))
