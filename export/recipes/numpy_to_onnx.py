"""Train with NumPy and fastbn, fold, export, check: two spirals, one hidden layer, no framework.

Run: ``python export/recipes/numpy_to_onnx.py [OUT.onnx]``
"""

from __future__ import annotations

import sys

import fastbn_export
import numpy as np
from fastbn_export.files import save_model
from fastbn_export.layers import Linear

import fastbn

STEPS, BATCH, RATE = 2000, 64, 0.5


def spirals(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return points (count, 2) on two interleaved spirals and which one each is on."""
    label = rng.integers(0, 2, count)
    turn = rng.uniform(0.3, 1.5, count) * 2 * np.pi
    angle = turn + np.pi * label
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1) * turn[:, None] / 6
    return (points + rng.normal(scale=0.02, size=points.shape)).astype(np.float32), label


def train(rng: np.random.Generator) -> tuple[np.ndarray, fastbn.BatchNorm, np.ndarray, np.ndarray]:
    """Return first weight, its batch normalization with ReLU, last weight and bias."""
    first = rng.normal(size=(128, 2)).astype(np.float32)
    last, bias = (rng.normal(size=(2, 128)) / 8).astype(np.float32), np.zeros(2, np.float32)
    bn = fastbn.BatchNorm(128, activation="relu")
    bn.bias[:] = rng.normal(size=128)
    for step in range(STEPS):
        x, label = spirals(BATCH, rng)
        hidden = bn(x @ first.T)
        logits = hidden @ last.T + bias
        grad = np.exp(logits - logits.max(1, keepdims=True))
        grad /= grad.sum(1, keepdims=True)
        grad[np.arange(BATCH), label] -= 1
        grad /= BATCH
        grads = bn.backward(grad @ last)
        rate = np.float32(RATE * (1 - step / STEPS))
        last -= rate * grad.T @ hidden
        bias -= rate * grad.sum(0)
        first -= rate * grads.input.T @ x
        bn.weight -= rate * grads.weight
        bn.bias -= rate * grads.bias
    return first, bn, last, bias


def main(out: str) -> int:
    """Train, export, check, and return the exit status."""
    rng = np.random.default_rng(0)
    first, bn, last, bias = train(rng)
    layers = [Linear(first), bn, Linear(last, bias)]
    original = fastbn_export.build(layers, (None, 2), fold=False)
    result = fastbn_export.fold(original)
    x, label = spirals(1000, rng)
    report = fastbn_export.verify(original, result.model, inputs={"input": x})
    print(report)
    if not report.ok:
        return 1
    save_model(result.model, out)

    import onnxruntime

    (logits,) = onnxruntime.InferenceSession(out).run(None, {"input": x})
    print(f"operators: {dict(result.report.ops_before)} -> {dict(result.report.ops_after)}")
    print(f"accuracy of {out}: {np.mean(logits.argmax(1) == label):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["spirals.onnx"])))
