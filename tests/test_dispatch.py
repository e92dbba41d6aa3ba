"""The CPU's kernels where Numba compiles, NumPy where it does not, and a clear word about device arrays."""

from __future__ import annotations

import numba
import pytest

import fastbn
from fastbn import dispatch
from fastbn.cpu import fallback, launch


def test_kernels_follow_the_jit(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 0)
    assert dispatch.kernels() is launch
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert dispatch.kernels() is fallback


def test_both_offer_the_same_operations():
    import inspect

    for name in ("train", "infer", "backward", "moments"):
        assert inspect.signature(getattr(launch, name)) == inspect.signature(getattr(fallback, name))


def test_device_arrays_are_told_what_to_do():
    error = dispatch.refuse_device("x")
    assert isinstance(error, fastbn.DeviceError) and str(error).startswith(
        "x: expected a NumPy array, got a CUDA array"
    )
    assert "copy the array to the host" in str(error)


def test_an_array_of_jax_is_a_gpus_only_there():
    """Its type has CUDA's interface; the property raises on the CPU."""

    class Jax:
        on_gpu = False

        @property
        def __cuda_array_interface__(self):
            if not self.on_gpu:
                raise AttributeError
            return {}

    with pytest.raises(fastbn.ArgumentTypeError, match="x: expected a NumPy array, got Jax"):
        fastbn.batch_norm_train(Jax())
    Jax.on_gpu = True
    assert dispatch.on_device(Jax())
