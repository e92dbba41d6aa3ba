"""Where blocks of a tensor should lie between two passes over them: how large the cache next to a core is."""

from __future__ import annotations

import os
from pathlib import Path

LEAST = 1 << 20  # bytes of a core's own cache below which blocks would be too small for it
_UNITS = {"K": 1 << 10, "M": 1 << 20}


def _size(text: str) -> int:
    """Return the bytes of Linux's "2048K"."""
    digits, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS else (text, "")
    return int(digits) * _UNITS.get(unit, 1)


def second(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the bytes of a core's second cache as Linux tells them, 0 if unknown."""
    try:
        for index in sorted(folder.glob("index*")):
            if (index / "level").read_text().strip() == "2":
                return _size((index / "size").read_text().strip())
    except (OSError, ValueError):
        pass
    return 0


def vendor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return who made the processor, "" if unknown."""
    try:
        with info.open(encoding="utf-8", errors="replace") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("vendor_id")), "")
    except OSError:
        return ""


def core() -> int:
    """Return the bytes of the core's own cache that blocks should fit in; 0: they go by the cache that cores share.

    AMD's shared cache gives one core 100 GB/s, so there blocks may be large, and long stretches are read faster. That
    of an Intel Xeon (Emerald Rapids) gives 27 GB/s (memory 14 to 27, by the hour), the core's own 110: channels-first
    training takes 0.75 of the time where blocks fit in that one, gradients 0.67. Others were not measured.
    ``FASTBN_CORE_CACHE`` (bytes) overrides it, for experiments.
    """
    named = os.environ.get("FASTBN_CORE_CACHE", "")
    if named.isdecimal():
        return min(int(named), 1 << 40)
    size = second() if vendor() == "GenuineIntel" else 0
    return size if size >= LEAST else 0
