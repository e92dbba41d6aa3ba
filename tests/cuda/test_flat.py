"""Inference with one vector a thread: the bits of the kernels that it stands in for, and which calls it gets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fastbn import device, device_arguments, device_known, dispatch
from fastbn.cuda import driver, flat, launch, libraries, tuning
from fastbn.cuda.arrays import ITEMSIZE, WIDE, Flat, dtype_of
from tests.oracle import same_bits

NAMES = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16"}
OWNER = SimpleNamespace(stream=lambda: 0)
# Whole runs; odd runs, in vectors of two samples too; channels last. Tails of blocks, one channel, one sample.
SHAPES = {
    "run": [(3, 5, 72), (5, 1, 8), (1, 3, 264), (4, 33, 16)],
    "spread": [(8, 3, 49), (2, 8, 7), (16, 5, 9), (24, 1, 15), (1, 8, 25)],
    "columns": [(37, 24, 1), (5, 8, 1), (1, 520, 1), (2, 1032, 1)],
}
ALL = [(layout, dims) for layout, shapes in SHAPES.items() for dims in shapes]


def put(values, kind, skew=0):
    """Lay an array where a vector of 128 bits begins, or ``skew`` elements behind."""
    values = np.asarray(values).astype(dtype_of(NAMES[kind]))
    memory = np.empty(values.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 16 + skew * values.itemsize
    here = memory[start : start + values.nbytes]
    here[:] = np.ascontiguousarray(values).view(np.uint8).ravel()
    OWNER.__dict__.setdefault("kept", []).append(memory)
    return Flat(here.ctypes.data, values.size, kind, OWNER)


@pytest.fixture(autouse=True)
def forget():
    yield
    OWNER.__dict__.pop("kept", None)


class Case:
    """Arrays of a call; what rarely happens among the variances."""

    def __init__(self, rng, kind, dims, affine=(True, True), given=True, skew=0):
        C, wide = dims[1], WIDE[kind]
        self.dims, self.kind = dims, kind
        self.x, self.residual = (put(3 * rng.standard_normal(dims) + 1, kind) for _ in range(2))
        self.out = put(np.full(dims, np.nan), kind)
        var = rng.random(C) + 0.1
        var[:: max(5, C // 3)] = rng.choice([0.0, 1e-38, 1e30, -1.0, np.inf, np.nan])
        mean, self.weight, self.bias = (put(rng.standard_normal(C), wide, skew) for _ in range(3))
        self.weight, self.bias = (
            p if there else None for p, there in zip((self.weight, self.bias), affine, strict=True)
        )
        self.stats = launch.Given(mean, put(var, wide, skew), 1e-12)
        if not given:
            self.stats = put(rng.standard_normal(4 * C), wide, skew)

    def infer(self, relu=False, residual=False, out=None, mask=launch.ALL):
        """The bytes of the output, and the name of the kernel."""
        out = self.out if out is None else out
        driver.recorder.steps = steps = []
        try:
            other = self.residual if residual else None
            launch.infer(self.x, other, out, self.weight, self.bias, self.stats, self.dims, relu, mask)
        finally:
            driver.recorder.steps = None
        (step,) = steps
        return out.array.copy(), step[0].function.__name__


def both(monkeypatch, case, **options):
    """Return the output of this kernel, and of the other one, and check who made them."""
    monkeypatch.setattr(tuning, "FLAT", False)
    want, name = case.infer(**options)
    assert name in ("planes_normalise", "rows_normalise")
    monkeypatch.setattr(tuning, "FLAT", True)
    found, name = case.infer(**options)
    assert name == "flat_normalise"
    return found, want


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", ITEMSIZE)
@pytest.mark.parametrize(("layout", "dims"), ALL, ids=str)
def test_same_bits(layout, dims, kind, depth, rng, monkeypatch):
    for name in ("FLAT_DEPTH", "FLAT_COLUMNS", "FLAT_HALVES"):
        monkeypatch.setattr(tuning, name, depth)
    cut = flat.cut(dims, kind, True)
    if np.prod(dims) % (16 // ITEMSIZE[kind]):
        assert cut is None
        return
    assert cut.layout == layout
    options = [(False, False), (True, True), (True, False), (False, True)]
    affine = [(True, True), (False, True), (True, False), (False, False)]
    for (relu, residual), there, given in zip(options, affine, (True, True, False, False), strict=True):
        found, want = both(monkeypatch, Case(rng, kind, dims, there, given), relu=relu, residual=residual)
        assert same_bits(found, want)


@pytest.mark.parametrize("dims", [(3, 5, 72), (8, 3, 49), (37, 24, 1)], ids=str)
def test_in_place(dims, rng, monkeypatch):
    case = Case(rng, "f32", dims)
    want, _ = case.infer(relu=True, residual=True)
    kept = case.x.array.copy()
    found, name = case.infer(relu=True, residual=True, out=case.x)
    assert same_bits(found, want)
    case.x.array[:] = kept
    again, other = case.infer(relu=True, residual=True, out=case.residual)
    assert same_bits(again, want)
    assert name == other == "flat_normalise"


def test_which_calls(rng):
    for kind, dims, skew, name in [
        ("f32", (9, 8, 1), 0, "flat_normalise"), ("f32", (9, 8, 1), 1, "rows_normalise"),
        ("f32", (8, 3, 49), 1, "flat_normalise"), ("f32", (3, 5, 72), 1, "flat_normalise"),
        ("f16", (8, 3, 6), 0, "rows_normalise"), ("f32", (9, 13, 1), 0, "rows_normalise"),
        ("f32", (3, 3, 3), 0, "rows_normalise"), ("f64", (8, 3, 1), 0, "flat_normalise"),
    ]:  # fmt: skip
        assert Case(rng, kind, dims, skew=skew).infer()[1] == name, (kind, dims, skew)
    case = Case(rng, "f32", (3, 5, 72))
    valid = np.ones(3 * 72, np.uint8)
    mask = launch.Mask(Flat(valid.ctypes.data, valid.size, "u8", OWNER), None)
    assert case.infer(mask=mask)[1] == "planes_normalise"
    case.x = put(np.zeros(case.dims), "f32", 1)
    assert case.infer()[1] == "planes_normalise"


def test_known_calls_tell_aligned_parameters_from_others(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(libraries.Torch, "stream", lambda self, value: 0)
    for module in (device, device_arguments, dispatch):
        monkeypatch.setattr(module, "on_device", lambda value: isinstance(value, torch.Tensor))
    libraries._torch.cache_clear()
    x, parameters = torch.randn(9, 8), torch.rand(4, 16) + 0.5
    names, genuine = [], driver.run
    monkeypatch.setattr(driver, "run", lambda what, *rest: (names.append(what.function.__name__), genuine(what, *rest)))
    for turn in range(12):
        skew = turn // 2 % 2
        mean, var, weight, bias = (p[skew : 8 + skew] for p in parameters)
        out = device_known.infer(x, mean, var, weight, bias, 1e-5, 1, None, None)
        torch.testing.assert_close(out, (x - mean) * (var + 1e-5).rsqrt() * weight + bias)
    assert names[-4:] == ["flat_normalise"] * 2 + ["rows_normalise"] * 2


def test_cuts_of_large_tensors():
    assert flat.cut((256, 64, 112 * 112), "f32", True).numbers[-2:] == (256 * 64 * 3136,) * 2
    assert flat.cut((1 << 12, 1 << 10, 1 << 12), "f32", True) is None  # 2**32 vectors
    assert flat.cut((1 << 12, 1 << 10, 1 << 9), "f32", True) is not None  # 2**31 elements
    assert flat.cut((1 << 12, 1 << 10, 513), "f32", True) is None  # whose places are counted in odd runs
    assert flat.cut((0, 8, 8), "f32", True) is None


def test_reciprocals_divide_exactly(rng):
    most = (1 << 31) - 1
    near = [(1 << k) + j for k in range(31) for j in (-1, 0, 1)] + [most, most - 1, 3, 5, 7, 49, 196, 3136, 641]
    for d in {n for n in near if 0 < n <= most} | {int(n) for n in rng.integers(1, most, 300)}:
        multiplier, shift = flat.reciprocal(d)
        assert -(1 << 31) <= multiplier < 0
        last = most // d
        quotients = {0, 1, 2, last - 1, last, *(int(q) for q in rng.integers(0, last + 1, 20))}
        for n in {q * d + j for q in quotients for j in (-1, 0, 1, d - 1)} | {most}:
            if 0 <= n <= most:
                assert n * (multiplier + (1 << 32)) >> shift == n // d, (n, d)
    for d in (1, 2, 7, 49, 3136, most):
        numbers = [np.int32(n) for n in flat.reciprocal(d)]
        for n in (0, 1, d - 1, d, most - 1, most):
            assert flat.quotient(np.int32(n), *numbers) == n // d


def test_reciprocals_of_small_numbers_divide_all_of_them():
    n = np.arange(1 << 14, dtype=np.uint64)
    for d in range(1, 600):
        multiplier, shift = flat.reciprocal(d)
        assert (n * np.uint64(multiplier + (1 << 32)) >> np.uint64(shift) == n // np.uint64(d)).all()
