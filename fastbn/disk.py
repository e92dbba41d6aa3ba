"""Where compiled kernels are kept on disk: a folder per user, named after what the kernels were made from."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path


def digest(sources: Path, *made_by: str) -> str:
    """Hash of every source file of a folder, and of what compiles them."""
    found = hashlib.sha256(" ".join(made_by).encode())
    for path in sorted(sources.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _user_cache() -> Path:
    for name in ("FASTBN_CACHE_DIR", "NUMBA_CACHE_DIR"):
        if os.environ.get(name):
            return Path(os.environ[name])
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "fastbn" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastbn"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbn"


def folder(name: str) -> Path | None:
    """Return the user's folder of this name, made if need be; None where it can be neither written nor read.

    One that was filled ahead may be read-only: an image that ``fastbn warmup`` ran in, with another user.
    """
    try:
        found = (_user_cache() / name).absolute()  # kernels are loaded later, maybe from another working directory
    except (RuntimeError, OSError):  # Path.home() without a home, or a working directory that is gone
        return None
    return found if writable(found) or _filled(found) else None


def writable(found: Path) -> bool:
    """Tell whether files can be made in a folder, which is made if need be."""
    try:
        found.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found):
            return True
    except OSError:
        return False


def _filled(found: Path) -> bool:
    try:
        return any(found.iterdir())
    except OSError:
        return False
