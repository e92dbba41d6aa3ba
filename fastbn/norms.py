"""Layer, instance and group norm as layers: arrays with state, under PyTorch's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, family, functional, running
from fastbn.errors import ArgumentValueError
from fastbn.moments import Moments
from fastbn.state import Layer, axis_number, integer, parameter_dtype

__all__ = ["GroupNorm", "InstanceNorm", "LayerNorm"]

Array = npt.NDArray[Any]


class LayerNorm(Layer):
    """Layer normalization with its own weight and bias; semantics of PyTorch's LayerNorm.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Shape of the last axes of the inputs, which are normalised together.
    eps : float
        Added to the variance inside the root; > 0.
    elementwise_affine : bool
        Learn weight (ones) of shape ``normalized_shape``.
    bias : bool
        With ``elementwise_affine``: learn bias (zeros) too.
    dtype : dtype
        Of the parameters: float64 for float64 inputs, else float32.

    Attributes
    ----------
    weight, bias : numpy.ndarray, shape ``normalized_shape``, or None
        Parameters; to be changed in place or replaced.

    Raises
    ------
    ValueError, TypeError
        For values that make no such layer.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
        bias: bool = True, *, dtype: npt.DTypeLike = np.float32,
    ):  # fmt: skip
        super().__init__()
        sizes = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        if not sizes:
            raise ArgumentValueError("normalized_shape", "at least one size", sizes)
        self.normalized_shape = tuple(integer("normalized_shape", size) for size in sizes)
        self.dtype, self.eps = parameter_dtype(dtype), arguments.epsilon(eps, positive=True)
        self.elementwise_affine = bool(elementwise_affine)
        self.weight = np.ones(self.normalized_shape, self.dtype) if elementwise_affine else None
        self.bias = np.zeros(self.normalized_shape, self.dtype) if elementwise_affine and bias else None

    def __call__(self, x: Any, *, out: Any = None) -> Array:
        """Normalise the last axes of x; see ``fastbn.layer_norm``."""
        rank, shape = len(self.normalized_shape), getattr(x, "shape", None)
        if isinstance(shape, tuple) and tuple(shape[-rank:]) != self.normalized_shape:
            raise ArgumentValueError("x", f"last axes {self.normalized_shape}", f"shape {shape}")
        self._follow(x)
        y, self._saved = family.layer_norm(x, self.weight, self.bias, axis=-rank, eps=self.eps, out=out)
        return y

    def __repr__(self) -> str:
        return f"LayerNorm({self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine})"


class _ByChannel(Layer):
    """What group and instance norm share: C channels along an axis."""

    def __init__(self, name: str, channels: int, eps: float, affine: bool, axis: int, dtype: npt.DTypeLike):
        super().__init__()
        self._channels = integer(name, channels)
        self.dtype, self.axis = parameter_dtype(dtype), axis_number(axis)
        self.eps, self.affine = arguments.epsilon(eps, positive=True), bool(affine)
        self.weight = np.ones(self._channels, self.dtype) if affine else None
        self.bias = np.zeros(self._channels, self.dtype) if affine else None

    def _check(self, x: Any) -> None:
        shape = getattr(x, "shape", None)
        if not isinstance(shape, tuple) or not -len(shape) <= self.axis < len(shape):
            return  # the function says what is wrong
        if shape[self.axis] != self._channels:
            raise ArgumentValueError("x", f"{self._channels} channels along axis {self.axis}", f"shape {shape}")


class GroupNorm(_ByChannel):
    """Group normalization with its own weight and bias; semantics of PyTorch's GroupNorm.

    Parameters
    ----------
    num_groups : int
        Divides num_channels.
    num_channels : int
        Channels C.
    eps : float
        Added to the variance inside the root; > 0.
    affine : bool
        Learn weight (ones) and bias (zeros), shape (C,).
    axis : int
        Channel axis of the inputs.
    dtype : dtype
        Of the parameters: float64 for float64 inputs, else float32.

    Attributes
    ----------
    weight, bias : numpy.ndarray, shape (C,), or None
        Parameters; to be changed in place or replaced.

    Raises
    ------
    ValueError, TypeError
        For values that make no such layer.
    """

    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, *, axis: int = 1,
        dtype: npt.DTypeLike = np.float32,
    ):  # fmt: skip
        super().__init__("num_channels", num_channels, eps, affine, axis, dtype)
        self.num_groups, self.num_channels = integer("num_groups", num_groups), self._channels
        if self.num_channels % self.num_groups:
            raise ArgumentValueError("num_groups", f"a divisor of the {num_channels} channels", num_groups)

    def __call__(self, x: Any, *, out: Any = None) -> Array:
        """Normalise groups of channels of every sample; see ``fastbn.group_norm``."""
        self._check(x)
        self._follow(x)
        y, self._saved = family.group_norm(
            x, self.num_groups, self.weight, self.bias, axis=self.axis, eps=self.eps, out=out
        )
        return y

    def __repr__(self) -> str:
        return f"GroupNorm({self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine})"


class InstanceNorm(_ByChannel):
    """Instance normalization with its own state; semantics of PyTorch's InstanceNorm1d/2d/3d on batches.

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
        Keep running_mean (zeros) and running_var (ones), the means over the samples of a batch of their means and
        unbiased variances, and normalise by them in evaluation.
    axis : int
        Channel axis of the inputs.
    dtype : dtype
        Of parameters and statistics: float64 for float64 inputs, else float32.

    Attributes
    ----------
    weight, bias, running_mean, running_var : numpy.ndarray, shape (C,), or None
        Parameters and statistics; to be changed in place or replaced.
    num_batches_tracked : int
        Batches seen in training, empty ones too.

    Raises
    ------
    ValueError, TypeError
        For values that make no such layer.
    """

    arrays = ("weight", "bias", "running_mean", "running_var")

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = False,
        track_running_stats: bool = False, *, axis: int = 1, dtype: npt.DTypeLike = np.float32,
    ):  # fmt: skip
        super().__init__("num_features", num_features, eps, affine, axis, dtype)
        self.num_features, self.track_running_stats = self._channels, bool(track_running_stats)
        self.momentum = None if momentum is None else arguments.number("momentum", momentum)
        self.running_mean = np.zeros(self._channels, self.dtype) if track_running_stats else None
        self.running_var = np.ones(self._channels, self.dtype) if track_running_stats else None

    def __call__(self, x: Any, *, out: Any = None) -> Array:
        """Normalise every channel of every sample; see ``fastbn.instance_norm``."""
        self._check(x)
        self._follow(x)
        if self.running_mean is not None and not self.training:
            y, self._saved = functional.frozen(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps, axis=self.axis, out=out
            )
            return y
        if self.running_mean is not None and not self._away:
            moved = running.pair(self.running_mean, self.running_var, self._channels, self.dtype)
            running.check_apart(*moved, (self.weight, self.bias), (x, out, None))
        y, self._saved = saved = family.instance_norm(x, self.weight, self.bias, axis=self.axis, eps=self.eps, out=out)
        if self.running_mean is not None and self.running_var is not None:
            self._move(saved[1])
        return y

    def _move(self, saved: functional.Saved) -> None:
        assert self.running_mean is not None and self.running_var is not None
        momentum = 1.0 / (self.num_batches_tracked + 1) if self.momentum is None else self.momentum
        if self._away:
            from fastbn import device_family

            assert isinstance(saved, device_family.DeviceSetsSaved)
            device_family.move(saved, self.running_mean, self.running_var, momentum)
        elif saved.mean.size and saved.count:
            with np.errstate(all="ignore"):  # NaN and inf stay in their channel, as in the kernels
                mean, var = saved.mean.mean(0), saved.variance.mean(0)
            running.move(
                self.running_mean, self.running_var, Moments._of_variance(saved.count, mean, var), momentum, True
            )
        self.num_batches_tracked += 1

    def __repr__(self) -> str:
        return (
            f"InstanceNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats})"
        )
