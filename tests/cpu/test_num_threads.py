"""How many threads there are: what was asked for, and what a container's quota allows."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn import limits
from fastbn.cpu import pool
from fastbn.errors import ArgumentTypeError, ArgumentValueError


def test_number_of_threads(monkeypatch, threads):
    import numba

    monkeypatch.delenv("FASTBN_NUM_THREADS", raising=False)
    assert fastbn.get_num_threads() in (numba.config.NUMBA_NUM_THREADS, numba.get_num_threads())
    for text, n in (("3", 3), ("0", None), ("two", None), ("²", None), ("", None)):
        monkeypatch.setenv("FASTBN_NUM_THREADS", text)
        assert n is None or fastbn.get_num_threads() == n
        assert fastbn.get_num_threads() >= 1
    threads(np.int64(5))
    assert fastbn.get_num_threads() == 5
    threads(None)
    monkeypatch.setenv("FASTBN_NUM_THREADS", "4")
    assert fastbn.get_num_threads() == 4


@pytest.mark.parametrize("n", [0, -1])
def test_too_few_threads(n, threads):
    with pytest.raises(ArgumentValueError, match=r"^n: expected an integer >= 1 or None, got"):
        threads(n)


@pytest.mark.parametrize("n", ["2", 2.0, True])
def test_threads_of_a_wrong_type(n, threads):
    with pytest.raises(ArgumentTypeError, match=r"^n: expected an integer or None, got"):
        threads(n)


def test_a_quota_limits_the_default_alone(monkeypatch, threads):
    """Threads of a group that has used its quota up are all stopped."""
    config = pool.numba.config
    monkeypatch.setattr(limits, "cores", lambda: 2)
    monkeypatch.delenv("FASTBN_NUM_THREADS", raising=False)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    for name in ("NUMBA_DEFAULT_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setattr(config, name, 16)
    monkeypatch.setattr("numba.np.ufunc.parallel._is_initialized", False)
    assert fastbn.get_num_threads() == 2
    monkeypatch.setattr(limits, "cores", lambda: None)
    assert fastbn.get_num_threads() == 16
    monkeypatch.setattr(limits, "cores", lambda: 2)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "16")
    assert fastbn.get_num_threads() == 16
    monkeypatch.delenv("NUMBA_NUM_THREADS")
    monkeypatch.setattr(config, "NUMBA_NUM_THREADS", 8)  # as numba.config's file may say
    assert fastbn.get_num_threads() == 8
    monkeypatch.setenv("FASTBN_NUM_THREADS", "32")
    assert fastbn.get_num_threads() == 32
    threads(12)
    assert fastbn.get_num_threads() == 12
