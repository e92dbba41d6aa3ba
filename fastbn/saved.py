"""What a forward pass leaves for the backward pass, and the backward pass of plain batch norm.

Every kind of normalisation saves its own kind of ``Saved``, which knows how to take its gradients: ``fastbn.backward``
asks it, and no list of kinds has to be kept anywhere.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, layout, quick, views
from fastbn.errors import ArgumentValueError
from fastbn.moments import Moments

__all__ = ["BatchSaved", "Gradients", "Saved"]

Array = npt.NDArray[Any]


class Gradients(NamedTuple):
    """What ``backward`` returns; None where the forward pass had no such thing."""

    input: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


class Saved:
    """What a forward pass leaves for ``backward``: x and its statistics.

    References, not copies: x, weight, bias, a mask, and y with both residual and activation (unless it is large: then
    its signs are kept) must not change in between.

    Attributes
    ----------
    mean, invstd : numpy.ndarray, float64
        Statistics that x was normalised with, one per normalised set of values: shape (C,) for batch norm, (ghosts, C)
        for ghost batches, (T, C) for whole sequences by step, (N, C) for instance norm, (N, G) for group norm, the
        leading axes of x for layer norm; invstd = 1/sqrt(var + eps).
    variance : numpy.ndarray, float64
        The biased variance, shape as mean.
    count : int
        Values per set.
    moments : Moments
        The batch's statistics as a mergeable value: those it was normalised with, but where it was normalised with
        running ones (frozen, evaluation, ``on_single="running"``) its own, from x. Those of layer,
        instance and group norm have an entry per set.
    updated : int
        How often the call moved running statistics: 0 or 1, or the number of ghost batches.
    """

    __slots__ = ("count", "stats", "updated")

    numpy_sums: ClassVar[bool] = False  # NumPy, which warns about NaN and inf, adds up gradients, not kernels alone

    stats: Array  # flat: means, invstds, variances
    count: int
    updated: int

    def _row(self, i: int) -> Array:
        size = self.stats.size // 3
        row: Array = self.stats[i * size : (i + 1) * size]
        return row

    @property
    def mean(self) -> Array:  # noqa: D102
        return self._row(0)

    @property
    def invstd(self) -> Array:  # noqa: D102
        return self._row(1)

    @property
    def variance(self) -> Array:  # noqa: D102
        return self._row(2)

    @property
    def moments(self) -> Moments:  # noqa: D102
        return Moments._of_variance(self.count, self._row(0).reshape(-1), self._row(2).reshape(-1))

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of x and y, for a caller who keeps them himself; only batch norm's, which can be ``restored``."""
        of: Any = self
        del of.x, of.y


def no_statistics(channels: int, eps: float) -> Array:
    """Statistics of an empty batch: mean 0, variance 0."""
    stats = np.zeros(3 * channels)
    stats[channels : 2 * channels] = eps**-0.5 if eps else np.inf
    return stats


class BatchSaved(Saved):
    """What batch norm saves; ``frozen`` statistics are constants, ``y`` or ``signs`` tell the sign where x cannot.

    ``places`` (``fastbn.places``) are the valid ones under a mask.
    """

    __slots__ = (
        "affine", "axis", "bias", "frozen", "layout", "places", "relu", "residual", "signs", "weight", "x", "y",
    )  # fmt: skip

    x: Array
    y: Array | None
    signs: npt.NDArray[np.uint8] | None
    axis: int
    layout: layout.Layout
    places: Any
    weight: Array
    bias: Array
    affine: tuple[bool, bool]
    relu: bool | None
    residual: bool
    frozen: bool

    def __setstate__(self, state: Any) -> None:
        layout.restore(self, state, "x", "y")

    @property
    def moments(self) -> Moments:  # noqa: D102
        if not self.frozen:
            return super().moments
        if self.count == 0:
            return Moments(0, np.zeros(self.weight.size), np.zeros(self.weight.size))
        x = views.flat(self.x, self.layout)
        if self.places is None:
            stats = dispatch.kernels().moments(x, self.weight, self.layout.dims, 0.0)
        else:
            stats = self.places.statistics(x, self.weight, 0.0)
        mean, _, var = stats.reshape(3, -1)
        return Moments._of_variance(self.count, mean, var)

    def release(self) -> None:  # noqa: D102
        super().release()
        del self.signs

    def restored(self, x: Any, y: Any = None, signs: Any = None) -> BatchSaved:
        """Return what this was before ``release``: a copy, with x and y in the memory order they had."""
        s = BatchSaved()
        s.axis, s.layout, s.stats, s.count, s.updated = self.axis, self.layout, self.stats, self.count, self.updated
        s.weight, s.bias, s.affine, s.relu = self.weight, self.bias, self.affine, self.relu
        s.residual, s.frozen, s.places = self.residual, self.frozen, self.places
        s.x, s.y, s.signs = x, y, signs
        return s

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        done = quick.backward(self, grad_output, out)
        if done is not None:
            return Gradients(done[0], done[1] if self.affine[0] else None, done[2] if self.affine[1] else None, done[3])
        dx, dweight, dbias, residual = self.all_gradients(grad_output, out)
        return Gradients(dx, dweight if self.affine[0] else None, dbias if self.affine[1] else None, residual)

    def all_gradients(self, grad_output: Any, out: Any) -> tuple[Array, Array, Array, Array | None]:
        """Gradients of input, weight, bias (also where there is none) and residual."""
        if self.places is not None:
            grad, dx = self._checked(grad_output, out)
            return dx, *self.places.gradients(self, grad, dx)
        x, where = self.x, self.layout
        grad, dx = check_gradient(grad_output, x, where, self.axis, out, self.residual, (self.weight, self.bias))
        if self.y is not None and out is not None:
            arguments.apart("the output that the forward pass saved", out, self.y, exact_allowed=False)
        gated = layout.empty_like(x, where) if self.residual and self.relu else None
        if x.size:
            values, g, y, to, to_residual = (
                None if a is None else views.flat(a, where) for a in (x, grad, self.y, dx, gated)
            )
            dweight, dbias = dispatch.kernels().backward(
                values, g, y if self.signs is None else self.signs, to, to_residual, self.weight, self.bias, self.stats,
                where.dims, self.frozen, self.relu,
            )  # fmt: skip
        else:
            dweight, dbias = np.zeros_like(self.weight), np.zeros_like(self.bias)
        dx = delivered(dx, out)
        return dx, dweight, dbias, (grad_output if gated is None else gated) if self.residual else None

    def _checked(self, grad_output: Any, out: Any) -> tuple[Array, Array]:
        """Return the gradient and the array for the input's, in any memory order each, apart from what is read."""
        grad = arguments.same_kind("grad_output", grad_output, self.x)
        if out is None:
            return grad, layout.empty_like(self.x, self.layout)
        output(out, self.x, self.axis)
        arguments.apart("x", out, self.x, exact_allowed=False)
        arguments.apart("grad_output", out, grad, exact_allowed=True)
        arguments.apart_from_parameters(out, self.weight, self.bias)
        if self.y is not None:
            arguments.apart("the output that the forward pass saved", out, self.y, exact_allowed=False)
        return grad, out


class Overwritten(Saved):
    """What inference in place makes of a ``Saved``: x is gone, and with it gradients of weight or through a ReLU."""

    __slots__ = ()

    def _refuse(self, what: str) -> ArgumentValueError:
        expected = f"an x that was not overwritten (out=x), which {what} need"
        return ArgumentValueError("saved", expected, "y in its place")

    @property
    def moments(self) -> Moments:
        raise self._refuse("moments")

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        of: Any = self
        if of.affine[0] or of.relu:
            raise self._refuse("gradients of weight and through a ReLU")
        return super().gradients(grad_output, out)


class OverwrittenSaved(Overwritten, BatchSaved):
    """What inference in place saves."""

    __slots__ = ()


def kept(done: quick.Done, x: Array, frozen: bool, updated: int) -> BatchSaved:
    """Return what backward needs after a quick call."""
    saved = OverwrittenSaved() if done[0] is x else BatchSaved()
    _, call, saved.stats, saved.weight, saved.bias, saved.affine, saved.signs = done
    saved.x, saved.axis, saved.layout, saved.count, saved.relu = x, call.axis, call.where, call.values, call.relu
    saved.residual, saved.frozen, saved.updated, saved.places = call.fused, frozen, updated, None
    saved.y = done[0] if call.fused and call.relu and saved.signs is None else None
    return saved


def output(out: Any, x: Array, axis: int) -> layout.Layout:
    """Check an output array, which may be empty; return its layout."""
    if x.size:
        return arguments.output(out, x, axis)
    arguments.plain_output(out)
    arguments.same_kind("out", out, x)
    return layout.contiguous(x.shape, axis)


def check_gradient(
    grad_output: Any, x: Array, where: layout.Layout, axis: int, out: Any, grad_kept: bool,
    params: tuple[Array, Array],
) -> tuple[Array, Array]:  # fmt: skip
    """Return the gradient in the memory order of x and an array in that order for the input's: ``out`` if it is in it.

    Else the input's gradient must be ``delivered`` to ``out``.
    """
    grad = arguments.same_kind("grad_output", grad_output, x)
    if out is None:
        return layout.like(grad, where), layout.empty_like(x, where)
    output(out, x, axis)
    arguments.apart("x", out, x, exact_allowed=False)
    arguments.apart("grad_output", out, grad, exact_allowed=not grad_kept)
    arguments.apart_from_parameters(out, *params)
    fits = not x.size or layout.matches(out, where, axis)
    return layout.like(grad, where), out if fits else layout.empty_like(x, where)


def delivered(result: Array, out: Any) -> Array:
    """Return a result where the caller wants it: itself if ``out`` is None."""
    if out is None or out is result:
        return result
    out[...] = result
    found: Array = out
    return found
