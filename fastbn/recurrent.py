"""Batch norm inside recurrent networks: statistics for every time step.

Cooijmans et al. 2016 (arXiv:1603.09025): the statistics of the first steps differ from those of later ones, so each
step t has its own, shape (T, C); weight and bias are shared; weight starts at 0.1, because at 1 the saturated tanh
lets no gradient through; past the last step seen in training, that step's statistics are used again.

One statistic over batch and time (Laurent et al. 2015, arXiv:1510.01378) needs nothing from here: it is
``BatchNorm(C, axis=-1)(x, lengths=...)`` on (N, T, C).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, functional, saved, training
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments
from fastbn.saved import Gradients, Saved
from fastbn.state import Layer, integer, parameter_dtype

__all__ = ["RecurrentBatchNorm"]

Array = npt.NDArray[Any]


class StepsSaved(Saved):
    """What a whole sequence saves; mean, invstd and variance have shape (T, C), count is that of the fullest step."""

    __slots__ = ("affine", "dtype", "parts", "shape")

    numpy_sums = True

    parts: list[Saved]  # one for all steps, or one per step
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    affine: bool

    def _row(self, i: int) -> Array:
        rows = [part._row(i) for part in self.parts]
        return np.concatenate(rows).reshape(self.shape[1:]) if rows else np.empty(self.shape[1:])

    @property
    def moments(self) -> Moments:
        """The statistics of all steps, one behind the other; ValueError for ragged ones, whose counts differ."""
        counts = {part.count for part in self.parts}
        if len(counts) > 1:
            raise ArgumentValueError("moments", "as many values at every step", f"{min(counts)} to {max(counts)}")
        return super().moments

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        N, T, C = self.shape
        grad = arguments.tensor("grad_output", grad_output)
        if grad.shape != self.shape:
            raise ArgumentValueError("grad_output", f"the shape of x, {self.shape}", grad.shape)
        if out is not None:
            saved.output(out, grad, 2)
            arguments.apart("grad_output", out, grad, exact_allowed=True)
            for part in self.parts:
                if isinstance(part, saved.BatchSaved):
                    arguments.apart("x", out, part.x, exact_allowed=False)
                    arguments.apart_from_parameters(out, part.weight, part.bias)
        if len(self.parts) == 1:
            flat = functional.backward(grad.reshape(N, T * C), self.parts[0])
            grads, dx = [flat], flat.input.reshape(self.shape)
        else:
            grads = [functional.backward(grad[:, t], part) for t, part in enumerate(self.parts)]
            dx = np.stack([g.input for g in grads], axis=1) if grads else np.empty_like(grad)
        dx = saved.delivered(dx, out)
        if not self.affine:
            return Gradients(dx, None, None, None)
        totals = [
            sum((v.reshape(-1, C).sum(0, dtype=np.float64) for g in grads if (v := g[i]) is not None), np.zeros(C))
            for i in (1, 2)
        ]
        kind = arguments.arithmetic(self.dtype)
        return Gradients(dx, totals[0].astype(kind), totals[1].astype(kind), None)


class RecurrentBatchNorm(Layer):
    """Batch normalization with statistics per time step, for use inside a recurrent network.

    Parameters
    ----------
    num_features : int
        Channels C.
    max_steps : int
        Time steps T with statistics of their own; later ones share those of step T - 1.
    eps : float
        Added to the variance inside the root; > 0.
    momentum : float or None
        Weight of the new value in the running statistics; None: cumulative average, step by step.
    affine : bool
        Learn weight (``weight_init``) and bias (zeros), shape (C,), shared by all steps.
    weight_init : float
        0.1, as the paper recommends.
    on_single : {"error", "running"}
        Where a step has one valid value per channel, as the last steps of ragged sequences do.
    dtype : dtype
        Of parameters and statistics: float64 for float64 inputs, else float32.

    Attributes
    ----------
    running_mean, running_var : numpy.ndarray, shape (T, C)
        Statistics by step.
    num_batches_tracked : numpy.ndarray of int64, shape (T,)
        Batches seen in training, by step.

    Raises
    ------
    ValueError, TypeError
        For values that make no such layer.
    """

    arrays = ("weight", "bias", "running_mean", "running_var")

    def __init__(
        self, num_features: int, max_steps: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        *, weight_init: float = 0.1, on_single: str = "running", dtype: npt.DTypeLike = np.float32,
    ):  # fmt: skip
        super().__init__()
        self.num_features, self.max_steps = integer("num_features", num_features), integer("max_steps", max_steps)
        self.dtype, self.eps = parameter_dtype(dtype), arguments.epsilon(eps, positive=True)
        self.momentum = None if momentum is None else arguments.number("momentum", momentum)
        training.check(training.Options(0.1, 1.0, None, on_single=on_single))
        self.on_single = on_single
        C, shape = self.num_features, (self.max_steps, self.num_features)
        start = arguments.number("weight_init", weight_init)
        self.weight = np.full(C, start, self.dtype) if affine else None
        self.bias = np.zeros(C, self.dtype) if affine else None
        self.running_mean: Array = np.zeros(shape, self.dtype)
        self.running_var: Array = np.ones(shape, self.dtype)
        self.num_batches_tracked: Array = np.zeros(self.max_steps, np.int64)

    def rows(self, steps: int, start: int = 0) -> Array:
        """Return, for ``steps`` steps from ``start`` on, which row of the statistics normalises each in evaluation.

        That of the last step, not later than it, that was seen in training; its own where there is none.
        """
        wanted = np.minimum(np.arange(start, start + steps), self.max_steps - 1)
        seen = np.maximum.accumulate(np.where(self.num_batches_tracked > 0, np.arange(self.max_steps), -1))[wanted]
        rows: Array = np.where(seen < 0, wanted, seen)
        return rows

    def step(self, x: Any, t: int, *, mask: Any = None) -> tuple[Array, Saved]:
        """Normalise one time step; in training by the batch, which moves the statistics of step min(t, T - 1).

        Parameters
        ----------
        x : numpy.ndarray, shape (N, C)
            Step t of all sequences.
        t : int
            Time step, >= 0.
        mask : array of bool, shape (N,), optional
            Which sequences are still running; y is zero for the others.

        Returns
        -------
        y : numpy.ndarray, shape (N, C)
        saved : Saved
            For ``fastbn.backward``, which goes through the steps in reverse.

        Raises
        ------
        ValueError, TypeError
            As ``fastbn.batch_norm_train``; t below 0.
        """
        if isinstance(t, bool) or not isinstance(t, int | np.integer):
            raise ArgumentTypeError("t", "an integer", type(t).__name__)
        if t < 0:
            raise ArgumentValueError("t", "an integer >= 0", t)
        t = int(t)  # small NumPy integers overflow
        if getattr(x, "ndim", 2) != 2 or getattr(x, "shape", (0, self.num_features))[1] != self.num_features:
            raise ArgumentValueError("x", f"shape (N, {self.num_features})", f"shape {x.shape}")
        if not self.training:
            row = self.rows(1, t)[0]
            return functional.frozen(
                x, self.running_mean[row], self.running_var[row], self.weight, self.bias, eps=self.eps, mask=mask
            )
        row = min(t, self.max_steps - 1)
        y, own = functional.batch_norm_train(
            x, self.weight, self.bias, self.running_mean[row], self.running_var[row],
            momentum=self._momentum(row), eps=self.eps, mask=mask, on_single=self.on_single,
        )  # fmt: skip
        self.num_batches_tracked[row] += own.updated
        return y, own

    def _momentum(self, row: int) -> float:
        return 1.0 / (int(self.num_batches_tracked[row]) + 1) if self.momentum is None else self.momentum

    def __call__(self, x: Any, *, lengths: Any = None, out: Any = None) -> Array:
        """Normalise whole sequences, step by step over the batch.

        Parameters
        ----------
        x : numpy.ndarray, shape (N, T, C)
            Any number of steps.
        lengths : array of int, shape (N,), optional
            Steps of each sequence that count; y is zero past them.
        out : numpy.ndarray, optional
            Output; shape and dtype of x, no gaps.

        Returns
        -------
        numpy.ndarray
            Shape and dtype of x.

        Raises
        ------
        ValueError, TypeError
            As ``fastbn.batch_norm_train``, before any step has moved its statistics.
        """
        x = arguments.tensor("x", x)
        if x.ndim != 3 or x.shape[2] != self.num_features:
            raise ArgumentValueError("x", f"shape (N, T, {self.num_features})", f"shape {x.shape}")
        if out is not None:
            saved.output(out, x, 2)
            arguments.apart("x", out, x, exact_allowed=False)
        mask = None if lengths is None else arguments.from_lengths(lengths, x, 2)
        if mask is not None:
            self._refuse_single(mask)
        result = StepsSaved()
        result.shape, result.dtype, result.affine = x.shape, x.dtype, self.weight is not None
        if mask is None and self._at_once(x):
            y, whole = self._whole(x)
            parts = [whole]
        else:
            steps = [self.step(x[:, t], t, mask=None if mask is None else mask[:, t]) for t in range(x.shape[1])]
            parts = [own for _, own in steps]
            y = np.stack([step for step, _ in steps], axis=1) if steps else np.empty_like(x)
        result.parts, result.updated = parts, sum(part.updated for part in parts)
        result.count = max((part.count for part in parts), default=0)
        self._saved = result
        return saved.delivered(y, out)

    def _refuse_single(self, mask: Array) -> None:
        """Raise if a step has one valid value per channel, before the steps in front of it move their statistics."""
        if not self.training or self.on_single != "error":
            return
        single = np.flatnonzero(mask.sum(0) == 1)
        if single.size:
            raise ArgumentValueError("lengths", "more than 1 value per channel when training", f"1 at step {single[0]}")

    def _at_once(self, x: Array) -> bool:
        """Tell whether all steps are channels of one call: each moves a row of its own, by the same momentum."""
        if not self.training:
            return bool(x.shape[1])
        counts = self.num_batches_tracked[: x.shape[1]]
        alike = self.momentum is not None or bool((counts == counts[:1]).all())
        return alike and bool(0 < x.shape[1] <= self.max_steps and x.shape[0] > 1)

    def _whole(self, x: Array) -> tuple[Array, Saved]:
        N, T, C = x.shape
        flat = x.reshape(N, T * C)
        weight, bias = (None if p is None else np.tile(p, T) for p in (self.weight, self.bias))
        if self.training:
            rows = self.running_mean[:T], self.running_var[:T]
            mean, var = (r.reshape(-1) for r in rows)  # views, but where the layer was given arrays in another order
            momentum = self._momentum(0)
            y, whole = functional.batch_norm_train(flat, weight, bias, mean, var, momentum=momentum, eps=self.eps)
            for row, moved in zip(rows, (mean, var), strict=True):
                if not np.may_share_memory(row, moved):
                    row[...] = moved.reshape(row.shape)
            self.num_batches_tracked[:T] += whole.updated
        else:
            seen = self.rows(T)
            mean, var = self.running_mean[seen].reshape(-1), self.running_var[seen].reshape(-1)
            y, whole = functional.frozen(flat, mean, var, weight, bias, eps=self.eps)
        return y.reshape(x.shape), whole

    def __repr__(self) -> str:
        return f"RecurrentBatchNorm({self.num_features}, {self.max_steps}, eps={self.eps}, momentum={self.momentum})"
