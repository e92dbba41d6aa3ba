"""Makes Numba's CUDA simulator good enough for our kernels; import it before any kernel module.

Numba's runs one block at a time and lacks warp shuffles, ``alignment=`` and a grid barrier between blocks (it gives
silently wrong results). Here:

- all blocks of a small grid run at once, so that barriers between blocks are real. A CUDA thread is a greenlet: it runs
  until it waits for others, and who is next is drawn, the same way every time that a test runs. Python's threads took
  5 times as long, and began and went on in the order of their numbers, which hides a missing barrier;
- ``__shared__`` memory is one per block and begins as NaN: what is read before it is written shows;
- a barrier that not all threads reach ends in an error, not in a hang;
- accesses through ``simd`` are checked for bounds and alignment (``fastbn.cuda._simulated``).

With it a missing ``syncthreads``, a wrong index and a dropped lane guard are caught. It proves neither the absence of
races nor anything about memory order or speed.
"""

from __future__ import annotations

import contextvars
import os
import random
import sys
import traceback
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda.simulator import kernel, kernelapi

from fastbn.cuda import _simulated, driver

PATIENCE = 10_000  # turns in which threads only look for what others are to write, before it counts as a deadlock
LATE = 0.2  # of all turns begin with a block or a warp falling asleep
CONCURRENT = 2048  # threads of a grid that runs all at once; larger grids run block by block


class Aborted(RuntimeError):
    """Another thread failed."""


_launches: Counter[str] = Counter()


def _chance() -> random.Random:
    """Draw differently in each launch, and the same way each time that a test runs."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    _launches[test] += 1
    return random.Random(f"{test} {_launches[test]}")


class Turns:
    """Lets the threads of a grid run one after the other, in an order that is drawn; blocks and warps come late."""

    def __init__(self) -> None:
        self.ready: list[Thread] = []
        self.main, self.chance = getcurrent(), _chance()
        self.error, self.looking = "", 0
        self.late: dict[Block | Warp, int] = {}

    def wait(self) -> None:
        """Let others run; whoever makes the thread ready again lets it go on."""
        self.main.switch()
        if self.error:
            raise Aborted

    def pause(self) -> None:
        """Let others run, and go on."""
        self.ready.append(current())
        self.looking += 1
        self.wait()

    def _delay(self, who: Block | Warp) -> None:
        self.late[who] = 1 << self.chance.randrange(8)

    def _turn(self) -> list[Thread]:
        """Take those who run now, in their order."""
        self.late = {who: turns - 1 for who, turns in self.late.items() if turns > 1}
        if self.chance.random() < LATE:
            thread = self.chance.choice(self.ready)
            self._delay(self.chance.choice((thread.block, thread.warp)))
        turn: list[Thread] = []
        others: list[Thread] = []
        for thread in self.ready:
            (others if thread.block in self.late or thread.warp in self.late else turn).append(thread)
        turn, self.ready = (turn, others) if turn else (others, turn)
        self.chance.shuffle(turn)
        return turn

    def run(self, threads: list[Thread]) -> None:
        """Run all threads to their end."""
        self.ready, idle = list(threads), 0
        for block in threads[0].grid.blocks:
            if self.chance.random() < 0.5:
                self._delay(block)
        while self.ready:
            turn = self._turn()
            self.looking = 0
            for thread in turn:
                thread.switch()
            idle = idle + 1 if self.looking == len(turn) else 0
            if self.ready and idle <= PATIENCE and not self.error:
                continue
            self.ready = [thread for thread in threads if not thread.dead]
            if self.ready and not self.error:
                self.error = "deadlock: not all reach a barrier, or nobody writes what is waited for"
                self.ready[0].error = self.error


class Barrier:
    """A barrier whose membership shrinks when a thread returns."""

    def __init__(self, members: int, turns: Turns):
        self.members, self.turns = members, turns
        self.waiting: list[Thread] = []

    def _release(self) -> None:
        self.turns.ready += self.waiting
        self.waiting = []

    def wait(self) -> None:
        self.waiting.append(current())
        if len(self.waiting) >= self.members:
            self._release()
        self.turns.wait()

    def leave(self) -> None:
        self.members -= 1
        if 0 < self.members <= len(self.waiting):
            self._release()


class Warp:
    def __init__(self, lanes: int, turns: Turns):
        self.barrier, self.slots = Barrier(lanes, turns), [None] * 32

    def exchange(self, lane: int, value: Any) -> list[Any]:
        self.slots[lane] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values


def aligned(size: int) -> Any:
    """Bytes of shared memory, NaN as numbers."""
    memory = np.full(size + 16, 0xFF, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + size]


class Block:
    def __init__(self, index: tuple[int, ...], threads: int, shared_bytes: int, turns: Turns):
        self.index, self.threads, self.barrier = kernelapi.Dim3(*index), threads, Barrier(threads, turns)
        self.warps = [Warp(min(32, threads - first), turns) for first in range(0, threads, 32)]
        self.votes: list[bool] = []
        self.arrays: dict[Any, Any] = {}
        self.dynamic = aligned(shared_bytes)

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> Any:
        dtype = np.dtype(dtype.name)
        if shape == 0:
            return self.dynamic.view(dtype)
        caller = sys._getframe(1)
        key = (caller.f_code, caller.f_lineno)
        if key not in self.arrays:
            self.arrays[key] = aligned(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        return self.arrays[key]


class Grid:
    def __init__(self, shape: Any, blocks: list[Block], threads: int, whole: bool, turns: Turns):
        self.shape, self.blocks, self.whole, self.turns = kernelapi.Dim3(*shape), blocks, whole, turns
        self.barrier = Barrier(len(blocks) * threads, turns)

    def sync(self) -> None:
        if not self.whole:
            raise RuntimeError("a grid barrier in a grid too large for the simulator")
        self.barrier.wait()


class Thread(greenlet):
    """One CUDA thread (blocks are one-dimensional here)."""

    def __init__(self, function: Any, args: Any, grid: Grid, block: Block, number: int):
        super().__init__()
        self.gr_context = contextvars.copy_context()  # NumPy's errstate
        self.function, self.args = function, args
        self.grid, self.block, self.number, self.error = grid, block, number, ""
        self.lane, self.warp = number % 32, block.warps[number // 32]
        self.groups: list[list[tuple[Any, ...]]] = [[]]

    def run(self) -> None:
        try:
            self.function(*self.args)
        except Aborted:
            pass
        except BaseException:
            self.error = self.grid.turns.error = traceback.format_exc()
        finally:
            for barrier in (self.block.barrier, self.warp.barrier, self.grid.barrier):
                barrier.leave()


def current() -> Thread:
    thread = getcurrent()
    assert isinstance(thread, Thread), "this part of numba.cuda exists in kernels only"
    return thread


class Copies:
    """Copies that a CUDA thread has begun."""

    @property
    def groups(self) -> list[list[tuple[Any, ...]]]:
        return current().groups


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
        block.votes.append(bool(value))
        block.barrier.wait()
        found = any(block.votes[-block.barrier.members :])
        block.barrier.wait()
        return found

    def shfl_xor_sync(self, mask: int, value: Any, step: int) -> Any:
        thread = current()
        return thread.warp.exchange(thread.lane, value)[thread.lane ^ step]

    def shfl_sync(self, mask: int, value: Any, lane: int) -> Any:
        thread = current()
        return thread.warp.exchange(thread.lane, value)[lane]

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
        turns = Turns()
        blocks = [Block(p, self.threads, self.shared_bytes, turns) for p in points]
        grid = Grid(self.grid, blocks, self.threads, whole, turns)
        with np.errstate(all="ignore"):
            threads = [Thread(self.function, args, grid, b, i) for b in blocks for i in range(self.threads)]
            turns.run(threads)
        failed = next((t for t in threads if t.error), None)
        if failed is not None:
            raise AssertionError(f"block {list(failed.block.index)}, thread {failed.number}: {failed.error}")


assert driver.SIMULATED, "set NUMBA_ENABLE_CUDASIM=1"
numba_cuda: Any = driver.cuda
driver.cuda = Cuda()
kernel.BlockManager = Blocks
_simulated.pause = lambda: current().grid.turns.pause()
_simulated._copies = Copies()
