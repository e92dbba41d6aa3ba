"""PyTorch's tensors through our calls, and the checks of bench.gpu, with CPU tensors standing for CUDA's."""

from __future__ import annotations

import weakref

import pytest

from bench import gpu_peers as peers
from bench.gpu_cases import MOVED, Case
from fastbn import device, device_arguments, device_known, dispatch
from fastbn.cuda import choice, libraries, tuning
from fastbn.errors import ArgumentTypeError

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def cpu_tensors(monkeypatch):
    monkeypatch.setattr(libraries.Torch, "stream", lambda self, value: 0)
    for module in (device, device_arguments, dispatch):
        monkeypatch.setattr(module, "on_device", lambda value: isinstance(value, torch.Tensor))
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


def _arrays(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=g) for _ in range(2))
    return x, grad, [torch.rand(shape[1], generator=g) + 0.5 for _ in range(4)]


@pytest.fixture
def slow(monkeypatch):
    """Count the calls that are checked in full."""
    calls = []
    for name in ("train", "infer"):
        genuine = getattr(device, name)
        monkeypatch.setattr(device, name, lambda *a, f=genuine, **k: (calls.append(1), f(*a, **k))[1])
    device_known._calls.clear()
    return calls


def step(x, grad, vectors, out=None, activation=None, **changed):
    options = {"momentum": 0.1, "eps": 1e-5, "axis": 1, "update": True, "unbiased": True} | changed
    y, saved = device_known.train(x, *vectors, activation=activation, out=out, **options)
    return y, saved, saved.gradients(grad, None)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_known_calls_compute_the_same(memory, activation, slow):
    x, grad, vectors = _arrays((3, 4, 2, 4))
    x, grad = x.to(memory_format=memory), grad.to(memory_format=memory)
    results = []
    for _ in range(3):
        mine = [v.clone() for v in vectors]
        y, saved, grads = step(x, grad, mine, activation=activation)
        assert y.stride() == x.stride() == grads.input.stride() and saved.moments.count == 24 and saved.updated == 1
        results.append([y, saved.mean, saved.variance, *grads[:3], *mine])
        infer = device_known.infer(x, *vectors[2:], *vectors[:2], 1e-5, 1, activation, None)
        results[-1].append(infer)
    assert len(slow) == 2  # the first of each
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later, strict=True))
    moved = saved.gradients(grad, torch.full_like(grad, float("nan"))).input
    assert torch.equal(moved, grads.input) and torch.equal(saved.gradients(grad, grad).input, moved)
    assert torch.equal(grad, moved)


def test_known_calls_still_refuse_what_overlaps(slow):
    x, grad, vectors = _arrays((6, 4))
    out = torch.empty_like(x)
    for _ in range(2):
        step(x, grad, vectors, out=out)
        device_known.infer(x, *vectors[2:], *vectors[:2], 1e-5, 1, None, out)
    assert len(slow) == 2
    with pytest.raises(ValueError, match="out: expected memory apart from x"):
        step(x, grad, vectors, out=x)
    both = torch.randn(8, 4)
    with pytest.raises(ValueError, match="out: expected memory apart from x"):
        step(both[:6], grad, vectors, out=both[2:])
    _, saved, _ = step(x, grad, vectors)
    saved.gradients(grad, torch.empty_like(grad))
    with pytest.raises(ValueError, match="out: expected memory apart from x"):
        saved.gradients(grad, x)
    want = device_known.infer(x, *vectors[2:], *vectors[:2], 1e-5, 1, None, None)
    assert torch.equal(device_known.infer(x, *vectors[2:], *vectors[:2], 1e-5, 1, None, x), want)


def test_known_calls_still_refuse_one_array_under_two_names(slow):
    x, grad, vectors = _arrays((6, 4))
    for _ in range(2):
        step(x, grad, vectors)
    weight, bias, mean, var = vectors
    with pytest.raises(ValueError, match="running_var: expected memory apart from weight"):
        step(x, grad, [weight, bias, mean, weight])
    with pytest.raises(ValueError, match="running_mean: expected memory apart from bias"):
        step(x, grad, [weight, mean, mean, var])
    with pytest.raises(ValueError, match="running_var: expected memory apart from running_mean"):
        step(x, grad, [weight, bias, var, var])
    step(x, grad, vectors)


def test_only_the_very_same_call_is_known(slow):
    x, grad, vectors = _arrays((6, 4))
    other = [torch.rand(8)[::2] for _ in range(2)] + vectors[2:]
    calls = [
        (vectors, {}), (vectors, {"eps": 1e-3}), (vectors, {"momentum": 0.5}), (vectors, {"activation": "relu"}),
        (vectors, {"update": False}), (vectors, {"unbiased": False}), ([None, *vectors[1:]], {}), (other, {}),
        (other, {}),
    ]  # fmt: skip
    for count, (arrays, options) in enumerate(calls, start=1):
        grads = step(x, grad, arrays, **options)[2]
        assert len(slow) == count  # strided parameters are copied, so that such a call is never known
        assert (grads.weight is None) == (arrays[0] is None)
    for _ in range(2):
        with pytest.raises(TypeError, match="weight: expected float32"):
            step(x, grad, [vectors[0].double(), *vectors[1:]])
    for _ in range(2):  # a gradient in another memory order is copied every time
        _, saved, _ = step(x, grad, vectors)
        turned = grad.t().contiguous().t()
        assert torch.equal(saved.gradients(turned, None).input, saved.gradients(grad, None).input)
    with torch.enable_grad(), pytest.raises(ArgumentTypeError, match="outside autograd"):
        step(x.clone().requires_grad_(), grad, vectors)


def test_replays_go_where_the_arrays_lie(slow):
    """One array given twice, arrays that are not aligned, work in place, and other kernels in between."""
    x, grad, vectors = _arrays((6, 4))
    want = step(x, grad, [v.clone() for v in vectors])
    skewed = torch.empty(25)[1:].view(6, 4)
    skewed.copy_(x)
    for turn in range(8):
        mine = [v.clone() for v in vectors]
        if turn in (2, 5):
            mine[1] = mine[0]
        if turn == 3:
            choice.forget()
        y, saved, grads = step(skewed if turn in (1, 6) else x, grad, mine)
        exact = [v.clone() for v in vectors]
        if turn in (2, 5):
            exact[1] = exact[0].clone()
            assert not torch.equal(y, want[0])
        right, _, right_grads = step(x.clone(), grad, exact)
        assert torch.equal(y, right) and torch.allclose(grads.input, right_grads.input, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(mine[2:], exact[2:], strict=True))
        assert saved.moments.count == 6
        other, target = grad.clone(), torch.empty_like(grad)
        assert torch.equal(saved.gradients(other, other).input, saved.gradients(grad, target).input)
        inplace = x.clone()
        out = device_known.infer(x, *vectors[2:], *vectors[:2], 1e-5, 1, None, None)
        assert torch.equal(device_known.infer(inplace, *vectors[2:], *vectors[:2], 1e-5, 1, None, inplace), out)


def test_replayed_launches_allocate_what_the_recorded_ones_did(slow, monkeypatch):
    x, grad, vectors = _arrays((40, 8))
    for name, value in {"PERSISTENT": True, "SMALL": 0}.items():
        monkeypatch.setattr(tuning, name, value)
    choice.forget()
    results = [step(x, grad, [v.clone() for v in vectors]) for _ in range(4)]
    for y, saved, grads in results[1:]:
        assert torch.equal(y, results[0][0]) and grads.weight.shape == (8,)
        assert all(torch.equal(a, b) for a, b in zip(grads[:3], results[0][2][:3], strict=True))
        assert saved.vectors.size == 32 and saved.mean.shape == (8,)
    known = results[0][1].known
    launched = [s.what.function.__name__ for s in known.replays[False].steps]
    assert launched[-1] == "rows_train"  # counters may be cleared before
    assert len(known.replays[False].made.sizes) == 1  # scratch lies behind the statistics
    assert len(known.backs[0].apart.made.sizes) == 1  # and behind the gradients of weight and bias
    assert not (grads.weight.data_ptr() | grads.bias.data_ptr()) & 15


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_adapter_hands_tensors_on(memory, activation, fused, training, monkeypatch):
    import fastbn.torch.functional as adapter
    from fastbn.torch import gradients

    for module in (adapter, gradients):
        monkeypatch.setattr(module, "array", lambda tensor: tensor)
        monkeypatch.setattr(module, "parameter", lambda tensor: tensor)
    x, r, vectors = _arrays((3, 4, 2, 4))
    x, r = (t.to(memory_format=memory) for t in (x, r))
    found = []
    for call in (adapter._run, adapter._native):
        leaves = [t.clone().requires_grad_() for t in (x, r, *vectors[:2])]
        mean, var = (v.clone() for v in vectors[2:])
        inner, residual, weight, bias = leaves
        args = (inner, residual if fused else None, weight, bias, mean, var, training, 0.1, 1e-5, activation)
        args += (None, None)  # mask and lengths
        with torch.enable_grad():
            y = call(args)
            y.backward(r, retain_graph=True)
            y.backward(r)
        found.append([y.detach(), mean, var, *(t.grad for t in leaves if t.grad is not None)])
        assert y.stride() == leaves[0].grad.stride() == x.stride()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    watched = weakref.ref(y)
    del y
    assert watched() is None
