"""The process that runs models for `worker.Worker`: onnxruntime can crash on legal models, and then only this dies.

Run as ``python -m fastbn_export._ort_child``; it reads requests from standard input and answers on the original
standard output (whatever a library prints goes to standard error). Not for people.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, BinaryIO

import numpy as np

from fastbn_export._wire import dtype_named, receive, send

__all__ = ["serve"]

_NARROW = {"tensor(bfloat16)": "bfloat16"}
"""Element types that onnxruntime cannot exchange with NumPy directly."""


class _Ort:
    """An onnxruntime session, optimizations off ("none") or at the default level ("all")."""

    def __init__(self, request: dict[str, Any]):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_DISABLE_ALL if request["level"] == "none" else levels.ORT_ENABLE_ALL
        )
        self.session = onnxruntime.InferenceSession(_source(request), options, providers=["CPUExecutionProvider"])
        session = self.session
        values = (*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs())
        self.narrow = {value.name: value.type for value in values}
        self.plain = not any(kind in _NARROW for kind in self.narrow.values())

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        if self.plain:
            return list(self.session.run(None, feeds))
        from onnxruntime import OrtValue

        values = {name: self._value(OrtValue, name, feed) for name, feed in feeds.items()}
        return [self._array(value) for value in self.session.run_with_ort_values(None, values)]

    def _value(self, ort_value: Any, name: str, feed: Any) -> Any:
        if self.narrow[name] in _NARROW:
            from onnx import TensorProto

            return ort_value.ortvalue_from_numpy_with_onnx_type(feed.view(np.uint16), TensorProto.BFLOAT16)
        return ort_value.ortvalue_from_numpy(feed)

    @staticmethod
    def _array(value: Any) -> Any:
        if value.data_type() not in _NARROW:
            return value.numpy()
        import ctypes

        shape = value.shape()
        count = int(np.prod(shape, dtype=np.int64))
        codes = np.ctypeslib.as_array((ctypes.c_uint16 * max(count, 1)).from_address(value.data_ptr()))[:count]
        return codes.copy().view(dtype_named("bfloat16")).reshape(shape)


class _Reference:
    """onnx's NumPy evaluator, for what onnxruntime has no float64 kernels for (Conv among them)."""

    def __init__(self, request: dict[str, Any]):
        from onnx.reference import ReferenceEvaluator

        from fastbn_export._reference_ops import CORRECTED
        from fastbn_export.files import load_model

        model = _lifted(request) if request["lifted"] else load_model(request["path"])
        self.evaluator = ReferenceEvaluator(model, new_ops=CORRECTED)

    def run(self, feeds: dict[str, Any]) -> list[Any]:
        with np.errstate(all="ignore"):
            return list(self.evaluator.run(None, feeds))


def _source(request: dict[str, Any]) -> str | bytes:
    """Return the model as onnxruntime takes it: the path, or the bytes of one that was changed."""
    if request["lifted"]:
        return bytes(_lifted(request).SerializeToString())
    if "moved" in request:
        from fastbn_export.files import load_model
        from fastbn_export.moved import move_factors

        model = load_model(request["path"])
        move_factors(model, np.random.default_rng(request["moved"]))
        return bytes(model.SerializeToString())
    return str(request["path"])


def _lifted(request: dict[str, Any]) -> Any:
    """Return the model in float64, its changed constants rounded at random if so asked."""
    from fastbn_export.files import load_model
    from fastbn_export.float64 import fingerprints, lift

    model = load_model(request["path"])
    if "rounding" not in request:
        return lift(model)
    known, seed, shake = request["rounding"]
    return lift(model, fingerprints(load_model(known)), np.random.default_rng(seed), shake)


_ENGINES: dict[str, Any] = {"onnxruntime": _Ort, "reference": _Reference}


def _timed(engine: Any, feeds: dict[str, Any], repeats: int) -> list[float]:
    engine.run(feeds)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        engine.run(feeds)
        seconds.append(time.perf_counter() - start)
    return seconds


def _answer(request: dict[str, Any], values: list[Any], engines: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    key = request["key"]
    if request["do"] == "load":
        engines[key] = _ENGINES[request["engine"]](request)
        return {}, []
    if request["do"] == "drop":
        engines.pop(key, None)
        return {}, []
    feeds = dict(zip(request["names"], values, strict=True))
    if request["do"] == "time":
        return {"seconds": _timed(engines[key], feeds, request["repeats"])}, []
    return {}, engines[key].run(feeds)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the parent closes its end."""
    engines: dict[str, Any] = {}
    while True:
        try:
            request, values = receive(requests)
        except EOFError:
            return
        try:
            message, outputs = _answer(request, values, engines)
        except Exception as error:  # whatever a library raises is an answer, not our end
            message, outputs = {"error": f"{type(error).__name__}: {error}"}, []
        send(answers, message, outputs)


def _limit_memory() -> None:
    """Ask for no more memory than the machine has: a model of absurd sizes gets an error, not the machine swapping."""
    try:
        import resource

        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = int(physical * 0.9)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))
    except (ImportError, OSError, ValueError):  # no such limits on this system
        return


if __name__ == "__main__":
    _limit_memory()
    with os.fdopen(os.dup(1), "wb") as private:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, private)
