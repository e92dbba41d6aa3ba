"""The picture of the demo: test accuracy against training steps, as in figure 1a of Ioffe & Szegedy (2015)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastbn_export.files import atomic_path

__all__ = ["save_accuracies"]

_STYLES = (("#8a8a8a", "--", "o"), ("#0b5fa5", "-", "s"))


def save_accuracies(
    path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], title: str, marked: Sequence[int]
) -> None:
    """Draw accuracy curves into a PNG file.

    Parameters
    ----------
    path : Path
        The file; it appears whole or not at all.
    curves : mapping of str to sequence of (step, accuracy)
        At most two.
    title : str
        What was trained on what.
    marked : sequence of int
        Steps whose points are marked and labelled: those of the printed table.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), (colour, dash, marker) in zip(curves.items(), _STYLES, strict=False):
        points = dict(curve)
        axes.plot(list(points), list(points.values()), dash, color=colour, linewidth=1.8)
        steps = [step for step in marked if step in points]
        axes.plot(steps, [points[step] for step in steps], marker, color=colour, markersize=5, label=name)
    axes.set_xlabel("training steps (mini-batches of 60)")
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1)
    axes.set_xlim(0, None)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))
