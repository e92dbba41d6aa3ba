"""The digits that the demo learns: scikit-learn's own, or MNIST from its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ArgumentValueError
from fastbn_export.idx import find_mnist, read_idx

__all__ = ["Data", "digits", "mnist"]

_LEAST = 60
"""Pictures of each part that a mini-batch needs."""


@dataclass(frozen=True)
class Data:
    """Black and white pictures, flattened, and their classes.

    Attributes
    ----------
    name : str
    train_x, test_x : ndarray of float32, shape (examples, pixels)
        0 or 1: the paper's input is a binary image.
    train_y, test_y : ndarray of int64, shape (examples,)
    """

    name: str
    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]


def digits() -> Data:
    """Return scikit-learn's 1797 digits of 8 x 8 pixels, binarised at half the range; a fifth of them to test on."""
    from sklearn.datasets import load_digits

    pictures, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(classes))
    x, y = _binary(pictures[order], 8), classes[order].astype(np.int64)
    test = len(x) // 5
    return Data("scikit-learn's digits", x[test:], y[test:], x[:test], y[:test])


def mnist(folder: str) -> Data:
    """Return MNIST from its four IDX files, binarised at half the range.

    Raises
    ------
    ArgumentValueError
        A file is missing or broken, or they do not belong together.
    """
    parts = {part: read_idx(path) for part, path in find_mnist(folder).items()}
    for name in ("train", "t10k"):
        images, labels = parts[f"{name}-images"], parts[f"{name}-labels"]
        if images.ndim != 3 or labels.shape != images.shape[:1] or len(images) < _LEAST:
            raise ArgumentValueError(
                f"{folder}: {name}",
                f"images (n, rows, columns) and labels (n,), n >= {_LEAST}",
                (images.shape, labels.shape),
            )
        if labels.min() < 0 or labels.max() > 9:
            raise ArgumentValueError(f"{folder}: {name}", "labels 0 to 9", f"{labels.min()} to {labels.max()}")
    if parts["train-images"].shape[1:] != parts["t10k-images"].shape[1:]:
        raise ArgumentValueError(str(folder), "pictures of one size", [p.shape for p in parts.values()])
    x = {
        name: _binary(parts[f"{name}-images"].reshape(len(parts[f"{name}-images"]), -1), 128)
        for name in ("train", "t10k")
    }
    y = {name: parts[f"{name}-labels"].astype(np.int64) for name in ("train", "t10k")}
    return Data("MNIST", x["train"], y["train"], x["t10k"], y["t10k"])


def _binary(pictures: NDArray[Any], threshold: int) -> NDArray[np.float32]:
    return (pictures >= threshold).astype(np.float32)
