"""What a result was measured on: machine, library versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess

LIBRARIES = ("numpy", "numba", "llvmlite", "torch", "onnxruntime", "jax")


def _cpu() -> tuple[str, str]:
    """Return the processor's name and its family number, as Linux tells them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return platform.processor() or platform.machine(), ""
    name = re.search(r"model name\s*: (.+)", text)
    family = re.search(r"cpu family\s*: (\d+)", text)
    return (name.group(1).strip() if name else platform.machine(), family.group(1) if family else "")


def name() -> str:
    """Return for instance "2-core AMD EPYC (Zen 5)"."""
    cpu, family = _cpu()
    zen = {"23": " (Zen 1/2)", "25": " (Zen 3/4)", "26": " (Zen 5)"}.get(family, "") if "AMD" in cpu else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores}-core {cpu}{zen}"


def slug() -> str:
    """Return the machine's name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", name().lower()).strip("-")


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the short hash of the checked-out commit, with "+" if there are changes on top of it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        clean = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "fastbn"], check=False).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("" if clean else "+")


def today() -> str:
    """Return the date."""
    return datetime.date.today().isoformat()
