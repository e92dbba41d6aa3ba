"""Other draws of the original's rounding error: its outputs with its factors moved, run when asked for, and kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastbn_export.samples import Feeds
from fastbn_export.worker import RunError, Worker

__all__ = ["REDRAWS", "Redraws"]

REDRAWS = 8
"""Where one direction dominates, the errors of two right models are two normal draws, and the one is more than 4 times
the other in 16 of 100 cases; more than 2.5 times the largest of 1 + 8 in 17 of 10,000."""


class Redraws:
    """Runs the reference with its factors moved (`moved`), at most ``REDRAWS`` times, whatever asks for it.

    Parameters
    ----------
    worker : Worker
        Where models run; it has the model in its file "reference".
    """

    def __init__(self, worker: Worker):
        self.worker = worker
        self._kept: list[list[list[Any]]] = []
        self._most = REDRAWS

    def rows(self, feeds: list[Feeds]) -> Iterator[list[list[Any]]]:
        """Yield the outputs, sample by sample, of one moved model after the other; always the same ``feeds``."""
        for seed in range(REDRAWS):
            if seed == len(self._kept) < self._most:
                self._draw(seed, feeds)
            if seed < len(self._kept):
                yield self._kept[seed]

    def _draw(self, seed: int, feeds: list[Feeds]) -> None:
        try:
            self.worker.load("moved", "reference", moved=seed)
            self._kept.append([self.worker.run("moved", feed) for feed in feeds])
            self.worker.drop("moved")
        except RunError:  # nor would the next ones run
            self._most = seed
