"""Pieces of masks (``pieces``): the runs or the values that NumPy finds, by kernel and without the JIT."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from fastbn.cpu import fallback, launch

MODULES = [fallback] if numba.config.DISABLE_JIT else [launch, fallback]
SHAPES = [(1, 1), (5, 1), (1, 300), (7, 60), (40, 64), (3, 0), (0, 4)]


def positions(table, per, P):
    """Return the numbers of the valid values, in a flat array of samples of P positions, that a table means."""
    first, start, place = table
    lengths = np.ones(start.size, np.int64) if place is None else np.diff(place)
    assert first[-1] == start.size == lengths.size
    found = []
    for n in range(first.size - 1):
        for i in range(first[n], first[n + 1]):
            assert start[i] >= 0 and start[i] + lengths[i] <= P * per
            found += list(range(n * P * per + start[i], n * P * per + start[i] + lengths[i]))
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("per", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_numpy_finds(rng, shape, per, module):
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        mask = rng.random(shape) < share
        expected = np.flatnonzero(np.repeat(mask.reshape(-1), per))
        table = module.pieces(mask.reshape(-1).view(np.int8), shape[0], per)
        assert positions(table, per, shape[1]) == expected.tolist()


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="without the JIT values are moved one by one")
def test_runs_where_they_pay(rng):
    mask = np.zeros((4, 100), np.int8)
    mask[:, :60] = 1
    assert launch.pieces(mask.reshape(-1), 4, 1)[2] is not None
    mask[:] = np.arange(100) % 2
    assert launch.pieces(mask.reshape(-1), 4, 1)[2] is None
    assert launch.pieces(mask.reshape(-1), 4, 8)[2] is not None  # rows: a position is a run itself


def test_bytes_that_are_neither_0_nor_1():
    """A mask seen through ``view`` may hold any byte; NumPy takes them all as true."""
    mask = np.array([0, 2, -1, 0, 127, 0, 0, 3], np.int8)
    for module in MODULES:
        for per in (1, 2):
            expected = np.flatnonzero(np.repeat(mask != 0, per)).tolist()
            assert positions(module.pieces(mask, 2, per), per, 4) == expected
