"""Compiled kernels on disk: a kernel takes 0.3 to 2 s to compile, and a file a few milliseconds to read.

Numba's own disk cache looks at the file of the kernel alone and never finds a kernel whose closure holds another
compiled function, as all of ours do. Here a kernel is known by the sources of this folder, by what compiles them, by
the GPU's compute capability, and by what its closure holds. What is kept is what Numba keeps, most of it text, hence
compressed: 100 KB instead of 750. Whatever goes wrong with a file, the kernel is compiled instead; a kernel that cannot
be named so is not kept.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import os
import pickle
import sys
import tempfile
import zlib
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import llvmlite
import numba
import numpy as np

from fastbn import disk
from fastbn.cuda.driver import types

if TYPE_CHECKING:
    from fastbn.cuda.driver import Kernel

__all__ = ["Store", "folder", "use"]


class Unnamed(TypeError):
    """A closure holds something that has no name that lasts."""


def name_of(value: Any) -> str:
    """Return what tells a value of a closure apart, in every process alike."""
    value = getattr(value, "py_func", value)  # a compiled function
    value = getattr(value, "_defn", value)  # an intrinsic
    if isinstance(value, tuple):
        return "(" + ",".join(map(name_of, value)) + ")"
    if value is None or isinstance(value, bool | int | float | str | np.generic | types.Type):
        return repr(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, FunctionType):
        held = [name_of(cell.cell_contents) for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}:{value.__code__.co_firstlineno}[{','.join(held)}]"
    raise Unnamed(type(value).__name__)


@functools.cache
def _digest() -> str:
    """Hash of the sources that kernels are made of, and of what compiles them."""
    versions = [sys.version, numba.__version__, llvmlite.__version__]
    for package in ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink"):
        try:
            versions.append(importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            versions.append("")
    versions += [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    return disk.digest(Path(__file__).resolve().parent, *versions)


@functools.cache
def folder() -> Path | None:
    """Where kernels lie; None where nothing is writable."""
    return disk.folder(f"cuda-{_digest()}")


class Store:
    """Stands where Numba's dispatcher has its disk cache; holds one kernel for one compute capability."""

    def __init__(self, path: Path):
        self.path, self.cache_path = path, str(path.parent)

    @classmethod
    def of(cls, what: Kernel, capability: tuple[int, int]) -> Store | None:
        """Return where a kernel is kept; None where it cannot be."""
        where = folder()
        try:
            key = f"{name_of(what.function)} {what.letters} {what.kind} {what.threads} {what.blocks}"
        except (Unnamed, ValueError):  # ValueError: a cell that is still empty
            return None
        if where is None:
            return None
        name = f"{what.function.__name__}-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
        return cls(where / f"{name}.sm_{capability[0]}{capability[1]}")

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled kernel, None where there is none to be had."""
        try:
            states = pickle.loads(zlib.decompress(self.path.read_bytes()))
            return importlib.import_module("numba.cuda.dispatcher")._Kernel._rebuild(**states)
        except Exception:  # of a file that is absent, cut off, or of another numba-cuda
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled kernel: whole or not at all, and silently not on a full disk."""
        try:
            data = zlib.compress(_serialize().dumps(compiled._reduce_states()), 1)
            handle, name = tempfile.mkstemp(dir=self.path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, self.path)
        except Exception:
            return

    def flush(self) -> None:
        """Forget the kernel."""
        self.path.unlink(missing_ok=True)


def _serialize() -> Any:
    try:
        return importlib.import_module("numba.cuda.serialize")
    except ImportError:  # older numba-cuda shares it with Numba
        return importlib.import_module("numba.core.serialize")


def use(dispatcher: Any, what: Kernel, capability: tuple[int, int]) -> None:
    """Give Numba's dispatcher of a kernel its place on the disk, if it has use for one."""
    store = Store.of(what, capability)
    if store is not None and hasattr(dispatcher, "_cache"):
        dispatcher._cache = store
