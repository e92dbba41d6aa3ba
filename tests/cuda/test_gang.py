"""Gangs whose blocks are a turn ahead of each other, and what a plan shares out."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastbn.cuda import _simulated, choice, gang_sums, plan_gang, tuning
from fastbn.cuda.driver import device_properties
from tests.cuda.device import through_gpu
from tests.oracle import case, check_backward, check_train


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    through_gpu(monkeypatch)
    monkeypatch.setattr(tuning, "GANG", True)


@pytest.mark.parametrize("shape", [(4, 11, 256), (2, 5, 1024)], ids=str)
def test_blocks_that_come_late(shape, monkeypatch, rng):
    """A block that is a turn ahead counts for itself alone, and leaves others' sums where they are."""
    genuine, chance = gang_sums.say, random.Random(1)

    def say(array, index, *numbers):
        if chance.random() < 0.1:
            for _ in range(50):  # turns of all the others
                _simulated.pause()
        genuine(array, index, *numbers)

    monkeypatch.setattr(gang_sums, "say", say)
    choice.forget()
    dims = shape[0], shape[1], shape[2]
    one = choice.one_launch("f32", dims, True, False, False, False, False, device_properties())
    gang, blocks = one.cut[4], one.cut[3]
    assert one.name == "gang" and blocks > 1 and shape[1] > 2 * gang
    for _ in range(2):
        c = case(rng, shape, np.float32)
        _, saved = check_train(c)
        check_backward(c, saved, rng.standard_normal(shape).astype(np.float32))
    x = np.ones(shape, np.float32)
    x[:, 3] = 1e30  # sums that are no good: done again behind the loop
    check_train(case(rng, shape, np.float32)._replace(x=x))


@pytest.mark.parametrize("tensors", [1, 2])
def test_shares_fit_on_the_gpu(tensors, monkeypatch):
    for name, value in {"GANG_THREADS": 256, "GANG_LAYERS": (2, 3), "SMALL": 4 << 20}.items():
        monkeypatch.setattr(tuning, name, value)
    for N, C, S in ((64, 64, 112 * 112), (64, 256, 56 * 56), (256, 512, 28 * 28), (64, 1024, 196), (3, 1, 1 << 20)):
        for kind, itemsize in (("f32", 4), ("bf16", 2), ("f64", 8)):
            p = plan_gang.gang.__wrapped__((N, C, S), kind, True, tensors, 132, 232448)
            if not p.blocks:
                continue
            assert p.blocks * p.gangs <= 132 * p.layers and (p.shared + 2048) * p.layers <= 228 * 1024
            assert (p.blocks - 1) * p.chunk < N * S * itemsize // 16 <= p.blocks * p.chunk
            assert p.shared == p.chunk * 16 * tensors
