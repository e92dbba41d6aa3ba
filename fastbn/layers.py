"""Batch norm as a layer: arrays with state around the functions, under PyTorch's names."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fastbn import arguments, functional, training
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments
from fastbn.state import Layer, axis_number, integer, parameter_dtype

__all__ = ["BatchNorm"]

Array = npt.NDArray[Any]


class BatchNorm(Layer):
    """Batch normalization with its own weight, bias and running statistics; semantics of PyTorch's BatchNorm1d/2d/3d.

    Parameters
    ----------
    num_features : int
        Channels C.
    eps : float
        Added to the variance inside the root; >= 0, in training > 0.
    momentum : float or None
        Weight of the new value in the running statistics; None: cumulative average over all batches.
    affine : bool
        Learn weight (ones) and bias (zeros), shape (C,).
    track_running_stats : bool
        Keep running_mean (zeros) and running_var (ones); without them batch statistics are used in evaluation too.
    axis : int
        Channel axis of the inputs.
    activation : {None, "relu"}
        Applied last.
    dtype : dtype
        Of parameters and statistics: float64 for float64 inputs, else float32.
    ghost, renorm, on_single, nonfinite, unbiased
        See ``fastbn.batch_norm_train``; for training only. Attributes too, to be changed at any time (``renorm`` by a
        schedule).
    update_stats : bool
        False: training calls do not move the running statistics; see ``update``.

    Attributes
    ----------
    weight, bias, running_mean, running_var : numpy.ndarray, shape (C,), or None
        Parameters and statistics; to be changed in place or replaced.
    num_batches_tracked : int
        Batches that moved the running statistics, and empty ones without a mask (as PyTorch); every ghost batch counts.
    training, frozen : bool
        See ``train``, ``eval`` and ``freeze``.

    Raises
    ------
    ValueError, TypeError
        For values that make no such layer.

    Notes
    -----
    One layer in several threads: the running statistics take every call's batch, in some order and perhaps two at once,
    and ``backward`` is that of whichever call came last. The functions leave both to the caller.

    Examples
    --------
    >>> bn = BatchNorm(64)
    >>> y = bn(x)                   # doctest: +SKIP
    >>> grads = bn.backward(dy)     # doctest: +SKIP
    """

    arrays = ("weight", "bias", "running_mean", "running_var")
    num_batches_tracked: int

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, *, axis: int = 1, activation: str | None = None,
        dtype: npt.DTypeLike = np.float32, ghost: int | None = None, renorm: tuple[float, float] | None = None,
        on_single: str = "error", nonfinite: str = "propagate", unbiased: bool = True, update_stats: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.num_features, self.dtype = integer("num_features", num_features), parameter_dtype(dtype)
        arguments.activation(activation)
        self.eps = arguments.epsilon(eps, positive=False)
        self.momentum = None if momentum is None else arguments.number("momentum", momentum)
        self.affine, self.track_running_stats = bool(affine), bool(track_running_stats)
        self.axis, self.activation = axis_number(axis), activation
        training.check(training.Options(0.1, 1.0, activation, ghost, renorm, on_single, nonfinite, True, unbiased))
        self.ghost, self.renorm, self.on_single, self.nonfinite = ghost, renorm, on_single, nonfinite
        self.unbiased, self.update_stats = unbiased, bool(update_stats)
        C, dtype = self.num_features, self.dtype
        self.weight: Array | None = np.ones(C, dtype) if affine else None
        self.bias: Array | None = np.zeros(C, dtype) if affine else None
        self.running_mean: Array | None = np.zeros(C, dtype) if track_running_stats else None
        self.running_var: Array | None = np.ones(C, dtype) if track_running_stats else None
        self.num_batches_tracked = 0
        self.frozen = False

    def __call__(
        self, x: Any, *, residual: Any = None, mask: Any = None, out: Any = None, lengths: Any = None,
        update_stats: bool | None = None,
    ) -> Array:  # fmt: skip
        """Normalise x; in training by the batch's statistics, which also move the running ones.

        Parameters
        ----------
        x : numpy.ndarray, rank >= 2
            C channels along ``axis``.
        residual, mask, out, lengths
            See ``fastbn.batch_norm_train``. With the running statistics too, y is zero where the mask is false.
        update_stats : bool, optional
            Instead of the layer's own setting.

        Returns
        -------
        numpy.ndarray
            Shape and dtype of x.

        Raises
        ------
        ValueError, TypeError
            As ``fastbn.batch_norm_train``; another number of channels.
        """
        self._check(x)
        self._follow(x)
        if self.running_mean is not None and (self.frozen or not self.training):
            y, self._saved = functional.frozen(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps, axis=self.axis,
                activation=self.activation, residual=residual, out=out, mask=mask, lengths=lengths,
            )  # fmt: skip
            return y
        tracked = self.training and self.running_mean is not None
        update = tracked and (self.update_stats if update_stats is None else bool(update_stats))
        momentum, each = self.momentum, False
        if momentum is None:
            each = update and self.training and self.ghost is not None  # every ghost has a momentum of its own
            momentum = self._next_momentum()
        y, self._saved = saved = functional.batch_norm_train(
            x, self.weight, self.bias, self.running_mean if tracked else None, self.running_var if tracked else None,
            momentum=momentum, eps=self.eps, axis=self.axis, activation=self.activation, residual=residual, mask=mask,
            out=out, lengths=lengths, ghost=self.ghost if self.training else None,
            renorm=self.renorm if self.training else None, on_single=self.on_single, nonfinite=self.nonfinite,
            update_stats=not tracked or (update and not each), unbiased=self.unbiased,
        )  # fmt: skip
        if each and hasattr(saved[1], "ghosts") and saved[1].count:
            before = self.num_batches_tracked
            for ghost in saved[1].ghosts:
                if ghost.count > 1:  # one value was normalised by the running statistics (``on_single``)
                    self.update(ghost)
            saved[1].updated = self.num_batches_tracked - before
        elif update:
            moved = saved[1].updated  # asked first: on a GPU the others may wait for it
            if not moved and mask is None and lengths is None and saved[1].count == 0:
                moved = 1  # an empty batch counts, as PyTorch's; not one whose values a mask leaves out
            self.num_batches_tracked += moved
        return y

    def _next_momentum(self) -> float:
        return 1.0 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum

    def update(self, moments: Moments) -> None:
        """Move the running statistics once, by statistics gathered elsewhere, as a training call would.

        For micro-batches: call with ``update_stats=False``, merge ``layer.saved.moments``, update once. Count 0 changes
        nothing; ``nonfinite`` is obeyed.

        Parameters
        ----------
        moments : Moments
            C channels.

        Raises
        ------
        ValueError
            No running statistics, another number of channels, one value per channel.
        """
        if self.running_mean is None or self.running_var is None:
            raise ArgumentValueError("update", "a layer with running statistics", "track_running_stats=False")
        if not isinstance(moments, Moments):
            raise ArgumentTypeError("moments", "fastbn.Moments", type(moments).__name__)
        if moments.mean.size != self.num_features:
            raise ArgumentValueError("moments", f"{self.num_features} channels", moments.mean.size)
        if moments.count == 0:
            return
        if self.nonfinite != "propagate" and not training.finite(moments, self.dtype).all():
            if self.nonfinite == "raise":
                training.refuse_nonfinite(moments, self.dtype)
            return
        functional.update_running(
            self.running_mean, self.running_var, moments, momentum=self._next_momentum(), unbiased=self.unbiased
        )
        self.num_batches_tracked += 1

    def _check(self, x: Any) -> None:
        shape = getattr(x, "shape", None)
        if not isinstance(shape, tuple) or len(shape) < 2 or not -len(shape) <= self.axis < len(shape):
            return  # the function says what is wrong
        if shape[self.axis] != self.num_features:
            raise ArgumentValueError("x", f"{self.num_features} channels along axis {self.axis}", f"shape {shape}")

    def freeze(self, mode: bool = True) -> Self:
        """Normalise by the running statistics in training too, with gradients; ``train`` does not undo it."""
        if mode and self.running_mean is None:
            raise ArgumentValueError("freeze", "a layer with running statistics", "track_running_stats=False")
        self.frozen = bool(mode)
        return self

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis})"
        )
