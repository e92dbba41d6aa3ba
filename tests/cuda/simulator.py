"""Makes Numba's CUDA simulator good enough for our kernels; import it before any kernel module.

Numba's runs one block at a time and lacks warp shuffles, ``alignment=`` and a grid barrier between blocks (it gives
silently wrong results). Here:

- all blocks of a small grid run at once, every CUDA thread a Python thread, so that barriers between blocks are real;
- ``__shared__`` memory is one per block and begins as NaN: what is read before it is written shows;
- a barrier that not all threads reach ends in an error, not in a hang;
- accesses through ``simd`` are checked for bounds and alignment (``fastbn.cuda._simulated``).

With it a missing ``syncthreads``, a wrong index and a dropped lane guard are caught. It proves neither the absence of
races nor anything about memory order or speed.
"""

from __future__ import annotations

import sys
import threading
import traceback
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba.cuda.simulator import kernel, kernelapi

from fastbn.cuda import _simulated, driver

PATIENCE = 20.0  # seconds at a barrier after which it counts as a deadlock
CONCURRENT = 2048  # threads of a grid that runs all at once; larger grids run block by block


class Aborted(RuntimeError):
    """Another thread failed."""


class Barrier:
    """A barrier whose membership shrinks when a thread returns."""

    def __init__(self, members: int):
        self.members, self.arrived, self.round, self.dead = members, 0, 0, False
        self.changed = threading.Condition()

    def _release(self) -> None:
        self.arrived = 0
        self.round += 1
        self.changed.notify_all()

    def wait(self) -> None:
        with self.changed:
            if self.dead:
                raise Aborted
            now = self.round
            self.arrived += 1
            if self.arrived >= self.members:
                self._release()
                return
            while now == self.round and not self.dead:
                if not self.changed.wait(PATIENCE):
                    self.dead = True
                    self.changed.notify_all()
                    raise RuntimeError("deadlock at a barrier: not all threads reach it")
            if self.dead:
                raise Aborted

    def leave(self) -> None:
        with self.changed:
            self.members -= 1
            if 0 < self.members <= self.arrived:
                self._release()

    def kill(self) -> None:
        with self.changed:
            self.dead = True
            self.changed.notify_all()


class Warp:
    def __init__(self, lanes: int):
        self.barrier, self.slots = Barrier(lanes), [None] * 32

    def exchange(self, lane: int, value: Any) -> list[Any]:
        self.slots[lane] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


class Block:
    def __init__(self, index: tuple[int, ...], threads: int, shared_bytes: int):
        self.index, self.threads, self.barrier = kernelapi.Dim3(*index), threads, Barrier(threads)
        self.warps = [Warp(min(32, threads - first)) for first in range(0, threads, 32)]
        self.lock, self.votes = threading.Lock(), list[bool]()
        self.arrays: dict[Any, Any] = {}
        memory = np.full(shared_bytes + 16, 0xFF, np.uint8)
        start = -memory.ctypes.data % 16
        self.dynamic = memory[start : start + shared_bytes]

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> Any:
        dtype = np.dtype(dtype.name)
        if shape == 0:
            return self.dynamic.view(dtype)
        caller = sys._getframe(1)
        with self.lock:
            key = (caller.f_code, caller.f_lineno)
            if key not in self.arrays:
                count = int(np.prod(shape))
                memory = np.full(count * dtype.itemsize + 16, 0xFF, np.uint8)
                start = -memory.ctypes.data % 16
                self.arrays[key] = memory[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
            return self.arrays[key]


class Grid:
    def __init__(self, shape: Any, blocks: list[Block], threads: int, whole: bool):
        self.shape, self.blocks, self.whole = kernelapi.Dim3(*shape), blocks, whole
        self.barrier = Barrier(len(blocks) * threads)

    def kill(self) -> None:
        self.barrier.kill()
        for block in self.blocks:
            block.barrier.kill()
            for warp in block.warps:
                warp.barrier.kill()

    def sync(self) -> None:
        if not self.whole:
            raise RuntimeError("a grid barrier in a grid too large for the simulator")
        self.barrier.wait()


class Thread(threading.Thread):
    """One CUDA thread (blocks are one-dimensional here)."""

    def __init__(self, function: Any, args: Any, grid: Grid, block: Block, number: int):
        super().__init__(daemon=True)
        self.function, self.args = function, args
        self.grid, self.block, self.number, self.error = grid, block, number, ""
        self.lane, self.warp = number % 32, block.warps[number // 32]

    def run(self) -> None:
        try:
            with np.errstate(all="ignore"):
                self.function(*self.args)
        except Aborted:
            pass
        except BaseException:
            self.error = traceback.format_exc()
            self.grid.kill()
        finally:
            for barrier in (self.block.barrier, self.warp.barrier, self.grid.barrier):
                barrier.leave()


def current() -> Thread:
    thread = threading.current_thread()
    assert isinstance(thread, Thread), "this part of numba.cuda exists in kernels only"
    return thread


def alive() -> None:
    if current().grid.barrier.dead:
        raise Aborted


class Cuda:
    """``numba.cuda`` as kernels see it: each thread finds its own indices, barriers and shared memory."""

    cg = SimpleNamespace(this_grid=lambda: current().grid)

    @property
    def threadIdx(self) -> Any:
        return kernelapi.Dim3(current().number, 0, 0)

    @property
    def blockIdx(self) -> Any:
        return current().block.index

    @property
    def gridDim(self) -> Any:
        return current().grid.shape

    @property
    def blockDim(self) -> Any:
        return kernelapi.Dim3(current().block.threads, 1, 1)

    @property
    def shared(self) -> Any:
        return current().block

    def syncthreads(self) -> None:
        current().block.barrier.wait()

    def syncthreads_or(self, value: Any) -> bool:
        block = current().block
        with block.lock:
            block.votes.append(bool(value))
        block.barrier.wait()
        found = any(block.votes[-block.barrier.members :])
        block.barrier.wait()
        return found

    def shfl_xor_sync(self, mask: int, value: Any, step: int) -> Any:
        thread = current()
        return thread.warp.exchange(thread.lane, value)[thread.lane ^ step]

    def __getattr__(self, name: str) -> Any:
        return getattr(numba_cuda, name)


class Blocks:
    """Takes the place of the simulator's ``BlockManager``: ``run`` is called once a block."""

    def __init__(self, function: Any, grid: Any, block: Any, debug: bool):
        self.function, self.grid, self.threads = function, grid, int(np.prod(block))
        context = kernel._get_kernel_context()
        self.shared_bytes = int(context.shared._dynshared_size)

    def run(self, point: Any, *args: Any) -> None:
        whole = int(np.prod(self.grid)) * self.threads <= CONCURRENT
        if whole and any(point):
            return  # everything ran with the first block
        points = list(np.ndindex(*self.grid)) if whole else [point]
        blocks = [Block(p, self.threads, self.shared_bytes) for p in points]
        grid = Grid(self.grid, blocks, self.threads, whole)
        threads = [Thread(self.function, args, grid, b, i) for b in blocks for i in range(self.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = next((t for t in threads if t.error), None)
        if failed is not None:
            raise AssertionError(f"block {list(failed.block.index)}, thread {failed.number}: {failed.error}")


assert driver.SIMULATED, "set NUMBA_ENABLE_CUDASIM=1"
numba_cuda: Any = driver.cuda
driver.cuda = Cuda()
kernel.BlockManager = Blocks
_simulated.alive = alive
