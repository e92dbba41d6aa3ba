"""Launches by the driver itself: the arguments as the driver would read them, its errors, and Numba's way instead."""

from __future__ import annotations

import ctypes
import importlib
import sys
from types import SimpleNamespace

import pytest

from fastbn.cuda import driver, launcher, tuning
from fastbn.errors import DeviceError

READ = {"i": ctypes.c_int32, "l": ctypes.c_int64, "T": ctypes.c_uint64, "A": ctypes.c_uint64}


class Driver:
    """What the CUDA bindings look like; keeps what each launch would have read."""

    def __init__(self, codes=()):
        self.launched, self.codes = [], list(codes)
        self.CUfunction, self.CUstream = (lambda value: ("function", value)), (lambda value: ("stream", value))

    def _launch(self, *args):
        pointers = (ctypes.c_void_p * len(LETTERS)).from_address(args[9])
        numbers = [READ.get(c, ctypes.c_float).from_address(p).value for c, p in zip(LETTERS, pointers, strict=True)]
        self.launched.append((args[:9], numbers, args[10:]))
        return (self.codes.pop(0) if self.codes else 0,)

    cuLaunchKernel = cuLaunchCooperativeKernel = _launch


LETTERS = "TiAalai"
NUMBERS = [0x7F0000000010, -5, 3, 0.5, 1 << 40, -1.25, 7]


@pytest.fixture
def kernel(monkeypatch):
    def make(cooperative=False, codes=()):
        pretended = Driver(codes)
        genuine = importlib.import_module
        monkeypatch.setattr(
            importlib, "import_module", lambda name: pretended if name == "cuda.bindings.driver" else genuine(name)
        )
        monkeypatch.setattr(driver, "SIMULATED", False)
        monkeypatch.setattr(driver, "_capability", lambda number: (0, 0))
        launcher._stream.cache_clear()
        code = SimpleNamespace(get_cufunc=lambda: SimpleNamespace(handle=99))
        overload = SimpleNamespace(_codelibrary=code, cooperative=cooperative)
        what = driver.Kernel(lambda: None, LETTERS, "f32", 64, 1)
        what._compiled[0, 0] = SimpleNamespace(overloads={"only": overload})
        return what, pretended

    yield make
    launcher._stream.cache_clear()


@pytest.mark.parametrize("cooperative", [False, True])
def test_the_driver_reads_what_was_given(kernel, cooperative):
    what, pretended = kernel(cooperative)
    args = (driver.Flat(NUMBERS[0], 4, "f32"), *NUMBERS[1:2], driver.Flat(3, 1, "f32"), *NUMBERS[3:])
    driver.run(what, (5, 6), 77, args)
    driver.run(what, (5,), 0, args)
    (first, numbers, extra), (second, again, _) = pretended.launched
    assert first == (("function", 99), 5, 6, 1, 64, 1, 1, 0, ("stream", 77)) and numbers == again == NUMBERS
    assert second[1:3] == (5, 1) and second[8] == ("stream", 0) and extra == (() if cooperative else (0,))
    assert what.launcher((5, 6), 0) is what.launcher((5, 6), 0)


def test_numbers_beyond_float32_are_infinite(kernel):
    what, pretended = kernel()
    what.launcher((1,), 0)(0, [*NUMBERS[:3], 1e300, NUMBERS[4], NUMBERS[5], 7])
    assert pretended.launched[0][1][3] == float("inf") and pretended.launched[0][1][5:] == [-1.25, 7]


def test_a_thread_without_a_context_gets_one_and_errors_are_raised(kernel, monkeypatch):
    what, pretended = kernel(codes=[launcher.NO_CONTEXT, 0, 719])
    woken = []
    monkeypatch.setattr(launcher, "cuda", SimpleNamespace(current_context=lambda: woken.append(1)))
    launch = launcher.make(what, (1,), 0)
    launch(0, NUMBERS)
    assert woken == [1] and len(pretended.launched) == 2
    with pytest.raises(DeviceError, match="refused the launch: 719"):
        launch(0, NUMBERS)
    assert len(launch.pool) == 1


@pytest.mark.parametrize("cooperative", [False, True])
@pytest.mark.parametrize("letters", ["TATial", "TATiaTl"])  # addresses in front, and among numbers
def test_bound_launches_take_addresses_alone(letters, cooperative, kernel, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LETTERS", letters)
    what, pretended = kernel(cooperative, codes=[0, 0, 0, launcher.NO_CONTEXT, 0, 719, 719])
    woken = []
    monkeypatch.setattr(launcher, "cuda", SimpleNamespace(current_context=lambda: woken.append(1)))
    fixed = [0, 0, 0, 5, 0.5, *([0] if len(letters) > 6 else []), 1 << 40]
    fills = [(0, 1), (2, 0)] + [(5, 2)] * (len(letters) > 6)
    what.launcher((3,), 0)(0, fixed)
    launch = what.launcher((3,), 0).bind(fixed, fills)
    for stream, at in ((7, [16, 32, 48, 0]), (0, [64, 80, 96, 0]), (0, [16, 32, 48, 0])):
        launch(stream, at)
        place, numbers, extra = pretended.launched[-1]
        assert numbers == [at[1], 0, at[0], 5, 0.5, *([at[2]] if len(letters) > 6 else []), 1 << 40]
        assert place[1:3] == (3, 1) and place[8] == ("stream", stream) and extra == (() if cooperative else (0,))
    assert len(woken) <= 1 and len(pretended.launched) >= 5
    with pytest.raises(DeviceError, match="refused the launch: 719"):
        launch(0, [16, 32, 48, 0])


def test_a_first_launch_that_the_driver_refuses_is_numbas(kernel):
    what, pretended = kernel(codes=[400])
    called = []
    what._compiled[0, 0] = Numbas(what, lambda configuration, numbers: called.append((configuration, numbers)))
    with pytest.warns(RuntimeWarning, match="Numba launches it, the driver said 400"):
        what.launcher((3,), 0)(0, NUMBERS)
    what.launcher((3,), 0)(0, NUMBERS)
    assert len(pretended.launched) == 1 and called == [(((3,), 64, 0, 0), tuple(NUMBERS))] * 2


def test_a_launch_that_nobody_can_make_is_an_error(kernel):
    what, _ = kernel(codes=[701])
    what._compiled[0, 0] = Numbas(what, lambda configuration, numbers: 1 / 0)
    with pytest.raises(DeviceError, match="refused the launch: 701; by Numba: division"):
        what.launcher((3,), 0)(0, NUMBERS)


class Numbas:
    """A dispatcher of Numba's."""

    def __init__(self, what, called):
        self.overloads, self.called = what._compiled[0, 0].overloads, called

    def __getitem__(self, configuration):
        return lambda *numbers: self.called(configuration, numbers)


def test_numbas_way_where_it_is_asked_for(kernel, monkeypatch):
    monkeypatch.setattr(tuning, "DIRECT", False)
    assert isinstance(kernel()[0].launcher((3,), 0), launcher.Plain)


def test_numbas_way_where_the_bindings_are_not_as_expected(kernel):
    what, pretended = kernel()
    del pretended.CUfunction
    called = []

    what._compiled[0, 0] = Numbas(what, lambda configuration, numbers: called.append((configuration, numbers)))
    launch = launcher.make(what, (3,), 1024)
    launch(0, NUMBERS)
    assert isinstance(launch, launcher.Plain) and called == [(((3,), 64, 0, 1024), tuple(NUMBERS))]


def test_layouts_are_the_structs_own():
    for letters in (LETTERS, "aiTl", "iTa"):
        for kind in ("f32", "f64"):
            packing, offsets = launcher.layout_of(letters, kind)
            assert len(offsets) == len(letters) and offsets[-1] < packing.size
            values = packing.pack(*range(1, len(letters) + 1))
            kinds = {"i": "<i4", "l": "<i8", "a": "<f4" if kind == "f32" else "<f8"}
            import numpy as np

            for k, (letter, at) in enumerate(zip(letters, offsets, strict=True)):
                assert np.frombuffer(values, kinds.get(letter, "<u8"), 1, at)[0] == k + 1
