"""Ctrl-C, and whatever other signal a program has a handler for, waits until a kernel is compiled."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Within, handlers of signals wait, a second at most.

    LLVM's objects do not outlive an exception that Python raises between any two of Numba's lines: one Ctrl-C of some
    40 ended the process with a segmentation fault as they were disposed of (in another trial none of 45). And Python
    drops what a handler raises while such an object is disposed of: `fastbn warmup` went on, one SIGTERM in ten.
    Signals reach Python in the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    before: dict[int, Any] = {number: handler for number, handler in handlers.items() if callable(handler)}
    came: dict[int, Any] = {}

    def called() -> None:
        with contextlib.ExitStack() as calls:  # all of them, whatever the first raises
            for number, frame in reversed(came.items()):
                calls.callback(before[number], number, frame)

    with contextlib.ExitStack() as end:
        end.callback(called)  # at the very end: when every handler is back
        for number, handler in before.items():
            end.callback(signal.signal, number, handler)
            signal.signal(number, came.setdefault)  # at its number, the frame
        yield
