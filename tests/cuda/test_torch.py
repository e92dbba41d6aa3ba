"""PyTorch's tensors through our calls, and the checks of bench.gpu, with CPU tensors standing for CUDA's."""

from __future__ import annotations

import pytest

from bench import gpu_peers as peers
from bench.gpu_cases import MOVED, Case
from fastbn import device
from fastbn.cuda import libraries
from fastbn.errors import ArgumentTypeError

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def cpu_tensors(monkeypatch):
    monkeypatch.setattr(libraries.Torch, "stream", lambda self, value: 0)
    monkeypatch.setattr(device, "on_device", lambda value: isinstance(value, torch.Tensor))
    libraries._torch.cache_clear()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("op", MOVED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(("layout", "shape"), [("NCHW", (3, 2, 4, 6)), ("NHWC", (3, 8, 2, 3)), ("NC", (17, 8))])
def test_the_benchmarks_checks_pass(op, dtype, layout, shape):
    case = Case(op, layout, dtype, shape)
    b = peers.buffers(torch, case, 3, "cpu")
    want = peers.reference(torch, case, b)
    peers.fastbn(torch, case, b)()
    assert peers.error(torch, case, b.out, want) <= peers.ALLOWED[dtype]
    assert b.out.stride() == b.x.stride()
    b.out[0, 0] = float("nan")
    assert peers.error(torch, case, b.out, want) == float("inf")


@pytest.mark.parametrize("op", MOVED)
def test_the_peer_computes_the_same(op):
    case = Case(op, "NCHW", "float32", (3, 2, 4, 6))
    b = peers.buffers(torch, case, 3, "cpu")
    want = peers.reference(torch, case, b)
    got = peers.torch_native(torch, case, b)()
    got = got[0] if isinstance(got, tuple) else got
    assert peers.error(torch, case, got, want) <= 1e-5


def test_results_are_tensors_in_the_memory_format_of_x():
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    y, saved = device.train(x, None, None, None, None, 0.1, 1e-5, 1, None, None, None)
    assert isinstance(y, torch.Tensor) and y.stride() == x.stride() and saved.mean.shape == (8,)
    grads = saved.gradients(torch.ones_like(x), None)
    assert grads.input.stride() == x.stride() and grads.weight is None
    gappy = torch.randn(2, 8, 3, 6)[..., ::2]
    y, _ = device.train(gappy, None, None, None, None, 0.1, 1e-5, 1, None, None, None)
    want, _ = device.train(gappy.contiguous(), None, None, None, None, 0.1, 1e-5, 1, None, None, None)
    assert torch.equal(y, want)


def test_autograd_is_refused():
    x = torch.randn(4, 3).requires_grad_()
    with torch.enable_grad(), pytest.raises(ArgumentTypeError, match="x: expected a tensor outside autograd"):
        device.train(x, None, None, None, None, 0.1, 1e-5, 1, None, None, None)


def test_other_dtypes_are_refused():
    with pytest.raises(ArgumentTypeError, match="int64"):
        device.train(torch.ones(4, 3, dtype=torch.int64), None, None, None, None, 0.1, 1e-5, 1, None, None, None)
