"""Batch norm layers from other frameworks' arrays and settings, with their conventions.

=========  =====================================  ==================  =============  =======
From       scale, shift, mean, variance           momentum weighs     running var    eps
=========  =====================================  ==================  =============  =======
PyTorch    weight, bias, running_mean, _var       the new value, 0.1  unbiased       1e-5
Keras 3    gamma, beta, moving_mean, _variance    the old, 0.99       biased         1e-3
Flax       scale, bias, mean, var                 the old, 0.99       biased         1e-5
ONNX       scale, B, input_mean, input_var        the old, 0.9        biased         1e-5
=========  =====================================  ==================  =============  =======

So the layer's momentum is 1 - theirs, and it is told ``unbiased=False``. A variance that was averaged unbiased cannot
be turned into a biased one, or back, unless every batch had the same size n (then by (n - 1)/n): none of it is tried.
PyTorch's own state needs no conversion: ``BatchNorm.load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.layers import BatchNorm

__all__ = ["from_flax", "from_keras", "from_onnx"]

Array = npt.NDArray[Any]


def _layer(given: Mapping[str, Any], names: tuple[str, str, str, str], momentum: Any, eps: Any, axis: Any) -> BatchNorm:
    """Make a layer of arrays by their names in the other framework; the first two of the four names may be absent."""
    arrays = {name: _vector(name, value) for name, value in given.items()}
    channels = arrays[names[2]].size
    for name, array in arrays.items():
        if array.shape != (channels,):
            raise ArgumentValueError(name, f"shape ({channels},), that of {names[2]}", array.shape)
    decay = arguments.number("momentum", momentum)
    if not 0.0 <= decay <= 1.0:
        raise ArgumentValueError("momentum", "the weight of the old value, 0 to 1", momentum)
    epsilon = arguments.number("epsilon", eps)
    if epsilon < 0.0:
        raise ArgumentValueError("epsilon", "a number >= 0", eps)
    dtype = arguments.F64 if any(a.dtype == arguments.F64 for a in arrays.values()) else arguments.F32
    layer = BatchNorm(channels, epsilon, 1.0 - decay, axis=axis, dtype=dtype, unbiased=False)
    targets = ("weight", "bias", "running_mean", "running_var")
    for name, target in zip(names, targets, strict=True):
        setattr(layer, target, np.array(arrays[name], dtype) if name in arrays else None)
    layer.affine = names[0] in arrays or names[1] in arrays
    return layer


def _vector(name: str, value: Any) -> Array:
    array = arguments.sequence(name, _on_host(value), "one number per channel")
    if array.dtype.kind != "f" and not arguments.is_bfloat16(array.dtype):
        raise ArgumentTypeError(name, "an array of floating point numbers", array.dtype)
    if array.ndim != 1 or not array.size:
        raise ArgumentValueError(name, "one number per channel, shape (C,)", f"shape {array.shape}")
    return array


def _on_host(value: Any) -> Any:
    """Return what NumPy takes from wherever it lies: JAX's arrays, on a GPU too."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__array__"):
        return value
    try:
        return np.asarray(value)
    except (TypeError, RuntimeError):  # a GPU's that are not copied unasked, tensors with a graph
        return value


def _exactly(what: str, given: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """Return the values under ``names``, in order; raise if the mapping has others or lacks one."""
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(what, "a mapping of names to arrays", type(given).__name__)
    if set(given) != set(names):
        raise ArgumentValueError(what, f"the names {sorted(names)}", f"{sorted(given, key=str)}")
    return [given[name] for name in names]


def from_keras(
    weights: Mapping[str, Any] | Sequence[Any], *, momentum: float = 0.99, epsilon: float = 1e-3, axis: int = -1,
    center: bool = True, scale: bool = True,
) -> BatchNorm:  # fmt: skip
    """Return a layer that does what Keras' ``BatchNormalization`` does, in training and in inference.

    Parameters
    ----------
    weights : mapping or sequence of arrays, shape (C,)
        By name, ``gamma, beta, moving_mean, moving_variance``, or in that order, as ``layer.get_weights()`` returns
        them; without beta or gamma where ``center`` or ``scale`` is False.
    momentum, epsilon, axis, center, scale
        As given to Keras; the defaults are Keras'. momentum is the weight of the old value.

    Returns
    -------
    BatchNorm
        With momentum 1 - momentum and the biased running variance.

    Raises
    ------
    ValueError, TypeError
        Other names, another number of arrays, other shapes (renormalising layers among them).
    """
    names = ["gamma"] * bool(scale) + ["beta"] * bool(center) + ["moving_mean", "moving_variance"]
    if isinstance(weights, Mapping):
        values = dict(zip(names, _exactly("weights", weights, names), strict=True))
    elif not isinstance(weights, Sequence) or len(weights) != len(names):
        found = f"{len(weights)} arrays" if isinstance(weights, Sequence) else type(weights).__name__
        raise ArgumentValueError("weights", f"{len(names)} arrays, {names}", found)
    else:
        values = dict(zip(names, weights, strict=True))
    return _layer(values, ("gamma", "beta", "moving_mean", "moving_variance"), momentum, epsilon, axis)


def from_flax(
    params: Mapping[str, Any] | None, batch_stats: Mapping[str, Any], *, momentum: float = 0.99,
    epsilon: float = 1e-5, axis: int = -1, use_bias: bool = True, use_scale: bool = True,
) -> BatchNorm:  # fmt: skip
    """Return a layer that does what Flax' ``BatchNorm`` does, in training and in inference.

    Parameters
    ----------
    params : mapping of str to array, shape (C,), or None
        ``scale, bias``; without either where ``use_scale`` or ``use_bias`` is False.
    batch_stats : mapping of str to array, shape (C,)
        ``mean, var``.
    momentum, epsilon, axis, use_bias, use_scale
        As given to Flax; the defaults are Flax'. momentum is the weight of the old value.

    Returns
    -------
    BatchNorm
        With momentum 1 - momentum and the biased running variance.

    Raises
    ------
    ValueError, TypeError
        Other names, other shapes, more than one channel axis.
    """
    names = ["scale"] * bool(use_scale) + ["bias"] * bool(use_bias)
    values = dict(zip(names, _exactly("params", {} if params is None else params, names), strict=True))
    values["mean"], values["var"] = _exactly("batch_stats", batch_stats, ("mean", "var"))
    return _layer(values, ("scale", "bias", "mean", "var"), momentum, epsilon, axis)


def from_onnx(
    scale: Any, B: Any, input_mean: Any, input_var: Any, *, momentum: float = 0.9, epsilon: float = 1e-5
) -> BatchNorm:
    """Return a layer that does what the ONNX operator ``BatchNormalization`` (opset 14 and later) does.

    Parameters
    ----------
    scale, B, input_mean, input_var : array, shape (C,)
        The operator's inputs after X, in its order; float16 and bfloat16 become float32.
    momentum, epsilon : float
        Its attributes; momentum is the weight of the old value.

    Returns
    -------
    BatchNorm
        With channel axis 1, momentum 1 - momentum and the biased running variance.

    Raises
    ------
    ValueError, TypeError
        Other shapes or dtypes.
    """
    values = {"scale": scale, "B": B, "input_mean": input_mean, "input_var": input_var}
    for name, value in values.items():
        if value is None:
            raise ArgumentTypeError(name, "an array", "None")
    return _layer(values, ("scale", "B", "input_mean", "input_var"), momentum, epsilon, 1)
