"""``fastbn.torch.batch_norm`` under autograd: second derivatives, what it keeps and sees, hooks, threads."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fastbn import recycled  # noqa: E402
from fastbn.torch import batch_norm  # noqa: E402
from tests.torch_cases import DTYPES, LAYOUTS, close, dense, gappy, last, make, name, ours, theirs  # noqa: E402


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_gradcheck(training, fused):
    for layout, shape in ((dense, (4, 3)), (last, (2, 3, 2, 2)), (gappy, (3, 2, 4))):
        x, r, w, b, m, v = make(shape, torch.float64, layout)
        leaves = [t.requires_grad_() for t in (x, r, w, b)]

        def call(x, r, w, b, m=m, v=v):
            statistics = (m, v) if not training else (None, None)
            return ours(x, r if fused else None, w, b, *statistics, training, "relu")

        leaves = leaves if fused else [t.detach() if t is r else t for t in leaves]
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


def test_a_gradient_penalty_is_pytorchs():
    """Also where the gradient that comes in is constant, from which ``once_differentiable`` would have made a zero."""
    found = []
    for call in (ours, theirs):
        x, r, w, b, m, v = (t.requires_grad_(i < 4) for i, t in enumerate(make((6, 5), torch.float64)))
        (g,) = torch.autograd.grad(call(x, r, w, b, m, v, True, "relu").sum(), x, create_graph=True)
        g.square().sum().backward()
        found.append((g.detach(), x.grad, w.grad))
    assert found[1][2].abs().max() > 1e-30
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("create", [True, False])
def test_arguments_that_were_computed_from_each_other(create):
    """A layer that is used twice, a weight made from the input, one tensor as weight and bias."""
    x, _, w, b, _, _ = (t.requires_grad_(i < 4) for i, t in enumerate(make((6, 3), torch.float64)))

    def net(call):
        y = call(x, None, w, b, None, None, True, None).tanh()
        y = call(y, None, y.mean(0), b, None, None, True, None)
        return call(y, None, b, b, None, None, True, None).pow(3).sum()

    found = [torch.autograd.grad(net(call), (x, w, b), create_graph=create) for call in (ours, theirs)]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("absent", [2, 3])
def test_second_derivatives_of_one_parameter_alone(absent):
    x, _, w, b, _, _ = (t.requires_grad_(i < 4) for i, t in enumerate(make((6, 3), torch.float64)))
    leaves = (x, b) if absent == 2 else (x, w)

    def call(x, p):
        return batch_norm(x, None, None, *((None, p) if absent == 2 else (p, None)), training=True)

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


def test_strides_that_pytorchs_own_gradient_gets_wrong():
    x, g = torch.randn(4, 6, 5, 1, requires_grad=True), torch.randn(4, 5, 1, 6).permute(0, 3, 1, 2)
    y = batch_norm(x, None, None, torch.randn(6, 2)[:, 0], None, True)
    (want,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (got,) = torch.autograd.grad(y, x, g, create_graph=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (negative,) = torch.autograd.grad(y, x, torch._neg_view(g))
    torch.testing.assert_close(negative, -want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, the first time in a process
def test_a_tangent_of_the_gradient():
    x, g, w, b, _, _ = make((6, 5), torch.float32)
    x.requires_grad_()
    tangents = []
    for call in (ours, theirs):
        y = call(x, None, w, b, None, None, True, None)
        with torch.autograd.forward_ad.dual_level():
            (dx,) = torch.autograd.grad(y, x, torch.autograd.forward_ad.make_dual(g, g * g))
            tangents.append(torch.autograd.forward_ad.unpack_dual(dx).tangent.clone())
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_hooks_keep_the_parameters_of_the_forward_pass(activation):
    x, g, w, b, _, _ = make((6, 5), torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y, z = (call(x, None, w, b, None, None, True, activation) for call in (ours, theirs))
    with torch.no_grad():
        w.mul_(3)
        b.add_(1)
    for got, want in zip(torch.autograd.grad(y, leaves, g), torch.autograd.grad(z, leaves, g), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_bias_may_change_where_backward_does_not_need_it():
    x, g, w, b, _, _ = make((6, 5), torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = batch_norm(x, None, None, w, b, True)
    want = torch.autograd.grad(y, leaves, g, retain_graph=True)
    with torch.no_grad():
        b.add_(1)
    for got, first in zip(torch.autograd.grad(y, leaves, g, create_graph=True), want, strict=True):
        torch.testing.assert_close(got, first, rtol=1e-4, atol=1e-5)


def test_running_statistics_have_no_gradient():
    x, _, w, b, m, v = make((6, 5), torch.float32)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_mean'"):
        batch_norm(x, m.requires_grad_(), v, w.requires_grad_(), b)


def test_backward_twice():
    x, r, w, b, m, v = make((3, 5, 7, 9), torch.float32, last)
    x.requires_grad_()
    y = ours(x, r, w, b, m, v, True, "relu")
    first, second = (torch.autograd.grad(y, x, r, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.autograd.grad(y, x, r)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, r)


@pytest.mark.parametrize("changed", ["input", "weight", "y"])
def test_changes_of_what_backward_needs_are_seen(changed):
    x, r, w, b, m, v = make((6, 5), torch.float32)
    weight = w.clone().requires_grad_()
    inner = x.clone()
    y = ours(inner, r, weight, b, m, v, True, "relu")
    with torch.no_grad():
        {"input": inner, "weight": weight, "y": y}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "layout"), [((6, 5), dense), ((3, 16, 1, 1), last), ((3, 1, 4, 5), last)], ids=name)
def test_y_may_change_where_backward_does_not_need_it(shape, layout, dtype):
    x, _, w, b, m, v = make(shape, dtype, layout)
    y = ours(x.requires_grad_(), None, w, b, m, v, True, None)
    torch.nn.functional.relu(y, inplace=True).sum().backward()


def test_memory_is_autograds_to_keep():
    """What was saved goes with backward, though the graph's node stays: in a list of losses, for instance."""
    x, r, w, b, m, v = make((6, 5), torch.float32)
    y = ours(x, r, w.requires_grad_(), b, m, v, True, "relu")
    node, memory = y.grad_fn, weakref.ref(x)
    y.sum().backward()
    del x, y
    assert memory() is None and node.saved.mean.shape == (5,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=name)
def test_signs_are_kept_instead_of_large_outputs(shape, layout, training, dtype, large):
    x, r, w, b, m, v = make(shape, dtype, layout)
    for t in (x, r, w, b):
        t.requires_grad_()
    seed = torch.randn(shape, dtype=torch.float64).to(dtype)
    found = []
    for changed in (False, True):
        y = ours(x, r, w, b, m, v, training, "relu")
        signs, memory = y.grad_fn.saved_tensors[3], weakref.ref(y.grad_fn.saved_tensors[3])
        assert signs.dtype is torch.uint8 and signs.numel() < x.numel() // 8 + 64
        if changed:
            with torch.no_grad():
                y.fill_(-1)
        found.append(torch.autograd.grad(y, (x, r, w, b), seed, retain_graph=not changed))
        del signs
    assert memory() is None
    y = ours(x, r, w, b, m, v, training, "relu")
    found.append(torch.autograd.grad(y, (x, r, w, b), seed, create_graph=True))
    for kernel, again, graph in zip(*found, strict=True):
        assert torch.equal(kernel, again)
        close(graph.detach(), kernel, dtype, "differentiable")


def test_signs_in_memory_of_their_own_are_moved_by_hooks(large):
    x, r, w, b, m, v = make((3, 5, 7, 9), torch.float32, last)
    x.requires_grad_()
    expected = torch.autograd.grad(ours(x, r, w, b, m, v, True, "relu"), x, r)[0]
    with torch.autograd.graph.save_on_cpu():
        y = ours(x, r, w, b, m, v, True, "relu")
    assert torch.equal(torch.autograd.grad(y, x, r)[0], expected)


@pytest.mark.parametrize("create", [False, True])
@pytest.mark.parametrize("odd", [lambda n: slice(3, 3 + n), lambda n: slice(1, None, 3)], ids=["unaligned", "strided"])
def test_signs_that_hooks_put_at_odd_places(odd, create, large):
    def back(t):
        if t.dtype is not torch.uint8:
            return t
        return torch.empty(3 * t.numel() + 3, dtype=torch.uint8)[odd(t.numel())][: t.numel()].copy_(t)

    x, r, w, b, m, v = make((3, 5, 700), torch.float32)
    x.requires_grad_()
    expected = torch.autograd.grad(ours(x, r, w, b, m, v, True, "relu"), x, r)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), back):
        y = ours(x, r, w, b, m, v, True, "relu")
    close(torch.autograd.grad(y, x, r, create_graph=create)[0].detach(), expected, torch.float32, "moved")


@pytest.mark.parametrize("create", [False, True])
def test_a_checkpoint_whose_second_output_lies_elsewhere(create, large, monkeypatch):
    """Its signs then have another phase; their shape must be the first one's."""
    from torch.utils.checkpoint import checkpoint

    places = iter([1, 15, 0, 9] * 9)
    own = recycled.empty
    monkeypatch.setattr(
        recycled, "empty", lambda *kind: own(*kind) if kind[1].itemsize == 1 else _at(next(places), *kind)
    )
    x, r, w, b, m, v = make((3, 5, 128), torch.float32)
    x.requires_grad_()
    for _ in range(2):
        expected = torch.autograd.grad(ours(x, r, w, b, m, v, True, "relu"), x, r)[0]
        y = checkpoint(ours, x, r, w, b, m, v, True, "relu", use_reentrant=False)
        close(torch.autograd.grad(y, x, r, create_graph=create)[0].detach(), expected, torch.float32, "checkpoint")


def _at(place, shape, dtype):
    """Return memory that begins so many elements into a line."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + 128, np.uint8)
    return np.ndarray(shape, dtype, memory.data, -memory.ctypes.data % 64 + place * dtype.itemsize)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("shape", "layout"), [((3, 5, 7, 9), dense), ((3, 5, 7, 9), last), ((2, 5, 3, 4, 5), last)])
def test_many_gradients_at_once(shape, layout, fused, activation):
    x, r, w, b, _, _ = make(shape, torch.float64, layout)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = ours(x, r if fused else None, w, b, None, None, True, activation)
    seeds = torch.randn(2, *shape, dtype=torch.float64)

    def gradients(seed, **options):
        return torch.autograd.grad(y, leaves, seed, retain_graph=True, **options)

    want = [torch.stack(each) for each in zip(*map(gradients, seeds), strict=True)]
    for found in (gradients(seeds, is_grads_batched=True), torch.vmap(gradients)(seeds)):
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", [dense, last])
@pytest.mark.parametrize("fused", [True, False])
def test_hooks_that_move_what_is_saved(layout, fused):
    """``save_on_cpu`` gives tensors back in C order."""
    x, r, w, b, m, v = make((3, 5, 7, 9), torch.float32, layout)
    x.requires_grad_()
    grads = []
    for hook in (False, True):
        statistics = m.clone(), v.clone()
        if hook:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
                y = ours(x, r if fused else None, w, b, *statistics, True, "relu")
        else:
            y = ours(x, r if fused else None, w, b, *statistics, True, "relu")
        grads.append(torch.autograd.grad(y, x, r)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    x, _, w, b, _, _ = make((6, 5, 8), torch.float32)
    x.requires_grad_()

    def block(x):
        return torch.sigmoid(batch_norm(x * 2, None, None, w, b, True, activation="relu"))

    (want,) = torch.autograd.grad(block(x).sum(), x)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, want)


def test_threads():
    arguments = [make((64, 5, 33), torch.float32, seed=i) for i in range(8)]
    want, found = [], [None] * 8

    def work(i):
        x, r, w, b, m, v = (t.clone() for t in arguments[i])
        x.requires_grad_()
        y = ours(x, r, w, b, m, v, True, "relu")
        return (*torch.autograd.grad(y, x, r), m)

    want = [work(i) for i in range(8)]
    workers = [threading.Thread(target=lambda i=i: found.__setitem__(i, work(i))) for i in range(8)]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    assert all(torch.equal(a, b) for f, g in zip(found, want, strict=True) for a, b in zip(f, g, strict=True))
