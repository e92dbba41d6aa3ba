"""PyTorch's semantics to the letter, and more accurate where PyTorch is not: run where torch is installed."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm, reference
from tests.oracle import normal
from tests.tolerances import BF16

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

MODULES = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
SHAPES = [(37, 5), (4, 5, 31), (3, 5, 17, 19), (2, 5, 3, 4, 5), (1, 5, 300)]
DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}
HALF = {np.dtype(np.float16): torch.float16, BF16: torch.bfloat16}
LOOSE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-10, np.dtype(np.float16): 4e-3, BF16: 3e-2}


def tensor(x):
    """Return a tensor with the values and dtype of an array."""
    if x.dtype == BF16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def values(t):
    return t.detach().to(torch.float64).numpy() if t.is_floating_point() else t.detach().numpy()


def pair(x, rng, **options):
    """Return our layer and PyTorch's with the same parameters."""
    ours = BatchNorm(x.shape[1], dtype=np.float64 if x.dtype == np.float64 else np.float32, **options)
    theirs = MODULES[x.ndim](x.shape[1], **options)
    if ours.weight is not None:
        ours.weight[:], ours.bias[:] = rng.uniform(-2, 2, x.shape[1]), rng.normal(size=x.shape[1])
    if x.dtype == np.float64:
        theirs = theirs.double()
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in ours.state_dict().items()})
    return ours, theirs


def close(ours, theirs, dtype, what=""):
    np.testing.assert_allclose(
        np.asarray(ours).astype(np.float64), values(theirs), rtol=LOOSE[dtype], atol=LOOSE[dtype], err_msg=what
    )


def compare(x, ours, theirs, rng, residual=None):
    """Compare one call, its gradients and the state after it."""
    dtype = x.dtype
    theirs.zero_grad()
    t = tensor(x).requires_grad_()
    y = ours(x) if residual is None else ours(x, residual=residual)
    z = theirs(t) if residual is None else theirs(t) + tensor(residual)
    z = torch.relu(z) if ours.activation else z
    close(y, z, dtype, "y")
    grad = rng.standard_normal(x.shape).astype(dtype)
    z.backward(tensor(grad))
    grads = ours.backward(grad)
    close(grads.input, t.grad, dtype, "grad.input")
    if ours.weight is not None:
        weights = np.abs(values(theirs.weight.grad))
        scale = weights[np.isfinite(weights)].max(initial=1.0)
        close(grads.weight / scale, theirs.weight.grad / scale, dtype, "grad.weight")
        close(grads.bias / scale, theirs.bias.grad / scale, dtype, "grad.bias")
    else:
        assert grads.weight is None and grads.bias is None
    for key, value in theirs.state_dict().items():
        close(ours.state_dict()[key], value, np.dtype(np.float32) if dtype in HALF else dtype, key)


@pytest.mark.parametrize("options", [
    {}, {"affine": False}, {"momentum": None}, {"momentum": 0.7}, {"track_running_stats": False}, {"eps": 0.1},
    {"affine": False, "track_running_stats": False}, {"momentum": 0.0}, {"momentum": 1.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_steps_of_training_then_evaluation(shape, dtype, options, rng):
    ours, theirs = pair(normal(rng, shape, dtype), rng, **options)
    for _ in range(3):
        compare(normal(rng, shape, dtype), ours, theirs, rng)
    ours.eval(), theirs.eval()
    compare(normal(rng, shape, dtype), ours, theirs, rng)
    ours.train(), theirs.train()
    compare(normal(rng, shape, dtype), ours, theirs, rng)


@pytest.mark.parametrize("dtype", HALF, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [(37, 5), (3, 5, 17, 19)], ids=str)
def test_half_types_with_float32_parameters(shape, dtype, rng):
    ours, theirs = pair(normal(rng, shape, dtype), rng)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        compare(normal(rng, shape, dtype), ours, theirs, rng)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_relu_and_residual_are_the_composition(residual, mode, rng):
    x = normal(rng, (6, 5, 40), np.float64)
    ours, theirs = pair(x, rng)
    ours.activation = "relu"
    ours.train(mode), theirs.train(mode)
    compare(x, ours, theirs, rng, rng.standard_normal(x.shape) if residual else None)


@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (2, 3, 4, 5, 6)], ids=str)
def test_channels_last_strides(shape, rng):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    t = torch.from_numpy(normal(rng, shape, np.float64)).contiguous(memory_format=layout)
    x = t.numpy()
    assert x.strides[1] == 8
    ours, theirs = pair(x, rng)
    y = ours(x)
    assert y.strides == x.strides
    close(y, theirs(t), x.dtype)
    compare(x, ours, theirs, rng)


def outcome(call):
    try:
        return call()
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        return type(error)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4), (3, 5, 0), (1, 5), (1, 5, 1), (1, 5, 1, 1)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval", "no statistics"])
def test_empty_and_single_values(shape, mode, rng):
    """The same errors, shapes, counts and gradients."""
    x = rng.standard_normal(shape).astype(np.float32)
    ours, theirs = pair(x, rng, track_running_stats=mode != "no statistics")
    ours.train(mode == "train"), theirs.train(mode == "train")
    y, z = outcome(lambda: ours(x)), outcome(lambda: theirs(torch.from_numpy(x)))
    if isinstance(z, type):
        assert isinstance(y, type) and issubclass(y, z)
        return
    close(y, z, x.dtype)
    for key, value in theirs.state_dict().items():
        np.testing.assert_allclose(ours.state_dict()[key], value.numpy(), rtol=1e-6)
    z.sum().backward()
    grads = ours.backward(np.ones_like(x))
    close(grads.weight, theirs.weight.grad, x.dtype)
    close(grads.bias, theirs.bias.grad, x.dtype)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("shape", [(37, 5), (4, 5, 31)], ids=str)
def test_nan_and_inf(shape, mode, value, rng):
    x = normal(rng, shape, np.float32)
    x[2, 3] = value
    ours, theirs = pair(x, rng)
    ours.train(mode), theirs.train(mode)
    compare(x, ours, theirs, rng)


@pytest.mark.parametrize("eps", [0.0, -1e-5, 1e-30])
@pytest.mark.parametrize("mode", [True, False])
def test_eps(eps, mode, rng):
    """Zero is for evaluation only, as in PyTorch; negative ones we refuse there too."""
    x, mean, var = normal(rng, (6, 5, 4), np.float64), np.zeros(5), np.ones(5)
    z = outcome(lambda: torch.nn.functional.batch_norm(
        torch.from_numpy(x), torch.zeros(5).double(), torch.ones(5).double(), training=mode, eps=eps
    ))  # fmt: skip
    if mode:
        y = outcome(lambda: fastbn.batch_norm_train(x, None, None, mean, var, eps=eps)[0])
    else:
        y = outcome(lambda: fastbn.batch_norm_infer(x, mean, var, eps=eps))
    if isinstance(z, type) or eps < 0:
        assert y is fastbn.ArgumentValueError and (z is ValueError or not mode)
    else:
        close(y, z, x.dtype)


def test_dtypes_that_torch_refuses_we_refuse(rng):
    for dtype in (np.int64, np.complex64):
        x = np.ones((4, 5), dtype)
        assert isinstance(outcome(lambda x=x: torch.nn.BatchNorm1d(5)(torch.from_numpy(x))), type)
        assert outcome(lambda x=x: BatchNorm(5)(x)) is fastbn.ArgumentTypeError
    x = np.ones((4, 5))
    assert outcome(lambda: torch.nn.BatchNorm1d(5)(torch.from_numpy(x))) is RuntimeError
    assert outcome(lambda: BatchNorm(5)(x)) is fastbn.ArgumentTypeError


def test_state_travels_both_ways(rng):
    x = normal(rng, (4, 5, 31), np.float32)
    ours, theirs = pair(x, rng)
    theirs(torch.from_numpy(x))
    ours.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    assert ours.num_batches_tracked == 1
    for key, value in theirs.state_dict().items():
        assert np.array_equal(ours.state_dict()[key], value.numpy())
    ours(x)
    fresh = torch.nn.BatchNorm1d(5)
    fresh.load_state_dict({k: torch.from_numpy(v) for k, v in ours.state_dict().items()})
    assert list(ours.state_dict()) == list(fresh.state_dict())
    assert fresh.num_batches_tracked.dtype == torch.int64 and int(fresh.num_batches_tracked) == 2
    close(ours.eval()(x), fresh.eval()(torch.from_numpy(x)), x.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_checkpoints_of_any_dtype_load(dtype):
    twin = torch.nn.BatchNorm2d(3)
    torch.nn.init.uniform_(twin.weight)
    twin.to(getattr(torch, dtype))
    bn = fastbn.BatchNorm(3)
    bn.load_state_dict(dict(twin.named_parameters()) | dict(twin.named_buffers()))  # with their graph
    np.testing.assert_array_equal(bn.weight, twin.weight.detach().float().numpy())
    assert bn.weight.dtype == bn.running_var.dtype == np.float32 and bn.num_batches_tracked == 0


def test_tensors_without_data_do_not_load():
    with pytest.raises(TypeError, match=r"^weight: expected real numbers, got "):
        fastbn.BatchNorm(3).load_state_dict(torch.nn.BatchNorm2d(3, device="meta").state_dict())


def test_tensors_are_refused_with_a_hint(rng):
    for t in (torch.ones(4, 5), torch.ones(4, 5, requires_grad=True)):
        with pytest.raises(TypeError, match=r"^x: expected a NumPy array, got a torch.Tensor: pass x.detach\(\).numpy"):
            fastbn.batch_norm_train(t)
    with pytest.raises(TypeError, match=r"^weight: expected a NumPy array, got a torch.Tensor"):
        fastbn.batch_norm_train(np.ones((4, 5), np.float32), torch.ones(5, requires_grad=True))


def test_memory_shared_with_tensors_is_written_in_place(rng):
    x = normal(rng, (4, 5, 31), np.float32)
    mean, var, out = torch.zeros(5), torch.ones(5), torch.empty(4, 5, 31)
    fastbn.batch_norm_train(x, None, None, mean.numpy(), var.numpy(), out=out.numpy())
    want = torch.nn.BatchNorm1d(5)
    close(out.numpy(), want(torch.from_numpy(x)), x.dtype)
    close(mean.numpy(), want.running_mean, x.dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_more_accurate_at_a_large_mean(layout, rng):
    """At mean 1e4 and deviation 1 PyTorch is off by 9e-4 (channels first) or 1e-2 (channels last)."""
    x = (rng.standard_normal((16, 8, 28, 28)) + 1e4).astype(np.float32)
    t = torch.from_numpy(x).contiguous(memory_format=layout)
    want = reference.apply(x, *reference.statistics(x))
    ours = np.abs(fastbn.batch_norm_train(t.numpy())[0] - want).max()
    theirs = np.abs(values(torch.nn.functional.batch_norm(t, None, None, training=True)) - want).max()
    assert ours <= 1e-6 and ours < theirs / 100


def test_constant_channels_are_exact_where_torch_is_not():
    x = np.full((8, 3, 28, 28), 123.456, np.float32)
    assert (fastbn.batch_norm_train(x)[0] == 0).all()
    theirs = torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, training=True)
    assert theirs.abs().max() >= 0


def test_large_values_do_not_overflow(rng):
    """PyTorch's float32 variance overflows at 1e19 and its output is all zeros."""
    x = (rng.standard_normal((8, 3, 300)) * 1e19).astype(np.float32)
    assert abs(fastbn.batch_norm_train(x)[0].std() - 1) < 1e-5
