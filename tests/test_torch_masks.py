"""Masks and lengths for tensors: as packing, under autograd, in both memory orders, by kernels and PyTorch's own."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import fastbn.torch as ft  # noqa: E402
from fastbn.torch import masked  # noqa: E402

N, C, T = 5, 6, 40
LENGTHS = [40, 3, 0, 17, 22]


def keep(lengths=LENGTHS):
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def draw(dtype=torch.float32, last=False):
    torch.manual_seed(0)
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.randn(N, T, C, dtype=dtype).transpose(1, 2) if last else torch.randn(N, C, T, dtype=dtype)
    return (
        x.requires_grad_(),
        torch.randn_like(x).requires_grad_(),
        torch.randn(C, dtype=kind, requires_grad=True),
        torch.randn(C, dtype=kind, requires_grad=True),
    )


def packed(x, residual, weight, bias, mean, var, training, valid, activation):
    """Pack the valid values, normalise them with PyTorch's operator, and put them back."""
    rows = x.transpose(1, 2)[valid]
    y = torch.nn.functional.batch_norm(rows.to(weight.dtype), mean, var, weight, bias, training)
    y = y if residual is None else y + residual.transpose(1, 2)[valid]
    y = torch.relu(y) if activation else y
    found = torch.zeros(N, T, C, dtype=x.dtype)
    found[valid] = y.to(x.dtype)
    return found.transpose(1, 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("activation", "with_residual"), [(None, False), ("relu", True), (None, True), ("relu", False)]
)
@pytest.mark.parametrize("lengths", [LENGTHS, [40] * 5], ids=["some", "all"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_as_packed(dtype, last, lengths, activation, with_residual, training):
    x, residual, weight, bias = draw(dtype, last)
    residual = residual if with_residual else None
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    results, g = [], torch.randn_like(x)
    for by in ("lengths", "mask", "native", "packed"):
        moving = torch.full((C,), 0.5, dtype=weight.dtype), torch.full((C,), 2.0, dtype=weight.dtype)
        if by == "packed":
            y = packed(x, residual, weight, bias, *moving, training, keep(lengths), activation)
        elif by == "native":
            relu = True if activation else None
            y = masked.native(x, residual, weight, bias, *moving, training, 0.1, 1e-5, relu, None, lengths)
        else:
            which = {"lengths": torch.tensor(lengths)} if by == "lengths" else {"mask": keep(lengths)}
            y = ft.batch_norm(x, *moving, weight, bias, training, activation=activation, residual=residual, **which)
            assert y.stride() == x.stride()
        results.append([y, *moving, *torch.autograd.grad(y, inputs, g)])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for found in results[:-1]:
        for a, b in zip(found, results[-1], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)
    assert not results[0][0].masked_select(~keep(lengths)[:, None]).any()


@pytest.mark.parametrize("last", [False, True])
def test_nothing_leaks(last):
    x, _, weight, bias = draw(last=last)
    dirty = torch.where(keep()[:, None], x, torch.nan).detach()
    assert dirty.stride() == x.stride()
    dirty.requires_grad_()
    found = []
    for t in (x, dirty):
        y = ft.batch_norm(t, None, None, weight, bias, True, lengths=LENGTHS)
        found.append([y, *torch.autograd.grad(y.square().sum(), (t, weight, bias))])
    assert all(map(torch.equal, *found))


def test_gradients_of_gradients():
    x = draw(torch.float64)[0].detach()[:3, :2, :5].clone().requires_grad_()
    mask = torch.tensor([[True, False, True, True, False], [False] * 5, [True] * 5])

    def call(t):
        return ft.batch_norm(t, None, None, training=True, mask=mask)

    assert torch.autograd.gradcheck(call, x) and torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.uint16)])
def test_lengths_of_the_forward_pass(kind):
    """They may change before gradients are taken, be these PyTorch's."""
    x, g = draw()[0].detach().requires_grad_(), torch.randn(N, C, T)
    lengths = kind(LENGTHS)
    y = ft.batch_norm(x, None, None, training=True, lengths=lengths)
    (want,) = torch.autograd.grad(y, x, g, retain_graph=True)
    lengths[0] = 2
    (got,) = torch.autograd.grad(y, x, g, create_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_modules_count_batches_with_values():
    x = draw()[0].detach()
    module = ft.BatchNorm1d(C, momentum=None)
    module(x, lengths=torch.tensor(LENGTHS))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert int(module.num_batches_tracked) == 1
    y = module(x, mask=torch.zeros(N, T, dtype=torch.bool))
    assert not y.any() and all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    y = module.eval()(x, lengths=LENGTHS)
    torch.testing.assert_close(y, module(x) * keep()[:, None])


def test_images_and_rows():
    x = torch.randn(4, 3, 5, 6)
    mask = torch.rand(4, 5, 6) > 0.4
    for t in (x, x.to(memory_format=torch.channels_last)):
        y = ft.BatchNorm2d(3)(t, mask=mask)
        want = torch.nn.functional.batch_norm(t.movedim(1, -1)[mask], None, None, training=True)
        torch.testing.assert_close(y.movedim(1, -1)[mask], want)
        assert y.stride() == t.stride()
    rows, some = torch.randn(8, 3), torch.arange(8) > 2
    torch.testing.assert_close(
        ft.BatchNorm1d(3)(rows, mask=some)[some], torch.nn.functional.batch_norm(rows[some], None, None, training=True)
    )


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"mask": np.ones((N, T), bool)}, TypeError, "mask"),
        ({"mask": torch.ones(N, T)}, TypeError, "mask"),
        ({"mask": torch.ones(N, T + 1, dtype=torch.bool)}, ValueError, "mask"),
        ({"lengths": [1, 2]}, ValueError, "lengths"),
        ({"lengths": torch.ones(N)}, TypeError, "lengths"),
        ({"lengths": [T + 1] * N}, ValueError, "lengths"),
        ({"lengths": LENGTHS, "mask": keep()}, ValueError, "mask, lengths"),
        ({"lengths": [1, 0, 0, 0, 0]}, ValueError, "input"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # parameters of half types are PyTorch's
def test_errors_name_the_argument(options, error, named, dtype):
    module, x = ft.BatchNorm1d(C).to(dtype), draw()[0].detach().to(dtype)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(error, match=rf"^{named}: expected"):
        module(x, **options)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("options", [{"lengths": torch.tensor(LENGTHS)}, {"mask": keep()}, {"lengths": LENGTHS}])
def test_tensors_without_numbers(options):
    from torch._subclasses import FakeTensorMode

    x = draw()[0].detach()
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert ft.BatchNorm1d(C).to("meta")(x.to("meta"), **meta).shape == x.shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        assert ft.batch_norm(mode.from_tensor(x), None, None, training=True, **fake).shape == x.shape


def test_large_sequences_are_read_where_they_lie():
    """The kernels of ``launch_masked`` under autograd, in both memory orders."""
    x = torch.randn(8, 700, 64)
    lengths = torch.randint(300, 700, (8,))
    found = []
    for t in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        t = t.clone(memory_format=torch.preserve_format).requires_grad_()
        y = ft.batch_norm(t, None, None, training=True, lengths=lengths)
        found.append([y, torch.autograd.grad(y.square().sum() + y.exp().sum(), t)[0]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
