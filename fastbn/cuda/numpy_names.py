"""Names that NumPy has dropped and numba-cuda (0.30.4) still asks for, when it compiles its first kernel."""

from __future__ import annotations

import contextlib
import importlib

import numpy as np

DROPPED = {"row_stack": "vstack"}  # NumPy 2.5; to numba-cuda both are one
ASKING = "numba.cuda.np.arrayobj"


def lend() -> None:
    """Let numba-cuda find what is missing while it loads the module that asks; NumPy is left as it was."""
    missing = {old: new for old, new in DROPPED.items() if not hasattr(np, old)}
    if not missing:
        return
    for old, new in missing.items():
        setattr(np, old, getattr(np, new))
    try:
        with contextlib.suppress(ImportError):  # a numba-cuda that is cut otherwise
            importlib.import_module(ASKING)
    finally:
        for old in missing:
            delattr(np, old)
