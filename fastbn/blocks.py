"""Statistics per (block, channel): the shape (B, N, C, S) on top of the kernels' (N, C, S).

Instance norm and ghost batches are batch norm of every block on its own: block b of a contiguous array is the slab
(N, C, S). One channel run per block (N = 1) is one call of the kernels of sets, or of the others with B*C channels; so
is B = 1. In between, large slabs are worked off one by one, and small ones are laid side by side as (N, B*C, S), which
takes a copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, layout, recycled, views
from fastbn.core import Reordered
from fastbn.errors import ArgumentValueError
from fastbn.saved import Gradients, check_gradient, delivered

Array = npt.NDArray[Any]

ASIDE = 1 << 13  # elements of a slab below which copying all beats one kernel call (10 us) per slab


class Blocks(NamedTuple):
    """Sizes: blocks, values before the channel axis, channels, values behind it."""

    B: int
    N: int
    C: int
    S: int

    @property
    def slab(self) -> int:
        """Elements of a block."""
        return self.N * self.C * self.S


Piece = tuple[slice, Blocks, Array]  # which elements of the flat array, as which blocks, with which statistics


def _samples_outermost(x: Array, axis: int) -> bool:
    where = layout.of(x.shape, x.strides, x.itemsize, axis)
    if where is None:
        return False
    return x.size == 0 or x.shape[0] == 1 or next((a == 0 for a in where.order if x.shape[a] != 1), True)


class BlockForward(Reordered):
    """Checked arguments whose samples (axis 0) lie one behind the other in memory, x copied where they do not."""

    __slots__ = ("blocks",)

    def __init__(
        self, x: Any, weight: Any, bias: Any, axis: Any, activation: Any = None, residual: Any = None, out: Any = None
    ):
        x = arguments.tensor("x", x)
        axis = layout.normalise_axis(axis, x.ndim)
        if axis == 0:
            raise ArgumentValueError("axis", "a channel axis other than 0, that of the samples", 0)
        self.target = None
        fits = out is None or not x.size or (getattr(out, "shape", 0) == x.shape and _samples_outermost(out, axis))
        if not (_samples_outermost(x, axis) and fits):
            x, out = self.copied(x, axis, out), None
        super().__init__(x, weight, bias, axis, activation, residual, out, in_place=False)
        before, C, S = self.layout.dims
        B = x.shape[0]
        self.blocks = Blocks(B, 1, 1, S // B) if C == 1 and B else Blocks(B, before // max(B, 1), C, S)

    def train_piece(self, part: slice, d: Blocks, eps: float) -> Array:
        """Normalise the blocks of one piece into out; return their statistics."""
        x, residual, out = (None if t is None else t[part] for t in map(self.flat, (self.x, self.residual, self.out)))
        assert x is not None and out is not None
        return train(x, residual, out, self.weight, self.bias, d, eps, self.relu)

    def gradients(self, pieces: list[Piece], grad_output: Any, to: Any) -> Gradients:
        """Gradients through all pieces; see ``fastbn.backward``."""
        kept = self.residual is not None
        params = self.weight, self.bias
        grad, dx = check_gradient(grad_output, self.x, self.layout, self.axis, to, kept, params)
        y = self.out if self.relu and kept else None
        if y is not None and to is not None:
            arguments.apart("the output that the forward pass saved", to, y, exact_allowed=False)
        gated = layout.empty_like(self.x, self.layout) if self.relu and kept else None
        tensors = [None if a is None else views.flat(a, self.layout) for a in (self.x, grad, y, dx, gated)]
        dweight, dbias = np.zeros(self.weight.size), np.zeros(self.weight.size)
        for part, d, stats in pieces:
            cut: list[Any] = [None if t is None else t[part] for t in tensors]
            dw, db = backward(cut[0], cut[1], cut[2], cut[3], cut[4], self.weight, self.bias, stats, d, self.relu)
            dweight += dw
            dbias += db
        return Gradients(
            delivered(dx, to),
            dweight.astype(self.dtype) if self.affine[0] else None,
            dbias.astype(self.dtype) if self.affine[1] else None,
            (grad_output if gated is None else gated) if kept else None,
        )


def _are_sets(d: Blocks) -> bool:
    """Tell whether every (block, channel) is one run: group norm with as many groups as channels.

    That takes 0.5 to 0.8 of the time of the kernels for (1, B*C, S), 0.1 for runs of less than a vector.
    """
    return d.N == 1 and d.S > 1


def _by_block(parameter: Array, blocks: int) -> Array:
    """Repeat a parameter for every block: ``numpy.tile`` in a fifth of the time."""
    result = np.empty((blocks, parameter.size), parameter.dtype)
    result[...] = parameter
    return result.reshape(-1)


def _aside(x: Array | None, d: Blocks) -> Array | None:
    """Lay blocks side by side: (B, N, C, S) -> (N, B*C, S)."""
    return None if x is None else np.ascontiguousarray(x.reshape(d).swapaxes(0, 1)).reshape(-1)


def _back(x: Array, out: Array, d: Blocks) -> None:
    out.reshape(d)[...] = x.reshape(d.N, d.B, d.C, d.S).swapaxes(0, 1)


def _slabs(d: Blocks, *tensors: Array | None) -> Any:
    for b in range(d.B):
        yield b, [None if t is None else t[b * d.slab : (b + 1) * d.slab] for t in tensors]


def train(
    x: Array, residual: Array | None, out: Array, weight: Array, bias: Array, d: Blocks, eps: float, relu: bool | None
) -> Array:
    """Normalise every (block, channel) by its own statistics into ``out``; weight and bias by channel.

    Returns the means, invstds and variances, float64 of shape (3, B, C), flat.
    """
    kernels, none = dispatch.kernels(), weight[:0]
    if d.B == 1:
        first: Array = kernels.train(x, residual, out, weight, bias, none, none, d[1:], eps, 0.0, relu)
        return first
    if _are_sets(d) and residual is None and relu is None:
        sets: Array = dispatch.set_kernels().train(x, out, weight, bias, (d.B, d.C, d.C, d.S), eps)
        return sets
    if d.N == 1 or d.slab < ASIDE:
        dims = (d.N, d.B * d.C, d.S)
        weights, biases = _by_block(weight, d.B), _by_block(bias, d.B)
        if d.N == 1:
            whole: Array = kernels.train(x, residual, out, weights, biases, none, none, dims, eps, 0.0, relu)
            return whole
        y = recycled.empty_like(out)
        beside: Array = kernels.train(
            _aside(x, d), _aside(residual, d), y, weights, biases, none, none, dims, eps, 0.0, relu
        )
        _back(y, out, d)
        return beside
    stats = np.empty((3, d.B, d.C))
    for b, (xb, rb, ob) in _slabs(d, x, residual, out):
        stats[:, b] = kernels.train(xb, rb, ob, weight, bias, none, none, d[1:], eps, 0.0, relu).reshape(3, -1)
    return stats.reshape(-1)


def backward(
    x: Array, grad: Array, y: Array | None, out: Array, gated: Array | None, weight: Array, bias: Array, stats: Array,
    d: Blocks, relu: bool | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Input gradient into ``out``, the gradient before the activation into ``gated``; returns dweight and dbias."""
    kernels = dispatch.kernels()
    if d.B == 1:
        pair: tuple[Array, Array] = kernels.backward(x, grad, y, out, gated, weight, bias, stats, d[1:], False, relu)
        return pair
    if _are_sets(d) and gated is None and relu is None:
        sums: tuple[Array, Array] = dispatch.set_kernels().backward(x, grad, out, weight, stats, (d.B, d.C, d.C, d.S))
        return sums
    if d.N == 1 or d.slab < ASIDE:
        dims = (d.N, d.B * d.C, d.S)
        weights, biases = _by_block(weight, d.B), _by_block(bias, d.B)
        tensors: list[Any] = [x, grad, y, out, gated]
        if d.N > 1:
            tensors = [_aside(x, d), _aside(grad, d), _aside(y, d), recycled.empty_like(out), _aside(gated, d)]
        parts = kernels.backward(*tensors, weights, biases, stats, dims, False, relu)
        if d.N > 1:
            _back(tensors[3], out, d)
            if gated is not None and tensors[4] is not None:
                _back(tensors[4], gated, d)
        by_block = [p.reshape(d.B, d.C).astype(np.float64) for p in parts]
    else:
        by_block = [np.empty((d.B, d.C)), np.empty((d.B, d.C))]
        mine = stats.reshape(3, d.B, d.C)
        for b, slabs in _slabs(d, x, grad, y, out, gated):
            at = np.ascontiguousarray(mine[:, b]).reshape(-1)
            by_block[0][b], by_block[1][b] = kernels.backward(*slabs, weight, bias, at, d[1:], False, relu)
    return by_block[0].sum(0), by_block[1].sum(0)
