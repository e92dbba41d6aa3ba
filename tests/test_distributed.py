"""A batch that ranks share (``distributed``): the numbers of the whole batch, the same bits on every rank, no hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import distributed
from tests.oracle import same_bits
from tests.tolerances import BF16


class Ranks:
    """Ranks as threads of this process."""

    def __init__(self, count):
        self.count, self.places = count, [None] * count
        self.barrier = threading.Barrier(count, timeout=60)

    def run(self, work):
        """Call ``work(rank, comm)`` on every rank; return its results, or the exceptions it raised."""
        results = [None] * self.count

        def one(rank):
            try:
                results[rank] = work(rank, Rank(self, rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Rank:
    def __init__(self, all_of_them, rank):
        self.all, self.rank = all_of_them, rank

    def allgather(self, sendobj):
        self.all.places[self.rank] = sendobj
        self.all.barrier.wait()
        found = list(self.all.places)
        self.all.barrier.wait()
        return found


CASES = [
    ((11, 5, 9), 1, (4, 0, 7), {}),
    ((12, 3, 4, 6), 1, (6, 6), {"activation": "relu"}),
    ((40, 7), 1, (1, 30, 9), {"residual": True, "activation": "relu"}),
    ((10, 6, 33), 1, (10,), {"residual": True}),
    ((9, 8, 5), 2, (2, 3, 4), {"mask": True}),
    ((9, 5, 8), 1, (5, 4), {"mask": True, "residual": True, "activation": "relu"}),
    ((9, 5, 8), 1, (5, 0, 4), {"lengths": True}),
]


def draw(rng, shape, axis, options):
    """Return the arguments for the whole batch and a gradient."""
    C, x = shape[axis], rng.standard_normal(shape).astype(np.float32)
    given = {k: v for k, v in options.items() if k == "activation"}
    if "residual" in options:
        given["residual"] = rng.standard_normal(shape).astype(np.float32)
    if "mask" in options:
        given["mask"] = rng.random(tuple(s for a, s in enumerate(shape) if a != axis)) < 0.6
    if "lengths" in options:
        given["lengths"] = rng.integers(1, shape[2] + 1, shape[0])
    weight, bias = rng.uniform(-2, 2, (2, C)).astype(np.float32)
    return x, weight, bias, given, rng.standard_normal(shape).astype(np.float32)


def cut(given, part):
    return {k: v if isinstance(v, str) else v[part] for k, v in given.items()}


@pytest.mark.parametrize(("shape", "axis", "parts", "options"), CASES, ids=str)
def test_as_the_whole_batch(rng, shape, axis, parts, options):
    x, weight, bias, given, g = draw(rng, shape, axis, options)
    C, ends = shape[axis], np.cumsum((0, *parts))
    mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
    y, saved = fastbn.batch_norm_train(x, weight, bias, mean, var, axis=axis, **given)
    want = fastbn.backward(g, saved)

    def work(rank, comm):
        part, rm, rv = slice(ends[rank], ends[rank + 1]), np.zeros(C, np.float32), np.ones(C, np.float32)
        y, saved = distributed.batch_norm_train(x[part], weight, bias, rm, rv, axis=axis, comm=comm, **cut(given, part))
        return y, saved, fastbn.backward(g[part], saved), rm, rv

    results = Ranks(len(parts)).run(work)
    assert not [r for r in results if isinstance(r, Exception)]
    np.testing.assert_allclose(np.concatenate([r[0] for r in results]), y, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(np.concatenate([r[2].input for r in results]), want.input, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sum(r[2].weight for r in results), want.weight, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(sum(r[2].bias for r in results), want.bias, rtol=1e-4, atol=2e-5)
    if "residual" in given:
        np.testing.assert_array_equal(np.concatenate([r[2].residual for r in results]), want.residual)
    for r in results:
        np.testing.assert_allclose(r[3], mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(r[4], var, rtol=1e-6)
        assert same_bits(r[1].stats, results[0][1].stats)
        assert same_bits(r[3], results[0][3]) and same_bits(r[4], results[0][4])
        assert r[1].count == r[1].moments.count == saved.count


@pytest.mark.parametrize("dtype", [np.float64, np.float16, BF16], ids=lambda d: np.dtype(d).name)
def test_other_dtypes(rng, dtype):
    x, g = (rng.standard_normal((8, 3, 40)).astype(dtype) for _ in range(2))
    y, saved = fastbn.batch_norm_train(x)
    want = fastbn.backward(g, saved).input

    def work(rank, comm):
        y, saved = distributed.batch_norm_train(x[rank::2], comm=comm)
        return y, fastbn.backward(g[rank::2], saved).input

    close = {np.float64: 1e-12, np.float16: 4e-3, BF16: 4e-2}[dtype]
    for rank, (mine, dx) in enumerate(Ranks(2).run(work)):
        assert mine.dtype == dx.dtype == x.dtype
        for found, expected in ((mine, y), (dx, want)):
            np.testing.assert_allclose(
                found.astype(np.float64), expected[rank::2].astype(np.float64), rtol=close, atol=close
            )


def test_mean_far_from_zero(rng):
    """The merged mean is not rounded to float32 on its way."""
    x = (1e4 + rng.standard_normal((64, 4, 50))).astype(np.float32)
    y = fastbn.batch_norm_train(x)[0]
    found = Ranks(4).run(lambda rank, comm: distributed.batch_norm_train(x[rank::4], comm=comm)[0])
    for rank, mine in enumerate(found):
        np.testing.assert_allclose(mine, y[rank::4], atol=1e-6)


def test_out_and_memory_order(rng):
    x = np.asfortranarray(rng.standard_normal((6, 3, 5)).astype(np.float32))
    want, saved = fastbn.batch_norm_train(x)
    g = rng.standard_normal(x.shape).astype(np.float32)
    expected = fastbn.backward(g, saved).input
    out, to = np.empty_like(x), np.empty_like(x)

    def work(rank, comm):
        y, saved = distributed.batch_norm_train(x, comm=comm, out=out)
        return y, fastbn.backward(g, saved, out=to).input

    ((y, dx),) = Ranks(1).run(work)
    assert y is out and dx is to
    np.testing.assert_allclose(y, want, atol=1e-6)
    np.testing.assert_allclose(dx, expected, atol=1e-6)


def test_nothing_anywhere():
    x, mean, var = np.empty((0, 3, 4), np.float32), np.full(3, 2.0, np.float32), np.ones(3, np.float32)

    def work(rank, comm):
        y, saved = distributed.batch_norm_train(x, None, None, mean, var, comm=comm)
        return y.shape, saved.updated, fastbn.backward(x, saved).input.shape

    assert Ranks(2).run(work) == [((0, 3, 4), 0, (0, 3, 4))] * 2
    assert (mean == 2.0).all()


def test_one_value_in_all_ranks():
    parts = [np.zeros((0, 3), np.float32), np.ones((1, 3), np.float32)]
    found = Ranks(2).run(lambda rank, comm: distributed.batch_norm_train(parts[rank], comm=comm))
    assert all(isinstance(e, ValueError) and "more than 1 value per channel" in str(e) for e in found)


def test_a_rank_that_fails_leaves_nobody_waiting(rng):
    x, mean = rng.standard_normal((4, 3)).astype(np.float32), np.zeros(3, np.float32)

    def forward(rank, comm):
        return distributed.batch_norm_train(
            x if rank else x.astype(np.int64), None, None, mean, np.ones(3, np.float32), comm=comm
        )

    first, second = Ranks(2).run(forward)
    assert isinstance(first, TypeError) and "x: expected an array of float32" in str(first)
    assert isinstance(second, fastbn.FastbnError) and "rank 0 could not do its part: ArgumentType" in str(second)
    assert not mean.any()

    def backward(rank, comm):
        saved = distributed.batch_norm_train(x, comm=comm)[1]
        return fastbn.backward(x if rank else x[:1], saved)

    first, second = Ranks(2).run(backward)
    assert isinstance(first, ValueError) and isinstance(second, fastbn.FastbnError)


def test_other_numbers_of_channels(rng):
    found = Ranks(2).run(lambda rank, comm: distributed.batch_norm_train(np.ones((4, 3 + rank), np.float32), comm=comm))
    assert [str(e) for e in found] == ["x: expected as many channels on every rank, got [3, 4]"] * 2
    empty = [fastbn.Moments(0, np.zeros(2 + rank), np.zeros(2 + rank)) for rank in range(2)]
    found = Ranks(2).run(lambda rank, comm: distributed.merge(empty[rank], comm))
    assert all(isinstance(e, ValueError) and str(e).startswith("moments: expected as many channels") for e in found)


def test_bad_communicator():
    with pytest.raises(TypeError, match="comm: expected a communicator with allgather, such as mpi4py's, got int"):
        distributed.batch_norm_train(np.ones((4, 3), np.float32), comm=3)


def test_merge(rng):
    x = rng.standard_normal((30, 4))
    parts = [x[:3], x[3:3], x[3:]]
    whole = fastbn.Moments.of(x)
    found = Ranks(3).run(lambda rank, comm: distributed.merge(fastbn.Moments.of(parts[rank]), comm))
    for m in found:
        assert m.count == 30
        np.testing.assert_allclose(m.mean, whole.mean, atol=1e-15)
        np.testing.assert_allclose(m.m2, whole.m2, rtol=1e-13)
    assert all(isinstance(e, TypeError) for e in Ranks(1).run(lambda rank, comm: distributed.merge(3, comm)))


def test_imported_only_when_asked_for():
    code = "import fastbn, sys; assert 'fastbn.distributed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("scale", [1.0, 1e19, 1e25, 1e30])
@pytest.mark.parametrize("mask", [None, np.arange(64) % 5 > 0])
def test_gradients_of_large_data(rng, scale, mask):
    x, g = rng.standard_normal((2, 64, 4)).astype(np.float32)
    x = (x * scale).astype(np.float32)
    w = np.ones(4, np.float32)
    want = fastbn.backward(g, fastbn.batch_norm_train(x, w, mask=mask)[1])
    got = Ranks(1).run(
        lambda rank, comm: fastbn.backward(g, distributed.batch_norm_train(x, w, mask=mask, comm=comm)[1])
    )
    np.testing.assert_allclose(got[0].input * scale, want.input * scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[0].weight, want.weight, rtol=1e-5)
