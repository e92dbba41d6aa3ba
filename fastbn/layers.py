"""Layers: arrays with state around the functions, under PyTorch's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, functional
from fastbn.errors import ArgumentTypeError, ArgumentValueError

__all__ = ["BatchNorm"]

Array = npt.NDArray[Any]
KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class BatchNorm:
    """Batch normalization with its own weight, bias and running statistics; semantics of PyTorch's BatchNorm1d/2d/3d.

    Parameters
    ----------
    num_features : int
        Channels C.
    eps : float
        Added to the variance inside the root; > 0.
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

    Attributes
    ----------
    weight, bias, running_mean, running_var : numpy.ndarray, shape (C,), or None
        Parameters and statistics; to be changed in place or replaced.
    num_batches_tracked : int
        Batches seen in training.
    training, frozen : bool
        See ``train``, ``eval`` and ``freeze``.

    Raises
    ------
    ValueError, TypeError
        For values that make no such layer.

    Examples
    --------
    >>> bn = BatchNorm(64)
    >>> y = bn(x)                   # doctest: +SKIP
    >>> grads = bn.backward(dy)     # doctest: +SKIP
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, *, axis: int = 1, activation: str | None = None,
        dtype: npt.DTypeLike = np.float32,
    ):  # fmt: skip
        if isinstance(num_features, bool) or not isinstance(num_features, int | np.integer):
            raise ArgumentTypeError("num_features", "an integer", type(num_features).__name__)
        if num_features < 1:
            raise ArgumentValueError("num_features", "an integer >= 1", num_features)
        dtype = np.dtype(dtype)
        if dtype not in (arguments.F32, arguments.F64):
            raise ArgumentTypeError("dtype", "float32 (also for half-precision inputs) or float64", dtype)
        arguments.activation(activation)
        self.num_features = int(num_features)
        self.eps = arguments.epsilon(eps, positive=True)
        self.momentum = None if momentum is None else arguments.number("momentum", momentum)
        self.affine, self.track_running_stats = bool(affine), bool(track_running_stats)
        self.axis, self.activation, self.dtype = axis, activation, dtype
        self.weight: Array | None = np.ones(self.num_features, dtype) if affine else None
        self.bias: Array | None = np.zeros(self.num_features, dtype) if affine else None
        self.running_mean: Array | None = np.zeros(self.num_features, dtype) if track_running_stats else None
        self.running_var: Array | None = np.ones(self.num_features, dtype) if track_running_stats else None
        self.num_batches_tracked = 0
        self.training, self.frozen = True, False
        self._saved: functional.Saved | None = None

    def __call__(self, x: Any, *, residual: Any = None, mask: Any = None, out: Any = None) -> Array:
        """Normalise x; in training by the batch's statistics, which also move the running ones.

        Parameters
        ----------
        x : numpy.ndarray, rank >= 2
            C channels along ``axis``.
        residual, mask, out
            See ``fastbn.batch_norm_train``; a mask only in training.

        Returns
        -------
        numpy.ndarray
            Shape and dtype of x.
        """
        self._check(x)
        common: dict[str, Any] = {
            "eps": self.eps, "axis": self.axis, "activation": self.activation, "residual": residual, "out": out,
        }  # fmt: skip
        by_batch = self.running_mean is None or (self.training and not self.frozen)
        if not by_batch:
            if mask is not None:
                raise ArgumentValueError("mask", "None where the running statistics are used", "an array")
            y, self._saved = functional.frozen(x, self.running_mean, self.running_var, self.weight, self.bias, **common)
            return y
        moved: tuple[Any, Any] = (None, None)
        momentum = 0.0
        if self.training and not self.frozen and self.running_mean is not None:
            moved = (self.running_mean, self.running_var)
            momentum = 1.0 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
        y, self._saved = functional.batch_norm_train(
            x, self.weight, self.bias, *moved, momentum=momentum, mask=mask, **common
        )
        if moved[0] is not None:
            self.num_batches_tracked += 1
        return y

    def _check(self, x: Any) -> None:
        shape = getattr(x, "shape", None)
        if not isinstance(shape, tuple) or len(shape) < 2 or not -len(shape) <= self.axis < len(shape):
            return  # the function says what is wrong
        if shape[self.axis] != self.num_features:
            raise ArgumentValueError("x", f"{self.num_features} channels along axis {self.axis}", f"shape {shape}")

    def backward(self, grad_output: Any, *, out: Any = None) -> functional.Gradients:
        """Gradients of the last call; see ``fastbn.backward``."""
        if self._saved is None:
            raise ArgumentValueError("backward", "a call of the layer before it", "none")
        return functional.backward(grad_output, self._saved, out=out)

    def train(self, mode: bool = True) -> BatchNorm:
        """Normalise by batch statistics and move the running ones; returns self. A frozen layer stays frozen."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Normalise by the running statistics; returns self."""
        return self.train(False)

    def freeze(self, mode: bool = True) -> BatchNorm:
        """Normalise by the running statistics in training too, with gradients; ``train`` does not undo it."""
        if mode and self.running_mean is None:
            raise ArgumentValueError("freeze", "a layer with running statistics", "track_running_stats=False")
        self.frozen = bool(mode)
        return self

    def state_dict(self) -> dict[str, Array]:
        """Return copies under PyTorch's five keys; absent ones are left out."""
        state = {key: np.array(value) for key in KEYS[:4] if (value := getattr(self, key)) is not None}
        if self.track_running_stats:
            state["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the arrays of a state dict: keys and shapes must fit, dtypes are cast. All or nothing.

        Parameters
        ----------
        state : mapping of str to array
            As ``state_dict`` returns it, or PyTorch's with its tensors as arrays; ``num_batches_tracked`` may be
            absent (as in old checkpoints).

        Raises
        ------
        ValueError
            Missing or unexpected keys, other shapes.
        """
        expected = set(self.state_dict())
        missing, extra = expected - set(state) - {"num_batches_tracked"}, set(state) - expected
        if missing or extra:
            raise ArgumentValueError("state", f"the keys {sorted(expected)}", f"{sorted(state)}")
        values = {key: np.asarray(state[key]) for key in expected & set(state)}
        for key, value in values.items():
            shape = () if key == "num_batches_tracked" else (self.num_features,)
            if value.shape != shape:
                raise ArgumentValueError(key, f"shape {shape}", value.shape)
        for key, value in values.items():
            if key == "num_batches_tracked":
                self.num_batches_tracked = int(value)
            else:
                setattr(self, key, np.array(value, self.dtype))

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, axis={self.axis})"
        )
