"""What a batch normalization is in inference: ``y = scale * x + shift`` along one axis.

Requirement: the axis travels with the map, everything is float64, and a map is never changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "ChannelAffine", "Dims", "follow", "same_size", "stated_size"]

Array = npt.NDArray[Any]
Dims = tuple[int | str | None, ...]
"""A shape as far as it is known: an int, a symbol (equal symbols are equal sizes) or None for each dimension."""

_DENSE_LIMIT = 1 << 22
"""Longest period, in elements, that `follow` writes out to see whether a map that spans two axes is constant on one."""


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """The map ``y = scale * x + shift``, one scale and one shift for each index of `axis`.

    Parameters
    ----------
    scale, shift : float64 arrays of shape (C,)
    axis : int
        The axis, counted from 0, that the C values lie along.
    """

    scale: Array
    shift: Array
    axis: int

    @staticmethod
    def of(scale: Any, shift: Any, axis: int, size: int | None = None) -> ChannelAffine:
        """Make a map from anything array-like; scalars are repeated `size` times."""
        s = np.atleast_1d(np.asarray(scale, np.float64))
        t = np.atleast_1d(np.asarray(shift, np.float64))
        n = size if size is not None else max(s.size, t.size)
        return ChannelAffine(np.broadcast_to(s, (n,)), np.broadcast_to(t, (n,)), axis)

    @property
    def size(self) -> int:
        """Number of channels C."""
        return int(self.scale.size)

    @cached_property
    def has_scale(self) -> bool:
        """Whether any scale differs from one."""
        return bool((self.scale != 1.0).any())

    @cached_property
    def has_shift(self) -> bool:
        """Whether any shift differs from zero."""
        return bool(self.shift.any())

    @property
    def is_identity(self) -> bool:
        """Whether ``y = x``."""
        return not self.has_scale and not self.has_shift

    @property
    def is_uniform(self) -> bool:
        """Whether all channels have the same scale and the same shift."""
        return bool(np.all(self.scale == self.scale[:1]) and np.all(self.shift == self.shift[:1]))

    @property
    def is_finite(self) -> bool:
        """Whether no value is infinite or NaN."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())

    def equals(self, other: ChannelAffine) -> bool:
        """Whether it is the same map."""
        pairs = ((self.scale, other.scale), (self.shift, other.shift))
        return self is other or (self.axis == other.axis and all(np.array_equal(a, b) for a, b in pairs))

    def at(self, axis: int) -> ChannelAffine:
        """The same values along another axis."""
        return ChannelAffine(self.scale, self.shift, axis)

    def linear(self) -> ChannelAffine:
        """The scale alone."""
        return ChannelAffine(self.scale, np.zeros_like(self.shift), self.axis)

    def take(self, indices: Any) -> ChannelAffine:
        """The map whose channel k is this map's channel ``indices[k]``; `indices` may be a slice."""
        return ChannelAffine(self.scale[indices], self.shift[indices], self.axis)

    def after(self, first: ChannelAffine) -> ChannelAffine:
        """Apply this map after `first`: ``scale * (first.scale * x + first.shift) + shift``."""
        return ChannelAffine(self.scale * first.scale, self.scale * first.shift + self.shift, self.axis)

    def within(self, start: int, total: int) -> ChannelAffine:
        """Extend to `total` channels by the identity; this map's channels lie at ``start : start + size``."""
        scale, shift = np.ones(total), np.zeros(total)
        scale[start : start + self.size] = self.scale
        shift[start : start + self.size] = self.shift
        return ChannelAffine(scale, shift, self.axis)

    def broadcast(self, vector: Array, rank: int) -> Array:
        """Shape `vector` (C,) so that it lies along the axis of a tensor of `rank` dimensions."""
        shape = [1] * rank
        shape[self.axis] = self.size
        return vector.reshape(shape)


def stated_size(size: int | str | None) -> int | str | None:
    """A size as a model states it; below zero, or an empty name, it says nothing: some exporters write -1."""
    if isinstance(size, int):
        return size if size >= 0 else None
    return size or None


def same_size(a: Sequence[int | str | None], b: Sequence[int | str | None]) -> bool:
    """Whether two runs of dimensions certainly hold the same number of elements."""

    def key(dims: Sequence[int | str | None]) -> tuple[int, list[str]] | None:
        if any(d is None or d == 0 for d in dims):
            return None
        return prod(d for d in dims if isinstance(d, int)), sorted(d for d in dims if isinstance(d, str))

    ka = key(a)
    return ka is not None and ka == key(b)


def _static(dims: Sequence[int | str | None]) -> int | None:
    total = 1
    for d in dims:
        if not isinstance(d, int) or d == 0:
            return None
        total *= d
    return total


def follow(affine: ChannelAffine, source: Dims, target: Dims) -> ChannelAffine | None:
    """Follow the channel axis through a row-major reshape, in either direction.

    An element at flat position f belongs to channel ``(f // R) % C`` where R is the number of elements behind the axis.
    An axis of the target with S entries and Q elements behind it sees a map of its own when ``(f // R) % C`` depends
    only on ``(f // Q) % S``.

    Parameters
    ----------
    affine : ChannelAffine
        The map on the tensor of shape `source`.
    source, target : Dims
        The shapes on the map's side and on the other side of the reshape.

    Returns
    -------
    ChannelAffine or None
        The same map on a tensor of shape `target`; None when it is not a map along one of its axes, or when unknown
        dimensions hide whether it is.
    """
    a, channels = affine.axis, affine.size
    for b, size in enumerate(target):
        if size == channels and source[a] == channels:
            left, right = same_size(source[:a], target[:b]), same_size(source[a + 1 :], target[b + 1 :])
            if left or right:
                return affine.at(b)
    behind = _static(source[a + 1 :])
    if behind is not None:
        for b, size in enumerate(target):
            rest = _static(target[b + 1 :])
            if isinstance(size, int) and size > 0 and rest is not None:
                found = _onto(affine, behind, size, rest)
                if found is not None:
                    return ChannelAffine(found.scale, found.shift, b)
    if affine.is_uniform and channels:
        for b, size in enumerate(target):
            if isinstance(size, int) and size > 0:
                return ChannelAffine.of(affine.scale[0], affine.shift[0], b, size)
    return None


def _onto(affine: ChannelAffine, behind: int, size: int, rest: int) -> ChannelAffine | None:
    """The map on an axis of `size` entries with `rest` elements behind each, if there is one."""
    channels = affine.size
    if behind % rest == 0 and size % (behind // rest * channels) == 0:
        inner = behind // rest
        return affine.take(np.arange(size) // inner % channels)
    period = channels * behind
    if period > _DENSE_LIMIT or period % (size * rest):
        return None
    blocks = (np.arange(period) // behind).reshape(-1, size, rest)
    for vector in (affine.scale, affine.shift):
        dense = vector[blocks]
        if not np.array_equal(dense, np.broadcast_to(dense[:1, :, :1], dense.shape)):
            return None
    return affine.take(blocks[0, :, 0])
