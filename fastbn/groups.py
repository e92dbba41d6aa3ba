"""Statistics per (sample, group), affine per channel: group norm on (B, C, S), layer norm as one group on (R, D, 1).

A set of values that shares statistics is contiguous; the affine runs along another axis than the statistics, so these
have kernels of their own (``cpu.sets``): one call forward, one backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

from fastbn import dispatch, views

Array = npt.NDArray[Any]


class Groups(NamedTuple):
    """Sizes: samples, groups, channels, values behind the channel axis."""

    B: int
    G: int
    C: int
    S: int

    @property
    def length(self) -> int:
        """Values that share statistics."""
        return self.C // self.G * self.S


def forward(x: Array, out: Array, affine: tuple[Array, Array] | None, d: Groups, eps: float) -> Array:
    """Normalise flat x into flat out; ``affine`` is (weight, bias) by channel. Returns statistics by set."""
    weight, bias = (None, None) if affine is None else affine
    stats: Array = dispatch.set_kernels().train(views.raw(x), views.raw(out), weight, bias, d, eps)
    return stats


def backward(x: Array, grad: Array, out: Array, weight: Array | None, stats: Array, d: Groups) -> tuple[Array, Array]:
    """Gradient of flat x into flat out, which may be grad; returns dweight and dbias in float64, by channel.

    With v = weight*u: dx = invstd*(v - mean(v) - xhat*mean(v*xhat)) over each set (Wu & He 2018, arXiv:1803.08494).
    ``weight`` None: no affine, no gradients of it (zeros).
    """
    raw = (views.raw(x), views.raw(grad), views.raw(out))
    sums: tuple[Array, Array] = dispatch.set_kernels().backward(*raw, weight, stats, d)
    return sums
