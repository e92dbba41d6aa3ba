"""Batch norm in a recurrent network, in NumPy and fastbn: remember the first symbol of a noisy sequence.

Three LSTMs with the same weights to start from: plain, with sequence-wise statistics on the input's path (Laurent et
al. 2015), and with statistics per time step on the input's and the hidden state's path and on the way out of the cell
(Cooijmans et al. 2016; weights start at 0.1, the cell itself is left alone). Sequences are ragged; the last column of
the table runs them longer than any in training, where the last step's statistics are used again.

    python examples/recurrent_bn.py [--updates 300]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import numpy.typing as npt

import fastbn

Array = npt.NDArray[Any]
SYMBOLS, HIDDEN, STEPS = 4, 24, 24


def sample(rng: np.random.Generator, count: int, steps: int) -> tuple[Array, Array, Array]:
    """Return noisy sequences (N, T, SYMBOLS), their lengths and the symbol shown at the first step of each."""
    labels = rng.integers(SYMBOLS, size=count)
    lengths = rng.integers(steps // 2, steps + 1, size=count)
    x = rng.normal(scale=0.5, size=(count, steps, SYMBOLS))
    x[np.arange(count), 0, labels] += 2.0
    return x, lengths, labels


def sigmoid(z: Array) -> Array:
    """Return 1/(1 + exp(-z))."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


class Lstm:
    """An LSTM that reads a sequence and names a class; ``kind`` is "plain", "sequence" or "step"."""

    def __init__(self, kind: str, rng: np.random.Generator):
        self.kind, gates = kind, 4 * HIDDEN
        self.params: dict[str, Array] = {
            "Wx": rng.normal(scale=0.3, size=(SYMBOLS, gates)),
            "Wh": np.tile(np.eye(HIDDEN), 4) * 0.7 + rng.normal(scale=0.05, size=(HIDDEN, gates)),
            "b": np.zeros(gates),
            "Wo": rng.normal(scale=0.3, size=(HIDDEN, SYMBOLS)),
            "bo": np.zeros(SYMBOLS),
        }
        self.norms: dict[str, Any] = {}
        if kind == "sequence":
            self.norms = {"x": fastbn.BatchNorm(gates, axis=-1, dtype=np.float64)}
        elif kind == "step":
            sizes = {"x": gates, "h": gates, "c": HIDDEN}
            self.norms = {k: fastbn.RecurrentBatchNorm(n, STEPS, dtype=np.float64) for k, n in sizes.items()}
        for key, norm in self.norms.items():
            self.params[key + ".weight"], self.params[key + ".bias"] = norm.weight, norm.bias

    def train(self, mode: bool) -> None:
        """Switch between batch and running statistics."""
        for norm in self.norms.values():
            norm.train(mode)

    def _step_norm(self, key: str, z: Array, t: int, mask: Array) -> tuple[Array, Any]:
        return self.norms[key].step(z, t, mask=mask) if self.kind == "step" else (z, None)

    def forward(self, x: Array, lengths: Array) -> Array:
        """Return logits; keeps what ``backward`` needs."""
        p, (count, steps, _) = self.params, x.shape
        running = np.arange(steps) < lengths[:, None]
        zx = x @ p["Wx"]
        if self.norms:
            zx = self.norms["x"](zx, lengths=lengths)
        h, c, self.tape = np.zeros((count, HIDDEN)), np.zeros((count, HIDDEN)), []
        for t in range(steps):
            on = running[:, t, None]
            zh, saved_h = self._step_norm("h", h @ p["Wh"], t, running[:, t])
            i, f, o, g = np.split(zx[:, t] + zh + p["b"], 4, axis=1)
            i, f, o, g = sigmoid(i), sigmoid(f + 1.0), sigmoid(o), np.tanh(g)
            new_c = f * c + i * g
            normed, saved_c = self._step_norm("c", new_c, t, running[:, t])
            out = np.tanh(normed)
            self.tape.append((on, h, c, i, f, o, g, out, saved_h, saved_c))
            h, c = np.where(on, o * out, h), np.where(on, new_c, c)  # finished sequences keep their state
        self.x, self.h = x, h
        logits: Array = h @ p["Wo"] + p["bo"]
        return logits

    def _through(self, key: str, grad: Array, saved: Any, grads: dict[str, Array]) -> Array:
        if saved is None:
            return grad
        own = fastbn.backward(grad, saved)
        grads[key + ".weight"] += own.weight
        grads[key + ".bias"] += own.bias
        return own.input

    def backward(self, dlogits: Array) -> dict[str, Array]:
        """Gradients of all parameters, through time."""
        p, grads = self.params, {k: np.zeros_like(v) for k, v in self.params.items()}
        grads["Wo"], grads["bo"] = self.h.T @ dlogits, dlogits.sum(0)
        dh, dc = dlogits @ p["Wo"].T, np.zeros_like(self.h)
        dzx = np.zeros((*self.x.shape[:2], 4 * HIDDEN))
        for t in range(len(self.tape) - 1, -1, -1):
            on, h, c, i, f, o, g, out, saved_h, saved_c = self.tape[t]
            live = dh * on
            dnormed = live * o * (1 - out * out)
            dnew = dc * on + self._through("c", dnormed, saved_c, grads)
            dz = np.concatenate(
                [dnew * g * i * (1 - i), dnew * c * f * (1 - f), live * out * o * (1 - o), dnew * i * (1 - g * g)],
                axis=1,
            )
            dzx[:, t] = dz
            grads["b"] += dz.sum(0)
            dzh = self._through("h", dz, saved_h, grads)
            grads["Wh"] += h.T @ dzh
            dh, dc = np.where(on, 0.0, dh) + dzh @ p["Wh"].T, np.where(on, 0.0, dc) + dnew * f
        if self.norms:
            own = self.norms["x"].backward(dzx)
            grads["x.weight"], grads["x.bias"], dzx = own.weight, own.bias, own.input
        grads["Wx"] = np.einsum("nti,ntj->ij", self.x, dzx)
        return grads


def loss_and_gradient(logits: Array, labels: Array) -> tuple[float, Array]:
    """Cross-entropy and its gradient."""
    z = logits - logits.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    d = np.exp(log_p)
    d[rows, labels] -= 1.0
    return float(-log_p[rows, labels].mean()), d / len(labels)


def fit(net: Lstm, rng: np.random.Generator, updates: int, rate: float = 0.01, batch: int = 64) -> list[float]:
    """Train with Adam; return the losses."""
    first, second = ({k: np.zeros_like(v) for k, v in net.params.items()} for _ in range(2))
    losses = []
    net.train(True)
    for step in range(1, updates + 1):
        x, lengths, labels = sample(rng, batch, STEPS)
        loss, d = loss_and_gradient(net.forward(x, lengths), labels)
        losses.append(loss)
        for key, grad in net.backward(d).items():
            first[key] += 0.1 * (grad - first[key])
            second[key] += 0.001 * (grad * grad - second[key])
            scale = rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            net.params[key] -= scale * first[key] / (np.sqrt(second[key]) + 1e-8)
    return losses


def recalibrate(net: Lstm, rng: np.random.Generator, batches: int = 10, batch: int = 500) -> None:
    """Re-estimate the running statistics for the weights as they are now, by a cumulative average.

    The averages that training kept lag behind its weights: without this, statistics per step cost 20 points here.
    """
    net.train(True)
    for norm in net.norms.values():
        norm.momentum, norm.num_batches_tracked = None, 0 * norm.num_batches_tracked
    for _ in range(batches):
        net.forward(*sample(rng, batch, STEPS)[:2])


def accuracy(net: Lstm, rng: np.random.Generator, steps: int, count: int = 1000) -> float:
    """Share of sequences named rightly, by the running statistics."""
    net.train(False)
    x, lengths, labels = sample(rng, count, steps)
    return float((net.forward(x, lengths).argmax(1) == labels).mean())


def main(argv: list[str] | None = None) -> dict[str, tuple[float, float, float]]:
    """Train the three networks; print and return (last loss, accuracy, accuracy on longer sequences) of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--updates", type=int, default=300)
    updates = parser.parse_args(argv).updates
    results = {}
    print(f"{'statistics':<10}  {'loss':>6}  {'accuracy':>8}  {'at twice the length':>19}")
    for kind in ("plain", "sequence", "step"):
        net = Lstm(kind, np.random.default_rng(0))
        losses = fit(net, np.random.default_rng(1), updates)
        recalibrate(net, np.random.default_rng(3))
        found = [accuracy(net, np.random.default_rng(2), steps) for steps in (STEPS, 2 * STEPS)]
        results[kind] = (float(np.mean(losses[-10:])), found[0], found[1])
        print(f"{kind:<10}  {results[kind][0]:6.3f}  {found[0]:8.3f}  {found[1]:19.3f}")
    return results


if __name__ == "__main__":
    main()
