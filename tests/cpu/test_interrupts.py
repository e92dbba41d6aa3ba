"""Ctrl-C and other signals while a kernel compiles."""

from __future__ import annotations

import signal
import threading

import pytest

from fastbn.cpu._interrupts import held_back


def test_an_interrupt_waits_for_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_every_handler_waits():
    """Of a service that is stopped, or of a timeout; each is called once, whatever another one raises."""
    called = []

    def stop(number, frame):
        called.append(number)
        raise SystemExit(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        with pytest.raises(SystemExit), held_back():
            for number in (*numbers, signal.SIGTERM):
                signal.raise_signal(number)
            assert not called
        assert called == list(numbers)
        assert all(signal.getsignal(number) is stop for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_error_of_a_compilation_is_not_lost():
    with pytest.raises(ValueError, match="broken"), held_back():
        raise ValueError("broken")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_programs_without_a_handler_are_left_alone():
    def within():
        before = signal.getsignal(signal.SIGINT)
        with held_back():
            return signal.getsignal(signal.SIGINT) is before

    found = []
    thread = threading.Thread(target=lambda: found.append(within()))
    thread.start()
    thread.join()
    assert found == [True]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert within()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_first_call_that_is_interrupted_leaves_the_process_whole(python, tmp_path):
    """The interrupt comes while the kernel compiles; the next call is right."""
    code = """
import signal, threading
import numpy as np, fastbn
x = np.random.default_rng(0).standard_normal((64, 100)).astype(np.float32)
main = threading.main_thread().ident
threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
try:
    fastbn.batch_norm_train(x)
except KeyboardInterrupt:
    pass
y, _ = fastbn.batch_norm_train(x)
assert np.allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=1e-5)
print("right")
"""
    assert python(code, FASTBN_CACHE_DIR=tmp_path).stdout.strip() == "right"
