"""Arrays of other libraries as the functions see them, and what is refused before anything is written."""

from __future__ import annotations

import numpy as np
import pytest

from fastbn import device
from fastbn.cuda import arrays, driver, libraries
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from tests.cuda.device import GpuArray, through_gpu


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    through_gpu(monkeypatch)


X = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
ONE = np.ones(3, np.float32)


def call(x=X, weight=ONE, bias=None, rm=None, rv=None, **options):
    numbers = {"momentum": 0.1, "eps": 1e-5, "axis": 1, "activation": None, "residual": None, "out": None} | options
    put = [GpuArray.of(a) if isinstance(a, np.ndarray) else a for a in (x, weight, bias, rm, rv)]
    return device.train(*put, **numbers)


def test_describes_memory():
    found = libraries.wrap("x", GpuArray.of(X.astype(np.float16)))
    assert (found.shape, found.kind, found.itemsize, found.ndim) == ((4, 3, 2), "f16", 2, 3)
    assert found.c_contiguous and found.writeable and found.address % 16 == 0
    assert not libraries.wrap("x", GpuArray.of(X).transpose((1, 0, 2))).c_contiguous
    low, high = libraries.wrap("x", GpuArray.of(X)).bounds()
    assert high - low == X.nbytes


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ArgumentTypeError, "weight: expected an array on the GPU", {"weight": [1.0, 1.0, 1.0]}),
        (ArgumentValueError, "weight: expected one number per channel", {"weight": np.ones(2, np.float32)}),
        (ArgumentTypeError, "weight: expected float32", {"weight": np.ones(3)}),
        (ArgumentTypeError, "x: expected an array of float32", {"x": X.astype(np.int32)}),
        (ArgumentValueError, "x: expected an array of rank >= 2", {"x": ONE}),
        (ArgumentValueError, "x: expected more than 1 value", {"x": np.ones((1, 3), np.float32)}),
        (ArgumentValueError, "axis", {"axis": 3}),
        (ArgumentValueError, "eps", {"eps": 0.0}),
        (ArgumentValueError, "running_var: expected both", {"rm": ONE}),
        (ArgumentValueError, "residual: expected the shape", {"residual": GpuArray.of(X[:2])}),
        (ArgumentTypeError, "residual: expected the dtype", {"residual": GpuArray.of(X.astype(np.float64))}),
        (ArgumentTypeError, "residual: expected an array on the GPU", {"residual": X}),
        (ArgumentValueError, "out: expected the shape", {"out": GpuArray.of(X[:2])}),
        (ArgumentValueError, "activation", {"activation": "tanh"}),
        (ArgumentTypeError, "update_stats: expected True or False", {"update_stats": None}),
        (ArgumentTypeError, "unbiased: expected True or False", {"unbiased": 0.5}),
    ],
)
def test_refuses(error, match, options):
    with pytest.raises(error, match=match):
        call(**options)


def test_overlaps_are_refused():
    x = GpuArray.of(X)
    with pytest.raises(ArgumentValueError, match="memory apart from x"):
        device.train(x, None, None, None, None, 0.1, 1e-5, 1, None, None, x)
    wide = GpuArray.of(np.zeros((5, 3, 2), np.float32))
    part, other = GpuArray(wide.host[:4]), GpuArray(wide.host[1:])
    with pytest.raises(ArgumentValueError, match="overlapping"):
        device.infer(part, GpuArray.of(ONE), GpuArray.of(ONE), None, None, 1e-5, 1, None, None, other)


def test_memory_that_no_kernel_reads_is_refused():
    memory = GpuArray.of(np.zeros(100, np.uint8)).host
    unaligned = GpuArray(memory[2:98].view(np.float32).reshape(4, 3, 2))
    for name, options in {
        "x": {"x": unaligned},
        "out": {"out": unaligned},
        "residual": {"residual": unaligned},
    }.items():
        with pytest.raises(ArgumentValueError, match=f"^{name}: expected an array aligned to its 4-byte elements"):
            call(**options)
    call(x=GpuArray(memory[2:50].view(np.float16).reshape(4, 3, 2)))
    with pytest.raises(ArgumentTypeError, match=r"^x: expected an array of float32, .*, got >f4"):
        call(x=X.astype(">f4"))


def test_strided_running_statistics_are_refused():
    strided = GpuArray(GpuArray.of(np.zeros(6, np.float32)).host[::2])
    with pytest.raises(ArgumentValueError, match="contiguous"):
        device.train(GpuArray.of(X), None, None, strided, strided, 0.1, 1e-5, 1, None, None, None)


def test_gaps_are_copied_or_refused_by_the_library():
    gappy = GpuArray(GpuArray.of(np.tile(X, (1, 1, 2))).host[:, :, ::2])
    y, _ = device.train(gappy, None, None, None, None, 0.1, 1e-5, 1, None, None, None)
    want, _ = device.train(
        GpuArray.of(np.ascontiguousarray(gappy.host)), None, None, None, None, 0.1, 1e-5, 1, None, None, None
    )
    assert np.array_equal(y.host, want.host)
    with pytest.raises(ArgumentTypeError, match="C-contiguous"):
        libraries.Numba().contiguous(gappy)


def test_an_array_on_another_stream_is_waited_for(monkeypatch):
    """Each array says which stream it is on; x's is where everything is launched."""
    waits = []
    monkeypatch.setattr(driver, "wait", lambda here, there: waits.append((here, there)))
    monkeypatch.setattr(type(libraries.NUMBA), "stream", lambda self, value: getattr(value, "on", 0))
    monkeypatch.setattr(type(libraries.NUMBA), "streams_differ", True, raising=False)
    x, weight, mean, var = (GpuArray.of(a) for a in (X, ONE, ONE, ONE))
    x.on, weight.on, mean.on, var.on = 7, 7, 9, 0
    _, saved = device.train(x, weight, None, mean, var, 0.1, 1e-5, 1, None, None, None)
    assert waits == [(7, 9), (7, 0)]
    saved.gradients(GpuArray.of(X), None)
    assert waits[2:] == [(7, 0)]


def test_bfloat16_without_ml_dtypes(monkeypatch):
    import builtins

    genuine = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "ml_dtypes":
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    found = arrays.dtype_of.__wrapped__("bfloat16")
    assert found.itemsize == 2 and str(found) == "bfloat16"
