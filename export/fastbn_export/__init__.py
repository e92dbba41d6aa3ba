"""fastbn_export: make batch normalization disappear from an ONNX model, and prove it.

Requirement: ``import fastbn_export`` is instant and works without onnx; each public function loads what it needs on
first use, and a missing extra says which install brings it. A public function and the module that defines it share a
name; the names of this package are always the functions.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build as build
    from .fold import fold as fold
    from .recalibrate import recalibrate as recalibrate
    from .verify import verify as verify

__all__ = ["build", "fold", "recalibrate", "verify"]

_EXTRA = {"onnx", "onnx_ir", "onnxruntime", "ml_dtypes", "rich"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] in _EXTRA:
            raise ImportError(
                f'fastbn_export.{name} needs {error.name}: pip install "fastbn[export]"', name=error.name
            ) from error
        raise
    return getattr(module, name)


class _Package(types.ModuleType):
    """The package itself: importing ``fastbn_export.fold`` must not hide the function ``fold`` behind its module."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule on its package; bind the function of the same name instead.
        if name in __all__ and isinstance(value, types.ModuleType):
            value = getattr(value, name, None)
            if value is None:  # still half imported: __getattr__ will find the function later
                return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
