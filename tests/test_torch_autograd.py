"""``fastbn.torch.batch_norm`` under autograd: second derivatives, what it keeps and sees, hooks, threads."""

from __future__ import annotations

import threading
import weakref

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fastbn.torch import batch_norm  # noqa: E402
from tests.torch_cases import DTYPES, dense, gappy, last, make, ours, theirs  # noqa: E402


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
@pytest.mark.parametrize(("shape", "layout"), [((6, 5), dense), ((3, 16, 1, 1), last), ((3, 1, 4, 5), last)], ids=str)
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
