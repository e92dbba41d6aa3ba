"""Large results come from memory that outlived earlier ones, and never from memory that someone still sees."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import fastbn
from fastbn import recycled

F32 = np.dtype(np.float32)
SHAPE = (8, 64, 64, 64)  # 8 MB


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(recycled, "_pool", recycled.Pool())
    recycled._returned.clear()
    monkeypatch.delenv("FASTBN_KEEP_BYTES", raising=False)


def address(a):
    return a.__array_interface__["data"][0]


def test_a_dead_result_gives_its_memory_to_the_next():
    a = recycled.empty(SHAPE, F32)
    assert a.shape == SHAPE and a.dtype == F32 and a.flags.carray and address(a) % 4096 == 2048
    where = address(a)
    del a
    assert address(recycled.empty(SHAPE, F32)) == where


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[1:, ::2],
        lambda a: a.T,
        lambda a: a.view(np.int32).reshape(-1)[5:6],
        lambda a: memoryview(a),
        lambda a: np.asarray(memoryview(a)),
        lambda a: np.frombuffer(a, np.uint8)[3:],
    ],
)
def test_not_while_a_view_lives(view):
    a = recycled.empty(SHAPE, F32)
    where, seen = address(a), view(a)
    del a
    gc.collect()
    other = recycled.empty(SHAPE, F32)
    assert address(other) != where
    del seen, other
    gc.collect()
    assert where in {address(recycled.empty(SHAPE, F32)), *(address(b.memory) + b.at for b in recycled._pool.free)}


def test_sizes_that_do_not_fit_are_not_used():
    a = recycled.empty(SHAPE, F32)
    del a
    others = [recycled.empty((int(SHAPE[0] * factor), *SHAPE[1:]), F32) for factor in (2, 0.5)]
    assert len(others) == 2 and len(recycled._pool.free) == 1
    assert recycled.empty((7, *SHAPE[1:]), F32).nbytes == 7 << 20  # within a quarter
    assert len(recycled._pool.free) == 0


def test_small_ones_and_none_kept(monkeypatch):
    assert recycled.empty((10, 10), F32).base is None
    monkeypatch.setenv("FASTBN_KEEP_BYTES", "0")
    assert recycled.empty(SHAPE, F32).base is None


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setenv("FASTBN_KEEP_BYTES", str(20 << 20))
    arrays = [recycled.empty(SHAPE, F32) for _ in range(5)]
    del arrays
    recycled.empty(SHAPE, F32)
    assert recycled._pool.total == sum(b.memory.size for b in recycled._pool.free) <= 20 << 20
    assert recycled.empty((32, *SHAPE[1:]), F32).base is None  # larger than all that may be kept


def test_small_blocks_are_few(monkeypatch):
    monkeypatch.setattr(recycled, "MOST", 5)
    arrays = [recycled.empty((1 << 16,), F32) for _ in range(9)]
    assert all(address(a) % 4096 == 2048 for a in arrays)
    del arrays
    recycled.empty((1 << 16,), F32)
    recycled._pool.collect()
    assert len(recycled._pool.free) == 5
    assert not [block for _, block in recycled._lent.values() if block.room == 1 << 18]


def test_short_calls_too(rng):
    """Results that the short way makes: two that die together would go back to the system each time."""
    x = rng.standard_normal((64, 2000), dtype=np.float32)
    for _ in range(4):
        y, saved = fastbn.batch_norm_train(x)
        dx = fastbn.backward(x, saved).input
        assert {address(a) % 4096 for a in (y, dx)} == {2048}


def test_results_of_calls(rng):
    x = rng.standard_normal(SHAPE).astype(np.float32)
    first, _ = fastbn.batch_norm_train(x)
    kept, where = first.copy(), address(first)
    second, saved = fastbn.batch_norm_train(2 * x)
    np.testing.assert_array_equal(first, kept)
    del first
    third, _ = fastbn.batch_norm_train(x)
    assert address(third) == where
    np.testing.assert_array_equal(third, kept)
    assert fastbn.backward(x, saved).input.shape == second.shape


def test_threads_never_share_a_block():
    def work(number):
        for _ in range(30):
            a = recycled.empty((1 << 20,), F32)
            a[::4096] = number
            assert (a[::4096] == number).all()
            del a

    failed = []

    def guarded(number):
        try:
            work(number)
        except AssertionError as e:
            failed.append(e)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_not_locked_out():
    code = (
        "import os, numpy as np\nfrom fastbn import recycled\n"
        "recycled._lock.acquire()\npid = os.fork()\n"
        "if pid == 0:\n    recycled.empty((1 << 22,), np.dtype(np.float32))\n    os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
