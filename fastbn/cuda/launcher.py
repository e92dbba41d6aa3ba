"""One kernel, one grid: from numbers to a launch in about a microsecond of host time.

Numba's own call costs 20 us for twenty arguments (types are compared and boxed one by one), ``cuda.core.launch`` with
arguments boxed here 5 us. What remains below is one ``struct.pack_into`` and one call of the driver, by the same
CUDA bindings that numba-cuda stands on. Where those are not what is expected, or the driver refuses a kernel's first
launch, Numba's call does it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import operator
import struct
import warnings
from typing import TYPE_CHECKING, Any

from fastbn.cuda import tuning
from fastbn.cuda.driver import ARITHMETIC, cuda, stream_of
from fastbn.errors import DeviceError

if TYPE_CHECKING:
    from fastbn.cuda.driver import Kernel

FLOAT32_MAX = 3.4028234663852886e38
NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has not used the GPU yet


def layout_of(letters: str, kind: str) -> tuple[struct.Struct, list[int]]:
    """Return how a kernel's arguments lie in memory: the packing, and where each begins."""
    arithmetic = "d" if ARITHMETIC[kind].bitwidth == 64 else "f"
    codes = [{"i": "i", "l": "q", "a": arithmetic}.get(letter, "Q") for letter in letters]
    offsets, end = [], 0
    for code in codes:
        size = struct.calcsize(code)
        end += -end % size
        offsets.append(end)
        end += size
    return struct.Struct("@" + "".join(codes)), offsets


@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    return importlib.import_module("cuda.bindings.driver").CUstream(handle)


def as_float32(number: Any) -> Any:
    """Round a number beyond float32 as C does; ``struct`` refuses it."""
    if type(number) is float and abs(number) > FLOAT32_MAX:
        return math.copysign(math.inf, number)
    return number


class Launcher:
    """Packs the arguments and launches. Slots of memory for them are taken from a pool, so that threads do not meet."""

    def __init__(self, what: Kernel, grid: tuple[int, ...], shared: int):
        bindings = importlib.import_module("cuda.bindings.driver")
        self.what, self.grid, self.shared, self.proven = what, grid, shared, False
        compiled = next(iter(what.compiled.overloads.values()))
        self.keep = compiled._codelibrary.get_cufunc()
        # A CUkernel may stand where a CUfunction is expected, as numba-cuda itself uses it.
        function, x, y = bindings.CUfunction(int(self.keep.handle)), grid[0], grid[1] if len(grid) > 1 else 1
        self.place = (function, x, y, 1, what.threads, 1, 1, shared)
        self.extra = () if compiled.cooperative else (0,)
        self.call = bindings.cuLaunchCooperativeKernel if compiled.cooperative else bindings.cuLaunchKernel
        self.packing, self.offsets = layout_of(what.letters, what.kind)
        self.name = what.function.__name__
        self.pool: list[tuple[Any, Any, int]] = []
        _stream(0)

    def slot(self) -> tuple[Any, Any, int]:
        """Return memory for arguments, that for their addresses, and the address of the latter."""
        values = ctypes.create_string_buffer(self.packing.size)
        start = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * len(self.offsets))(*[start + offset for offset in self.offsets])
        return values, pointers, ctypes.addressof(pointers)

    def pack(self, slot: tuple[Any, Any, int], numbers: list[Any]) -> None:
        """Put arguments into a slot."""
        try:
            self.packing.pack_into(slot[0], 0, *numbers)
        except OverflowError:
            self.packing.pack_into(slot[0], 0, *map(as_float32, numbers))

    def __call__(self, stream: int, numbers: list[Any]) -> None:
        """Launch; the driver copies the arguments before it returns."""
        try:
            slot = self.pool.pop()
        except IndexError:
            slot = self.slot()
        self.pack(slot, numbers)
        try:
            self.launch(stream, slot)
        finally:
            self.pool.append(slot)

    def launch(self, stream: int, slot: tuple[Any, Any, int]) -> None:
        """Launch with the arguments that are in a slot."""
        (code,) = self.call(*self.place, _stream(stream), slot[2], *self.extra)
        if code == NO_CONTEXT:
            cuda.current_context()
            (code,) = self.call(*self.place, _stream(stream), slot[2], *self.extra)
        if code == 0:
            self.proven = True
        elif self.proven:
            raise DeviceError(f"{self.name}: the driver refused the launch: {code!r}")
        else:
            self._instead(code, stream, list(self.packing.unpack_from(slot[0])))

    def bind(self, numbers: list[Any], fills: list[tuple[int, int]]) -> Any:
        """Return a launch in which all but some addresses are fixed: ``(stream handle, addresses) -> None``.

        ``fills``: which argument is which of the addresses, the last of which is that of no array.
        """
        count = 1 + max((place for place, _ in fills), default=0)
        pointers = all(self.what.letters[place] in "TAIM" for place in range(count))
        return bound(self, numbers, dict(fills), count) if pointers and count > 1 else bind(self, numbers, fills)

    def _instead(self, code: Any, stream: int, numbers: list[Any]) -> None:
        """Launch by Numba, now and from now on: what the driver says of a first launch may be about how it was made."""
        plain = Plain(self.what, self.grid, self.shared)
        try:
            plain(stream, numbers)
        except Exception as error:
            raise DeviceError(f"{self.name}: the driver refused the launch: {code!r}; by Numba: {error}") from error
        self.what.replace(self, plain)
        warnings.warn(f"{self.name}: Numba launches it, the driver said {code!r}", RuntimeWarning, stacklevel=2)


def bound(launcher: Launcher, numbers: list[Any], fills: dict[int, int], count: int) -> Any:
    """Return a launch whose arguments were packed before: only the addresses, ``count`` arguments from the first on.

    A function with everything at hand: attributes and a call more take a tenth of a launch each.
    """
    pick = operator.itemgetter(*(fills.get(place, -1) for place in range(count)))
    pool: list[tuple[Any, int, Any]] = []
    words, together = ctypes.c_uint64 * count, not launcher.extra
    run, again, take, give = functools.partial(launcher.call, *launcher.place), launcher.launch, pool.pop, pool.append

    def make() -> tuple[Any, int, Any]:
        slot = launcher.slot()
        launcher.pack(slot, numbers)
        return words.from_buffer(slot[0]), slot[2], slot

    def launch(stream: int, at: list[int]) -> None:
        try:
            held = take()
        except IndexError:
            held = make()
        addresses, pointers, slot = held
        addresses[:] = pick(at)
        (code,) = run(_stream(stream), pointers) if together else run(_stream(stream), pointers, 0)
        if code:
            again(stream, slot)  # this thread may not have used the GPU yet
        give(held)

    return launch


def bind(launcher: Any, numbers: list[Any], fills: list[tuple[int, int]]) -> Any:
    """As ``Launcher.bind``, for every launcher."""

    def launch(stream: int, at: list[int]) -> None:
        args = numbers.copy()
        for place, slot in fills:
            args[place] = at[slot]
        launcher(stream, args)

    return launch


class Plain:
    """Numba's own launch."""

    def __init__(self, what: Kernel, grid: tuple[int, ...], shared: int):
        self.what, self.grid, self.shared = what, grid, shared
        self.configured = functools.lru_cache(maxsize=64)(self._configured)

    def _configured(self, stream: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Numba finds small grids worth a warning
            handle = stream_of(stream) if stream else 0
            return self.what.compiled[self.grid, self.what.threads, handle, self.shared]

    def __call__(self, stream: int, numbers: list[Any]) -> None:
        """Launch."""
        self.configured(stream)(*numbers)

    def bind(self, numbers: list[Any], fills: list[tuple[int, int]]) -> Any:
        """Return a launch in which all but some addresses are fixed; see ``Launcher.bind``."""
        return bind(self, numbers, fills)


def make(what: Kernel, grid: tuple[int, ...], shared: int) -> Any:
    """Return the quickest launcher that works with the installed numba-cuda."""
    if not tuning.DIRECT:
        return Plain(what, grid, shared)
    try:
        return Launcher(what, grid, shared)
    except (ImportError, AttributeError, TypeError, ValueError):
        return Plain(what, grid, shared)
