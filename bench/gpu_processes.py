"""Keeps bench.gpu going: jobs run in another process, and what kills or hangs that costs one job, not the run."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PATIENCE = 100.0  # seconds of silence after which a process counts as hung; torch.compile takes up to 40
MOST = 12  # processes that a run may use up
IDLE = 3  # of them that begin no job

Report = dict[str, Any]
Start = Callable[[int], tuple[Any, int]]  # the first job -> (process, where its lines are read)


def start_worker(command: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a process that writes its reports, a JSON a line, to a pipe of their own: its output may say anything."""
    read, write = os.pipe()
    process = subprocess.Popen([*command, "--tell", str(write)], pass_fds=[write], stdin=subprocess.DEVNULL)
    os.close(write)
    return process, read


def lines(read: int, patience: float) -> Iterator[Report | None]:
    """Yield what comes from a pipe until it is closed; None once for a silence that lasted too long."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(read, selectors.EVENT_READ)
        while True:
            if not selector.select(patience):
                yield None
                return
            chunk = os.read(read, 1 << 16)
            if not chunk:
                return
            *whole, pending = (pending + chunk).split(b"\n")
            for line in whole:
                yield json.loads(line)


def supervise(start: Start, count: int, end: float, patience: float = PATIENCE) -> Iterator[Report]:
    """Yield a report of each job that was begun, ``{"done": number, "result" or "error": ...}``, until ``end``."""
    first, used, idle = 0, 0, 0
    while first < count and used < MOST and idle < IDLE and time.time() < end:
        process, read = start(first)
        used, idle = used + 1, idle + 1
        in_hand, why, usable = -1, "", True
        for report in lines(read, patience):
            if report is None:
                why = f"nothing happened for {patience:.0f} s"
                break
            idle, in_hand = 0, report.get("begun", -1)
            usable = report.get("usable", True)
            if "done" in report:
                first = report["done"] + 1
                yield report
        os.close(read)
        if why:
            process.kill()
        code = finish(process)
        if in_hand < 0 and code == 0 and usable:
            return  # what is left is beyond the time
        if in_hand >= 0 or idle:
            first = max(first, in_hand)
            yield {"done": first, "error": why or f"the process ended with {code}"}
            first += 1


def finish(process: Any) -> int:
    """Wait for a process that should have ended, end it if it has not, and return its exit status."""
    try:
        return int(process.wait(15))
    except subprocess.TimeoutExpired:
        process.kill()
        return int(process.wait())


def compile_kernels(target: tuple[int, int], seconds: float) -> str:
    """Compile every kernel into the store by as many processes as there are cores; say how it went."""
    count, begun = max(1, min(32, (os.cpu_count() or 2) - 1)), time.time()  # a container may have fewer than it sees
    flag = f"--sm{target[0]}{target[1]}"
    command = [sys.executable, "-m", "bench.gpu_compile", flag, "--store"]
    running = [
        subprocess.Popen([*command, f"{i}/{count}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for i in range(count)
    ]
    said = ""
    for process in running:
        try:
            _, error = process.communicate(timeout=max(1.0, begun + seconds - time.time()))
            if process.returncode and not said:
                said = ": " + error.decode(errors="replace").strip()[-200:]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            said = said or f": more than {seconds:.0f} s"
    return f"{count} processes, {time.time() - begun:.0f} s{said}"


def sanitize(end: float, options: list[str]) -> str:
    """Run the small checks under compute-sanitizer; say how it went."""
    import shutil

    program, seconds = shutil.which("compute-sanitizer"), min(120.0, end - time.time())
    if program is None:
        return "not installed"
    if seconds < 20:
        return "no time left"
    command = [
        program,
        "--tool",
        "memcheck",
        "--report-api-errors",
        "no",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "bench.gpu",
        "--small",
    ]
    try:
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} s"
    except OSError as error:
        return f"did not start: {error}"
    last = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return last[-1].strip("= ") if last else f"failed with {done.returncode}: {(done.stderr or done.stdout)[-300:]}"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write the result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, path)
