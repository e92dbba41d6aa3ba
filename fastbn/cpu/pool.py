"""Our own threads: a kernel claims numbered blocks from an atomic counter, and so may any number of callers of it.

Why not ``prange``: OpenMP kills a forked child, ``workqueue`` aborts the process when two Python threads call at once,
a static split waits at its barrier for the slower core (8 ms beside a busy neighbour), and each parallel kernel is a
second compilation. Here every thread runs the same compiled kernel with the GIL released:

- a helper that the machine never schedules costs nothing, the caller does all blocks itself;
- a second Python thread that finds the helpers taken runs its kernel alone;
- a forked child starts its own helpers when it first needs them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np

from fastbn import limits
from fastbn.errors import ArgumentTypeError, ArgumentValueError

Job = tuple[Callable[..., Any], tuple[Any, ...], list[None]]
_SPINS = 200
_NEVER = 1 << 62  # more blocks than there are

_chosen: int | None = None
_busy = threading.Lock()
_jobs: SimpleQueue[Job] = SimpleQueue()
_helpers = 0


def _reset() -> None:
    """In a forked child the helpers are gone and the lock may have been held by a thread that is gone too."""
    global _busy, _jobs, _helpers
    _busy, _jobs, _helpers = threading.Lock(), SimpleQueue(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)


def set_num_threads(n: int | None) -> None:
    """Use at most ``n`` threads in this process. Results are bit-identical for any number.

    Parameters
    ----------
    n : int or None
        At least 1; None returns to the default (see ``get_num_threads``).

    Raises
    ------
    ValueError, TypeError
        For anything else.
    """
    global _chosen
    if n is not None and (isinstance(n, bool) or not isinstance(n, int | np.integer)):
        raise ArgumentTypeError("n", "an integer or None", type(n).__name__)
    if n is not None and n < 1:
        raise ArgumentValueError("n", "an integer >= 1 or None", n)
    _chosen = None if n is None else int(n)


def get_num_threads() -> int:
    """Return how many threads a large operation uses.

    Returns
    -------
    int
        What ``set_num_threads`` said, else ``FASTBN_NUM_THREADS``, else Numba's own setting (``numba.set_num_threads``
        or ``NUMBA_NUM_THREADS``), by default the cores this process may use: no more than a container's CPU quota.
    """
    if _chosen is not None:
        return _chosen
    named = os.environ.get("FASTBN_NUM_THREADS", "")
    if named.isdecimal() and int(named) > 0:
        return int(named)
    from numba.np.ufunc import parallel

    # Numba's masked thread count can be asked only once its threading layer runs; asking would start it.
    threads = int(numba.config.NUMBA_NUM_THREADS)
    if getattr(parallel, "_is_initialized", False):
        threads = int(numba.get_num_threads())
    if threads != numba.config.NUMBA_DEFAULT_NUM_THREADS or "NUMBA_NUM_THREADS" in os.environ:
        return threads  # somebody's choice
    return min(threads, limits.cores() or threads)


def _help(jobs: SimpleQueue[Job]) -> None:
    while True:
        kernel, args, working = jobs.get()
        working.append(None)
        # A kernel fails before its first block or never (no memory for its scratch): the caller does what is left.
        with contextlib.suppress(Exception):
            kernel(*args)
        working.pop()
        del kernel, args  # or the last arrays would live until the next call


def _start(count: int) -> int:
    """Have so many helpers, or as many as there can be; return their number."""
    global _helpers
    while _helpers < count:
        try:
            threading.Thread(target=_help, args=(_jobs,), name="fastbn", daemon=True).start()
        except RuntimeError:  # a limit on processes, or the interpreter is shutting down: the caller does the rest
            return _helpers
        _helpers += 1
    return count


def _wait(claim: np.ndarray[Any, Any], units: int) -> None:
    spins = 0
    while claim[1] < units:
        spins += 1
        time.sleep(0 if spins < _SPINS else 5e-5)
    threading.Lock().acquire()  # an acquire in C's sense: CPUs like ARM's may have read results before the counter


def _stop(claim: np.ndarray[Any, Any], working: list[None]) -> None:
    """Let no helper begin another block and wait for their last: they write to the caller's arrays, so Ctrl-C waits."""
    claim[0] = _NEVER
    while working:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(5e-5)


def run(kernel: Callable[..., Any], args: tuple[Any, ...], units: int, parallel: bool) -> None:
    """Call ``kernel(*args, claim)`` here, and in helpers too if ``parallel``, until all ``units`` are done."""
    claim = np.zeros(2, np.int64)
    if not parallel or (threads := get_num_threads()) == 1 or not _busy.acquire(blocking=False):
        kernel(*args, claim)
        return
    working: list[None] = []
    try:
        for _ in range(_start(min(threads, units) - 1)):
            _jobs.put((kernel, (*args, claim), working))
        kernel(*args, claim)
        _wait(claim, units)
    except BaseException:
        _stop(claim, working)
        raise
    finally:
        _busy.release()
