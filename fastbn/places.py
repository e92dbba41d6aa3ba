"""Where the valid values of a masked array lie, and how they get into a kernel and out of it.

A mask means packing: only the valid values count, what a masked position holds (NaN, inf) never does, and results are
zero there. Many values in long runs are read where they lie (``lying``). Others are packed, (N, C, S) to (C, M) and so
normalised as (1, C, M), rows (R, C) to (M, C); channels-first arrays are worked off a few channels at a time, packed
into memory that stays in the cache, so that masks cost two more passes through the cache and not through memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import dispatch, layout, recycled, views
from fastbn.cpu.pool import get_num_threads

Array = npt.NDArray[Any]
Table = tuple[Array, Array, Array | None]

CHUNK = 1 << 19  # values packed at a time for each thread (2 MB of float32); a quarter: 1.15x, four times: 1.3x
SPREAD = 64  # values of a channel from which packing a few channels at a time ends up in the kernel that all would


def of_channels(stats: Array, channels: slice) -> Array:
    """Return the statistics of some channels."""
    return np.ascontiguousarray(stats.reshape(3, -1)[:, channels]).reshape(-1)


class Places:
    """The valid values of an array, in the order they lie in memory.

    Attributes
    ----------
    count : int
        Values per channel, M.
    """

    __slots__ = ("channels", "count", "dims", "lying", "step", "table", "whole")

    lying: Any  # ``launch_masked.Lying``; None: the values are packed

    def __init__(self, mask: Array, x: Array, axis: int, where: layout.Layout):
        shape = tuple(x.shape[a] for a in where.order)
        N, C, S = layout.contiguous(shape, where.order.index(axis)).dims
        mask = mask.transpose([a - (a > axis) for a in where.order if a != axis])
        self.channels, self.count, self.whole = C, int(np.count_nonzero(mask)), S == 1
        samples = N
        if self.whole:  # rows; all channels of a row lie side by side
            samples = shape[0] if len(shape) > 2 else 1
        self.dims = (samples, 1, N // max(samples, 1) * C) if self.whole else (N, C, S)
        flat = views.raw(np.ascontiguousarray(mask).reshape(-1).view(np.int8))
        self.table = dispatch.kernels().pieces(flat, samples, C if self.whole else 1)
        most = C if self.whole or self.count < SPREAD else CHUNK * get_num_threads() // self.count
        self.step = max(1, min(C, most))  # channels that are worked off together
        module = dispatch.masked_kernels()
        self.lying = module.find(self.table, self.count, C, self.dims, self.whole, x) if module else None

    def shape(self, channels: int) -> tuple[int, int, int]:
        """Return what kernels take for so many packed channels."""
        if not self.whole:
            return 1, channels, self.count
        return layout.contiguous((self.count, channels), 1).dims

    def chunks(self) -> Iterator[slice]:
        """Channels that are worked off together; none where no value is valid."""
        for lo in range(0, self.channels if self.count else 0, self.step):
            yield slice(lo, min(self.channels, lo + self.step))

    def room(self, x: Array | None) -> Array | None:
        """Return memory for a chunk of x, for one after the other: fresh memory for each costs more than packing."""
        return None if x is None else recycled.empty((self.step * self.count,), x.dtype)

    def _numbers(self, packed: Array, channels: slice) -> tuple[Table, int, int, int, int, int]:
        """Return what ``launch.pack`` and ``launch.unpack`` take."""
        lo, hi, M = (0, 1, packed.size) if self.whole else (channels.start, channels.stop, self.count)
        return self.table, self.dims[1], self.dims[2], M, lo, hi

    def pack(self, x: Any, channels: slice, room: Any) -> Any:
        """Return the valid values of these channels of a flat array, packed into room."""
        if x is None:
            return None
        packed = room[: (channels.stop - channels.start) * self.count]
        dispatch.kernels().pack(x, packed, *self._numbers(packed, channels))
        return packed

    def unpack(self, packed: Array, y: Array, channels: slice) -> None:
        """Put packed values of these channels into a flat array; zero elsewhere."""
        dispatch.kernels().unpack(packed, y, *self._numbers(packed, channels))

    def statistics(self, x: Array, weight: Array, eps: float) -> Array:
        """Return the statistics of the valid values."""
        if self.lying is not None:
            known: Array | None = self.lying.moments(x, weight, eps)
            if known is not None:
                return known
        stats, room = np.empty((3, self.channels)), self.room(x)
        for some in self.chunks():
            packed, part = self.pack(x, some, room), weight[some]
            found = dispatch.kernels().moments(packed, part, self.shape(part.size), eps)
            stats[:, some] = found.reshape(3, -1)
        return stats.reshape(-1)

    def gradients(self, saved: Any, grad: Array, result: Array) -> tuple[Array, Array, Array | None]:
        """Put the input's gradient into ``result``; return those of weight, bias and residual. Zero where masked.

        ``saved`` is a ``saved.BatchSaved``.
        """
        x, where = saved.x, saved.layout
        dx = result if layout.matches(result, where, saved.axis) else layout.empty_like(x, where)
        residual = layout.empty_like(x, where) if saved.residual else None
        tensors = (x, layout.like(grad, where), saved.y, dx, residual)
        flat = [None if t is None else views.flat(t, where) for t in tensors]
        parameters: tuple[Array, Array] | None = None
        if self.lying is not None:
            parameters = self.lying.backward(
                *flat, saved.weight, saved.bias, saved.stats, saved.frozen, saved.relu
            )  # fmt: skip
        if parameters is None:
            parameters = self._gradients(saved, *flat)
        if dx is not result:
            result[...] = dx
        return *parameters, residual

    def _gradients(self, saved: Any, x: Any, grad: Any, y: Any, dx: Any, residual: Any) -> tuple[Array, Array]:
        dweight, dbias = np.zeros_like(saved.weight), np.zeros_like(saved.bias)
        if self.count == 0:
            dx[...] = 0
            if residual is not None:
                residual[...] = 0
        rooms = [self.room(t) for t in (x, grad, y, residual if saved.relu else None)]
        for some in self.chunks():
            values, g = self.pack(x, some, rooms[0]), self.pack(grad, some, rooms[1])
            gated, weight = None if rooms[3] is None else rooms[3][: values.size], saved.weight[some]
            if residual is not None and gated is None:
                self.unpack(g, residual, some)
            dweight[some], dbias[some] = dispatch.kernels().backward(
                values, g, self.pack(y, some, rooms[2]), g, gated, weight, saved.bias[some],
                of_channels(saved.stats, some), self.shape(weight.size), saved.frozen, saved.relu,
            )  # fmt: skip
            self.unpack(g, dx, some)
            if gated is not None:
                self.unpack(gated, residual, some)
        return dweight, dbias
