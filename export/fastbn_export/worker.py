"""A process of its own for running models: a crash or a hang in there is an error message out here.

onnxruntime with optimizations off segfaults on some legal opset-9 models, and a model may simply take forever; neither
may take the caller's process down.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import onnx

from fastbn.errors import FastbnError
from fastbn_export._wire import receive, send
from fastbn_export.files import save_model

__all__ = ["Rounding", "RunCrash", "RunError", "RunTimeout", "Worker"]


class RunError(FastbnError, RuntimeError):
    """A model could not be loaded or run; the text is the runtime's own."""


class RunCrash(RunError):
    """The process died, by a signal as a rule."""


class RunTimeout(RunError):
    """The process was ended because it took too long."""


@dataclass(frozen=True)
class Rounding:
    """Constants that the model ``known`` does not have are moved by their own rounding; see `float64.lift`."""

    known: str
    seed: int
    shake: float = 1.0


class Worker:
    """Runs ONNX models in a child process; use it as a context manager.

    Parameters
    ----------
    timeout : float
        Seconds that one load or one run may take.
    """

    def __init__(self, timeout: float = 120.0):
        self.timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="fastbn-")
        self._child: subprocess.Popen[bytes] | None = None
        self._files: dict[str, Path] = {}
        self._loaded: dict[str, dict[str, Any]] = {}
        self._alive: set[str] = set()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._folder.cleanup()

    def put(self, file: str, model: onnx.ModelProto) -> None:
        """Write a model to where the child can read it, under a name for :meth:`load`."""
        self._files.pop(file, None)
        save_model(model, self.path(file))

    def use(self, file: str, path: str | os.PathLike[str]) -> None:
        """Let the child read a model where it is."""
        self._files[file] = Path(path).resolve()

    def load(
        self,
        key: str,
        file: str,
        *,
        engine: str = "onnxruntime",
        level: str = "none",
        lifted: bool = False,
        rounding: Rounding | None = None,
        moved: int | None = None,
    ) -> None:
        """Load a model that was :meth:`put` there, in place of the one that had the key before.

        Parameters
        ----------
        key : str
            The name for :meth:`run`.
        file : str
            The name given to :meth:`put`.
        engine : {"onnxruntime", "reference"}
            Who runs it; "reference" is onnx's NumPy evaluator.
        level : {"none", "all"}
            Graph optimizations of onnxruntime: off, or its default.
        lifted : bool
            Lift the model to float64 first (`float64.lift`), in the child: the large copy is never written.
        rounding : Rounding, optional
            With ``lifted``: round its changed constants at random.
        moved : int, optional
            For onnxruntime, without ``lifted``: the seed by which its factors are moved by an ulp (`moved`), in the
            child, too.

        Raises
        ------
        RunError
            The model cannot be loaded, with the runtime's reason; RunCrash and RunTimeout are its special cases.
        """
        request: dict[str, Any] = {
            "do": "load",
            "key": key,
            "path": str(self.path(file)),
            "engine": engine,
            "level": level,
        }
        request["lifted"] = lifted
        if rounding is not None:
            request["rounding"] = [str(self.path(rounding.known)), rounding.seed, rounding.shake]
        if moved is not None:
            request["moved"] = moved
        self._loaded[key] = request
        self._alive.discard(key)
        self._ensure(key)

    def path(self, file: str) -> Path:
        """Return where the model of this name is, or would be."""
        return self._files.get(file, Path(self._folder.name) / f"{file}.onnx")

    def run(self, key: str, feeds: Mapping[str, Any]) -> list[Any]:
        """Run a loaded model and return its outputs in order.

        Raises
        ------
        RunError
            As :meth:`load`.
        """
        self._ensure(key)
        request = {"do": "run", "key": key, "names": list(feeds)}
        return self._ask(request, list(feeds.values()))[1]

    def time(self, key: str, feeds: Mapping[str, Any], repeats: int = 20) -> list[float]:
        """Return the seconds of each of ``repeats`` runs, one more run before them not counted."""
        self._ensure(key)
        request = {"do": "time", "key": key, "names": list(feeds), "repeats": repeats}
        return list(self._ask(request, list(feeds.values()))[0]["seconds"])

    def is_loaded(self, key: str) -> bool:
        """Return whether the model is in memory, ready to run."""
        return key in self._alive

    def drop(self, key: str) -> None:
        """Forget a model and free its memory."""
        self._loaded.pop(key, None)
        if key in self._alive:
            self._alive.discard(key)
            self._ask({"do": "drop", "key": key}, [])

    def _ensure(self, key: str) -> None:
        """Load the model again when the child that had it died meanwhile."""
        if key not in self._alive:
            self._ask(self._loaded[key], [])
            self._alive.add(key)

    def _ask(self, request: dict[str, Any], values: list[Any]) -> tuple[dict[str, Any], list[Any]]:
        child = self._child or self._start()
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            child.kill()

        timer = threading.Timer(self.timeout, end)
        timer.daemon = True  # or the interpreter would wait for one that nobody cancels
        try:
            timer.start()  # in here: a Ctrl-C may come before it returns
            send(cast("IO[bytes]", child.stdin), request, values)  # type: ignore[arg-type]
            message, outputs = receive(cast("IO[bytes]", child.stdout))  # type: ignore[arg-type]
        except (EOFError, OSError):
            status = child.wait()
            self._stop()
            if timed_out.is_set():
                raise RunTimeout(f"no answer within {self.timeout:g} s") from None
            raise RunCrash(f"the process running the model died ({_why(status)})") from None
        except BaseException:
            self._stop()  # its answer would be taken for that to the next request
            raise
        finally:
            timer.cancel()
        if "error" in message:
            raise RunError(message["error"])
        return message, outputs

    def _start(self) -> subprocess.Popen[bytes]:
        home = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "fastbn_export._ort_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        return self._child

    def _stop(self) -> None:
        child, self._child = self._child, None
        self._alive.clear()
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still buffered for a dead child
                    stream.close()


def _why(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-status).name}"
    return f"exit status {status}"
