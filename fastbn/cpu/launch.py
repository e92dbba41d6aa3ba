"""Which CPU kernel for which shape: from (N, C, S) to one call, or three, of the kernels.

Tensors arrive flat and contiguous (``layout``), half types as ``uint16`` (float16) or ``int16`` (bfloat16) views,
parameters in the arithmetic type. Returned ``stats`` is float64 of 3*C: mean, invstd, biased variance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn.cpu import finalize, packing, planes, planes_backward, plans, pool, rows, rows_swept, tuning
from fastbn.cpu import pieces as mask_pieces

Array = npt.NDArray[Any]
Dims = plans.Dims
Table = tuple[Array, Array, Array | None]


def keeps_signs(
    x: Array, residual: Array | None, out: Array, dims: Dims, relu: bool | None, once: bool = False
) -> bool:
    """Tell whether training, or inference (``once``), can write the signs of its output too, for gradients.

    Where results stream, behind a residual and a ReLU: gradients by signs take 0.68-0.83 of the time of those that read
    the output, of rows 0.58-0.88, and training by one thread 0.98-1.04.
    """
    if relu is None or residual is None:
        return False
    p = plans.plan(dims, plans.lanes_of(x), x.itemsize if once else 0)
    return tuning.streams(x, residual, out, least=plans.streams_from(p, once))


def _together(p: plans.Plan, signs: Array | None) -> bool:
    """Tell whether several threads are to work, and tell it to a kernel that writes signs."""
    if signs is None:
        return p.parallel
    together = p.parallel and pool.get_num_threads() > 1
    signs[8:16].view(np.int64)[0] = together
    return together


def train(
    x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array,
    dims: Dims, eps: float, momentum: float, relu: bool | None, signs: Array | None = None,
) -> Array:  # fmt: skip
    """Training forward into ``out``; moves the running statistics if they have elements."""
    p = plans.plan(dims, plans.lanes_of(x))
    N, C, S = dims
    stats = np.empty(3 * C)
    y, together = out if signs is None else (out, signs), _together(p, signs)
    tensors = (x, residual, y, weight, bias, running_mean, running_var, stats)
    streamed = tuning.streams(x, residual, out, over=(out, residual) if signs is None else ())  # signs are by line
    if p.kind == "rows":
        pool.run(rows.train, (*tensors, dims, p.V, p.per, eps, momentum, relu, streamed), C, together)
    elif p.kind == "planes":
        pool.run(planes.train, (*tensors, N, C, S, eps, momentum, relu, streamed), C, together)
    else:
        columns = _swept_moments(x, stats, weight, running_mean, running_var, dims, p, eps, momentum)
        rows_swept.affines(x, out, stats, weight, bias, columns, dims, p.V)
        _swept_normalise(x, residual, out, columns, p, relu, streamed, signs)
    return stats


def _swept_moments(
    x: Array, stats: Array, weight: Array, running_mean: Array, running_var: Array,
    dims: Dims, p: plans.Plan, eps: float, momentum: float,
) -> Array:  # fmt: skip
    down, across = p.bands(x.size)
    columns, part = plans.room_for_columns(weight, p.V, 3), plans.room_for_sums(p.V, down)
    rows_swept.pivots(x, columns, dims, p.V)
    sums = (x, None, None, None, None, columns, part, p.V, p.height, p.width, None)
    pool.run(rows_swept.sums, sums, down * across, p.parallel)
    rows_swept.settle_train(x, columns, part, stats, running_mean, running_var, dims, p.V, down, eps, momentum, False)
    return columns


def _swept_normalise(
    x: Array, residual: Array | None, out: Array, columns: Array, p: plans.Plan, relu: bool | None, streamed: bool,
    signs: Array | None = None,
) -> None:  # fmt: skip
    p = plans.written(p, out)
    down, across = p.bands(x.size)
    work = (x, residual, out if signs is None else (out, signs), columns, p.V, p.height, p.width, relu, streamed)
    pool.run(rows_swept.normalise, work, down * across, _together(p, signs))


def moments(x: Array, weight: Array, dims: Dims, eps: float) -> Array:
    """Statistics alone; ``weight`` only tells the arithmetic type."""
    p = plans.plan(dims, plans.lanes_of(x))
    N, C, S = dims
    stats, none = np.empty(3 * C), weight[:0]
    if p.kind == "planes":
        pool.run(planes.moments, (x, stats, none, N, C, S, eps), C, p.parallel)
    else:
        _swept_moments(x, stats, weight, none, none, dims, plans.swept(p, x.size), eps, 0.0)
    return stats


def given(mean: Array, var: Array, eps: float) -> Array:
    """Statistics that were taken elsewhere, as ``infer`` takes them."""
    stats = np.empty(3 * mean.size)
    finalize.given(mean, var, stats, eps)
    return stats


def infer_by(
    x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, mean: Array, var: Array, eps: float,
    dims: Dims, relu: bool | None,
) -> None:  # fmt: skip
    """Inference into ``out`` by a mean and a variance."""
    p = plans.plan(dims, plans.lanes_of(x), x.itemsize)
    if not plans.many(p, dims[1]):
        infer(x, residual, out, weight, bias, given(mean, var, eps), dims, relu)
        return
    streamed = tuning.streams(x, residual, out, least=plans.streams_from(p, once=True), over=(out, x, residual))
    work = (x, residual, out, weight, bias, np.empty(0), mean, var, eps, dims, p.V, p.per, relu, streamed)
    pool.run(rows.infer_by, work, dims[1], p.parallel)


def infer(
    x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, stats: Array, dims: Dims,
    relu: bool | None, signs: Array | None = None,
) -> None:  # fmt: skip
    """Inference into ``out`` with the means and invstds in ``stats``."""
    p = plans.plan(dims, plans.lanes_of(x), x.itemsize)
    N, C, S = dims
    over = (out, x, residual) if signs is None else ()
    streamed = tuning.streams(x, residual, out, least=plans.streams_from(p, once=True), over=over)
    y, together = out if signs is None else (out, signs), _together(p, signs)
    if p.kind == "planes":
        work = (x, residual, y, weight, bias, stats, N, C, S, relu, streamed)
        pool.run(planes.infer, work, N * C, together)
        return
    if plans.in_one_call(p, C, alone=not p.parallel or pool.get_num_threads() == 1):
        matrix = (x, residual, y, weight, bias, stats, dims, p.V, p.per, relu, streamed)
        pool.run(rows.infer, matrix, C, together)
        return
    p = plans.swept(p, x.size)
    columns = plans.room_for_columns(weight, p.V, 3)
    rows_swept.affines(x, out, stats, weight, bias, columns, dims, p.V)
    _swept_normalise(x, residual, out, columns, p, relu, streamed, signs)


def backward(
    x: Array, grad: Array, y: Array | None, out: Array, grad_residual: Array | None, weight: Array, bias: Array,
    stats: Array, dims: Dims, frozen: bool, relu: bool | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Input gradient into ``out``; returns the gradients of weight and bias. ``y``: the output, or its signs."""
    p = plans.plan(dims, plans.lanes_of(x))
    N, C, S = dims
    dweight, dbias = np.empty_like(weight), np.empty_like(bias)
    tensors = (x, grad, y, out, grad_residual)
    streamed = tuning.streams(*tensors, over=() if grad_residual is not None else (out, grad))
    params = (weight, bias, dweight, dbias, stats)
    if p.kind == "planes":
        both = (None, grad_residual) if streamed and plans.lined(grad_residual, S) else (grad_residual, None)
        work = (x, grad, y, out, *both, *params, N, C, S, frozen, relu, streamed)
        pool.run(planes_backward.backward, work, C, p.parallel)
    elif p.kind == "rows" and not (frozen and x.size >= tuning.PARALLEL):
        matrix = (*tensors, *params, dims, p.V, p.per, frozen, relu, streamed)
        pool.run(rows.backward, matrix, C, p.parallel)
    else:
        _swept_gradients(tensors, params, dims, plans.swept(p, x.size), frozen, relu, streamed)
    return dweight, dbias


def _swept_gradients(
    tensors: tuple[Array, Array, Array | None, Array, Array | None], params: tuple[Array, ...],
    dims: Dims, p: plans.Plan, frozen: bool, relu: bool | None, streamed: bool,
) -> None:  # fmt: skip
    x, grad, y, out, grad_residual = tensors
    weight, bias, dweight, dbias, stats = params
    down, across = p.bands(x.size)
    columns, part = plans.room_for_columns(weight, p.V, 5), plans.room_for_sums(p.V, down)
    rows_swept.affines(x, out, stats, weight, bias, columns, dims, p.V)
    once = frozen and plans.at_once(p, grad, out)
    early = grad_residual if once or (streamed and plans.lined(grad_residual, p.V)) else None
    sums = (x, grad, y, early, out, columns, part, p.V, p.height, p.width, relu)
    if once:
        pool.run(rows_swept.frozen, (*sums, streamed), down * across, p.parallel)
    else:
        pool.run(rows_swept.sums, sums, down * across, p.parallel)
    rows_swept.settle_backward(
        x, grad, y, out, columns, part, stats, weight, bias, dweight, dbias, dims, p.V, down, frozen, relu, False,
    )  # fmt: skip
    if once:
        return
    if early is not None:  # it holds u
        tensors, relu = (x, early, None, out, None), None
    p = plans.written(p, out)
    down, across = p.bands(x.size)
    work = (*tensors, columns, p.V, p.height, p.width, relu, streamed)
    pool.run(rows_swept.gradient, work, down * across, p.parallel)


def pieces(mask: Array, samples: int, per: int) -> Table:
    """Return (first, start, place) as ``packing`` takes them, of a flat mask of int8; ``per``: values of a position."""
    runs, values = np.zeros(samples + 1, np.int64), np.zeros(samples + 1, np.int64)
    if not mask.size:
        return runs, runs[:0], runs[:1]
    mask_pieces.count(mask, runs, values)
    if per == 1 and values[-1] < packing.RUN * runs[-1]:
        start = np.empty(values[-1] + 1, np.int64)
        mask_pieces.singly(mask, samples, start)
        return values, start[:-1], None
    start, place = np.empty(runs[-1], np.int64), np.empty(runs[-1] + 1, np.int64)
    mask_pieces.by_run(mask, samples, per, start, place)
    return runs, start, place


def pack(x: Array, packed: Array, table: Table, C: int, S: int, M: int, lo: int, hi: int) -> None:
    """Pack the valid values of channels lo..hi - 1; see ``packing`` for the numbers."""
    work = (x, packed, *table, C, S, M, lo, hi)
    pool.run(packing.pack, work, table[0].size - 1, packed.size >= tuning.PARALLEL)


def unpack(packed: Array, y: Array, table: Table, C: int, S: int, M: int, lo: int, hi: int) -> None:
    """Put packed values back, zero elsewhere."""
    work = (packed, y, *table, C, S, M, lo, hi, tuning.streams(packed, y))
    pool.run(packing.unpack, work, table[0].size - 1, packed.size >= tuning.PARALLEL)
