"""(operation, device) -> kernel. Today the CPU's; device arrays are told what is missing.

With ``NUMBA_DISABLE_JIT=1`` the kernels' vector instructions do not exist and every operation runs in NumPy float64
(``fallback``): slow, right, and open to a Python debugger.
"""

from __future__ import annotations

from types import ModuleType

import numba

from fastbn.errors import DeviceError


def kernels() -> ModuleType:
    """Return the module with ``train``, ``infer``, ``backward`` and ``moments`` for host arrays."""
    if numba.config.DISABLE_JIT:
        from fastbn.cpu import fallback

        return fallback
    from fastbn.cpu import launch

    return launch


def refuse_device(name: str) -> DeviceError:
    """Return the error for an array that lives on a GPU."""
    return DeviceError(
        f"{name}: expected a NumPy array, got a CUDA array; this version of fastbn has no GPU kernels: "
        "copy the array to the host first (cupy.asnumpy, tensor.cpu())"
    )
