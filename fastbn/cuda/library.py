"""What one array library (PyTorch, CuPy, Numba) does its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbn.cuda.arrays import DeviceArray, Flat


class Library:
    """What one library does its own way. ``name`` is for messages."""

    name = "CUDA"
    streams_differ = False  # arrays say themselves which stream they are on
    pointer: Callable[[Any], int] | None = None  # what ``address`` does, if there is a quicker way

    def wrap(self, value: Any, name: str = "x") -> DeviceArray:
        """See an array of this library."""
        raise NotImplementedError

    def signatures(self, values: Any) -> list[Any]:
        """Return what tells arrays of this library apart but their memory; TypeError where it cannot tell."""
        raise TypeError(self.name)

    def guard(self, values: Any) -> Callable[..., bool]:
        """Return what tells whether arrays are as these are in everything but their memory."""
        wanted = self.signatures(values)

        def same(*others: Any) -> bool:
            try:
                return self.signatures(others) == wanted
            except (AttributeError, TypeError):  # not of this library
                return False

        return same

    def address(self, value: Any) -> int:
        """Return where the memory begins."""
        return self.wrap(value).address

    def addresses(self, values: Any) -> list[int]:
        """Return where the memory of each begins."""
        address = self.address
        return [address(v) for v in values]

    def like(self, value: Any) -> Any:
        """Return an uninitialised array with the shape, dtype and (dense) memory order of another."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> Any:
        """Return an uninitialised C-contiguous array on the device of ``like``."""
        raise NotImplementedError

    def vector(self, size: int, dtype: str, like: Any) -> Flat:
        """Return an uninitialised vector as kernels take it."""
        return self.wrap(self.empty((size,), dtype, like)).flat()

    def room(self, size: Any, dtype: str, like: Any) -> Any:
        """Return an uninitialised array as this library has it; ``size``: of a vector, or a shape."""
        return self.empty(size if type(size) is tuple else (size,), dtype, like)

    def maker(self, size: Any, dtype: str, like: Any) -> Callable[[Any], Any]:
        """Return what makes room for arrays with the dtype of this one, without looking it up again."""
        return lambda like: self.room(size, dtype, like)

    def cut(self, value: Any, sizes: list[int]) -> Any:
        """Return the parts of a vector, of these sizes."""
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        return [value[end - size : end] for size, end in zip(sizes, ends, strict=True)]

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

    def assign(self, target: Any, source: Any) -> None:
        """Copy one array's values into another of the same shape, whatever their strides."""
        raise NotImplementedError

    def expand(self, value: Any, shape: tuple[int, ...]) -> Any:
        """Return a view broadcast to another shape."""
        raise NotImplementedError

    def reshape(self, value: Any, shape: tuple[int, ...]) -> Any:
        """Return a view of a contiguous array with another shape."""
        return value.reshape(shape)

    def transpose(self, value: Any, order: tuple[int, ...]) -> Any:
        """Return a view with the axes in another order."""
        return value.transpose(order)

    def stream(self, value: Any) -> int:
        """Return the handle of the stream that the caller works on."""
        raise NotImplementedError
