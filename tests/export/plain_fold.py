"""Small networks and their folds done by hand in float64: what the exporter is checked against."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from fastbn_export.layers import Conv, Linear


def norm(rng: np.random.Generator, size: int, dtype: Any = np.float32, axis: int = 1, activation: str | None = None):
    """Return what the exporter reads of a fastbn.BatchNorm, with uneven statistics."""
    return SimpleNamespace(
        weight=rng.uniform(0.5, 1.5, size).astype(dtype),
        bias=rng.normal(size=size).astype(dtype),
        running_mean=rng.normal(size=size).astype(dtype),
        running_var=rng.uniform(0.2, 3.0, size).astype(dtype),
        eps=1e-5,
        axis=axis,
        activation=activation,
    )


def folded(layer: Linear | Conv, bn: Any) -> Linear | Conv:
    """Return the layer that does what ``layer`` and then ``bn`` do, computed in float64 and rounded once."""
    weight = np.asarray(layer.weight)
    scale = bn.weight.astype(np.float64) / np.sqrt(bn.running_var.astype(np.float64) + bn.eps)
    shift = bn.bias - bn.running_mean * scale
    old = 0.0 if layer.bias is None else np.asarray(layer.bias).astype(np.float64)
    per_row = scale.reshape(-1, *[1] * (weight.ndim - 1))
    changed = {"weight": (weight * per_row).astype(weight.dtype), "bias": (old * scale + shift).astype(weight.dtype)}
    return type(layer)(**{**vars(layer), **changed})
