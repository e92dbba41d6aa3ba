"""Launch ``planes_masked``: runs (N, C, S) of which only some values count, in long pieces; see ``launch_masked``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn.cpu import launch, planes_masked, planes_masked_backward, plans, pool, tuning

Array = npt.NDArray[Any]


class Pieces(NamedTuple):
    """Valid values as ``planes_masked`` takes them."""

    first: Array
    begin: Array
    size: Array
    some: Array
    M: int  # valid values of a channel
    dims: tuple[int, int, int]

    def _how(self) -> tuple[bool, tuple[Any, ...], tuple[Any, ...]]:
        """Whether threads share the work, and what kernels take."""
        parallel = self.M * self.dims[1] >= tuning.PARALLEL
        return parallel, (self.first, self.begin, self.size), (self.M, *self.dims)

    def train(
        self, x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, running_mean: Array,
        running_var: Array, eps: float, momentum: float, relu: bool | None,
    ) -> Array:  # fmt: skip
        """See ``launch.train``."""
        parallel, table, numbers = self._how()
        stats = np.empty(3 * self.dims[1])
        tensors = (x, residual, out, weight, bias, running_mean, running_var, stats)
        streamed = tuning.streams(x, residual, out, over=(out, residual))
        work = (*tensors, *table, self.some, *numbers, eps, momentum, relu, streamed)
        pool.run(planes_masked.train, work, self.dims[1], parallel)
        return stats

    def moments(self, x: Array, weight: Array, eps: float) -> Array:
        """See ``launch.moments``."""
        parallel, table, numbers = self._how()
        stats = np.empty(3 * self.dims[1])
        work = (x, stats, weight[:0], *table, self.some, *numbers, eps)
        pool.run(planes_masked.moments, work, self.dims[1], parallel)
        return stats

    def infer(
        self, x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, stats: Array,
        relu: bool | None,
    ) -> None:  # fmt: skip
        """See ``launch.infer``."""
        parallel, table, _ = self._how()
        streamed = tuning.streams(x, residual, out, over=(out, x, residual))
        work = (x, residual, out, weight, bias, stats, *table, *self.dims, relu, streamed)
        pool.run(planes_masked.infer, work, self.dims[0], parallel)

    def backward(
        self, x: Array, grad: Array, y: Array | None, out: Array, grad_residual: Array | None, weight: Array,
        bias: Array, stats: Array, frozen: bool, relu: bool | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """See ``launch.backward``."""
        parallel, table, numbers = self._how()
        dweight, dbias = np.empty_like(weight), np.empty_like(bias)
        tensors = (x, grad, y, out, grad_residual)
        parameters = (weight, bias, dweight, dbias, stats)
        streamed = tuning.streams(*tensors, over=() if grad_residual is not None else (out, grad))
        work = (*tensors, *parameters, *table, *numbers, frozen, relu, streamed)
        pool.run(planes_masked_backward.backward, work, self.dims[1], parallel)
        return dweight, dbias


def pieces(table: launch.Table, M: int, dims: tuple[int, int, int], lanes: int) -> Pieces | None:
    """Return the pieces of the runs of (N, C, S) whose M values count; None where packing is as fast.

    Pieces of 40 values took 0.5 of the time forward and 0.8 backward, half types 1.2; of 20 values 0.7 and 1.0.
    """
    first, begin, place = table
    _, C, S = dims
    if place is None or M * C < tuning.LYING or tuning.PIECE * lanes * begin.size > M:
        return None
    size = np.diff(place)
    (whole,) = np.nonzero(size >= lanes)
    if not whole.size or plans.plan(dims, lanes).kind != "planes":
        return None
    a, b = whole[whole.size // 4], whole[3 * whole.size // 4]
    rows = np.searchsorted(first, (a, b), side="right") - 1
    some = rows * (C * S) + (begin[a], begin[b] + size[b] - lanes)
    return Pieces(first, begin, size, some, M, dims)
