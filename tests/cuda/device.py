"""Arrays on a pretended GPU: host memory behind ``__cuda_array_interface__``, and the public functions through them."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastbn
from fastbn import device
from fastbn.cuda import arrays, libraries


class GpuArray:
    """What Numba's or CuPy's arrays look like from outside; ``host`` is its memory."""

    def __init__(self, host: Any, strides: Any = None):
        self.host, self.dtype, self.shape = host, host.dtype, host.shape

    @classmethod
    def of(cls, values: Any, skew: int = 0) -> GpuArray:
        """Copy an array to the GPU, in its memory order."""
        values = np.asarray(values)
        order = np.argsort([-s for s in values.strides], kind="stable")
        dense = np.ascontiguousarray(values.transpose(order))
        memory = np.empty(dense.nbytes + 32, np.uint8)
        start = -memory.ctypes.data % 16 + skew * dense.itemsize
        copied = memory[start : start + dense.nbytes].view(dense.dtype).reshape(dense.shape)
        copied[...] = dense
        return cls(copied.transpose(np.argsort(order)))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        interface = dict(self.host.__array_interface__)
        return interface | {"strides": self.host.strides, "version": 3, "stream": None}

    def transpose(self, order: Any) -> GpuArray:
        return GpuArray(self.host.transpose(order))

    def reshape(self, shape: Any) -> GpuArray:
        return GpuArray(self.host.reshape(shape))

    def __getitem__(self, part: Any) -> GpuArray:
        return GpuArray(self.host[part])


class Pretended(arrays.Library):
    """A library whose arrays these are, with strides and copies; every fresh array is full of NaN."""

    name = "pretended"
    wrap = libraries.Numba.wrap

    def empty(self, shape: Any, dtype: str, like: Any) -> GpuArray:
        kind = arrays.dtype_of(dtype)
        return GpuArray.of(np.full(shape, 0xFF, np.uint8).repeat(kind.itemsize).view(kind).reshape(shape))

    def zeros(self, shape: Any, dtype: str, like: Any) -> GpuArray:
        return GpuArray.of(np.zeros(shape, arrays.dtype_of(dtype)))

    def contiguous(self, value: GpuArray) -> GpuArray:
        return GpuArray.of(np.ascontiguousarray(value.host))

    def expand(self, value: GpuArray, shape: Any) -> GpuArray:
        return GpuArray(np.broadcast_to(value.host, shape))

    def put(self, values: Any, like: Any) -> GpuArray:
        return GpuArray.of(values)

    def assign(self, target: GpuArray, source: GpuArray) -> None:
        target.host[...] = source.host

    def host(self, value: GpuArray) -> Any:
        return value.host

    def stream(self, value: GpuArray) -> int:
        return 0


def put(value: Any) -> Any:
    """To the GPU; anything but an array stays."""
    return GpuArray.of(value) if isinstance(value, np.ndarray) else value


def get(value: Any) -> Any:
    """From the GPU; anything but an array stays."""
    return value.host if isinstance(value, GpuArray) else value


class SavedOnHost:
    """``Saved`` with NumPy's arrays, for the checks."""

    def __init__(self, saved: Any):
        self.saved, self.count = saved, saved.count
        self.mean, self.invstd, self.variance = (get(a) for a in (saved.mean, saved.invstd, saved.variance))


def batch_norm_train(x, weight=None, bias=None, running_mean=None, running_var=None, **options):
    moved = [put(running_mean), put(running_var)]
    out = options.pop("out", None)
    options = {k: put(v) for k, v in options.items()}
    given = put(out)
    numbers = {"momentum": 0.1, "eps": 1e-5, "axis": 1, "activation": None, "residual": None} | options
    y, saved = device.train(put(x), put(weight), put(bias), *moved, **numbers, out=given)
    for target, source in ((running_mean, moved[0]), (running_var, moved[1])):
        if target is not None:
            target[...] = get(source)
    return _returned(y, given, out), SavedOnHost(saved)


def _returned(y, given, out):
    """Check that a given output came back, and give its values to the host array that it stands for."""
    if given is None:
        return get(y)
    assert y is given
    out[...] = given.host
    return out


def batch_norm_infer(x, mean, var, weight=None, bias=None, out=None, **options):
    on_gpu = put(x)
    given = on_gpu if out is x else put(out)
    numbers = {"eps": 1e-5, "axis": 1, "activation": None, "residual": None}
    numbers |= {k: put(v) for k, v in options.items()}
    y = device.infer(on_gpu, put(mean), put(var), put(weight), put(bias), **numbers, out=given)
    return _returned(y, given, out)


def frozen(x, mean, var, weight=None, bias=None, **options):
    numbers = {"eps": 1e-5, "axis": 1, "activation": None, "residual": None, "out": None}
    numbers |= {k: put(v) for k, v in options.items()}
    y, saved = device.frozen(put(x), put(mean), put(var), put(weight), put(bias), **numbers)
    return get(y), SavedOnHost(saved)


def backward(grad, saved, out=None):
    on_gpu = put(grad)
    given = on_gpu if out is grad else put(out)
    grads = saved.saved.gradients(on_gpu, given)
    if grads.residual is on_gpu:
        grads = grads._replace(residual=grad)
    if given is not None:
        assert grads.input is given
        out[...] = given.host
        grads = grads._replace(input=out)
    return fastbn.Gradients(*(get(g) for g in grads))


def _sets(call):
    """Give a function of the family host arrays."""

    def through(x, *args, out=None, **options):
        given = put(out)
        y, saved = call(put(x), *[put(a) for a in args], out=given, **options)
        return _returned(y, given, out), SavedOnHost(saved)

    return through


layer_norm, group_norm, instance_norm = _sets(fastbn.layer_norm), _sets(fastbn.group_norm), _sets(fastbn.instance_norm)


def through_gpu(monkeypatch):
    """Make tests.oracle and tests.test_family check the GPU kernels instead of the CPU's."""
    import sys

    from tests import oracle, test_family

    monkeypatch.setattr(libraries, "NUMBA", Pretended())
    for checks in (oracle, test_family):
        monkeypatch.setattr(checks, "fastbn", sys.modules[__name__])
    monkeypatch.setattr(oracle, "frozen", frozen)
