"""What commands print: tables and progress, with rich where it is installed and as plain text where it is not."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["bytes_text", "json_text", "line", "print_table", "progress", "working"]

T = TypeVar("T")


def line(text: str = "") -> None:
    """Print one line to standard output."""
    print(text, flush=True)


def json_text(content: object) -> str:
    """Return JSON for standard output, with escapes of its own where characters are not in the output's encoding."""
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(content, indent=2, default=str)
    return text


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns after the first are aligned to the right when they hold numbers only."""
    text = [[str(cell) for cell in row] for row in rows]
    numeric = [index > 0 and all(_is_number(row[index]) for row in text) for index in range(len(columns))]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        _plain(title, columns, text, numeric)
        return
    table = Table(title=escape(title), title_justify="left", title_style="bold", header_style="bold")
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(escape(column), justify="right" if right else "left", overflow="fold")
    for row in text:
        table.add_row(*(escape(cell) for cell in row))

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the process with status 1, which says that a check failed

    console = Ours()
    if not console.is_terminal:
        console = Ours(width=_width(columns, text, title))
    console.print(table)


def _width(columns: Sequence[str], rows: list[list[str]], title: str) -> int:
    """Return the width that shows every cell whole: a file or a pipe has no edge to wrap at."""
    from rich.cells import cell_len  # some characters are two wide

    widths = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    return max(sum(widths) + 3 * len(widths) + 1, cell_len(title), 20)


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or (cell[0] in "+-" and cell[1:2].isdigit()) or cell in ("-", "nan", "inf")


def _plain(title: str, columns: Sequence[str], rows: list[list[str]], numeric: list[bool]) -> None:
    cells = [list(columns), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line(title)
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        line("  " + "  ".join(padded).rstrip())


def progress(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield the items under a progress bar on standard error (nothing is drawn where that is no terminal)."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            yield item
            bar.advance(task)


@contextmanager
def working(label: str, after: float = 1.0) -> Iterator[None]:
    """Show a moving bar on standard error while the body runs, if it runs longer than ``after`` seconds."""
    done = threading.Event()
    thread = threading.Thread(target=_wait, args=(label, after, done), daemon=True)
    if sys.stderr is not None and sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.is_alive():
            thread.join()


def _wait(label: str, after: float, done: threading.Event) -> None:
    if done.wait(after):
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        return
    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(label, total=None)
        done.wait()


def bytes_text(count: int) -> str:
    """Return a size for people: 1023 B, 1.5 kB, 97.4 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
