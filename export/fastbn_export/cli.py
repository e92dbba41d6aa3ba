"""The ``fastbn`` command.

Exit status: 0 done; 1 the check failed, and OUT was not written; 2 bad usage or unreadable input, with one line on
standard error. What goes wrong unforeseen is one line and 2 as well; FASTBN_TRACEBACK=1 shows where. This module needs
numpy and numba alone: each command imports what it needs, and a missing extra names the install that brings it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from fastbn import __version__
from fastbn.errors import FastbnError

__all__ = ["main"]

_EXTRAS = {
    "export": ("onnx", "onnx_ir", "onnxruntime", "ml_dtypes", "google", "rich"),
    "demo": ("sklearn", "matplotlib"),
}

Handler = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, instead of printing the whole usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; those of the process by default.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    try:
        with _ended_in_order(), _any_character():
            return _handler(*arguments.handler)(arguments)
    except _Terminated:
        return _fail(arguments.command, "terminated")
    except KeyboardInterrupt:
        return _fail(arguments.command, "interrupted")
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("FASTBN_TRACEBACK"):
            raise
        return _fail(arguments.command, _told(error))


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Let SIGTERM end the body as Ctrl-C does: temporary files and the process that runs models go with it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours:  # whoever calls us from Python may have a handler of its own
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the cleaning up short
        raise _Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _any_character() -> Iterator[None]:
    """Let standard output write what its encoding lacks as escapes, as standard error does: names may be anything."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper) or out.errors != "strict":
        yield
        return
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError):  # what was still to be written there
            out.reconfigure(errors="strict")


def _handler(module: str, name: str) -> Handler:
    """Import the module of a command only when it is the one to run."""
    function: Handler = getattr(importlib.import_module(f"fastbn_export.{module}"), name)
    return function


def _fail(command: str, message: str) -> int:
    if sys.stderr is not None:  # closed: print would take standard output instead
        print(f"fastbn {command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _told(error: Exception) -> str:
    """Return what an exception means to the one who typed the command."""
    if isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        for extra, packages in _EXTRAS.items():
            if package in packages:
                return f'{package} is not installed: pip install "fastbn[{extra}]"'
    if isinstance(error, FastbnError):
        return str(error)
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError):
        return f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")
    return f"unexpected {type(error).__name__}: {error} (FASTBN_TRACEBACK=1 shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastbn", description="Batch normalization: fast while training, gone when deployed.")
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    fold = _command(commands, "fold", "commands", "fold the batch normalizations of a model into its other operators")
    fold.add_argument("input", metavar="IN.onnx")
    fold.add_argument("output", metavar="OUT.onnx")
    fold.add_argument("--report", metavar="R.json", help="write what was folded where, and why the rest stay")
    fold.add_argument("--keep", metavar="PATTERN", action="append", help="leave these alone (name or glob; repeatable)")
    fold.add_argument("--duplicate", action="store_true", help="also fold behind operators with other readers")
    fold.add_argument("--no-verify", action="store_true", help="write the result unchecked")
    _check_options(fold)

    verify = _command(commands, "verify", "commands", "check that two models are the same function")
    verify.add_argument("reference", metavar="A.onnx")
    verify.add_argument("candidate", metavar="B.onnx")
    verify.add_argument("--report", metavar="R.json", help="write the errors of every output")
    _check_options(verify)

    inspect = _command(commands, "inspect", "commands", "show every batch normalization of a model and its fate")
    inspect.add_argument("model", metavar="MODEL.onnx")
    inspect.add_argument("--duplicate", action="store_true", help="as for fold")
    inspect.add_argument("--json", action="store_true", help="print the report as JSON")

    again = _command(commands, "recalibrate", "commands", "re-estimate the statistics of a model from data")
    again.add_argument("input", metavar="IN.onnx")
    again.add_argument("output", metavar="OUT.onnx")
    again.add_argument("--data", metavar="DATA.npz", required=True, help="an array for each input, examples first")
    again.add_argument("--batch", metavar="N", type=_positive, default=64, help="examples run at a time (default 64)")

    demo = _command(commands, "demo", "demo", "train with and without batch normalization, export, fold, compare")
    demo.add_argument("--out", metavar="DIR", default="demo-out", help="where the files go (default demo-out)")
    demo.add_argument("--data", metavar="MNIST_DIR", help="a folder with MNIST's four IDX files (.gz or not)")

    _command(commands, "doctor", "doctor", "show versions, CPU, threads, cache and GPU")
    _command(commands, "warmup", "warmup", "compile the kernels ahead of their first use")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, module: str, what: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what.capitalize() + ".")
    parser.set_defaults(handler=(module, name))
    return parser


def _check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", metavar="N", type=_positive, default=3, help="random inputs tried (default 3)")
    parser.add_argument("--seed", metavar="S", type=_seed, default=0, help="seed of the random inputs (default 0)")
    parser.add_argument("--inputs", metavar="DATA.npz", help="an array for each input, instead of random ones")
    parser.add_argument("--rtol", metavar="X", type=_tolerance, help="relative tolerance instead of the dtype's own")
    parser.add_argument("--atol", metavar="Y", type=_tolerance, help="absolute tolerance")
    parser.add_argument("--timeout", metavar="S", type=_seconds, default=120.0, help="seconds a run may take")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text}")
    return value


def _tolerance(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected seconds > 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
