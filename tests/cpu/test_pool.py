"""Threads: the same bits for any number of them, from many Python threads at once, and in a forked child."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbn
from fastbn.cpu import plans, pool
from tests.oracle import case, same_bits
from tests.tolerances import BF16

# Large enough to be parallel, one for each kernel; odd, so that blocks are uneven.
LARGE = {"planes": (8, 67, 1031), "rows": (263, 2003), "swept": (8209, 67), "swept, short runs": (20011, 9, 3)}


def everything(shape, dtype=np.float32, activation="relu"):
    """Return every array that the public functions compute from one case."""
    c = case(np.random.default_rng(5), shape, dtype, activation=activation, residual=True)
    rm, rv = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
    y, saved = fastbn.batch_norm_train(c.x, c.weight, c.bias, rm, rv, **c.options())
    grads = fastbn.backward(c.residual, saved)
    z = fastbn.batch_norm_infer(c.x, rm, rv, c.weight, c.bias, **c.options())
    moments = fastbn.Moments.of(c.x)
    return [y, z, rm, rv, saved.mean, saved.invstd, saved.variance, *grads, moments.mean, moments.m2]


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_the_same_bits_for_any_number_of_threads(shape, dtype, threads):
    assert plans.plan((shape[0], shape[1], int(np.prod(shape[2:])))).parallel
    threads(1)
    want = everything(shape, dtype)
    for n in (2, 3, 7):
        threads(n)
        for _ in range(3):
            assert all(same_bits(a, b) for a, b in zip(everything(shape, dtype), want, strict=True))


def shifted(x, offset):
    """Return a copy that begins ``offset`` bytes after a cache line."""
    memory = np.empty(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


@pytest.mark.parametrize("shape", [(4, 9, 323), (560, 40), *LARGE.values()], ids=str)
def test_the_same_bits_wherever_the_arrays_lie(shape):
    """NumPy promises 16 bytes of alignment: without this, two calls in a row could differ."""
    c = case(np.random.default_rng(5), shape, np.float32, activation="relu", residual=True)

    def results(*offsets):
        x, residual, y, grad, dx = (
            shifted(a, o) for a, o in zip((c.x, c.residual, c.x, c.x, c.x), offsets, strict=True)
        )
        _, saved = fastbn.batch_norm_train(x, c.weight, c.bias, activation="relu", residual=residual, out=y)
        grads = fastbn.backward(grad, saved, out=dx)
        return [y, saved.mean, saved.variance, *grads]

    want = results(0, 0, 0, 0, 0)
    for offsets in ((4, 0, 0, 0, 0), (0, 8, 60, 0, 4), (16, 16, 16, 16, 16), (36, 4, 20, 52, 44)):
        assert all(same_bits(a, b) for a, b in zip(results(*offsets), want, strict=True)), offsets


BITS = """
import hashlib
from tests.cpu.test_pool import LARGE, everything
for shape in LARGE.values():
    print(hashlib.sha256(b"".join(a.tobytes() for a in everything(shape))).hexdigest())
"""


def test_the_same_bits_for_any_numba_num_threads(python):
    runs = [python(BITS, NUMBA_NUM_THREADS=n, PYTHONPATH=os.pathsep.join(sys.path)).stdout for n in (1, 2, 5)]
    assert runs[0] == runs[1] == runs[2] and len(runs[0].split()) == len(LARGE)


def test_many_python_threads_at_once(threads):
    threads(2)
    shapes = list(LARGE.values()) * 2
    want = [everything(shape) for shape in shapes]
    start = threading.Barrier(len(shapes))

    def work(shape):
        start.wait()
        return [everything(shape) for _ in range(3)]

    with ThreadPoolExecutor(len(shapes)) as executor:
        for results, expected in zip(executor.map(work, shapes), want, strict=True):
            for arrays in results:
                assert all(same_bits(a, b) for a, b in zip(arrays, expected, strict=True))


# A child forked after a parallel call computes in parallel itself, and gives the same bits. In a process of its own: a
# fork that fails must not take the tests with it. Python warns about fork beside threads: that is the point here.
FORK = """
import multiprocessing, os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import fastbn
from fastbn.cpu import pool
from tests.cpu.test_pool import LARGE, everything
from tests.oracle import same_bits

def same(a, b):
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))

fastbn.set_num_threads(2)
if sys.argv[1:] == []:
    {numba_first}
shapes = list(LARGE.values())
want = [everything(shape) for shape in shapes]
assert pool._helpers == 1

def child():
    assert pool._helpers == 0
    ok = all(same(everything(shape), arrays) for shape, arrays in zip(shapes, want))
    return ok and pool._helpers == 1  # parallel again

for _ in range(2):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if child() else 3)
    assert os.waitpid(pid, 0)[1] == 0
def run(queue):
    queue.put(child())
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=run, args=(queue,))
process.start()
assert queue.get(timeout=60)
process.join()
assert process.exitcode == 0
assert same(everything(shapes[0]), want[0])  # and the parent goes on
print("done")
"""
# What a user's own parallel code does before: it starts Numba's threading layer in the parent.
NUMBA_FIRST = """
    import numba, numpy as np
    @numba.njit(parallel=True)
    def own(x):
        for i in numba.prange(x.size):
            x[i] += 1
    own(np.zeros(1000))
    assert numba.threading_layer() == os.environ["NUMBA_THREADING_LAYER"]
"""


def available(layer):
    try:
        importlib.import_module(f"numba.np.ufunc.{layer}pool" if layer != "workqueue" else "numba.np.ufunc.workqueue")
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("layer", ["omp", "workqueue", "tbb"])
def test_a_forked_child_computes_in_parallel(layer, python):
    if not available(layer):
        pytest.skip(f"Numba's {layer} threading layer is not installed")
    code = FORK.format(numba_first=NUMBA_FIRST.strip())
    result = python(code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS=2, PYTHONPATH=os.pathsep.join(sys.path))
    assert result.stdout.split()[-1] == "done"


def test_many_threads_beside_numbas_workqueue(python):
    """Two Python threads in a parallel kernel of Numba's abort the process on this layer; ours do not."""
    code = """
from concurrent.futures import ThreadPoolExecutor
import fastbn
from tests.cpu.test_pool import everything
fastbn.set_num_threads(2)
with ThreadPoolExecutor(6) as executor:
    list(executor.map(lambda _: everything((8, 67, 1031)), range(12)))
print("done")
"""
    result = python(code, NUMBA_THREADING_LAYER="workqueue", PYTHONPATH=os.pathsep.join(sys.path))
    assert result.stdout.strip() == "done"


def test_helpers_do_not_keep_a_process_alive(python):
    code = "import fastbn, numpy; fastbn.set_num_threads(4); fastbn.batch_norm_train(numpy.ones((8, 64, 2048), 'f4'))"
    python(code, timeout=60)


# -- the pool itself ---------------------------------------------------------------------------------------------


def count(claim_by, done):
    """Make a stand-in for a kernel: a Python function that claims units one by one."""
    lock = threading.Lock()

    def kernel(record, claim):
        while True:
            with lock:
                number = int(claim[0])
                claim[0] += 1
            if number >= claim_by:
                return
            record.append((number, threading.current_thread().name))
            with lock:
                claim[1] += 1
            done()

    return kernel


def test_every_unit_is_done_once(threads):
    threads(3)
    for units in (0, 1, 2, 50):
        record = []
        pool.run(count(units, lambda: None), (record,), units=units, parallel=True)
        assert sorted(n for n, _ in record) == list(range(units))


def test_helpers_take_part_and_serial_work_stays_here(threads):
    threads(2)
    record, met = [], threading.Barrier(2, timeout=20)
    pool.run(count(2, met.wait), (record,), units=2, parallel=True)
    assert len({name for _, name in record}) == 2, "two threads met inside of one call"
    record = []
    pool.run(count(5, lambda: None), (record,), units=5, parallel=False)
    assert {name for _, name in record} == {threading.current_thread().name}


def test_without_new_threads_the_caller_works_alone(threads, python, monkeypatch):
    """As under a limit on processes, or in Python's last moments."""
    threads(4)
    c = case(np.random.default_rng(5), LARGE["planes"], np.float32)
    want = fastbn.batch_norm_train(c.x)[0]

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(pool, "_helpers", 0)
    monkeypatch.setattr(pool, "_jobs", pool.SimpleQueue())
    assert same_bits(fastbn.batch_norm_train(c.x)[0], want)
    assert pool._jobs.empty(), "nobody would ever take it"
    python(
        "import atexit, numpy as np, fastbn\n"
        "x = np.ones((8, 64, 4096), np.float32)\n"
        "atexit.register(lambda: fastbn.batch_norm_train(x))",
        FASTBN_NUM_THREADS=2,
    )


def test_no_more_helpers_than_blocks(threads, monkeypatch):
    """A million threads are more than a machine has room for, and none of them would find work."""
    threads(1 << 20)
    asked = []
    monkeypatch.setattr(pool, "_start", lambda n: asked.append(n) or 0)
    pool.run(count(5, lambda: None), ([],), units=5, parallel=True)
    assert asked == [4]


def test_a_second_caller_runs_alone(threads):
    threads(2)
    record = []
    assert pool._busy.acquire(timeout=10)
    try:
        pool.run(count(5, lambda: None), (record,), units=5, parallel=True)
    finally:
        pool._busy.release()
    assert {name for _, name in record} == {threading.current_thread().name}


def test_a_failing_kernel_fails_here_and_the_pool_goes_on(threads):
    threads(2)

    def kernel(claim):
        raise MemoryError("no scratch")

    for _ in range(3):
        with pytest.raises(MemoryError, match="no scratch"):
            pool.run(kernel, (), units=4, parallel=True)
    assert not pool._busy.locked()
    record, met = [], threading.Barrier(2, timeout=20)
    pool.run(count(2, met.wait), (record,), units=2, parallel=True)
    assert len({name for _, name in record}) == 2, "the helper still works"


def test_an_interrupted_call_waits_for_its_helpers(threads):
    """Ctrl-C while a helper still writes: the caller's arrays are its own again only when the helper is done."""
    threads(2)
    begun, go_on, finished = threading.Event(), threading.Event(), []

    def kernel(claim):
        if threading.current_thread() is threading.main_thread():
            begun.wait(20)
            threading.Timer(0.1, go_on.set).start()
            raise KeyboardInterrupt
        claim[0] += 1
        begun.set()
        go_on.wait(20)
        finished.append(True)
        claim[1] += 1

    with pytest.raises(KeyboardInterrupt):
        pool.run(kernel, (), units=2, parallel=True)
    assert finished == [True] and not pool._busy.locked()


def test_arrays_are_not_kept_after_a_call(threads):
    import gc
    import time
    import weakref

    threads(2)
    x = np.ones((8, 64, 2048), np.float32)
    gone = weakref.ref(x)
    fastbn.batch_norm_infer(x, np.zeros(64, np.float32), np.ones(64, np.float32))
    del x
    for _ in range(100):
        gc.collect()
        if gone() is None:
            return
        time.sleep(0.02)
    raise AssertionError("a helper still holds the input")
