"""What the control group of this process may use, as containers are limited by: ``docker --cpus``, Kubernetes' limits.

Linux stops every thread of a group that has used up its CPU time until the period (100 ms) ends, and a thread for each
core of the host uses it up in a moment: with a quota of one core, two threads took 54 ms in one call of a hundred, one
thread 6. A process that passes the limit of memory is killed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cores", "memory"]


@functools.cache
def cores(root: str = "/") -> int | None:
    """Return the cores' worth of CPU time, rounded up, or None where nothing limits it."""
    found = _numbers(root, "cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    least = min((quota / period for quota, period in found), default=None)
    return None if least is None else max(1, math.ceil(least))


@functools.cache
def memory(root: str = "/") -> int | None:
    """Return the bytes of memory, or None where nothing limits them."""
    found = _numbers(root, "memory", ("memory.max",), ("memory.limit_in_bytes",))
    return min((limit for (limit,) in found), default=None)


def _numbers(root: str, controller: str, v2: tuple[str, ...], v1: tuple[str, ...]) -> Iterator[list[int]]:
    """Yield the numbers in these files, of version 2 or 1, for each limited group that the process is in."""
    try:
        groups = Path(root, "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):  # not Linux, or not for us to see
        return
    mounted = Path(root, "sys/fs/cgroup")
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:  # version 2, perhaps beside version 1
            names, bases = v2, {mounted, mounted / "unified"}
        elif controller in controllers.split(","):
            names, bases = v1, {mounted / controller, mounted / controllers}
        else:
            continue
        for base in bases:
            for folder in _upwards(base, path):
                with contextlib.suppress(OSError, ValueError):  # no such group to be seen, or "max": no limit
                    numbers = [int(word) for name in names for word in (folder / name).read_text().split()]
                    if min(numbers) > 0:  # -1: no limit either
                        yield numbers


def _upwards(base: Path, path: str) -> Iterator[Path]:
    """Yield a group's folder and those of the groups around it; in a container only the last one may be there."""
    folder = base / path.strip("/")
    yield folder
    while folder != base:
        folder = folder.parent
        yield folder
