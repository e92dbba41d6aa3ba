"""The picture of the demo: test accuracy against training steps, as in figure 1a of Ioffe & Szegedy (2015)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbn_export.files import atomic_path

__all__ = ["save_accuracies"]

_STYLES = (("#777777", "--", "o", -1), ("#0b5fa5", "-", "s", 1))
"""Colour, dash, marker, and whether numbers stand below or above; told apart in black and white too."""


def save_accuracies(
    path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], title: str, caption: str, marked: Sequence[int]
) -> None:
    """Draw accuracy curves into a PNG file.

    Parameters
    ----------
    path : Path
        The file; it appears whole or not at all.
    curves : mapping of str to sequence of (step, accuracy)
        At most two.
    title, caption : str
        What was trained on what, and how.
    marked : sequence of int
        Steps whose points are marked and labelled: those of the printed table.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), style in zip(curves.items(), _STYLES, strict=False):
        _draw(axes, name, dict(curve), style, marked)
    last = max(step for curve in curves.values() for step, _ in curve)
    axes.set_xlim(-0.01 * last, 1.07 * last)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(f"training steps\n{caption}")
    axes.set_ylabel("share of test pictures classified right")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(0.98, 0.08), frameon=False)
    with atomic_path(path) as part:
        FigureCanvasAgg(figure).print_png(str(part))


def _draw(
    axes: Any, name: str, points: Mapping[int, float], style: tuple[str, str, str, int], marked: Sequence[int]
) -> None:
    colour, dash, marker, side = style
    places = [index for index, step in enumerate(points) if step in marked]
    steps, values = list(points), list(points.values())
    axes.plot(
        *(steps, values, dash), color=colour, linewidth=1.7, marker=marker, markersize=5.5, markevery=places, label=name
    )
    for place in places:
        axes.annotate(
            *(f"{values[place]:.2f}", (steps[place], values[place])),
            xytext=(0, 8) if side > 0 else (9, -3),
            textcoords="offset points",
            ha="center" if side > 0 else "left",
            va="bottom" if side > 0 else "top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            fontsize=9,
            color=colour,
        )
