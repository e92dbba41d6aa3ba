"""Group and layer norm on flat arrays: the kernels and their fallback say the same, over every kind of set."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from fastbn import groups
from fastbn.cpu import fallback_sets
from fastbn.groups import Groups


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="needs the kernels")
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("d", [Groups(37, 1, 24, 1), Groups(7, 3, 12, 5), Groups(5, 2, 4, 300)], ids=str)
def test_kernels_and_fallback_agree(rng, monkeypatch, d, affine):
    x, g = (rng.standard_normal((2, d.B * d.C * d.S)) * 2 + 1).astype(np.float32)
    weight, bias = rng.uniform(0.5, 2, (2, d.C)).astype(np.float32)
    results = []
    for twin in (False, True):
        if twin:
            monkeypatch.setattr("fastbn.dispatch.set_kernels", lambda: fallback_sets)
        y, dx = np.empty_like(x), np.empty_like(x)
        stats = groups.forward(x, y, (weight, bias) if affine else None, d, 1e-5)
        results.append([y, stats, dx, *groups.backward(x, g, dx, weight if affine else None, stats, d)])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(want).max()))


def test_sizes():
    d = Groups(23, 2, 6, 3)
    assert d.length == 9
