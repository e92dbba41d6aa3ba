"""One place for every Numba flag, and a disk cache that can be neither stale nor in the way.

- ``fastmath`` stays off: NaN must survive, and the kernels spell out their vectors and their fused multiply-adds.
- ``nogil``: threads are ours (``pool.py``), so a kernel exists in one variant only. A ``parallel=True`` twin was the
  alternative: twice the compile time, a cache entry that the serial variant can pick up by mistake (numba#6845),
  OpenMP that kills a forked child and ``workqueue`` that aborts the process under concurrent calls.
- The cache lies in a folder per user, named after a hash of all our sources, of Numba's version and settings and of the
  cache that blocks are made for (``tuning.CORE_CACHE``). Numba itself looks only at the file of the kernel, so a helper
  changed in another file would keep its old code.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import numba
import numpy as np
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys

from fastbn import disk
from fastbn.cpu import tuning
from fastbn.cpu._parts import KERNEL_OPTIONS, OPTIONS

F = TypeVar("F", bound=Callable[..., Any])

_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")
"""Numba's settings that change machine code, but not the key that it is kept under."""


if hasattr(os, "register_at_fork"):  # a child of a fork amid a compilation would wait for its end, and nobody is there
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )


@functools.cache
def source_digest() -> str:
    """Hash of every source file of the kernels, which import from this folder alone, and of what compiles them."""
    return disk.digest(
        Path(__file__).resolve().parent,
        numba.__version__,
        llvmlite.__version__,
        np.__version__,
        sys.version,
        str(tuning.CORE_CACHE),
        *(str(getattr(numba.config, name, None)) for name in _SETTINGS),
    )


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled kernels lie, or are put; None where there are none and nothing is writable."""
    return disk.folder(source_digest())


class _Files(IndexDataCacheFile):  # type: ignore[misc]
    """A file for each variant of a kernel, named after it, that begins with its own hash.

    Numba numbers files and keeps in an index whose they are. Two processes that compile two variants at once may both
    write number 1: later ones then take that with a ReLU for that without. An index that the crash of a machine cut off
    is never written again, and machine code with a hole ends the process.
    """

    def _path(self, key: Any) -> Path:
        name = hashlib.sha256(repr((self._source_stamp, key)).encode()).hexdigest()[:16]
        return Path(self._cache_path, self._index_name).with_suffix(f".{name}.nbc")

    def save(self, key: Any, data: Any) -> None:
        dumped = self._dump(data)
        with self._open_for_write(str(self._path(key))) as file:
            file.write(hashlib.sha256(dumped).digest() + dumped)

    def load(self, key: Any) -> Any:
        whole = self._path(key).read_bytes()
        head, dumped = whole[:32], whole[32:]
        return pickle.loads(dumped) if hashlib.sha256(dumped).digest() == head else None


class _QuietCache(FunctionCache):  # type: ignore[misc]
    """A disk cache that gives up silently: a full disk or a race must not fail a normalisation."""

    _cache_file: Any

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        files = self._cache_file
        self._cache_file = _Files(files._cache_path, self._impl.filename_base, files._source_stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load machine code, which needs Numba's memory alone.

        Numba would first import all that it can compile, 0.2 to 0.3 s of a process's first call.
        """
        try:
            rtsys.initialize(target_context)
            return self._load_overload(sig, target_context)
        except Exception:
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:
            return


@functools.cache
def _cache_class() -> Any:
    """Return the cache that also reads where it cannot write; Numba's own locator refuses such a folder.

    Where Numba's inside has changed it is the plain one.
    """
    try:
        made_by: Any = FunctionCache._impl_class
        numbas: Any = made_by._locator_classes[0]

        class Locator(numbas):  # type: ignore[misc]
            def ensure_cache_path(self) -> None:
                try:
                    super().ensure_cache_path()
                except OSError:
                    if not Path(self.get_cache_path()).is_dir():
                        raise

        impl = type("Impl", (made_by,), {"_locator_classes": [Locator]})
        return type("ReadingCache", (_QuietCache,), {"_impl_class": impl})
    except (AttributeError, IndexError, TypeError):
        return _QuietCache


def jit(function: F) -> F:
    """Compile lazily, per dtype; release the GIL; keep the machine code on disk."""
    dispatcher = numba.njit(nogil=True, error_model="numpy", **KERNEL_OPTIONS)(function)
    folder = cache_folder()
    if folder is not None and not numba.config.DISABLE_JIT:
        ours = {"CACHE_DIR": str(folder), "CACHE_LOCATOR_CLASSES": ""}  # read by the cache's constructor only
        theirs = {name: getattr(numba.config, name, "") for name in ours}
        vars(numba.config).update(ours)
        try:
            dispatcher._cache = _cache_class()(dispatcher.py_func)
        except (OSError, RuntimeError, AttributeError):  # or Numba's inside has changed
            pass
        finally:
            vars(numba.config).update(theirs)
    return dispatcher  # type: ignore[no-any-return]


def _of_any_integer(dispatcher: Any) -> Any:
    """Let a part be compiled once for integers: Numba would do so for the constant 0 and again for others."""
    find = getattr(dispatcher, "get_call_template", None)
    if find is not None:  # else a plain function, without the JIT
        dispatcher.get_call_template = lambda args, kws: find(tuple(map(numba.types.unliteral, args)), kws)
    return dispatcher


def part(function: F) -> F:
    """Compile as a part of kernels, inlined into each: a call would pass vectors through memory (1.3x on the sums)."""
    compiled = numba.njit(nogil=True, error_model="numpy", forceinline=True, **OPTIONS)(function)
    return _of_any_integer(compiled)  # type: ignore[no-any-return]


def helper(function: F) -> F:
    """Compile as a part of kernels that may stay a function; nothing of its own on disk."""
    compiled = numba.njit(nogil=True, error_model="numpy", **OPTIONS)(function)
    return _of_any_integer(compiled)  # type: ignore[no-any-return]
