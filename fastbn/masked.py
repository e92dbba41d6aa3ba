"""Masks: the valid values are packed into rows, normalised as rows, and put back; everything else is zero.

Packing is what the semantics mean, and a masked position can hold NaN or inf and never be looked at. It costs a copy
in and a copy out, which kernels that weigh positions would save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, layout, recycled
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments
from fastbn.saved import Gradients, Saved, output

Array = npt.NDArray[Any]

# (x, axis, residual, out) -> (y, saved): how the packed values, or all of them, are normalised
Step = Callable[[Any, Any, Any, Any], tuple[Array, Saved]]


def valid(mask: Any, lengths: Any, x: Array, axis: int) -> Array:
    """Return the mask with the shape of x without its channel axis, from the one of the two that is given."""
    if lengths is None:
        return arguments.valid(mask, x, axis)
    if mask is not None:
        raise ArgumentValueError("mask, lengths", "one of them", "both")
    return arguments.from_lengths(lengths, x, axis)


def pack(x: Array, axis: int, mask: Array) -> Array:
    """Return the valid values as rows (M, C), in the order of the mask."""
    packed: Array = np.moveaxis(x, axis, -1)[mask]
    return packed


def unpack(packed: Array, like: Array, axis: int, mask: Array, out: Array | None) -> Array:
    """Put rows back where they came from, zero elsewhere."""
    result: Array = recycled.empty_like(like) if out is None else out
    result[...] = 0
    np.moveaxis(result, axis, -1)[mask] = packed
    return result


class MaskedSaved(Saved):
    """What the packed values saved, and where they came from."""

    __slots__ = ("axis", "dtype", "inner", "mask", "shape")

    inner: Saved
    mask: Array
    axis: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def moments(self) -> Moments:  # noqa: D102
        return self.inner.moments

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        axis, mask = self.axis, self.mask
        grad = arguments.tensor("grad_output", grad_output)
        if grad.shape != self.shape:
            raise ArgumentValueError("grad_output", f"the shape of x, {self.shape}", grad.shape)
        if grad.dtype != self.dtype:
            raise ArgumentTypeError("grad_output", f"the dtype of x, {self.dtype}", grad.dtype)
        if out is not None:
            output(out, grad, axis)
        dx, dweight, dbias, residual = self.inner.gradients(pack(grad, axis, mask), None)
        if residual is not None:
            residual = unpack(residual, grad, axis, mask, None)
        return Gradients(unpack(dx, grad, axis, mask, out), dweight, dbias, residual)


def normalise(step: Step, x: Any, axis: Any, residual: Any, mask: Any, lengths: Any, out: Any) -> tuple[Array, Saved]:
    """Normalise the valid values as ``step`` does; zero elsewhere."""
    x = arguments.tensor("x", x)
    axis = layout.normalise_axis(axis, x.ndim)
    mask = valid(mask, lengths, x, axis)
    if mask.all():
        return step(x, axis, residual, out)
    if residual is not None:
        residual = pack(arguments.same_kind("residual", residual, x), axis, mask)
    if out is not None:
        output(out, x, axis)
        arguments.apart("x", out, x, exact_allowed=False)
    y, inner = step(pack(x, axis, mask), 1, residual, None)
    saved = MaskedSaved()
    saved.stats, saved.count, saved.updated = inner.stats, inner.count, inner.updated
    saved.inner, saved.mask, saved.axis, saved.shape, saved.dtype = inner, mask, axis, x.shape, x.dtype
    return unpack(y, x, axis, mask, out), saved
