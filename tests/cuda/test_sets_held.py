"""Sets in registers: every number of vectors a thread, warps and blocks, more samples than teams and fewer."""

from __future__ import annotations

import numpy as np
import pytest

from fastbn.cuda import choice, plan_sets, sets_held, sets_staged, tuning
from fastbn.cuda.plan_sets import Sizes
from tests import test_family as family
from tests.cuda import device
from tests.cuda.device import through_gpu
from tests.tolerances import BF16


@pytest.fixture
def launched(monkeypatch):
    """Small teams; what is launched: (forward or backward, W, threads, team, vectors a thread)."""
    through_gpu(monkeypatch)
    monkeypatch.setattr(tuning, "HELD_WARP", 4)
    monkeypatch.setattr(tuning, "SLAB_CHANNELS", 0)
    choice.forget()
    seen = []
    for module, name in ((sets_held, "train"), (sets_staged, "backward")):
        kernel = getattr(module, name)

        def see(what, name=name, kernel=kernel):
            seen.append((name, what.W, what.threads, what.team, what.held))
            return kernel(what)

        monkeypatch.setattr(module, name, see)
    return seen


CASES = [
    ((5, 16), "f4", (4, 64, 32, 1), (4, 64, 32, 1)),
    ((1, 24), "f4", (4, 64, 32, 2), (4, 64, 32, 2)),
    ((9, 44), "f4", (4, 64, 32, 3), (4, 64, 64, 1)),  # 11 vectors: three and a bit, and fewer than threads
    ((2, 60), "f4", (4, 64, 32, 4), (4, 64, 64, 1)),
    ((3, 1000), "f4", (4, 64, 64, 4), (4, 128, 128, 2)),  # 250 vectors
    ((11, 72), "f2", (8, 64, 32, 3), (8, 64, 64, 1)),
    ((2, 1400), BF16, (8, 64, 64, 3), (8, 192, 192, 1)),  # 175 vectors
    ((2, 2560), BF16, (8, 160, 160, 2), (8, 160, 160, 2)),  # 320 vectors
    ((3, 264), "f8", (2, 160, 160, 1), (2, 160, 160, 1)),  # 132 vectors
]


@pytest.mark.parametrize(("shape", "dtype", "forward", "backward"), CASES, ids=str)
def test_every_team(rng, launched, shape, dtype, forward, backward):
    family.test_forward_and_backward(rng, "layer", shape, np.dtype(dtype))
    assert set(launched) == {("train", *forward), ("backward", *backward)}


def test_four_vectors_a_thread_in_backward(rng, launched, monkeypatch):
    monkeypatch.setattr(plan_sets, "team_of", lambda vectors, W, backward: (64, 64, 4))
    family.test_forward_and_backward(rng, "layer", (5, 900), np.dtype(np.float32))
    assert ("backward", 4, 64, 64, 4) in launched


@pytest.mark.parametrize("samples", [1, 3, 8, 9, 50])
def test_teams_walk_down_the_samples(rng, launched, samples):
    """Two teams a block on four multiprocessors; the gradient may go where grad is."""
    kind, x, weight, bias = family.make(rng, "layer", (samples, 16), np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)
    want = kind.want_gradients(g, x, weight)
    _, saved = kind(x, weight, bias)
    grads = device.backward(g, saved, out=g)
    assert grads.input is g and launched[-1] == ("backward", 4, 64, 32, 1)
    for got, expected in zip(grads[:3], want, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_one_parameter_alone(rng, launched):
    kind, x, weight, _ = family.make(rng, "layer", (6, 16), np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)
    grads = device.backward(g, kind(x, weight, None)[1])
    np.testing.assert_allclose(grads.weight, kind.want_gradients(g, x, weight)[1], atol=2e-5)
    assert grads.bias is None and launched[-1][0] == "backward"
    launched.clear()
    device.backward(g, kind(x, None, weight)[1])  # no weight: other kernels
    assert [name for name, *_ in launched] == ["train"]


def test_what_is_not_finite_stays_in_its_sample_and_column(rng, launched):
    kind, x, weight, bias = family.make(rng, "layer", (4, 44), np.float32)
    g = rng.standard_normal(x.shape).astype(np.float32)
    g[2, 41] = np.inf
    grads = device.backward(g, kind(x, weight, bias)[1])
    assert np.isfinite(np.delete(grads.input, 2, 0)).all() and not np.isfinite(grads.input[2]).any()
    assert np.isfinite(np.delete(grads.bias, 41)).all() and not np.isfinite(grads.bias[41])


def test_plans_of_real_sizes(monkeypatch):
    for name, value in {"THREADS": 256, "SLAB_CHANNELS": 96, "SMALL": 4 << 20}.items():
        monkeypatch.setattr(tuning, name, value)
    choice.forget()
    find = plan_sets.sets
    limits = (227 << 10, 132)
    p = find(Sizes(32768, 1, 768, 1), "f32", True, True, 2, *limits)
    assert (p.threads, p.team, p.held, p.blocks) == (96, 96, 2, 132 * 8)
    p = find(Sizes(65536, 1, 256, 1), "bf16", True, True, 2, *limits)
    assert (p.threads, p.team, p.held, p.blocks) == (256, 32, 1, 132 * 3)
    p = find(Sizes(16384, 1, 8192, 1), "f32", True, True, 2, *limits)
    assert (p.threads, p.held, p.blocks) == (512, 4, 132)
    assert p.shared == 3 * 64 << 10 and not find(Sizes(16384, 1, 8192, 1), "f32", True, True, 2, 163 << 10, 108).held
    assert find(Sizes(16384, 1, 8192, 1), "f32", True, True, 1, *limits).held == 4
    for n, kind in ((16384, "bf16"), (12288, "f64"), (20000, "f32")):  # too large for the registers
        p = find(Sizes(16384, 1, n, 1), kind, True, True, 2, *limits)
        assert not p.held and (p.kept or not p.team)
    assert not find(Sizes(16384, 1, 766, 1), "f32", True, True, 2, *limits).held  # no whole vectors
    few = find(Sizes(64, 1, 1024, 1), "f32", True, True, 2, *limits)
    assert few.blocks == 64  # as long as multiprocessors idle, a sample a block
    for W in (2, 4, 8):
        for vectors in range(1, 5000, 7):
            for backward in (False, True):
                threads, team, held = plan_sets.team_of(vectors, W, backward)
                assert team * held >= vectors or not threads
                assert threads <= (512 if backward else 1024)
