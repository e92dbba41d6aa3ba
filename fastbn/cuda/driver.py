"""The one place that imports ``numba.cuda``: what is missing, the current device, launches with raw pointers.

numba-cuda is in maintenance mode; its successor (numba-cuda-mlir) keeps the API, so that a change of engine is a change
of this file and ``launcher``. Kernels take device addresses instead of array objects.

In the simulator (``NUMBA_ENABLE_CUDASIM=1``) an address is one of host memory and a ``Flat`` becomes a NumPy array.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from fastbn.cuda import numpy_names
from fastbn.cuda.arrays import INSTALL, Flat
from fastbn.errors import DeviceError

try:
    importlib.import_module("numba_cuda")  # numba's own copy of numba.cuda is frozen and too old
    from numba import cuda, types
except ImportError as error:
    raise DeviceError(f"it needs numba-cuda, which is not installed: {INSTALL}") from error
except Exception as error:  # an older numba-cuda beside a newer Numba
    raise DeviceError(f"numba-cuda does not fit Numba {numba.__version__} ({error}): {INSTALL}") from error

__all__ = ["SIMULATED", "Flat", "check", "cuda", "device_properties", "kernel", "run", "types"]

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
if not SIMULATED:
    numpy_names.lend()
POINTERS = {"f32": types.float32, "f64": types.float64, "f16": types.uint16, "bf16": types.int16}
POINTERS |= {"i32": types.int32, "i64": types.int64}  # lengths
ARITHMETIC = {"f32": types.float32, "f64": types.float64, "f16": types.float32, "bf16": types.float32}
ARITHMETIC |= {"i32": types.float32, "i64": types.float32}
MOST = 4096  # grids of a kernel that are remembered; then all are forgotten
GRANTED = 48 * 1024  # bytes of shared memory that a block may have without asking


def check() -> None:
    """Raise a DeviceError that says what is missing, unless kernels can run on the current device."""
    if not SIMULATED:
        _present()
        _new_enough(current_device())


@functools.cache
def _present() -> None:
    try:
        available = cuda.is_available()
    except Exception as error:
        raise DeviceError(f"it needs the CUDA libraries: {error}; {INSTALL}") from error
    if not available:
        raise DeviceError(f"{_absent()} {INSTALL}")


@functools.cache
def _new_enough(number: int) -> None:
    found = _capability(number)
    if found < (8, 0):
        raise DeviceError(f"fastbn's GPU kernels need compute capability 8.0 or newer, GPU {number} has {found}")


def _absent() -> str:
    """Say which of the two that numba-cuda asks for is not there."""
    try:
        driver = importlib.import_module("numba.cuda.cudadrv.driver").driver
        if driver.is_available:
            return "it needs CUDA's compiler (libnvvm), none was found: set CUDA_HOME to the toolkit's folder, or"
    except (ImportError, AttributeError):  # of another version
        pass
    return "it needs an NVIDIA driver and a GPU, none was found; then"


class Limits(NamedTuple):
    """What a choice of kernels depends on; GPUs of one model share their choices, others have their own."""

    multiprocessors: int
    shared: int  # bytes that a block may use
    capability: tuple[int, int] = (0, 0)


def device_properties() -> Limits:
    """Return what choices depend on of the current device."""
    return _properties(current_device())


@functools.cache
def _properties(number: int) -> Limits:
    if SIMULATED:
        return Limits(4, 64 * 1024)
    device = cuda.get_current_device()
    shared = int(device.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    return Limits(int(device.MULTIPROCESSOR_COUNT), shared, _capability(number))


@functools.cache
def _capability(number: int) -> tuple[int, int]:
    """Return the compute capability of the current device, which has this number."""
    major, minor = (0, 0) if SIMULATED else cuda.get_current_device().compute_capability
    return int(major), int(minor)


@functools.cache
def device_count() -> int:
    """Return how many GPUs there are."""
    return 1 if SIMULATED else len(cuda.gpus)


def current_device() -> int:
    """Return the number of the device that kernels are launched on."""
    return 0 if device_count() == 1 else int(cuda.get_current_device().id)


def stream_of(handle: int) -> Any:
    """Return Numba's object for a stream."""
    if handle == 2:  # as cudaStreamPerThread
        return cuda.per_thread_default_stream()
    return cuda.external_stream(handle) if handle else cuda.default_stream()


def wait(stream: int, other: int) -> None:
    """Let what is launched on a stream from now on begin after what another has been given so far."""
    if SIMULATED:
        return
    event = cuda.event(timing=False)
    event.record(stream_of(other))
    event.wait(stream_of(stream))


def foreign_allocator() -> bool:
    """Tell whether Numba's arrays lie in memory of another library (``cuda.set_memory_manager``, RMM); if in doubt."""
    if SIMULATED:
        return False
    try:
        module = importlib.import_module("numba.cuda.cudadrv.driver")
        return not issubclass(module._memory_manager, module.NumbaCUDAMemoryManager)
    except (ImportError, AttributeError, TypeError):  # of another version
        return True


def lend(array: Any, stream: int) -> Any:
    """Let a stream use an array that Numba has just made, until it is given back; returns it.

    Numba's own allocator gives memory back behind all work on the GPU. Others hand it out, and take it back, in the
    order of the default stream: this one then waits for that before, and that for this one behind.
    """
    if stream and foreign_allocator():
        wait(stream, 0)
        weakref.finalize(array, wait, 0, stream).atexit = False
    return array


@functools.cache
def _jit_options() -> frozenset[str]:
    return frozenset(inspect.signature(cuda.jit).parameters)


def device(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call; in the simulator it stays plain Python."""
    if SIMULATED:
        return function
    force: dict[str, Any] = {"forceinline": True} if "forceinline" in _jit_options() else {}
    return cuda.jit(device=True, **force)(function)


def argument_types(letters: str, kind: str) -> tuple[Any, ...]:
    """Types of kernel arguments: T tensor, A arithmetic array, I int32 array, M mask, i int32, l int64, a number."""
    tensor, arithmetic = POINTERS[kind], ARITHMETIC[kind]
    table = {
        "T": types.CPointer(tensor), "A": types.CPointer(arithmetic), "I": types.CPointer(types.int32),
        "M": types.CPointer(types.uint8),
        "i": types.int32, "l": types.int64, "a": arithmetic,
    }  # fmt: skip
    return tuple(table[letter] for letter in letters)


class Kernel:
    """A kernel with its one signature; ``launch_bounds`` caps its registers.

    Compiled at its first launch, for each compute capability by itself: a machine may have GPUs of several.
    """

    def __init__(
        self, function: Callable[..., Any], letters: str, kind: str, threads: int, blocks: int, together: bool = False
    ):
        self.function, self.letters, self.kind = function, letters, kind
        self.threads, self.blocks, self.together = threads, blocks, together
        self._compiled: dict[tuple[int, int], Any] = {}
        self._large: set[int] = set()
        self._launchers: dict[Any, Any] = {}

    @property
    def signature(self) -> Any:
        """Return the signature for ``cuda.jit``."""
        return types.void(*argument_types(self.letters, self.kind))

    @property
    def options(self) -> dict[str, Any]:
        """Return the options for ``cuda.jit``."""
        return {"launch_bounds": (self.threads, self.blocks)} if "launch_bounds" in _jit_options() else {}

    @property
    def compiled(self) -> Any:
        """Return Numba's dispatcher for the current device."""
        capability = _capability(current_device())
        found = self._compiled.get(capability)
        if found is None:
            if SIMULATED:
                found = cuda.jit(self.function)
            else:
                from fastbn.cuda import stored

                found = cuda.jit(**self.options)(self.function)
                stored.use(found, self, capability)
                found.compile(self.signature)
                for compiled in found.overloads.values() if self.together else ():
                    compiled.cooperative = True
            self._compiled[capability] = found
        return found

    def launcher(self, grid: tuple[int, ...], shared: int) -> Any:
        """Return what launches this kernel on the current device: ``(stream handle, numbers) -> None``."""
        key = (grid, shared, current_device())
        found = self._launchers.get(key)
        if found is None:
            from fastbn.cuda import launcher

            self.allow_shared(shared)
            if len(self._launchers) >= MOST:
                self._launchers.clear()
            found = self._launchers[key] = launcher.make(self, grid, shared)
        return found

    def replace(self, launcher: Any, better: Any) -> None:
        """Launch by something else where a launcher was used."""
        for key, found in self._launchers.items():
            if found is launcher:
                self._launchers[key] = better

    def allow_shared(self, size: int) -> None:
        """Opt in to more than 48 KB of shared memory, static and dynamic; numba-cuda does not do so by itself."""
        here = current_device()
        if not size or SIMULATED or here in self._large:
            return
        function = next(iter(self.compiled.overloads.values()))._codelibrary.get_cufunc()
        static = int(getattr(function.attrs, "shared", 0))
        if size + static <= GRANTED:
            return
        bindings = importlib.import_module("cuda.bindings.driver")  # what numba-cuda stands on
        most = device_properties().shared
        names, handle = bindings.CUfunction_attribute, function.handle
        wanted = {names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: most - static}
        wanted[names.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT] = 100  # percent; else fewer blocks may fit
        for attribute, value in wanted.items():
            if isinstance(handle, bindings.CUfunction):
                (code,) = bindings.cuFuncSetAttribute(handle, attribute, value)
            else:
                (code,) = bindings.cuKernelSetAttribute(attribute, value, handle, bindings.CUdevice(here))
            if int(code) != 0:
                raise DeviceError(f"the driver refused {size} bytes of shared memory a block: {code}")
        self._large.add(here)


def kernel(
    letters: str, kind: str, threads: int, blocks: int = 1, together: bool = False
) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a kernel: argument letters (see ``argument_types``), tensor kind, threads a block, blocks an SM.

    ``together``: a cooperative launch though no barrier of the whole grid says so: blocks wait for each other.
    """

    def decorate(function: Callable[..., Any]) -> Kernel:
        return Kernel(function, letters, kind, threads, blocks, together)

    return decorate


class _Recorder(threading.local):
    """What this thread launches is written down while ``steps`` is a list; see ``recorded``."""

    steps: list[Any] | None = None


recorder = _Recorder()


def run(what: Kernel, grid: tuple[int, ...], stream: int, args: tuple[Any, ...], shared: int = 0) -> None:
    """Launch on a stream (its handle). ``args``: Flat, None (an absent tensor) or numbers; nothing is synchronised."""
    if SIMULATED:
        values = [_simulated(a, letter, what.kind) for a, letter in zip(args, what.letters, strict=True)]
        what.compiled[grid, what.threads, 0, shared](*values)
    else:
        what.launcher(grid, shared)(stream, [a.address if type(a) is Flat else 0 if a is None else a for a in args])
    if recorder.steps is not None:  # not before: a launch that is refused is made in another way
        recorder.steps.append((what, grid, args, shared))


class Memory:
    """A tensor in the simulator: elements by index, IndexError outside (NumPy would take a negative one)."""

    def __init__(self, array: Any):
        self.array = array

    def __getitem__(self, index: Any) -> Any:
        return self.array[self._inside(index)]

    def __setitem__(self, index: Any, value: Any) -> None:
        assert np.asarray(value).dtype == self.array.dtype, (value, self.array.dtype)
        self.array[self._inside(index)] = value

    def _inside(self, index: Any) -> Any:
        if not 0 <= index < self.array.size:
            raise IndexError(f"element {index} of {self.array.size}")
        return index


def _simulated(value: Any, letter: str, kind: str) -> Any:
    """Numbers in the type that the signature says; tensors as they are (the simulator would copy NumPy arrays)."""
    if letter in "TAIM":
        expected = {"T": POINTERS[kind], "A": ARITHMETIC[kind], "I": types.int32, "M": types.uint8}[letter].name
        assert value is None or value.array.dtype == expected, (letter, value.kind)
        return None if value is None else Memory(value.array)
    return np.dtype({"i": "int32", "l": "int64"}.get(letter, ARITHMETIC[kind].name)).type(value)
