"""fastbn_export: make batch normalization disappear from an ONNX model, and prove it.

Requirement: ``import fastbn_export`` is instant and works without onnx; each public function loads what it needs on
first use, and a missing extra says which install brings it. A public function and the module that defines it share a
name; the names of this package are always the functions. The layers for `build` come from `layers`, errors from where
they are raised.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import build as build
    from .files import ModelFileError as ModelFileError
    from .fold import fold as fold
    from .layers import AveragePool as AveragePool
    from .layers import Conv as Conv
    from .layers import Flatten as Flatten
    from .layers import GlobalAveragePool as GlobalAveragePool
    from .layers import Linear as Linear
    from .layers import MaxPool as MaxPool
    from .layers import ReLU as ReLU
    from .layers import Sigmoid as Sigmoid
    from .layers import Softmax as Softmax
    from .recalibrate import recalibrate as recalibrate
    from .verify import verify as verify
    from .worker import RunError as RunError

__all__ = [
    "AveragePool",
    "Conv",
    "Flatten",
    "GlobalAveragePool",
    "Linear",
    "MaxPool",
    "ModelFileError",
    "ReLU",
    "RunError",
    "Sigmoid",
    "Softmax",
    "build",
    "fold",
    "recalibrate",
    "verify",
]

_FUNCTIONS = {"build", "fold", "recalibrate", "verify"}

_ERRORS = {"ModelFileError": "files", "RunError": "worker"}

_EXTRA = {"onnx", "onnx_ir", "onnxruntime", "ml_dtypes", "rich"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = name if name in _FUNCTIONS else _ERRORS.get(name, "layers")
    try:
        module = importlib.import_module(f"{__name__}.{home}")
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
        if name in _FUNCTIONS and isinstance(value, types.ModuleType):
            value = getattr(value, name, None)
            if value is None:  # still half imported: __getattr__ will find the function later
                return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
