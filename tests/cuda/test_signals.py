"""Numbers that blocks say to each other: late, and in memory where an earlier launch has said some."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastbn.cuda import _simulated, arrays, bundle_sums, choice, gang_backward, gang_sums, meeting, settle, tuning
from fastbn.cuda.driver import device_properties
from tests.cuda.device import through_gpu
from tests.oracle import case, check_backward, check_train

SHAPES = {  # several blocks and turns, but for the second bundle; more columns than blocks, and fewer
    "gang": [(4, 11, 256), (2, 5, 1024)],
    "bundle": [(33, 24, 3, 3), (9, 24, 3, 3)],
    "persistent": [(337, 16), (131, 8)],
}
ALL = [(kernel, shape) for kernel, shapes in SHAPES.items() for shape in shapes]


@pytest.fixture
def check(monkeypatch, rng):
    """Return a function that trains and takes gradients by one kernel, and compares with float64."""
    through_gpu(monkeypatch)

    def run(kernel, shape, dtype=np.float32):
        for name, used in (("GANG", "gang"), ("BUNDLE", "bundle"), ("PERSISTENT", "persistent")):
            monkeypatch.setattr(tuning, name, kernel == used)
        choice.forget()
        dims, kind = (*shape[:2], int(np.prod(shape[2:]))), "f64" if dtype == np.float64 else "f32"
        one = choice.one_launch(kind, dims, True, False, False, False, False, device_properties())
        assert one.name == kernel and one.scratch
        if kernel == "gang":
            blocks, gangs = one.cut[3:5]
            assert blocks > 1 and shape[1] > 2 * gangs
        elif kernel == "bundle":
            channels, blocks, gangs = one.cut[3], *one.cut[6:8]
            assert (blocks > 1 and shape[1] > 2 * channels * gangs) == (shape == SHAPES[kernel][0])
        else:
            assert one.cut[2] > 1
        for activation, residual in ((None, False), ("relu", True)):
            c = case(rng, shape, dtype, activation=activation, residual=residual)
            _, saved = check_train(c)
            check_backward(c, saved, rng.standard_normal(shape).astype(dtype))
        x = np.ones(shape, dtype)
        x[:, 3] = 1e30  # sums that are no good: done again
        check_train(case(rng, shape, dtype)._replace(x=x))

    return run


@pytest.mark.parametrize(("kernel", "shape"), ALL, ids=str)
def test_blocks_that_are_late(kernel, shape, monkeypatch, check):
    """A block that is a turn ahead speaks for itself alone, and leaves others' numbers where they are."""
    chance = random.Random(1)
    for module in (gang_sums, bundle_sums, meeting, settle):

        def say(array, index, *numbers, genuine=module.say):
            if chance.random() < 0.1:
                for _ in range(50):  # turns of all the others
                    _simulated.pause()
            genuine(array, index, *numbers)

        monkeypatch.setattr(module, "say", say)
    for _ in range(2):
        check(kernel, shape)


def test_one_warp_waits_for_a_large_gang(monkeypatch, check):
    """In backward every warp waits for the sums of a small gang."""
    monkeypatch.setattr(tuning, "GANG_FEW", 0)
    gang_backward.backward.cache_clear()
    try:
        check("gang", (2, 5, 1024))
    finally:
        gang_backward.backward.cache_clear()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize("kernel", SHAPES)
def test_memory_where_others_have_spoken(kernel, turn, dtype, monkeypatch, check):
    genuine, made = arrays.DeviceArray.vector, []

    def stale(self, size):
        flat = genuine(self, size)
        words = flat.array_owner.host.view(np.int32)
        words[0::2], words[1::2] = -1, turn + 1  # NaN, with the tag that is waited for
        made.append(size)
        return flat

    monkeypatch.setattr(arrays.DeviceArray, "scratch", stale)
    check(kernel, SHAPES[kernel][0], dtype)
    assert made
