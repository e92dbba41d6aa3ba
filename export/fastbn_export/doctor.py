"""``fastbn doctor``: what this machine and this installation look like to the kernels; never fails."""

from __future__ import annotations

import argparse
import contextlib
import ctypes.util
import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable

from fastbn_export.console import bytes_text, print_table

__all__ = ["doctor", "findings"]

_PACKAGES = ("fastbn", "numpy", "numba", "llvmlite", "ml_dtypes", "onnx", "onnx-ir", "onnxruntime", "rich", "torch")
_EXPORT = ("onnx", "onnx-ir", "onnxruntime")
_FEATURES = ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bf16", "avx512fp16", "neon", "sve", "fullfp16")


def doctor(_: argparse.Namespace) -> int:
    """Print the findings."""
    print_table("fastbn doctor", ["what", "finding"], findings())
    return 0


def findings() -> list[tuple[str, str]]:
    """Return (what, finding) pairs; a finding that could not be made says why."""
    rows = [("python", f"{platform.python_version()} ({sys.executable})"), ("system", platform.platform())]
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows += [(name, _try(find)) for name, find in _FINDERS.items()]
    return rows


def _try(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as error:  # a doctor that dies of the disease is of no use
        return f"unknown ({type(error).__name__}: {error})"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed: pip install "fastbn[export]"' if name in _EXPORT else "not installed"


def _cpu() -> str:
    import llvmlite.binding

    return f"{llvmlite.binding.get_host_cpu_name()}, {os.cpu_count()} logical cores"


def _features() -> str:
    import llvmlite.binding

    have = llvmlite.binding.get_host_cpu_features()
    return ", ".join(name for name in _FEATURES if have.get(name)) or "none of those used"


def _blocks() -> str:
    from fastbn.cpu import tuning

    size = tuning.CORE_CACHE
    set_by = " (FASTBN_CORE_CACHE)" if os.environ.get("FASTBN_CORE_CACHE", "").isdecimal() else ""
    return (f"a core's own cache, {bytes_text(size)}" if size else "the cache that cores share") + set_by


def _threads() -> str:
    from fastbn import get_num_threads, limits

    set_by = [
        f"{name}={os.environ[name]}" for name in ("FASTBN_NUM_THREADS", "NUMBA_NUM_THREADS") if name in os.environ
    ]
    if not set_by and limits.cores():
        set_by = [f"CPU quota: {limits.cores()}"]
    return f"{get_num_threads()}" + (f" ({', '.join(set_by)})" if set_by else "")


def _threading_layer() -> str:
    import numba

    usable = []
    for layer in ("tbbpool", "omppool", "workqueue"):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"numba.np.ufunc.{layer}")
            usable.append(layer.removesuffix("pool"))
    chosen = numba.config.THREADING_LAYER
    return f"fastbn's own threads; Numba's (not used): {', '.join(usable) or 'none'}, choice {chosen}"


def _cache() -> str:
    from fastbn import disk
    from fastbn.cpu._jit import cache_folder

    folder = cache_folder()
    if folder is None:
        return "no folder is writable: kernels are compiled in every process (set FASTBN_CACHE_DIR)"
    files = [file for file in folder.rglob("*") if file.suffix in (".nbi", ".nbc")]
    size = bytes_text(sum(file.stat().st_size for file in files))
    return f"{folder} ({len(files)} files, {size}{'' if disk.writable(folder) else ', read-only'})"


def _cuda() -> str:
    """Ask the driver itself, through ctypes: importing a CUDA package here could take seconds, or fail."""
    name = ctypes.util.find_library("cuda") or ctypes.util.find_library("nvcuda")
    if name is None:
        return "no driver found: the kernels run on the CPU"
    driver = ctypes.CDLL(name)
    count, version = ctypes.c_int(), ctypes.c_int()
    if (status := driver.cuInit(0)) != 0:
        return f"driver {name}, but no usable device (cuInit returned {status})"
    driver.cuDeviceGetCount(ctypes.byref(count))
    driver.cuDriverGetVersion(ctypes.byref(version))
    package = _version("numba-cuda")
    return (
        f"{count.value} device(s), driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}; "
        f"numba-cuda {package}"
    )


_FINDERS: dict[str, Callable[[], str]] = {
    "cpu": _cpu,
    "cpu features": _features,
    "threads": _threads,
    "blocks are made for": _blocks,
    "threading layer": _threading_layer,
    "kernel cache": _cache,
    "cuda": _cuda,
}
