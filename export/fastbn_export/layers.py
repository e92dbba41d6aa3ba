"""Plain descriptions of layers for `build`: weights and numbers, PyTorch's names and layouts, no behaviour.

`fastbn.BatchNorm` objects go between them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import ArrayLike

__all__ = [
    "AveragePool",
    "Conv",
    "Flatten",
    "GlobalAveragePool",
    "Layer",
    "Linear",
    "MaxPool",
    "ReLU",
    "Sigmoid",
    "Softmax",
]

Size = int | Sequence[int]
"""One number for all spatial axes, or one for each."""


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x @ weight.T + bias over the last axis.

    Attributes
    ----------
    weight : array_like, shape (out_features, in_features)
    bias : array_like, shape (out_features,), optional
    """

    weight: ArrayLike
    bias: ArrayLike | None = None


@dataclass(frozen=True, eq=False)
class Conv:
    """Convolution over one, two or three spatial axes of (N, C, ...).

    Attributes
    ----------
    weight : array_like, shape (out_channels, in_channels / groups, *kernel)
    bias : array_like, shape (out_channels,), optional
    stride, padding, dilation : int or sequence of int
        For all spatial axes, or for each; padding is zeros, the same on both sides.
    groups : int
    """

    weight: ArrayLike
    bias: ArrayLike | None = None
    stride: Size = 1
    padding: Size = 0
    dilation: Size = 1
    groups: int = 1


@dataclass(frozen=True)
class MaxPool:
    """Largest value of each window of (N, C, ...); ``stride`` defaults to ``kernel_size``."""

    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0


@dataclass(frozen=True)
class AveragePool:
    """Mean of each window of (N, C, ...); padded zeros count unless ``count_include_pad`` is False."""

    kernel_size: Size
    stride: Size | None = None
    padding: Size = 0
    count_include_pad: bool = True


@dataclass(frozen=True)
class GlobalAveragePool:
    """Mean over all spatial axes, kept with size 1."""


@dataclass(frozen=True)
class Flatten:
    """Collapse the axes from ``axis`` on into one, and those before it into another: the result has rank 2."""

    axis: int = 1


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)."""


@dataclass(frozen=True)
class Sigmoid:
    """1 / (1 + exp(-x))."""


@dataclass(frozen=True)
class Softmax:
    """exp(x) / sum(exp(x)) along ``axis``."""

    axis: int = -1


Layer = Any
"""One of the above, or a fastbn.BatchNorm."""
