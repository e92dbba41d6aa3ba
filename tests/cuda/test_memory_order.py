"""Arrays on a GPU in any memory order, and outputs in any other."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from tests.cuda.device import GpuArray, Pretended, get, put, through_gpu


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(Pretended, "put", lambda self, values, like: GpuArray.of(values), raising=False)
    through_gpu(monkeypatch)


def test_any_memory_order(rng):
    x = rng.standard_normal((6, 4, 5)).astype(np.float32)
    want, saved = fastbn.batch_norm_train(x, ghost=2)
    dx = fastbn.backward(x, saved).input
    last = np.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)
    for mine in (put(np.asfortranarray(x)), put(last), GpuArray(GpuArray.of(np.repeat(x, 2, axis=0)).host[::2])):
        for out in (None, put(np.empty_like(x)), put(np.asfortranarray(x))):
            got, own = fastbn.batch_norm_train(mine, ghost=2, out=out)
            assert out is None or got is out
            np.testing.assert_allclose(get(got), want, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(get(fastbn.backward(mine, own).input), dx, rtol=1e-4, atol=5e-6)


def test_gradients_go_to_any_memory_order(rng):
    x = rng.standard_normal((6, 4, 5)).astype(np.float32)
    want = fastbn.backward(x, fastbn.batch_norm_train(x)[1]).input
    for mine in (put(x), put(np.asfortranarray(x))):
        _, saved = fastbn.batch_norm_train(mine)
        for out in (put(np.empty_like(x)), put(np.asfortranarray(x))):
            assert fastbn.backward(put(x), saved, out=out).input is out
            np.testing.assert_allclose(get(out), want, rtol=1e-4, atol=5e-6)
