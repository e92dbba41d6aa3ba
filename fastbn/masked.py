"""Batch norm under a mask: ``core.Forward`` over packed values (``places``), a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, layout, views
from fastbn.core import Forward
from fastbn.errors import ArgumentValueError
from fastbn.places import Places, of_channels
from fastbn.saved import BatchSaved

Array = npt.NDArray[Any]


def valid(mask: Any, lengths: Any, x: Array, axis: int) -> Array:
    """Return the mask with the shape of x without its channel axis, from the one of the two that is given."""
    if lengths is None:
        return arguments.valid(mask, x, axis)
    if mask is not None:
        raise ArgumentValueError("mask, lengths", "one of them", "both")
    return arguments.from_lengths(lengths, x, axis)


def statistics(x: Array, mask: Array, axis: int, eps: float) -> tuple[int, Array]:
    """Return how many values of a channel are valid, and their statistics (zeros if none)."""
    if x.size == 0 or not mask.any():
        return 0, np.zeros(3 * x.shape[axis])
    x, where = layout.settle(x, axis)
    places, kind = Places(mask, x, axis, where), views.constant(1.0, x.shape[axis], arguments.arithmetic(x.dtype))
    return places.count, places.statistics(views.flat(x, where), kind, eps)


def forward(
    x: Any, weight: Any, bias: Any, axis: Any, activation: Any, residual: Any, out: Any, mask: Any, lengths: Any
) -> Forward:
    """Check arguments, of which all values count or only some."""
    if mask is not None or lengths is not None:
        x = arguments.tensor("x", x)
        axis = layout.normalise_axis(axis, x.ndim)
        mask = valid(mask, lengths, x, axis)
        if not mask.all():
            return MaskedForward(x, weight, bias, axis, activation, residual, out, mask)
    return Forward(x, weight, bias, axis, activation, residual, out, in_place=False)


class MaskedForward(Forward):
    """Checked arguments of which only some values count."""

    __slots__ = ("places",)

    def __init__(
        self, x: Array, weight: Any, bias: Any, axis: int, activation: Any, residual: Any, out: Any, mask: Array
    ):
        super().__init__(x, weight, bias, axis, activation, residual, out, in_place=False)
        self.places = Places(mask, x, self.axis, self.layout)

    @property
    def count(self) -> int:
        """Valid values per channel."""
        return self.places.count

    def train(self, running_mean: Array, running_var: Array, momentum: float, eps: float) -> Array:
        """See ``core.Forward``."""
        found: Array | None = None
        if self.places.lying is not None:
            found = self.places.lying.train(
                *map(self.flat, (self.x, self.residual, self.out)), self.weight, self.bias, running_mean, running_var,
                eps, momentum, self.relu,
            )  # fmt: skip
        return self._packed_train(running_mean, running_var, momentum, eps) if found is None else found

    def _packed_train(self, running_mean: Array, running_var: Array, momentum: float, eps: float) -> Array:
        stats = np.empty((3, self.weight.size))
        for some, values, residual in self._chunks():
            weight = self.weight[some]
            stats[:, some] = dispatch.kernels().train(
                values, residual, values, weight, self.bias[some], running_mean[some], running_var[some],
                self.places.shape(weight.size), eps, momentum, self.relu,
            ).reshape(3, -1)  # fmt: skip
        return stats.reshape(-1)

    def _chunks(self) -> Iterator[tuple[slice, Array, Array | None]]:
        """Channels and their packed x and residual; what x is turned into goes to y."""
        (x, residual, y), places = (self.flat(t) for t in (self.x, self.residual, self.out)), self.places
        rooms = places.room(x), places.room(residual)
        assert y is not None
        for some in places.chunks():
            values = places.pack(x, some, rooms[0])
            yield some, values, places.pack(residual, some, rooms[1])
            places.unpack(values, y, some)

    def statistics(self, eps: float) -> Array:
        """See ``core.Forward``."""
        x = self.flat(self.x)
        assert x is not None
        return self.places.statistics(x, self.weight, eps)

    def normalise(self, stats: Array) -> None:
        """See ``core.Forward``."""
        if self.places.lying is not None:
            tensors = map(self.flat, (self.x, self.residual, self.out))
            self.places.lying.infer(*tensors, self.weight, self.bias, stats, self.relu)
            return
        for some, values, residual in self._chunks():
            weight, shape = self.weight[some], self.places.shape(self.weight[some].size)
            known = of_channels(stats, some)
            dispatch.kernels().infer(values, residual, values, weight, self.bias[some], known, shape, self.relu)
        if self.count == 0:
            self.out[...] = 0

    def saved(self, stats: Array, frozen: bool, updated: int = 0) -> BatchSaved:
        """Return what backward needs."""
        saved = super().saved(stats, frozen, updated)
        saved.count, saved.places = self.count, self.places
        return saved
