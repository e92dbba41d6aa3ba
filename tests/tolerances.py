"""How far a result may lie from the float64 truth, by dtype: one rounding of the result and a few of its terms.

A bound grows with the terms that make up a number, not with the number: 1e4 - 1e4 may be off by a rounding of 1e4.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BF16]

# Half a unit in the last place, and half the smallest number, of what is stored.
ROUNDING = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 2.0**-149, "float64": 0.0, "float16": 2.0**-25, "bfloat16": 2.0**-126}
# What sums and a handful of operations may lose, relative to their terms: 1e-6 in float32 (and so for half types), as
# the package promises. float64 sums run over a whole channel.
ARITHMETIC = {"float32": 2.0**-20, "float64": 2.0**-42, "float16": 2.0**-20, "bfloat16": 2.0**-20}


def arithmetic(dtype):
    """Return the dtype of parameters and statistics."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def bound(want, terms, dtype):
    """Return the largest error of ``want``, stored in ``dtype``, if its terms have the magnitudes ``terms``."""
    name = np.dtype(dtype).name
    return 1.01 * ROUNDING[name] * np.abs(want) + TINY[name] + ARITHMETIC[name] * np.abs(terms)


def assert_within(got, want, limit, what):
    """Assert |got - want| <= limit for every element; NaN and inf must be the same."""
    got = np.asarray(got).astype(np.float64)
    want, limit = np.broadcast_to(want, got.shape), np.broadcast_to(limit, got.shape)
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite], equal_nan=True), f"{what}: other NaN or inf"
    excess = np.where(finite, np.abs(got - np.where(finite, want, 0.0)), 0.0) / np.where(finite & (limit > 0), limit, 1)
    worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
    ok = bool((excess[worst] <= 1.0) and np.isfinite(got[finite]).all())
    assert ok, f"{what}: {got[worst]} instead of {want[worst]} at {worst}, {excess[worst]:.3g} times the bound"
