"""The simulator must catch what it is for; and the arithmetic of ``simd`` must be what its names say."""

from __future__ import annotations

import numpy as np
import pytest

from fastbn.cuda import _simulated, driver, simd
from fastbn.cuda.arrays import Flat

cuda = driver.cuda
access = simd.access


def flat(array, kind):
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copied = memory[start : start + array.nbytes].view(array.dtype)
    copied[:] = array
    return Flat(copied.ctypes.data, copied.size, kind, copied)


def launch(function, letters, *args, threads=64, grid=(1, 1), shared=0):
    driver.run(driver.Kernel(function, letters, "f32", threads, 1), grid, 0, args, shared)


def test_shared_memory_begins_as_nan():
    out = flat(np.zeros(64, np.float32), "f32")

    def kernel(out):
        shared = cuda.shared.array(64, driver.types.float32)
        out[cuda.threadIdx.x] = shared[cuda.threadIdx.x]

    launch(kernel, "T", out)
    assert np.isnan(out.array).all()


def test_a_barrier_that_not_all_reach_is_an_error():
    def kernel(out):
        step = 16
        if cuda.threadIdx.x == 3:
            while step > 0:
                step >>= 1
            cuda.syncthreads()
        cuda.cg.this_grid().sync()

    with pytest.raises(AssertionError, match="deadlock"):
        launch(kernel, "T", flat(np.zeros(4, np.float32), "f32"))


def test_waiting_for_what_nobody_writes_is_an_error():
    def kernel(place):
        if cuda.blockIdx.x == 0:
            while not _simulated.hear(place, 0, 1)[0]:
                pass

    with pytest.raises(AssertionError, match="deadlock"):
        launch(kernel, "A", flat(np.zeros(4, np.float32), "f32"), grid=(2, 1))


def test_a_missing_barrier_shows():
    """Whichever thread it is that reads too early."""

    def kernel(out, step):
        shared = cuda.shared.array(64, driver.types.float32)
        shared[cuda.threadIdx.x] = np.float32(1)
        out[cuda.threadIdx.x] = shared[(cuda.threadIdx.x + step) % 64]

    for step in (1, 63):
        out = flat(np.zeros(64, np.float32), "f32")
        launch(kernel, "Ti", out, step)
        assert np.isnan(out.array).any()


def test_blocks_meet_at_the_grid_barrier():
    out = flat(np.zeros(4, np.float32), "f32")

    def kernel(out):
        block = cuda.blockIdx.x
        if cuda.threadIdx.x == 0:
            out[block] = np.float32(block + 1)
        cuda.cg.this_grid().sync()
        total = out[0] + out[1] + out[2] + out[3]
        cuda.cg.this_grid().sync()
        if cuda.threadIdx.x == 0:
            out[block] = total

    launch(kernel, "T", out, threads=32, grid=(4, 1))
    assert (out.array == 10).all()


@pytest.mark.parametrize("index", [-1, 61, 64])
def test_accesses_outside_are_errors(index):
    load = access("f32", 4).load

    def kernel(x):
        load(x, index)

    with pytest.raises(AssertionError, match="IndexError"):
        launch(kernel, "T", flat(np.zeros(64, np.float32), "f32"))


def test_unaligned_vectors_are_errors():
    load = access("f32", 4).load

    def kernel(x):
        load(x, 1)

    with pytest.raises(AssertionError, match="aligned"):
        launch(kernel, "T", flat(np.zeros(64, np.float32), "f32"))


def test_shuffles_exchange_within_a_warp():
    out = flat(np.arange(64, dtype=np.float32), "f32")

    def kernel(out):
        i = cuda.threadIdx.x
        out[i] = cuda.shfl_xor_sync(0xFFFFFFFF, out[i], 5)

    launch(kernel, "T", out)
    assert np.array_equal(out.array, np.arange(64) ^ 5)


def test_half_types_decode_and_encode_every_value():
    for kind, code in (("f16", np.uint16), ("bf16", np.int16)):
        io = access(kind, 8)
        for start in range(0, 1 << 16, 4096):
            raw = np.arange(start, start + 8).astype(np.uint16).view(code)
            back = io.encode(io.decode(raw))
            same = back.view(np.uint16) == raw.view(np.uint16)
            assert (same | np.isnan(io.decode(raw))).all()


def test_gate_passes_nan():
    z = np.array([-1, 0, 1, np.nan], np.float32)
    assert np.array_equal(simd.gate(z, z), np.array([0, 0, 1, np.nan], np.float32), equal_nan=True)
