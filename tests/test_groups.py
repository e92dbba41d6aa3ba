"""Working off samples in pieces changes nothing but the order in which parameter gradients are added."""

from __future__ import annotations

import numpy as np
import pytest

from fastbn import groups
from fastbn.groups import Groups
from tests.tolerances import DTYPES, arithmetic


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [Groups(37, 1, 24, 1), Groups(7, 3, 12, 5), Groups(5, 2, 4, 300)], ids=str)
def test_pieces_are_the_whole(rng, monkeypatch, d, dtype):
    x, g = (rng.standard_normal((2, d.B * d.C * d.S)) * 2).astype(dtype)
    weight, bias = rng.uniform(0.5, 2, (2, d.C)).astype(arithmetic(dtype))
    results = []
    for piece in (1 << 30, 5 * d.C * d.S, 1):
        monkeypatch.setattr(groups, "PIECE", piece)
        y, dx = np.empty_like(x), np.empty_like(x)
        stats = groups.forward(x, y, (weight, bias), d, 1e-5)
        results.append([y, stats, dx, *groups.backward(x, g, dx, weight, stats, d)])
    tolerance = {"float64": 1e-12, "float32": 2e-5, "float16": 3e-3, "bfloat16": 2e-2}[np.dtype(dtype).name]
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            want = np.asarray(want, np.float64)
            assert np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * np.abs(want).max()


def test_the_cut_covers_all_samples(monkeypatch):
    monkeypatch.setattr(groups, "PIECE", 100)
    d = Groups(23, 2, 6, 3)
    pieces = groups._pieces(d)
    assert [p.B for _, p in pieces] == [5, 5, 5, 5, 3]
    assert [i for part, _ in pieces for i in range(23 * 18)[part]] == list(range(23 * 18))
    assert groups._pieces(d._replace(B=5)) == []
