"""Ctrl-C waits until a kernel is compiled."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within, an interrupt waits, a second at most.

    LLVM's objects do not outlive an exception that Python raises between any two of Numba's lines: one Ctrl-C of some
    40 ended the process with a segmentation fault as they were disposed of (in another trial none of 45). Signals reach
    Python in the main thread alone.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *what: came.append(what))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
