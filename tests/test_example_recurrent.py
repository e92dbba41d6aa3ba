"""The recurrent example: its gradients are right, and it learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).resolve().parent.parent / "examples" / "recurrent_bn.py"
    spec = importlib.util.spec_from_file_location("recurrent_bn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["plain", "sequence", "step"])
def test_gradients_through_time_are_finite_differences(rng, example, kind):
    net = example.Lstm(kind, rng)
    x, _, labels = example.sample(rng, 6, 5)
    lengths = np.array([5, 3, 4, 5, 3, 4])
    _, d = example.loss_and_gradient(net.forward(x, lengths), labels)
    grads = net.backward(d)
    assert set(grads) == set(net.params)
    for key, array in net.params.items():
        for at in rng.choice(array.size, 2, replace=False):
            old, values = array.flat[at], []
            for h in (1e-5, -1e-5):
                array.flat[at] = old + h
                values.append(example.loss_and_gradient(net.forward(x, lengths), labels)[0])
            array.flat[at] = old
            assert grads[key].flat[at] == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-6), key


def test_it_learns(example, capsys):
    results = example.main(["--updates", "60"])
    assert set(results) == {"plain", "sequence", "step"}
    for _, accuracy, longer in (results["sequence"], results["step"]):
        assert accuracy > 0.6 and longer > 0.6  # chance is 0.25
    assert "twice the length" in capsys.readouterr().out
