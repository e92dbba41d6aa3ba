"""Launch ``rows_masked``: rows (N, C) of which only some count, in long runs; see ``launch_masked``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn.cpu import launch, plans, pool, rows_masked, rows_swept, tuning
from fastbn.cpu.band import NEAR

Array = npt.NDArray[Any]


class Stretches(NamedTuple):
    """Valid rows as ``rows_masked`` takes them."""

    at: Array
    size: Array
    bands: Array
    some: Array  # eight valid rows, for pivots
    M: int  # valid rows
    C: int
    V: int

    @property
    def dims(self) -> tuple[int, int, int]:
        """Shape of the valid values."""
        return self.M, self.C, 1

    def _how(self) -> tuple[bool, int, tuple[Any, ...]]:
        """Whether threads share the work, the number of bands, and what kernels take."""
        values = self.M * self.C
        how = self.at, self.size, self.bands, self.V, values > NEAR
        return values >= tuning.PARALLEL, self.bands.size - 1, how

    def train(
        self, x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, running_mean: Array,
        running_var: Array, eps: float, momentum: float, relu: bool | None,
    ) -> Array | None:  # fmt: skip
        """See ``launch.train``."""
        stats, columns = self._moments(x, weight, running_mean, running_var, eps, momentum)
        if stats is not None:
            self._normalise(x, residual, out, weight, bias, stats, columns, relu)
        return stats

    def moments(self, x: Array, weight: Array, eps: float) -> Array | None:
        """See ``launch.moments``."""
        return self._moments(x, weight, weight[:0], weight[:0], eps, 0.0)[0]

    def infer(
        self, x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, stats: Array,
        relu: bool | None,
    ) -> None:  # fmt: skip
        """See ``launch.infer``."""
        columns = plans.room_for_columns(weight, self.V, 3)
        self._normalise(x, residual, out, weight, bias, stats, columns, relu)

    def _moments(
        self, x: Array, weight: Array, running_mean: Array, running_var: Array, eps: float, momentum: float
    ) -> tuple[Array | None, Array]:
        parallel, down, how = self._how()
        stats, part = np.empty(3 * self.C), plans.room_for_sums(self.V, down)
        columns = plans.room_for_columns(weight, self.V, 3)
        some = np.ascontiguousarray(x.reshape(-1, self.C)[self.some]).reshape(-1)
        rows_swept.pivots(some, columns, (self.some.size, self.C, 1), self.V)
        pool.run(rows_masked.sums, (x, None, None, None, None, columns, part, *how, None), down, parallel)
        fine = rows_swept.settle_train(
            x, columns, part, stats, running_mean, running_var, self.dims, self.V, down, eps, momentum, True
        )
        return stats if fine else None, columns

    def _normalise(
        self, x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, stats: Array, columns: Array,
        relu: bool | None,
    ) -> None:  # fmt: skip
        parallel, down, how = self._how()
        streamed = tuning.streams(x, residual, out, over=(out, x, residual))
        rows_swept.affines(x, out, stats, weight, bias, columns, self.dims, self.V)
        pool.run(rows_masked.normalise, (x, residual, out, columns, *how, relu, streamed), down, parallel)

    def backward(
        self, x: Array, grad: Array, y: Array | None, out: Array, grad_residual: Array | None, weight: Array,
        bias: Array, stats: Array, frozen: bool, relu: bool | None,
    ) -> tuple[Array, Array] | None:  # fmt: skip
        """See ``launch.backward``."""
        parallel, down, how = self._how()
        dweight, dbias = np.empty_like(weight), np.empty_like(bias)
        tensors = (x, grad, y, out, grad_residual)
        streamed = tuning.streams(*tensors, over=() if grad_residual is not None else (out, grad))
        columns, part = plans.room_for_columns(weight, self.V, 5), plans.room_for_sums(self.V, down)
        rows_swept.affines(x, out, stats, weight, bias, columns, self.dims, self.V)
        early = grad_residual if streamed and plans.lined(grad_residual, self.C) else None
        pool.run(rows_masked.sums, (x, grad, y, early, out, columns, part, *how, relu), down, parallel)
        if not rows_swept.settle_backward(
            x, grad, y, out, columns, part, stats, weight, bias, dweight, dbias, self.dims, self.V, down,
            frozen, relu, True,
        ):  # fmt: skip
            return None
        if early is not None:  # it holds u
            tensors, relu = (x, early, None, out, None), None
        pool.run(rows_masked.gradient, (*tensors, columns, *how, relu, streamed), down, parallel)
        return dweight, dbias


def stretches(table: launch.Table, per: int, M: int, C: int, lanes: int) -> Stretches | None:
    """Return the stretches of M valid rows of C; None where packing is as fast. ``per``: elements of a sample."""
    first, start, place = table
    values = M * C
    if place is None or values < tuning.LYING or values < tuning.STRETCH * start.size or C > 2 * tuning.WIDTH:
        return None
    V = C * plans.side_by_side(C, M, tuning.MATRIX, lanes)
    least, most = tuning.BAND
    band = max(4 * V, min(most, max(least, values // 16)) // V * V)
    room = start.size + 2 * (values // band + 1)
    at, size, bands = (np.zeros(room + 1, np.int64) for _ in range(3))
    count, down = rows_masked.cut(first, start, place, per, V, band, at, size, bands)
    at, size = at[:count], size[:count]
    numbers = np.arange(8) * (M - 1) // 7
    before = np.cumsum(size) // C
    of = np.searchsorted(before, numbers, side="right")
    some = (at[of] + size[of]) // C - (before[of] - numbers)
    return Stretches(at, size, bands[: down + 1], some, M, C, V)
