"""Tensors as the arrays that kernels take, and results as tensors again: the same memory both ways.

Tensors on a GPU go through as they are: the public functions take them.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbn import layout

BFLOAT16 = torch.bfloat16


class Opaque(RuntimeError):
    """Raised for a tensor that has no memory to look at: traced, batched by vmap, on another device, sparse."""


@functools.cache
def _bfloat16() -> np.dtype[Any]:
    """Return NumPy's bfloat16, which PyTorch does not know by itself (pytorch#109873)."""
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def array(tensor: Tensor) -> Any:
    """See a tensor as an array; only where autograd is off, or knows nothing of the tensor."""
    if tensor.is_cuda:
        return tensor
    try:
        if tensor.dtype is BFLOAT16:
            return tensor.view(torch.int16).numpy().view(_bfloat16())
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise Opaque(f"expected a tensor whose memory NumPy can see: {error}") from error


_FLOAT: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_FAKE = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ())  # warns when asked for its memory


@functools.cache
def _memory(size: int) -> Any:
    return ctypes.c_char * size


def parameter(tensor: Tensor) -> Any:
    """As ``array``, but the tensor's memory may go on being resized, as sharding does with what it has gathered.

    ``Tensor.numpy`` rules that out for good; it takes 0.9 us, this 1.4.
    """
    dtype, size = _FLOAT.get(tensor.dtype), tensor.numel()
    plain = dtype is not None and size and tensor.__class__ in _PLAIN and tensor.is_cpu and tensor.dim() == 1
    if not plain or not tensor.is_contiguous() or tensor.is_neg():
        return array(tensor)
    try:
        memory = _memory(size * dtype.itemsize).from_address(tensor.data_ptr())  # type: ignore[union-attr]
    except RuntimeError as error:
        raise Opaque(f"expected a tensor with memory: {error}") from error
    memory.owner = tensor  # lives as long as the array does
    return np.ndarray(size, dtype, memory)


def tensor(array: Any, like: Tensor) -> Tensor:
    """See a result as a tensor with the strides of a dense one whose memory order it has.

    NumPy and PyTorch number the strides of axes with one element differently, and PyTorch tells channels last by them.
    """
    if type(array) is not np.ndarray:
        found = array
    elif like.dtype is BFLOAT16:
        found = torch.from_numpy(array.view(np.int16)).view(BFLOAT16)
    else:
        found = torch.from_numpy(array)
    return found if found.stride() == like.stride() else found.as_strided_(like.size(), like.stride())


def arithmetic(tensor: Tensor) -> torch.dtype:
    """Return the dtype of parameters and statistics for a tensor: float32 for half types."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def vector(array: Any) -> Tensor | None:
    """See a parameter's gradient as a tensor."""
    found: Tensor | None = torch.from_numpy(array) if type(array) is np.ndarray else array
    return found


def readable(value: Any) -> bool:
    """Tell whether numbers can be looked at, without waiting for a device."""
    return not isinstance(value, Tensor) or (value.__class__ in _PLAIN and value.is_cpu)


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor itself if it fills its memory without gaps, in any order of axes, else a copy that does.

    The copy's order is the one PyTorch gives its own results: part of a channels-last tensor stays channels last.
    """
    if tensor.__class__ not in _PLAIN and isinstance(tensor, _FAKE):
        raise Opaque("expected a tensor with memory, got a fake one")
    try:
        whole = tensor.is_contiguous() or tensor.dim() < 2
        whole = whole or layout.of(tensor.size(), tensor.stride(), 1, 1) is not None
        if whole and not tensor.data_ptr() % tensor.element_size():  # a buffer's tensor may be unaligned
            return tensor
    except RuntimeError as error:
        raise Opaque(f"expected a tensor with memory: {error}") from error
    return tensor.clone()


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return the tensor itself if it has these strides, else a copy: hooks may have moved what autograd saved."""
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.size(), strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
