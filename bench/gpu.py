"""Check and time the kernels on the GPU of this machine: ``python -m bench.gpu [--seconds N] [--out FILE]``.

In this order: a few small calls, the first contact, while all kernels are compiled by as many processes as there are
cores; every kernel against float64 with fresh inputs and poisoned outputs; the bandwidth of a copy and the cost of a
launch; our time of every case, its floor (bytes that must move, at the bandwidth of a copy) and those of PyTorch, of
cuDNN and, as far as the time goes, of torch.compile; compute-sanitizer on the small calls. All work on the GPU is done
by another process, which may fail, die or hang: that costs the case in hand, becomes its row, and the run goes on. The
JSON is written again and again as the run goes, the table comes last. What is wrong makes the exit status 1. Without a
GPU it says so and exits with 0. Needs numpy, numba-cuda and torch, nothing installed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench import gpu_processes as processes
from bench import gpu_report as report
from bench.gpu_processes import compile_kernels, sanitize, supervise, write

RESULTS = Path(__file__).parent / "results"
ENDS = {
    "check": 0.45,
    "check family": 0.55,
    "trial": 0.62,
    "time": 0.8,
    "time family": 0.85,
    "compile": 0.9,
}  # of the time, by stage


def find_toolkit() -> None:
    """Tell numba-cuda where the CUDA toolkit is (libnvvm, libdevice), if the machine has one and nobody said so."""
    program = shutil.which("nvcc")
    folders = ([Path(program).resolve().parent.parent] if program else []) + [Path("/usr/local/cuda")]
    found = next((folder for folder in folders if (folder / "nvvm").is_dir()), None)
    if found is not None and not os.environ.get("CUDA_HOME") and not os.environ.get("CUDA_PATH"):
        os.environ["CUDA_HOME"] = str(found)


def missing() -> str:
    """Say what keeps this from running, or nothing. Makes no CUDA context."""
    try:
        import torch

        found = torch.cuda.is_available()
    except Exception as error:  # of a library that is missing, or of another CUDA
        return f"no GPU is present for torch: {type(error).__name__}: {error}"
    return "" if found else f"no GPU is present for torch {torch.__version__} (CUDA {torch.version.cuda})"


def capability() -> tuple[int, int]:
    """Return the GPU's compute capability, as the driver's own program says; 9.0 where it does not."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
        major, minor = said.split(".")
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 9, 0


def first_contact(options: list[str]) -> tuple[int, str]:
    """Do the small calls in a process of their own; return its status and the end of what it said."""
    command = [sys.executable, "-m", "bench.gpu", "--small", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    except subprocess.TimeoutExpired as error:
        return -1, f"hung for 150 s: {str(error.stdout or '')[-1500:]}"
    return done.returncode, (done.stdout + done.stderr)[-2000:].strip()


def choose_launch() -> tuple[list[str], dict[str, str]]:
    """Return the options of workers, and what the first contact with each way to launch said."""
    said = {}
    for name, options in (("direct", []), ("numba", ["--numba-launch"])):
        code, said[name] = first_contact(options)
        print(f"first contact, launches by {name}: {said[name] if code else 'right'}", flush=True)
        if code == 0:
            return options, said
    return [], said


def follow(result: dict[str, Any], todo: list[dict[str, Any]], start: Any, end: float, out: Path) -> list[Any]:
    """Have jobs done and take what they report; write as it goes. Returns the jobs that failed."""
    saved, failed = time.time(), []
    for said in supervise(functools.partial(start, todo), len(todo), end):
        job = todo[said["done"]]
        report.take(result, job, said)
        if "error" in said:
            failed.append(job)
        if time.time() > saved + 2:
            write(out, result)
            saved = time.time()
    write(out, result)
    return failed


def run(seconds: float, out: Path, todo: list[dict[str, Any]], start: Any, options: list[str], begun: Any) -> int:
    """Have every job done, write and print; return the exit status."""
    now = time.time()
    for job in todo:
        job["until"] = now + ENDS.get(job["stage"], 1.0) * seconds
    result: dict[str, Any] = {"machine": {}, "versions": {}, "copy_gb_s": None, "launch": {}, "first_contact": begun}
    result |= {
        "sanitizer": "not run",
        "checked": 0,
        "worst": 0.0,
        "wrong": [],
        "warnings": [],
        "trials": [],
        "rows": [],
    }
    write(out, result)  # what follows may be cut off at any moment
    failed = follow(result, todo, start, now + seconds, out)
    again = [job | {"split": True} for job in failed if job["stage"] == "time"]
    follow(result, again, start, now + seconds, out)  # what killed or hung a process, without its one-launch kernels
    result["sanitizer"] = sanitize(now + 1.1 * seconds, options)
    report.finish(result, todo)
    write(out, result)
    report.show(result)
    return 1 if result["wrong"] else 0


def compile_beside(about: dict[str, Any]) -> None:
    """Compile all kernels and say how it went."""
    about["compiled"] = compile_kernels(capability(), 120.0)
    print(f"kernels compiled: {about['compiled']}", flush=True)


def begin(seconds: float, out: Path) -> int:
    """Compile, make contact, and run."""
    from bench.gpu_work import jobs

    end = time.time() + seconds
    find_toolkit()
    os.environ.setdefault("FASTBN_CACHE_DIR", str(Path(tempfile.gettempdir(), "fastbn")))  # whoever's home it is
    about: dict[str, Any] = {"compiled": "not to the end"}
    compiling = threading.Thread(target=compile_beside, args=(about,), daemon=True)
    compiling.start()  # a minute of all cores, that checks need not wait for: what is not there they compile themselves
    options, said = choose_launch()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "jobs.json")

        def start(todo: list[dict[str, Any]], first: int) -> Any:
            path.write_text(json.dumps(todo))
            command = [sys.executable, "-m", "bench.gpu", "--work", str(path), "--first", str(first), *options]
            return processes.start_worker(command)

        about |= {"launch": "numba" if options else "direct", "said": said}
        status = run(max(60.0, end - time.time()), out, jobs(), start, options, about)
    compiling.join()
    return status


def worker(options: argparse.Namespace) -> int:
    """Be the process that works: small calls, or jobs from a file."""
    find_toolkit()
    import torch

    from bench import gpu_work
    from fastbn.cuda import tuning

    tuning.DIRECT = not options.numba_launch
    with torch.no_grad():
        if options.small:
            wrong = gpu_work.small(torch)
            print("\n".join(wrong) or "right")
            return 1 if wrong else 0
        with open(options.tell, "w", buffering=1) as pipe:

            def tell(said: dict[str, Any]) -> None:
                pipe.write(json.dumps(said) + "\n")

            gpu_work.work(torch, json.loads(options.work.read_text()), options.first, tell)
    return 0


def main() -> int:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420.0, help="time to stay within, apart from the sanitizer")
    parser.add_argument("--out", type=Path, default=None, help="JSON (default: bench/results/<gpu>.json)")
    parser.add_argument("--small", action="store_true", help="a few small checks only")
    parser.add_argument("--numba-launch", action="store_true", help="launch by Numba's own call")
    for hidden, kind in (("--work", Path), ("--first", int), ("--tell", int)):
        parser.add_argument(hidden, type=kind, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    reason = missing()
    if reason:
        print(reason)
        return 0
    if options.small or options.work:
        return worker(options)
    import torch

    name = torch.cuda.get_device_name(0).lower().replace(" ", "-")
    return begin(options.seconds, options.out or RESULTS / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
