"""The child answers, survives errors, is replaced when it dies, and sends values of every kind as they are."""

from __future__ import annotations

import io
import os
import signal
import threading

import ml_dtypes
import numpy as np
import pytest
from fastbn_export._wire import receive, send
from fastbn_export.worker import RunCrash, RunError, Worker
from onnx import TensorProto, helper

from .onnx_models import graph, value

VALUES = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.array(3.5),
    np.zeros((0, 4), np.int64),
    np.arange(8).reshape(2, 4).T,
    np.array([1.5, -2], ml_dtypes.bfloat16),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array(["wörd", ""], object),
    [np.ones(2), np.zeros(1)],
    {"a": np.ones(1), "b": np.zeros(1)},
    None,
]


def test_the_wire_carries_every_kind_of_value():
    stream = io.BytesIO()
    send(stream, {"hello": 1}, VALUES)
    send(stream, {"bye": 2})
    stream.seek(0)
    message, have = receive(stream)
    assert message == {"hello": 1}
    for a, b in zip(have, VALUES, strict=True):
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()
        elif b is None:
            assert a is None
        else:
            assert list(a) == list(b) if isinstance(b, dict) else len(a) == len(b)
    assert receive(stream) == ({"bye": 2}, [])
    with pytest.raises(EOFError):
        receive(stream)


def identity(dtype):
    io_ = [value("x", dtype, ["n"])], [value("y", dtype, ["n"])]
    return graph([helper.make_node("Identity", ["x"], ["y"])], *io_)


@pytest.fixture(scope="module")
def worker():
    with Worker(30) as worker:
        yield worker


@pytest.mark.parametrize("array", [np.array([1.5, 2], np.float16), np.array(["a", "é"], object), np.array([True])])
def test_runs_models_of_any_type(worker, array):
    kinds = {"f": TensorProto.FLOAT16, "O": TensorProto.STRING, "b": TensorProto.BOOL}
    worker.put("m", identity(kinds[array.dtype.kind]))
    worker.load("m", "m")
    (y,) = worker.run("m", {"x": array})
    assert y.dtype == array.dtype and y.tolist() == array.tolist()
    assert len(worker.time("m", {"x": array}, 3)) == 3


def test_bfloat16_in_and_out(worker):
    io_ = [value("x", TensorProto.BFLOAT16, [2])], [value("y", TensorProto.BFLOAT16, [2])]
    worker.put("m", graph([helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)], *io_))
    worker.load("m", "m")
    (y,) = worker.run("m", {"x": np.array([1.5, -2], ml_dtypes.bfloat16)})
    assert y.dtype == ml_dtypes.bfloat16 and y.tolist() == [1.5, -2]


def test_an_error_is_told_and_the_next_run_works(worker):
    worker.put("m", identity(TensorProto.FLOAT))
    worker.load("m", "m")
    with pytest.raises(RunError, match="INVALID_ARGUMENT"):
        worker.run("m", {"x": np.ones((2, 2), np.float32)})
    assert worker.run("m", {"x": np.ones(2, np.float32)})[0].tolist() == [1, 1]


def test_a_killed_child_is_told_and_replaced():
    with Worker(30) as worker:
        worker.put("m", identity(TensorProto.FLOAT))
        worker.load("m", "m")
        os.kill(worker._child.pid, signal.SIGKILL)
        with pytest.raises(RunCrash, match="SIGKILL"):
            worker.run("m", {"x": np.ones(1, np.float32)})
        assert worker.run("m", {"x": np.ones(1, np.float32)})[0].tolist() == [1]
        worker.drop("m")
        assert not worker.is_loaded("m")


def test_an_interrupt_is_not_waited_for(monkeypatch):
    """One between two steps of Timer.start left a thread behind that the interpreter waited for until the timeout."""
    started = []

    def start(timer):
        plain(timer)
        started.append(timer)
        raise KeyboardInterrupt

    plain = threading.Timer.start
    with Worker(30) as worker:
        worker.put("a", identity(TensorProto.FLOAT))
        with monkeypatch.context() as patched:
            patched.setattr(threading.Timer, "start", start)
            with pytest.raises(KeyboardInterrupt):
                worker.load("a", "a")
        started[0].join(10)
        assert not started[0].is_alive()
        worker.load("a", "a")
        assert worker.run("a", {"x": np.ones(2, np.float32)})[0].tolist() == [1, 1]


def test_the_answer_to_an_interrupted_request_is_not_the_next_ones(monkeypatch):

    def interrupted(stream):
        raise KeyboardInterrupt

    with Worker(30) as worker:
        worker.put("a", identity(TensorProto.FLOAT))
        worker.load("a", "a")
        with monkeypatch.context() as patched:
            patched.setattr("fastbn_export.worker.receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                worker.run("a", {"x": np.ones(2, np.float32)})
        assert worker.run("a", {"x": np.full(2, 3, np.float32)})[0].tolist() == [3, 3]
