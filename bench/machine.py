"""What a result was measured on: machine, library versions, commit."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess

LIBRARIES = ("numpy", "numba", "llvmlite", "torch", "onnxruntime", "jax")


def _cpu() -> tuple[str, int, int]:
    """Return the processor's name, its family and its model number, as Linux tells them."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read()
    except OSError:
        return platform.processor() or platform.machine(), 0, 0
    name = re.search(r"model name\s*: (.+)", text)
    family, model = (re.search(rf"^{key}\s*: (\d+)", text, re.MULTILINE) for key in ("cpu family", "model"))
    return (
        name.group(1).strip() if name else platform.machine(),
        int(family.group(1)) if family else 0,
        int(model.group(1)) if model else 0,
    )


def _zen(family: int, model: int) -> str:
    """Return the generation of an AMD processor, "" if unknown; models of family 25: AMD's revision guides."""
    if family == 25:
        return " (Zen 4)" if 0x10 <= model < 0x20 or 0x60 <= model < 0x80 or 0xA0 <= model < 0xB0 else " (Zen 3)"
    return {23: " (Zen 1/2)", 26: " (Zen 5)"}.get(family, "")


def _xeon(family: int, model: int) -> str:
    """Return the generation of an Intel server processor, "" if unknown; models as in Linux's ``intel-family.h``."""
    names = {85: "Skylake", 106: "Ice Lake", 143: "Sapphire Rapids", 173: "Granite Rapids", 207: "Emerald Rapids"}
    return f" ({names[model]})" if family == 6 and model in names else ""


def name() -> str:
    """Return for instance "2-core AMD EPYC (Zen 5)"."""
    cpu, family, model = _cpu()
    if "Intel" in cpu:
        cpu = cpu.replace("(R)", "").removesuffix(" Processor") + _xeon(family, model)
    return f"{os.cpu_count()}-core {cpu}{_zen(family, model) if 'AMD' in cpu else ''}"


def slug(of: str | None = None) -> str:
    """Return a machine's name, by default this one's, for a file."""
    return re.sub(r"[^a-z0-9]+", "-", (of or name()).lower()).strip("-")


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


def without_options(about: str | None) -> None:
    """Answer ``--help`` for a benchmark that takes no options, and refuse any."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=about, formatter_class=raw, allow_abbrev=False).parse_args()
