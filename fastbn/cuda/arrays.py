"""Arrays of other libraries that live on a GPU, seen as the functions see NumPy's: shape, strides, dtype, memory.

CUDA tensors of PyTorch (bfloat16 included, which has no ``__cuda_array_interface__``), CuPy arrays, and anything else
with ``__cuda_array_interface__`` (Numba's arrays). Results are made by the library that x comes from, on its current
stream; other arrays get Numba's. Needs none of these libraries itself, and no numba-cuda.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any, NamedTuple

import numpy as np

from fastbn.errors import ArgumentTypeError, DeviceError

INSTALL = 'install the GPU extra that fits the driver: pip install "numba-cuda[cu13]" (or [cu12])'
ITEMSIZE = {"f32": 4, "f64": 8, "f16": 2, "bf16": 2}
_KINDS = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}


class _BFloat16:
    """Stands for the dtype where ml_dtypes, which owns it, is not installed."""

    itemsize, name, isnative = 2, "bfloat16", True

    def __str__(self) -> str:
        return self.name


@functools.cache
def dtype_of(name: str) -> Any:
    """Return the NumPy dtype of this name."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        return _BFloat16()
    return np.dtype(ml_dtypes.bfloat16)


class Flat:
    """A tensor as kernels take it: an address, a number of elements and what they are. Keeps its memory alive."""

    __slots__ = ("_array", "address", "kind", "owner", "size")

    def __init__(self, address: int, size: int, kind: str, owner: Any = None):
        self.address, self.size, self.kind, self.owner = address, size, kind, owner
        self._array: Any = None

    @property
    def array(self) -> Any:
        """The memory as a NumPy array; only in the simulator, where an address is one of host memory."""
        if self._array is None:
            memory = {"f32": "<f4", "f64": "<f8", "f16": "<u2", "bf16": "<i2"}[self.kind]
            self._array = np.asarray(_Host(self.address, self.size, memory))
        return self._array


class _Host:
    def __init__(self, address: int, size: int, typestr: str):
        self.__array_interface__ = {"data": (address, False), "shape": (size,), "typestr": typestr, "version": 3}


class Flags(NamedTuple):
    """What NumPy's ``flags`` say about an array."""

    c_contiguous: bool
    writeable: bool


def strides_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides, in bytes, of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _supported(name: str, dtype: str) -> None:
    if dtype not in _KINDS:
        raise ArgumentTypeError(name, "an array of float32, float64, float16 or bfloat16", dtype)


class Library:
    """What one library does its own way. ``name`` is for messages."""

    name = "CUDA"

    def wrap(self, value: Any, name: str = "x") -> DeviceArray:
        """See an array of this library."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Return an uninitialised C-contiguous array on the device of ``like``."""
        raise NotImplementedError

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Return an array of zeros on the device of ``like``."""
        raise NotImplementedError

    def contiguous(self, value: Any) -> Any:
        """Return the values in C order."""
        raise NotImplementedError

    def host(self, value: Any) -> Any:
        """Return the values as a NumPy array; waits for the GPU."""
        raise NotImplementedError

    def put(self, values: Any, like: Any) -> Any:
        """Copy a NumPy array to the device of ``like``."""
        raise NotImplementedError

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:
        """Return a view with the axes in another order."""
        return value.transpose(order)

    def stream(self, value: Any) -> int:
        """Return the handle of the stream that the caller works on."""
        raise NotImplementedError


class Torch(Library):
    """PyTorch."""

    name = "torch"

    def __init__(self, torch: Any):
        self.torch = torch
        self.dtypes = {getattr(torch, name): name for name in _KINDS}

    def wrap(self, value: Any, name: str = "x") -> DeviceArray:  # noqa: D102
        if value.requires_grad and self.torch.is_grad_enabled():
            raise ArgumentTypeError(name, "a tensor outside autograd (detach(), or torch.no_grad())", "requires_grad")
        dtype = self.dtypes.get(value.dtype) or str(value.dtype).removeprefix("torch.")
        _supported(name, dtype)
        itemsize = value.element_size()
        strides = tuple(s * itemsize for s in value.stride())
        return DeviceArray(self, value, value.data_ptr(), tuple(value.shape), strides, dtype, value.device.index)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=like.device)

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device=like.device)

    def contiguous(self, value: Any) -> Any:  # noqa: D102
        return value.contiguous()

    def host(self, value: Any) -> Any:  # noqa: D102
        return value.detach().cpu().numpy()

    def put(self, values: Any, like: Any) -> Any:  # noqa: D102
        return self.torch.from_numpy(values.copy()).to(like.device)

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:  # noqa: D102
        return value.permute(order)

    def stream(self, value: Any) -> int:  # noqa: D102
        return int(self.torch.cuda.current_stream(value.device).cuda_stream)


class CuPy(Library):
    """CuPy."""

    name = "cupy"

    def __init__(self, cupy: Any):
        self.cupy = cupy

    def wrap(self, value: Any, name: str = "x") -> DeviceArray:  # noqa: D102
        _supported(name, value.dtype.name)
        return DeviceArray(self, value, value.data.ptr, value.shape, value.strides, value.dtype.name, value.device.id)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        with like.device:
            return self.cupy.empty(shape, dtype_of(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        with like.device:
            return self.cupy.zeros(shape, dtype_of(dtype))

    def contiguous(self, value: Any) -> Any:  # noqa: D102
        return self.cupy.ascontiguousarray(value)

    def host(self, value: Any) -> Any:  # noqa: D102
        return self.cupy.asnumpy(value)

    def put(self, values: Any, like: Any) -> Any:  # noqa: D102
        with like.device:
            return self.cupy.array(values)

    def stream(self, value: Any) -> int:  # noqa: D102
        return int(self.cupy.cuda.get_current_stream().ptr)


class Numba(Library):
    """Numba's arrays, and every other array that has the interface."""

    name = "numba.cuda"

    def wrap(self, value: Any, name: str = "x") -> DeviceArray:  # noqa: D102
        interface = value.__cuda_array_interface__
        if interface.get("mask") is not None:
            raise ArgumentTypeError(name, "a plain array", "a masked array")
        dtype = getattr(getattr(value, "dtype", None), "name", None) or np.dtype(interface["typestr"]).name
        _supported(name, dtype)
        shape = tuple(interface["shape"])
        itemsize = np.dtype(interface["typestr"]).itemsize
        strides = interface.get("strides")
        address, readonly = interface["data"]
        strides = strides_of(shape, itemsize) if strides is None else tuple(strides)
        return DeviceArray(self, value, int(address or 0), shape, strides, dtype, None, not readonly)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        from fastbn.cuda.driver import cuda

        return cuda.device_array(shape, dtype_of(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        from fastbn.cuda.driver import cuda

        return cuda.to_device(np.zeros(shape, dtype_of(dtype)))

    def contiguous(self, value: Any) -> Any:  # noqa: D102
        raise ArgumentTypeError("x", "a C-contiguous array (Numba does not copy others on the GPU)", "other strides")

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:  # noqa: D102
        raise ArgumentTypeError("x", "a C-contiguous array (Numba does not transpose on the GPU)", "other strides")

    def host(self, value: Any) -> Any:  # noqa: D102
        return value.copy_to_host()

    def put(self, values: Any, like: Any) -> Any:  # noqa: D102
        from fastbn.cuda.driver import cuda

        return cuda.to_device(values)

    def stream(self, value: Any) -> int:  # noqa: D102
        stream = value.__cuda_array_interface__.get("stream")
        return 0 if stream in (None, 1) else int(stream)  # 1 is the legacy default stream


class DeviceArray:
    """An array on a GPU with the attributes of NumPy's that checks and layouts look at; ``owner`` is the array."""

    __slots__ = (
        "_flat", "address", "device", "dtype", "flags", "itemsize", "kind", "library", "name", "ndim", "owner", "shape",
        "size", "strides",
    )  # fmt: skip

    def __init__(
        self, library: Library, owner: Any, address: int, shape: tuple[int, ...], strides: tuple[int, ...], name: str,
        device: int | None, writeable: bool = True,
    ):  # fmt: skip
        self.library, self.owner, self.address, self.device = library, owner, address, device
        self.name, self.kind, self.dtype = name, _KINDS[name], dtype_of(name)
        self.itemsize: int = ITEMSIZE[self.kind]
        self.shape, self.strides, self.ndim, self.size = shape, strides, len(shape), math.prod(shape)
        dense = strides_of(shape, self.itemsize)
        same = all(n == 1 or a == b for n, a, b in zip(shape, strides, dense, strict=True)) or not self.size
        self.flags = Flags(same, writeable)
        self._flat: Flat | None = None

    def transpose(self, order: Any) -> DeviceArray:
        """Return a view with the axes in another order."""
        order = tuple(int(a) for a in order)
        if order == tuple(range(self.ndim)):
            return self
        return self.library.wrap(self.library.transpose(self.owner, order))

    def contiguous(self) -> DeviceArray:
        """Return an array with these values in C order: itself if it has."""
        return self if self.flags.c_contiguous else self.library.wrap(self.library.contiguous(self.owner))

    def empty(self, shape: Any, name: str | None = None) -> DeviceArray:
        """Return an uninitialised array of the same library, on the same device."""
        return self.library.wrap(self.library.empty(tuple(shape), name or self.name, self.owner))

    @property
    def arithmetic(self) -> str:
        """Name of the dtype of parameters and statistics."""
        return "float64" if self.kind == "f64" else "float32"

    def vector(self, size: int) -> Flat:
        """Return an uninitialised vector in the arithmetic type, for results."""
        return self.empty((size,), self.arithmetic).flat()

    def zeros(self, size: int) -> Flat:
        """Return a vector of zeros in the arithmetic type."""
        return self.library.wrap(self.library.zeros((size,), self.arithmetic, self.owner)).flat()

    def host(self) -> Any:
        """Return the values as a NumPy array; waits for the GPU."""
        return self.library.host(self.owner)

    scratch = vector  # memory in stream order, given back to the library when the last reference goes

    def flat(self) -> Flat:
        """See the memory as kernels do; only for dense arrays, in memory order."""
        if self._flat is None:
            self._flat = Flat(self.address, self.size, self.kind, self)
        return self._flat

    def stream(self) -> int:
        """Return the handle of the caller's current stream."""
        return self.library.stream(self.owner)

    def bounds(self) -> tuple[int, int]:
        """Return the first address and the one past the last."""
        spans = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        low = self.address + sum(s for s in spans if s < 0)
        return low, self.address + sum(s for s in spans if s > 0) + self.itemsize


@functools.cache
def _torch() -> Torch:
    return Torch(sys.modules["torch"])


@functools.cache
def _cupy() -> CuPy:
    return CuPy(sys.modules["cupy"])


NUMBA = Numba()


def on_device(value: Any) -> bool:
    """Tell whether this is an array on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(getattr(value, "is_cuda", False))
    return hasattr(type(value), "__cuda_array_interface__") or hasattr(value, "__cuda_array_interface__")


def wrap(name: str, value: Any) -> DeviceArray:
    """See a device array; errors name the argument. Raises DeviceError where kernels cannot run."""
    try:
        from fastbn.cuda.driver import check, current_device

        check()
    except DeviceError as error:
        raise DeviceError(f"{name}: expected a NumPy array on this machine, got a CUDA array: {error}") from error
    array = _library(value).wrap(value, name)
    here = current_device()
    if array.device is not None and array.device != here:
        raise DeviceError(f"{name}: expected an array on the current GPU {here}, got one on GPU {array.device}")
    return array


def _library(value: Any) -> Library:
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(value, torch.Tensor):
        return _torch()
    if cupy is not None and isinstance(value, cupy.ndarray):
        return _cupy()
    return NUMBA
