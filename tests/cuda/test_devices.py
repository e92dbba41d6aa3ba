"""Machines with several GPUs: kernels, limits and choices are those of the current one."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest

from fastbn.cuda import choice, driver, persistent, stored, tuning
from fastbn.errors import DeviceError


class Machine:
    """Numba's view of GPUs; ``current`` is changed by the tests, every other thing follows."""

    def __init__(self, *gpus):
        self.gpus, self.current, self.compiled, self.opted = gpus, 0, [], []

    def get_current_device(self):
        capability, multiprocessors, shared = self.gpus[self.current]
        return SimpleNamespace(
            id=self.current, compute_capability=capability, MULTIPROCESSOR_COUNT=multiprocessors,
            MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=shared,
        )  # fmt: skip

    def is_available(self):
        return True

    def jit(self, **options):
        """Compile for the GPU that is current."""

        def compiled(function):
            target, room = self.gpus[self.current][0], 1 << 20
            overload = SimpleNamespace(target=target, max_cooperative_grid_blocks=lambda *args: room)
            self.compiled.append(target)
            return SimpleNamespace(overloads={"only": overload}, compile=lambda signature: None)

        return compiled


@pytest.fixture
def machine(monkeypatch):
    made = Machine(((9, 0), 132, 232448), ((8, 0), 108, 166912), ((9, 0), 132, 232448), ((7, 5), 40, 65536))
    caches = driver._properties, driver._capability, driver._new_enough, driver._present, driver.device_count

    def clear():
        for cached in caches:
            cached.cache_clear()
        choice.forget()

    monkeypatch.setattr(driver, "cuda", made)
    monkeypatch.setattr(driver, "SIMULATED", False)
    monkeypatch.setattr(choice, "SIMULATED", False)
    nothing = functools.cache(lambda what: driver.Kernel(lambda: None, "T", "f32", what.threads, 1))
    monkeypatch.setattr(persistent, "train", nothing)  # the true ones are kept for the tests behind
    monkeypatch.setattr(driver.Kernel, "allow_shared", lambda self, size: made.opted.append((made.current, size)))
    monkeypatch.setattr(stored, "use", lambda dispatcher, what, capability: made.compiled.append(("kept", capability)))
    clear()
    yield made
    monkeypatch.undo()
    clear()


def test_a_kernel_is_compiled_for_each_capability_once(machine):
    what = driver.Kernel(lambda: None, "T", "f32", 64, 1)
    found = []
    for number in (0, 1, 2, 0, 1):
        machine.current = number
        (overload,) = what.compiled.overloads.values()
        assert overload.target == machine.gpus[number][0]
        found.append(what.compiled)
    assert found[0] is found[2] is found[3] and found[1] is found[4] is not found[0]
    assert machine.compiled == [(9, 0), ("kept", (9, 0)), (8, 0), ("kept", (8, 0))]


def test_limits_and_choices_are_the_current_ones(machine, monkeypatch):
    monkeypatch.setattr(tuning, "PERSISTENT", True)
    monkeypatch.setattr(tuning, "PERSISTENT_THREADS", 512)
    choice.forget()
    blocks = []
    for number in (0, 1, 2):
        machine.current = number
        limits = driver.device_properties()
        one = choice.one_launch("f32", (8192, 1024, 1), True, False, False, False, False, limits)
        assert limits == (*machine.gpus[number][1:], machine.gpus[number][0])
        assert one.shared <= limits.shared and one.grid[0] * one.grid[1] <= limits.multiprocessors
        blocks.append(one.grid)
    assert blocks[0] == blocks[2] != blocks[1]
    assert {number for number, _ in machine.opted} == {0, 1}  # the third is as the first


def test_what_one_gpu_refuses_another_may_do(machine, monkeypatch):
    monkeypatch.setattr(tuning, "PERSISTENT", True)

    def find():
        return choice.one_launch("f32", (8192, 64, 1), True, False, False, False, False, driver.device_properties())

    one = find()
    monkeypatch.setattr(choice, "_refused", {(one.kernel, 0)})
    choice.forget()
    assert find() is None
    machine.current = 1
    assert find() is not None


def test_an_old_gpu_beside_new_ones_is_refused_by_itself(machine):
    driver.check()
    machine.current = 3
    with pytest.raises(DeviceError, match=r"GPU 3 has \(7, 5\)"):
        driver.check()
    machine.current = 1
    driver.check()
