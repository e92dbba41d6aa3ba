"""The network of the first experiment of Ioffe & Szegedy (2015, section 4.1): the paper that introduced batch norm.

Three hidden layers of 100 sigmoid units, weights "small random Gaussian", mini-batches of 60, cross-entropy over ten
classes, plain SGD; batch normalization on Wu (its bias dropped) before each sigmoid. The paper gives neither the
learning rate nor the deviation of the initial weights: 0.5 and 0.1 are our choice. The normalisation, forward and
backward, is fastbn's; the rest is NumPy.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn_export.layers import Layer, Linear, Sigmoid

__all__ = ["BATCH", "DEVIATION", "HIDDEN", "LEARNING_RATE", "Net", "mini_batches"]

HIDDEN = (100, 100, 100)
BATCH = 60
LEARNING_RATE = 0.5
DEVIATION = 0.1

Array = NDArray[np.float32]


class Net:
    """The paper's network, with or without batch normalization.

    Parameters
    ----------
    features, classes : int
        Sizes of input and output.
    normalised : bool
        Put a fastbn.BatchNorm before each sigmoid.
    seed : int
        Of the initial weights: two nets of one seed start from the same.
    """

    def __init__(self, features: int, classes: int, normalised: bool, seed: int = 0):
        rng = np.random.default_rng(seed)
        sizes = (features, *HIDDEN, classes)
        self.weights: list[Array] = [
            rng.normal(0.0, DEVIATION, (out, in_)).astype(np.float32) for in_, out in pairwise(sizes)
        ]
        self.biases: list[Array] = [np.zeros(out, np.float32) for out in sizes[1:]]
        self.norms = [fastbn.BatchNorm(size) for size in HIDDEN] if normalised else []

    def forward(self, x: Array) -> tuple[Array, list[Array]]:
        """Return the logits and what each linear layer was given."""
        given = [x]
        for index, (weight, bias) in enumerate(zip(self.weights[:-1], self.biases, strict=False)):
            u = given[-1] @ weight.T
            u = self.norms[index](u) if self.norms else u + bias
            given.append(_sigmoid(u))
        return given[-1] @ self.weights[-1].T + self.biases[-1], given

    def step(self, x: Array, labels: NDArray[Any]) -> None:
        """Take one step of gradient descent on a mini-batch."""
        logits, given = self.forward(x)
        grad = _softmax(logits)
        grad[np.arange(len(labels)), labels] -= 1
        grad /= np.float32(len(labels))
        last = len(self.weights) - 1
        for index in range(last, -1, -1):
            if index < last:
                grad = grad * given[index + 1] * (1 - given[index + 1])
                if self.norms:
                    grad = self._norm_step(index, grad)
            below = grad @ self.weights[index]
            self.weights[index] -= LEARNING_RATE * (grad.T @ given[index])
            if index == last or not self.norms:
                self.biases[index] -= LEARNING_RATE * grad.sum(axis=0)
            grad = below

    def _norm_step(self, index: int, grad: Array) -> Array:
        norm = self.norms[index]
        grads = norm.backward(np.ascontiguousarray(grad))
        for parameter, gradient in ((norm.weight, grads.weight), (norm.bias, grads.bias)):
            if parameter is not None and gradient is not None:
                parameter -= LEARNING_RATE * gradient
        result: Array = grads.input
        return result

    def accuracy(self, x: Array, labels: NDArray[Any]) -> float:
        """Return the share of examples classified right, in inference."""
        for norm in self.norms:
            norm.eval()
        logits, _ = self.forward(x)
        for norm in self.norms:
            norm.train()
        return float(np.mean(logits.argmax(axis=1) == labels))

    def layers(self) -> list[Layer]:
        """Return the network for `fastbn_export.build`."""
        layers: list[Layer] = []
        for index in range(len(self.weights) - 1):
            if self.norms:
                layers += [Linear(self.weights[index]), self.norms[index], Sigmoid()]
            else:
                layers += [Linear(self.weights[index], self.biases[index]), Sigmoid()]
        return [*layers, Linear(self.weights[-1], self.biases[-1])]


def _sigmoid(u: Array) -> Array:
    result: Array = 0.5 * (np.tanh(0.5 * u) + 1)  # 1 / (1 + exp(-u)) without its overflow
    return result


def _softmax(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def mini_batches(count: int, steps: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of ``steps`` mini-batches: every example once, shuffled, then again in another order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(count)
    place = 0
    for _ in range(steps):
        if place + BATCH > count:
            order, place = rng.permutation(count), 0
        yield order[place : place + BATCH]
        place += BATCH
