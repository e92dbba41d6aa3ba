"""The cuts: whole, disjoint, within a GPU's limits, and the same whatever the GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbn import device_mask
from fastbn.cuda import choice, driver, plan, plan_bundle, plan_gang, tuning
from fastbn.cuda.arrays import ITEMSIZE
from fastbn.errors import ArgumentValueError

TRUE_SLAB = tuning.SLAB  # before the fixtures change it
TRUE_GANG = {n: getattr(tuning, n) for n in dir(tuning) if n.startswith(("GANG_", "BUNDLE"))}
SIZE = st.one_of(st.integers(1, 70), st.integers(1, 3000))


@pytest.fixture(autouse=True)
def true_numbers(small, monkeypatch):
    for name, value in {"THREADS": 256, "BLOCKS": 1056, "DEPTH": 16, "APPLY_DEPTH": 8, "SLAB_CHANNELS": 96}.items():
        monkeypatch.setattr(tuning, name, value)
    for name, value in TRUE_GANG.items():
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(tuning, "PERSISTENT", True)
    monkeypatch.setattr(tuning, "PERSISTENT_THREADS", 512)
    choice.forget()


@given(N=SIZE, C=SIZE, S=SIZE, kind=st.sampled_from(sorted(ITEMSIZE)), aligned=st.booleans())
def test_split_cuts_cover_everything_once(N, C, S, kind, aligned):
    p = plan.plan.__wrapped__((N, C, S), kind, aligned)
    length = p.R if p.rows else p.R * (p.V // p.W)
    for parts, chunk in ((p.parts, p.chunk), (p.apply_parts, p.apply_chunk)):
        assert 1 <= parts <= 65535 and (parts - 1) * chunk < length <= parts * chunk
    assert p.R * p.V * (1 if p.rows else C) == N * C * S
    assert p.V % p.W == 0 and (aligned or p.W == 1)
    assert 256 % p.group == 0 and p.depth * p.columns * C == p.parts * (p.V if p.rows else C)
    if p.rows:
        assert 1 <= p.tx <= plan.TILE and (p.across - 1) * p.tx * p.W < p.V <= p.across * p.tx * p.W


@given(N=st.integers(1, 10**6), C=SIZE, kind=st.sampled_from(sorted(ITEMSIZE)), tensors=st.sampled_from([1, 2]))
def test_one_launch_cuts_fit_on_the_gpu(N, C, kind, tensors):
    blocks, limit = 132, 232448
    p = plan.persistent.__wrapped__((N, C, 1), kind, True, tensors, blocks, limit)
    if not p.threads:
        return
    lanes, size, height = 16 // ITEMSIZE[kind], 8 if kind == "f64" else 4, p.threads // p.tx
    layer = p.parts * height  # rows of a turn; in the first one each block has some
    assert p.across * p.parts <= blocks and (p.parts - 1) * height < N
    assert p.turns * layer <= N < (p.turns + 1) * layer and p.kept <= -(-N // layer)
    assert 0 <= p.depth <= tuning.PERSISTENT_POOL // tensors and (p.depth == 0 or p.kept * layer < N)
    assert p.shared + 2 * p.threads * lanes * size + 7 * plan.TILE * lanes * size <= limit
    assert p.tx * p.across * lanes >= C


@given(
    N=SIZE, C=SIZE, S=st.integers(2, 300), kind=st.sampled_from(sorted(ITEMSIZE)), tensors=st.sampled_from([1, 2]),
    limit=st.sampled_from([101376, 166912, 232448]),
)  # fmt: skip
def test_bundles_are_whole_vectors_and_fit_on_the_gpu(N, C, S, kind, tensors, limit):
    p = plan_bundle.bundle.__wrapped__((N, C, S), kind, True, tensors, 132, limit)
    if not p.channels:
        return
    assert C % p.channels == 0 and p.channels * S * ITEMSIZE[kind] == 16 * p.vectors <= 16 * p.threads
    assert p.blocks * p.gangs <= 132 * p.layers and (p.blocks - 1) * p.chunk < N <= p.blocks * p.chunk
    assert 16 // ITEMSIZE[kind] <= S + 1  # values of two channels at most in a vector
    height = p.threads // p.vectors
    assert p.shared == -(-p.chunk // height) * p.threads * 16 * tensors
    assert (p.shared + plan_bundle.own(kind) + 1024) * p.layers <= limit + 1024
    assert -(-C // p.channels // p.gangs) * p.channels <= plan_bundle.OWN


def test_bundles_of_well_known_shapes():
    def channels(C, S, kind):
        return plan_bundle.channels(C, S, ITEMSIZE[kind])

    assert channels(2048, 49, "f32") == 4 and channels(2048, 49, "bf16") == 8 and channels(1024, 196, "f16") == 2
    assert channels(2049, 49, "f32") == 0 and channels(512, 9, "f32") == 8 and channels(512, 3, "bf16") == 0
    p = plan_bundle.bundle((64, 2048, 49), "f32", True, 1, 132, 232448)
    assert p.vectors == 49 and p.gangs * p.blocks > 250
    assert not plan_bundle.bundle((64, 2048, 49), "f32", False, 1, 132, 232448).channels


def test_slabs_leave_room_and_need_channels_enough():
    assert plan.slab((64, 256, 56 * 56), "f32", True, 1, 232448) == (0, 0)  # 803 KB a channel
    assert plan.slab((64, 512, 28 * 28), "f32", True, 1, 232448)[1] == 64 * 28 * 28 * 4
    assert plan.slab((64, 512, 28 * 28), "f32", False, 1, 232448) == (0, 0)
    assert plan.slab((64, 512, 28 * 28), "f32", True, 2, 232448) == (0, 0)
    assert plan.slab((64, 48, 14 * 14), "f16", True, 1, 232448) == (0, 0) or tuning.SMALL


def test_small_slabs_share_a_multiprocessor(monkeypatch):
    monkeypatch.setattr(tuning, "SLAB", TRUE_SLAB)
    choice.forget()
    half, whole, limit = (64, 512, 28 * 28), (64, 512, 28 * 56), 232448
    assert plan.slab(half, "bf16", True, 1, limit) == (512, 64 * 28 * 28 * 2)  # 98 KB: two of them fit
    assert plan.slab(half, "f32", True, 1, limit)[0] == plan.slab(whole, "bf16", True, 1, limit)[0] == 1024
    assert plan.slab((4, 96, 28 * 28), "f32", True, 1, limit)[0] == 256  # little work
    for shared in (1, 50000, 98000, 110000, 112000, 200000):
        threads = plan._slab_threads(1 << 20, shared, limit)
        assert threads == (512 if 2 * (shared + 1024 + 1536) <= 228 * 1024 else 1024)


def test_shapes_beyond_32_bits_are_refused():
    with pytest.raises(ArgumentValueError, match="2\\*\\*31"):
        plan.plan((1 << 16, 2, 1 << 15), "f32", True)
    for dims in ((1 << 31, 8, 1), (1, 1 << 31, 1), (4, 1, 1 << 29)):  # in one launch too, whose numbers are 32 bits
        with pytest.raises(ArgumentValueError, match="2\\*\\*31"):
            choice.one_launch("f16", dims, True, False, False, False, False, driver.Limits(132, 232448))


def test_masks_beyond_32_bits_are_refused():
    x = SimpleNamespace(size=1 << 34, kind="f16", shape=(1 << 31, 8), ndim=2)
    where = SimpleNamespace(dims=(1 << 31, 8, 1), order=(0, 1))
    with pytest.raises(ArgumentValueError, match="2\\*\\*31"):
        device_mask.find(object(), None, x, 1, where, train=True)


@pytest.mark.parametrize("tensors", [1, 2])
def test_shares_of_gangs_fit_on_the_gpu(tensors, monkeypatch):
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
