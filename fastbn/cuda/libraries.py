"""PyTorch, CuPy, Numba: how each describes, allocates and copies its arrays on a GPU.

CUDA tensors of PyTorch (bfloat16 included, which has no ``__cuda_array_interface__``), CuPy arrays, and anything else
with ``__cuda_array_interface__`` (Numba's arrays). Results are made by the library that x comes from, on its current
stream; other arrays get Numba's. None of them is imported here: who has an array has its library.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn.cuda.arrays import FLOATS, DeviceArray, Flat, Library, dtype_of, geometry, strides_of, supported
from fastbn.errors import ArgumentTypeError, ArgumentValueError, DeviceError

DTYPES = (*FLOATS, "bool", "int32", "int64")


def _guards(torch: Any) -> Any:
    """PyTorch's own comparison of all properties of tensors in one call, a tenth of the time that Python takes.

    It is not public: None where it is missing or does not tell apart what it must.
    """
    try:
        guards = importlib.import_module("torch._C._dynamo.guards").TensorGuards
        empty = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
        a, b = empty(2, 3), empty(2)
        same = guards(a, b, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        others = empty(3, 2), empty(3, 2).t(), a.double(), torch.nn.Parameter(empty(2, 3)), a[0], None
        works = same(empty(2, 3), b) is True and not any(same(other, b) for other in others)
    except Exception:
        return None
    return guards if works else None


class Torch(Library):
    """PyTorch."""

    name = "torch"

    def __init__(self, torch: Any):
        self.torch = torch
        self._grad_enabled = torch.is_grad_enabled
        self.pointer = self._pointer = torch.Tensor.data_ptr
        self._guards = _guards(torch)
        self._raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # 0.2 us instead of 1.5
        self.dtypes = {getattr(torch, name): name for name in DTYPES}
        self.types = {name: dtype for dtype, name in self.dtypes.items()}

    def wrap(self, value: Any, name: str = "x") -> DeviceArray:  # noqa: D102
        if value.requires_grad and self.torch.is_grad_enabled():
            raise ArgumentTypeError(name, "a tensor outside autograd (detach(), or torch.no_grad())", "requires_grad")
        dtype = self.dtypes.get(value.dtype) or str(value.dtype).removeprefix("torch.")
        supported(name, dtype)
        found = geometry(value.shape, value.stride(), dtype, value.element_size())
        return DeviceArray(self, value, value.data_ptr(), found, value.device.index)

    def signatures(self, values: Any) -> list[Any]:  # noqa: D102
        found: list[Any] = []
        asked = self._grad_enabled()
        for v in values:
            found += (type(v), v.dtype, v.shape, v.stride(), v.get_device(), asked and v.requires_grad)
        return found

    def guard(self, values: Any) -> Callable[..., bool]:  # noqa: D102
        if self._guards is None:
            return super().guard(values)
        same: Callable[..., bool] = self._guards(*values, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        if not any(v.requires_grad for v in values):
            return same
        return lambda *others: not self._grad_enabled() and same(*others)

    def address(self, value: Any) -> int:  # noqa: D102
        found: int = value.data_ptr()
        return found

    def addresses(self, values: Any) -> list[int]:  # noqa: D102
        return [*map(self._pointer, values)]

    def like(self, value: Any) -> Any:  # noqa: D102
        return self.torch.empty_like(value)

    def vector(self, size: int, dtype: str, like: Any) -> Flat:  # noqa: D102
        value = self.room(size, dtype, like)
        return Flat(value.data_ptr(), size, "f64" if dtype == "float64" else "f32", value)

    def room(self, size: Any, dtype: str, like: Any) -> Any:  # noqa: D102
        wanted = self.types[dtype]  # new_empty takes half the time of empty, and a number half that of a tuple
        return like.new_empty(size) if like.dtype is wanted else like.new_empty(size, dtype=wanted)

    def maker(self, size: Any, dtype: str, like: Any) -> Callable[[Any], Any]:  # noqa: D102
        wanted = self.types[dtype]
        if like.dtype is wanted:
            return lambda like: like.new_empty(size)
        return lambda like: like.new_empty(size, dtype=wanted)

    def cut(self, value: Any, sizes: list[int]) -> Any:  # noqa: D102
        return value.unsafe_split_with_sizes(sizes)  # not views of each other to autograd, who may write into them

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        return self.torch.empty(shape, dtype=getattr(self.torch, dtype), device=like.device)

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device=like.device)

    def contiguous(self, value: Any) -> Any:  # noqa: D102
        return value.contiguous()

    def assign(self, target: Any, source: Any) -> None:  # noqa: D102
        target.copy_(source)

    def host(self, value: Any) -> Any:  # noqa: D102
        return value.detach().cpu().numpy()

    def put(self, values: Any, like: Any) -> Any:  # noqa: D102
        return self.torch.from_numpy(values.copy()).to(like.device)

    def expand(self, value: Any, shape: tuple[int, ...]) -> Any:  # noqa: D102
        return value.expand(shape)

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:  # noqa: D102
        return value.permute(order)

    def stream(self, value: Any) -> int:  # noqa: D102
        if self._raw_stream is not None:
            return self._raw_stream(value.get_device())  # type: ignore[no-any-return]
        return int(self.torch.cuda.current_stream(value.device).cuda_stream)


class CuPy(Library):
    """CuPy."""

    name = "cupy"

    def __init__(self, cupy: Any):
        self.cupy = cupy

    def wrap(self, value: Any, name: str = "x") -> DeviceArray:  # noqa: D102
        supported(name, value.dtype.name)
        found = geometry(value.shape, value.strides, value.dtype.name, 1)
        return DeviceArray(self, value, value.data.ptr, found, value.device.id)

    def signatures(self, values: Any) -> list[Any]:  # noqa: D102
        found: list[Any] = []
        for v in values:
            found += (type(v), v.dtype, v.shape, v.strides, v.data.device_id)
        return found

    def address(self, value: Any) -> int:  # noqa: D102
        return int(value.data.ptr)

    def like(self, value: Any) -> Any:  # noqa: D102
        return self.cupy.empty_like(value)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        with like.device:
            return self.cupy.empty(shape, dtype_of(dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        with like.device:
            return self.cupy.zeros(shape, dtype_of(dtype))

    def contiguous(self, value: Any) -> Any:  # noqa: D102
        return self.cupy.ascontiguousarray(value)

    def assign(self, target: Any, source: Any) -> None:  # noqa: D102
        target[...] = source

    def host(self, value: Any) -> Any:  # noqa: D102
        return self.cupy.asnumpy(value)

    def put(self, values: Any, like: Any) -> Any:  # noqa: D102
        with like.device:
            return self.cupy.array(values)

    def expand(self, value: Any, shape: tuple[int, ...]) -> Any:  # noqa: D102
        return self.cupy.broadcast_to(value, shape)

    def stream(self, value: Any) -> int:  # noqa: D102
        return int(self.cupy.cuda.get_current_stream().ptr)


class Numba(Library):
    """Numba's arrays, and every other array that has the interface.

    A call works on the stream that the interface of x names (the default stream where it names none), and that stream
    waits for those of the other arguments. What is made for it is made by Numba and says that it is on this stream;
    where Numba's memory is another library's, ``driver.lend`` keeps the order. The arrays that a caller gave must live
    until the stream has used them: who frees one in the order of another stream waits first.
    """

    name = "numba.cuda"
    streams_differ = True

    def wrap(self, value: Any, name: str = "x") -> DeviceArray:  # noqa: D102
        interface = value.__cuda_array_interface__
        if interface.get("mask") is not None:
            raise ArgumentTypeError(name, "a plain array", "a masked array")
        described = np.dtype(interface["typestr"])
        dtype = getattr(getattr(value, "dtype", None), "name", None) or described.name
        supported(name, dtype if described.isnative else str(described))
        shape, itemsize = tuple(interface["shape"]), described.itemsize
        strides = interface.get("strides")
        address, readonly = interface["data"]
        strides = strides_of(shape, itemsize) if strides is None else tuple(strides)
        return DeviceArray(self, value, int(address or 0), geometry(shape, strides, dtype, 1), None, not readonly)

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        from fastbn.cuda.driver import cuda, lend

        return lend(cuda.device_array(shape, dtype_of(dtype), stream=self._own_stream(like)), self.stream(like))

    def _own_stream(self, value: Any) -> Any:
        """Numba's stream of an array: what is made for it says so, or others would read it before it is written."""
        from fastbn.cuda.driver import stream_of

        handle = self.stream(value)
        return stream_of(handle) if handle else 0

    def zeros(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:  # noqa: D102
        return self.put(np.zeros(shape, dtype_of(dtype)), like)

    def contiguous(self, value: Any) -> Any:  # noqa: D102
        raise ArgumentTypeError("x", "a C-contiguous array (Numba does not copy others on the GPU)", "other strides")

    def expand(self, value: Any, shape: tuple[int, ...]) -> Any:  # noqa: D102
        raise ArgumentTypeError("mask", f"shape {shape} (Numba does not broadcast on the GPU)", value.shape)

    def reshape(self, value: Any, shape: tuple[int, ...]) -> Any:  # noqa: D102
        found = value.reshape(shape)
        return found.bind(value.stream) if getattr(value, "stream", 0) else found  # Numba's reshape forgets it

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:  # noqa: D102
        raise ArgumentTypeError("x", "a C-contiguous array (Numba does not transpose on the GPU)", "other strides")

    def assign(self, target: Any, source: Any) -> None:  # noqa: D102
        raise ArgumentTypeError("out", "a C-contiguous array (Numba does not copy others on the GPU)", "other strides")

    def host(self, value: Any) -> Any:  # noqa: D102
        from fastbn.cuda.driver import cuda

        stream = self._own_stream(value)
        found = (value if hasattr(value, "copy_to_host") else cuda.as_cuda_array(value)).copy_to_host()
        if stream:
            stream.synchronize()
        return found

    def put(self, values: Any, like: Any) -> Any:  # noqa: D102
        from fastbn.cuda.driver import cuda, lend, stream_of

        handle = self.stream(like)
        if not handle:
            return cuda.to_device(values)
        made = lend(cuda.device_array(values.shape, values.dtype, stream=stream_of(handle)), handle)
        made.copy_to_device(values, stream=stream_of(handle))
        return made

    def stream(self, value: Any) -> int:  # noqa: D102
        stream = value.__cuda_array_interface__.get("stream")
        return 0 if stream in (None, 1) else int(stream)  # 1 is the legacy default stream


@functools.cache
def _torch() -> Torch:
    return Torch(sys.modules["torch"])


@functools.cache
def _cupy() -> CuPy:
    return CuPy(sys.modules["cupy"])


NUMBA = Numba()


def _quick(kind: type) -> Library | None:
    """Return the library of arrays of exactly this type, if its calls can be remembered."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and kind is torch.Tensor:
        return _torch()
    return _cupy() if cupy is not None and kind is cupy.ndarray else None


quick: Callable[[Any], Library | None] = functools.lru_cache(maxsize=64)(_quick)  # every call asks


def on_device(value: Any) -> bool:
    """Tell whether this is an array on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return bool(getattr(value, "is_cuda", False))
    # Not a question for the class alone: those of JAX have the attribute on the CPU, too, where it raises.
    return quick(type(value)) is not None or hasattr(value, "__cuda_array_interface__")


def ready(name: str) -> None:
    """Raise a DeviceError that names the argument where kernels cannot run."""
    try:
        from fastbn.cuda.driver import check

        check()
    except DeviceError as error:
        raise DeviceError(f"{name}: expected a NumPy array on this machine, got a CUDA array: {error}") from error


def wrap(name: str, value: Any, allowed: tuple[str, ...] = FLOATS) -> DeviceArray:
    """See a device array; errors name the argument. Raises DeviceError where kernels cannot run."""
    ready(name)
    from fastbn.cuda.driver import current_device

    array = _library(value).wrap(value, name)
    supported(name, array.name, allowed)
    if array.address % array.itemsize:  # an access to it would end all that the process does on the GPU
        expected = f"an array aligned to its {array.itemsize}-byte elements"
        raise ArgumentValueError(name, expected, "an unaligned one")
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
