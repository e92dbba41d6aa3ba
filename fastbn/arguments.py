"""Checks of arguments: each returns the usable value or raises, naming the argument, before anything is written."""

from __future__ import annotations

import functools
import math
import numbers
import sys
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from fastbn import dispatch, layout
from fastbn.errors import ArgumentTypeError, ArgumentValueError

Array = npt.NDArray[Any]
F32, F64, F16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)
_NAMES = "float32, float64, float16 or bfloat16"


def arithmetic(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of parameters and statistics for tensors of this dtype: float32 for half types."""
    return F32 if dtype is F32 or dtype != F64 else F64


@functools.cache
def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Tell whether this is ml_dtypes' bfloat16, without importing ml_dtypes."""
    return dtype.itemsize == 2 and dtype.name == "bfloat16"


def supported(dtype: np.dtype[Any]) -> bool:
    """Tell whether there are kernels for arrays of this dtype."""
    return dtype is F32 or ((dtype in (F32, F64, F16) or is_bfloat16(dtype)) and dtype.isnative)


def tensor(name: str, x: Any) -> Array:
    """Check an array of data: NumPy, float, rank >= 2."""
    if type(x) is not np.ndarray:
        x = _host(name, x)
    dtype = x.dtype
    if not supported(dtype):
        raise ArgumentTypeError(name, f"an array of {_NAMES}", dtype)
    if x.ndim < 2:
        raise ArgumentValueError(name, "an array of rank >= 2", f"shape {x.shape}")
    return cast(Array, x)


def _host(name: str, x: Any) -> Array:
    if isinstance(x, np.ma.MaskedArray):
        raise ArgumentTypeError(name, "a plain array (give the mask as mask=)", "a masked array")
    if isinstance(x, np.ndarray):
        return cast(Array, x.view(np.ndarray))
    if dispatch.on_device(x):
        raise dispatch.refuse_device(name)
    if is_tensor(x):
        raise ArgumentTypeError(name, "a NumPy array", "a torch.Tensor: pass x.detach().numpy(), or see fastbn.torch")
    raise ArgumentTypeError(name, "a NumPy array", type(x).__name__)


def is_tensor(x: Any) -> bool:
    """Tell whether this is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(isinstance(x, torch.Tensor))


def same_kind(name: str, value: Any, x: Array, of: str = "x") -> Array:
    """Check an array with the shape and dtype of x."""
    if type(value) is np.ndarray and value.dtype is x.dtype and value.shape == x.shape:
        return value
    array = tensor(name, value)
    if array.shape != x.shape:
        raise ArgumentValueError(name, f"the shape of {of}, {x.shape}", array.shape)
    if array.dtype is not x.dtype and array.dtype != x.dtype:
        raise ArgumentTypeError(name, f"the dtype of {of}, {x.dtype}", array.dtype)
    return array


def parameter(name: str, value: Any, channels: int, dtype: np.dtype[Any]) -> Array:
    """Check a vector with one number per channel in the arithmetic dtype; make it contiguous, aligned and writeable.

    Numba would compile every kernel once more for arrays that are read-only or not aligned.
    """
    array: Array = value if type(value) is np.ndarray else _vector(name, value)
    if array.shape != (channels,):
        raise ArgumentValueError(name, f"one number per channel, shape ({channels},)", f"shape {array.shape}")
    if array.dtype is not dtype and array.dtype != dtype:
        raise ArgumentTypeError(name, f"{dtype} (parameters of half types are float32)", array.dtype)
    return array if array.flags.carray else np.array(array, order="C")


def _vector(name: str, value: Any) -> Array:
    if isinstance(value, np.ndarray) or is_tensor(value) or dispatch.on_device(value):
        return _host(name, value)
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(name, "one number per channel", type(value).__name__) from None


def sequence(name: str, value: Any, expected: str) -> Array:
    """Return ``numpy.asarray(value)`` where NumPy makes an array of it; a masked array's mask would be lost."""
    if isinstance(value, np.ma.MaskedArray):
        raise ArgumentTypeError(name, "a plain array", "a masked array")
    if dispatch.on_device(value):
        raise dispatch.refuse_device(name)
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor with a graph
        raise ArgumentTypeError(name, expected, type(value).__name__) from None


def running(name: str, value: Any, channels: int, dtype: np.dtype[Any]) -> Array:
    """Check a running statistic that will be updated in place."""
    if type(value) is np.ndarray and value.dtype is dtype and value.shape == (channels,) and value.flags.carray:
        return value
    if not isinstance(value, np.ndarray):
        raise ArgumentTypeError(name, "a NumPy array (it is updated in place)", type(value).__name__)
    if parameter(name, value, channels, dtype) is not value and not value.flags.writeable:
        raise ArgumentValueError(name, "a writeable array (it is updated in place)", "a read-only one")
    return value


def number(name: str, value: Any) -> float:
    """Check a finite real number."""
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.floating | np.integer):
        raise ArgumentTypeError(name, "a number", type(value).__name__)
    try:
        found = float(value)
    except OverflowError:
        raise ArgumentValueError(name, "a finite number", f"an {type(value).__name__} beyond float64") from None
    if not math.isfinite(found):
        raise ArgumentValueError(name, "a finite number", value)
    return found


def epsilon(value: Any, positive: bool) -> float:
    """Check eps: > 0 in training, as PyTorch, and >= 0 in inference."""
    eps = number("eps", value)
    if eps < 0.0 or (positive and eps == 0.0):
        raise ArgumentValueError("eps", "a number > 0" if positive else "a number >= 0", value)
    return eps


def flag(name: str, value: Any) -> bool:
    """Check a switch."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(name, "True or False", value)
    return bool(value)


def activation(value: Any) -> bool | None:
    """Return True for "relu", None for None."""
    if value is None:
        return None
    if isinstance(value, str) and value == "relu":
        return True
    raise ArgumentValueError("activation", 'None or "relu"', repr(value))


def plain_output(out: Any) -> None:
    """Check that an output is NumPy's own array."""
    if isinstance(out, np.ndarray) and type(out) is not np.ndarray:
        raise ArgumentTypeError("out", "a plain NumPy array (out.view(np.ndarray) is one)", type(out).__name__)
    if type(out) is not np.ndarray:
        raise ArgumentTypeError("out", "a NumPy array", type(out).__name__)


def output(out: Any, x: Array, axis: int) -> layout.Layout:
    """Check an output array: like x, writeable and dense; return its layout."""
    plain_output(out)
    same_kind("out", out, x)
    flags = out.flags
    if not flags.writeable:
        raise ArgumentValueError("out", "a writeable array", "a read-only one")
    if not flags.aligned:  # a streaming store to such an address ends the process
        raise ArgumentValueError("out", f"an array aligned to its {out.itemsize}-byte elements", "an unaligned one")
    found = layout.of(out.shape, out.strides, out.itemsize, axis)
    if found is None:
        raise ArgumentValueError(
            "out", "an array without gaps in memory (contiguous in some order of axes)", f"strides {out.strides}"
        )
    return found


def apart(name: str, out: Array, other: Array, exact_allowed: bool) -> None:
    """Raise if out overlaps another array, unless it is the very same memory and that is allowed."""
    if not np.may_share_memory(out, other):
        return
    same = out.ctypes.data == other.ctypes.data and out.strides == other.strides
    if (same and exact_allowed) or not (same or share(out, other)):
        return
    expected = f"memory apart from {name}" + (f", or exactly that of {name}" if exact_allowed else "")
    raise ArgumentValueError("out", expected, "the same memory" if same else "overlapping memory")


def apart_from_parameters(out: Array, weight: Array | None, bias: Array | None) -> None:
    """Raise if out overlaps weight or bias."""
    apart_from_vectors(out, weight=weight, bias=bias)


def apart_from_vectors(out: Array, **vectors: Array | None) -> None:
    """Raise if out overlaps vectors that kernels read while they write it."""
    for name, vector in vectors.items():
        if vector is not None and not (out.flags.owndata and vector.flags.owndata):
            apart(name, out, vector, exact_allowed=False)


def share(a: Array, b: Array) -> bool:
    """Tell whether two arrays have a byte in common, or may have one where that is hard to say."""
    if not np.may_share_memory(a, b):
        return False
    most: Any = 1000  # steps of an exact search; NumPy's stubs know two special values only
    try:
        return bool(np.shares_memory(a, b, max_work=most))
    except np.exceptions.TooHardError:
        return True


def valid(mask: Any, x: Array, axis: int) -> Array:
    """Check a mask and broadcast it to the shape of x without its channel axis."""
    mask = sequence("mask", mask, "an array of bool")
    if mask.dtype != np.bool_:
        raise ArgumentTypeError("mask", "an array of bool", mask.dtype)
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ArgumentValueError(
            "mask", f"a shape that broadcasts to {shape}, that of x without its channel axis", mask.shape
        ) from None


def from_lengths(lengths: Any, x: Array, axis: int) -> Array:
    """Return the mask (N, T) of the first ``lengths[n]`` steps of (N, C, T) or (N, T, C)."""
    if x.ndim != 3 or axis == 0:
        raise ArgumentValueError(
            "lengths", "x of shape (N, C, T) with axis=1 or (N, T, C) with axis=2", f"shape {x.shape}, axis {axis}"
        )
    steps = x.shape[3 - axis]
    counts = sequence("lengths", lengths, "an array of integers")
    if counts.shape == (0,):  # NumPy makes an empty list an array of float64
        counts = counts.astype(np.intp)
    if not np.issubdtype(counts.dtype, np.integer):
        raise ArgumentTypeError("lengths", "an array of integers", counts.dtype)
    if counts.shape != x.shape[:1]:
        raise ArgumentValueError("lengths", f"one length per sample, shape {x.shape[:1]}", f"shape {counts.shape}")
    if counts.size and not 0 <= counts.min() <= counts.max() <= steps:
        raise ArgumentValueError("lengths", f"0 <= length <= {steps}", f"{counts.min()} to {counts.max()}")
    mask: Array = np.arange(steps) < counts[:, None]
    return mask
