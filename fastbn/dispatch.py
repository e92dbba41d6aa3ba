"""(operation, device) -> kernel. Batch norm of arrays on a GPU is ``fastbn.device``'s, all else runs on the CPU.

With ``NUMBA_DISABLE_JIT=1`` the kernels' vector instructions do not exist and every operation runs in NumPy float64
(``fallback``): slow, right, and open to a Python debugger.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numba
import numpy as np

from fastbn.errors import DeviceError


def kernels() -> ModuleType:
    """Return the module with ``train``, ``infer``, ``backward`` and ``moments`` for host arrays."""
    return _kernels(bool(numba.config.DISABLE_JIT))


@functools.cache  # an import statement costs half a microsecond even where it finds its module
def _kernels(interpreted: bool) -> ModuleType:
    if interpreted:
        from fastbn.cpu import fallback

        return fallback
    from fastbn.cpu import launch

    return launch


def set_kernels() -> ModuleType:
    """Return the module with ``train`` and ``backward`` of sets whose affine varies inside: layer and group norm."""
    if numba.config.DISABLE_JIT:
        from fastbn.cpu import fallback_sets

        return fallback_sets
    from fastbn.cpu import launch_sets

    return launch_sets


def masked_kernels() -> ModuleType | None:
    """Return the module for tensors of which only some values count; None where these are packed first."""
    if numba.config.DISABLE_JIT:
        return None
    from fastbn.cpu import launch_masked

    return launch_masked


def refuse_device(name: str) -> DeviceError:
    """Return the error for an array that lives on a GPU."""
    return DeviceError(
        f"{name}: expected a NumPy array, got a CUDA array; there is no GPU kernel for this yet, or x is not on the "
        "GPU: copy the array to the host first (cupy.asnumpy, tensor.cpu())"
    )


def on_device(x: Any) -> bool:
    """Tell whether this is an array on a GPU; never touches CUDA itself."""
    return type(x) is not np.ndarray and _finder()(x)


@functools.cache
def _finder() -> Callable[[Any], bool]:
    from fastbn.cuda.libraries import on_device as found

    return found
