"""``fastbn warmup``: compile every kernel ahead of its first use, into the cache."""

from __future__ import annotations

import argparse

from fastbn.warmup import tasks
from fastbn_export.console import line, progress

__all__ = ["warmup"]


def warmup(_: argparse.Namespace) -> int:
    """Call each kernel once, with a progress bar."""
    work = tasks()
    for _label, task in progress(work, "compiling kernels", len(work)):
        task()
    line(f"{len(work)} kernels ready")
    return 0
