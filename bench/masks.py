"""Batch norm of padded sequences: what is measured, by whom, and how it is checked.

Cases "masked" and "masked_backward" on (N, C, T) or, channels last, (N, T, C); a sample has between half and all of T
steps. Floors count all T. Who has no masks packs by the mask, normalises rows and puts them back, as users of PyTorch
do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.data import Data
from fastbn import reference

Call = Callable[[], object]
Array = npt.NDArray[Any]


def lengths(data: Data) -> Array:
    """Return how many steps of each sample count."""
    steps = data.shape[3 - data.axis]
    return np.random.default_rng(0).integers(steps // 2, steps + 1, data.shape[0])


def valid(data: Data) -> Array:
    """Return which steps count, (N, T)."""
    found: Array = np.arange(data.shape[3 - data.axis]) < lengths(data)[:, None]
    return found


def fastbn(data: Data) -> Call:
    """Ours, through the public functions."""
    import fastbn as f

    d, counts = data, lengths(data)

    def forward(out: Array) -> Any:
        return f.batch_norm_train(d.x, d.weight, d.bias, axis=d.axis, lengths=counts, out=out)

    if d.case.op == "masked":
        return lambda: forward(d.out)
    saved = forward(d.out2)[1]
    return lambda: f.backward(d.grad, saved, out=d.out)


def torch(data: Data) -> Call:
    """PyTorch eager: pack, normalise, put back."""
    import torch as t

    d = data
    x, grad, out = (t.from_numpy(a).movedim(d.axis, -1) for a in (d.x, d.grad, d.out))
    mask, w, b = t.from_numpy(valid(d)), t.from_numpy(d.weight.copy()), t.from_numpy(d.bias.copy())

    def put(values: Any) -> None:
        out.zero_()
        out[mask] = values

    def forward() -> Any:
        return t.native_batch_norm(x[mask], w, b, None, None, True, 0.1, 1e-5)

    if d.case.op == "masked":
        return lambda: put(forward()[0])
    packed, (_, mean, invstd) = x[mask], forward()
    return lambda: put(
        t.ops.aten.native_batch_norm_backward(
            grad[mask], packed, w, None, None, mean, invstd, True, 1e-5, [True, True, True]
        )[0]
    )


def error(data: Data, result: Array) -> float:
    """Compare three channels with the float64 reference."""
    d, mask = data, valid(data)
    channels = np.unique(np.linspace(0, d.weight.size - 1, 3).astype(int))
    x, grad, found = (
        np.moveaxis(a.take(channels, d.axis), d.axis, -1).astype(np.float64) for a in (d.x, d.grad, result)
    )
    mean, var = reference.statistics(x[mask])
    w, b = d.weight[channels], d.bias[channels]
    expected = np.zeros_like(x)
    if d.case.op == "masked":
        expected[mask] = reference.apply(x[mask], mean, var, w, b)
    else:
        expected[mask] = reference.backward(grad[mask], x[mask], mean, var, w, b)[0]
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
