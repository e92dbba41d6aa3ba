"""``fastbn.torch.batch_norm``: PyTorch's results and gradients, no copies, and what PyTorch does to a function."""

from __future__ import annotations

import numpy as np
import pytest

from fastbn import ArgumentTypeError, ArgumentValueError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from fastbn.torch import batch_norm, tensors  # noqa: E402
from tests.torch_cases import DTYPES, LAYOUTS, close, dense, last, make, name, ours, swapped, theirs  # noqa: E402

NAMES = ("input", "residual", "weight", "bias")


def compare(shape, dtype, layout, training, activation, fused, absent=()):
    x, r, w, b, m, v = make(shape, dtype, layout)
    r = r if fused else None
    w, b = (None if n in absent else t for n, t in (("weight", w), ("bias", b)))
    found = []
    for call, kind in ((ours, dtype), (theirs, torch.float64)):
        leaves = [
            None if t is None else t.detach().to(kind if t.dtype is dtype else torch.float64).clone() for t in (x, r)
        ]
        leaves = [None if t is None else layout(t) for t in leaves]
        parameters = [None if t is None else t.detach().clone().to(torch.float64 if kind is torch.float64 else t.dtype)
                      for t in (w, b, m, v)]  # fmt: skip
        sources = [t for t in (*leaves, *parameters[:2]) if t is not None]
        for t in sources:
            t.requires_grad_()
        y = call(*leaves, *parameters, training, activation)
        torch.manual_seed(1)
        grads = torch.autograd.grad(y, sources, torch.randn(shape).to(kind))
        found.append((y, grads, parameters[2:], leaves[0]))
    (y, grads, running, own), (z, want, moved, _) = found
    close(y.detach(), z.detach(), dtype, "y")
    for g, h, t in zip(
        grads, want, [n for n, t in zip(NAMES, (x, r, w, b), strict=True) if t is not None], strict=True
    ):
        close(g, h, dtype, t)
    for a, c in zip(running, moved, strict=True):
        close(a, c, torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype, "running")
    return y, grads, own


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_the_same_as_pytorch(shape, layout, dtype, training):
    for activation, fused in ((None, False), ("relu", False), (None, True), ("relu", True)):
        if dtype in (torch.float16, torch.bfloat16) and activation and fused:
            continue  # y rounds before the sign is looked at: either gradient is right
        y, grads, x = compare(shape, dtype, layout, training, activation, fused)
        assert y.dtype is dtype
        if tensors.dense(x) is x:
            assert y.stride() == grads[0].stride() == x.stride()
        plain = torch.nn.functional.batch_norm(x.detach(), None, None, training=True)
        if layout is not swapped:
            for memory in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
                if memory is torch.contiguous_format or x.dim() == {torch.channels_last: 4}.get(memory, 5):
                    assert y.is_contiguous(memory_format=memory) == plain.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_absent_parameters(absent, training):
    compare((6, 5, 8), torch.float32, dense, training, None, False, absent)


def test_statistics_of_the_batch_alone():
    x, _, w, b, _, _ = make((6, 5, 8), torch.float32)
    close(
        batch_norm(x, None, None, w, b, True), torch.nn.functional.batch_norm(x, None, None, w, b, True), x.dtype, "y"
    )


def test_only_what_is_asked_for():
    x, r, w, b, m, v = make((6, 5), torch.float32)
    for asked in range(1, 16):
        leaves = [t.clone().requires_grad_(bool(asked >> i & 1)) for i, t in enumerate((x, r, w, b))]
        ours(*leaves, m, v, True, "relu").sum().backward()
        assert [t.grad is not None for t in leaves] == [t.requires_grad for t in leaves]


def test_nothing_is_kept_without_gradients():
    x, r, w, b, m, v = make((6, 5), torch.float32)
    w.requires_grad_()
    for training in (True, False):
        with torch.no_grad():
            assert ours(x, r, w, b, m, v, training, "relu").grad_fn is None
        with torch.inference_mode():
            assert ours(x, r, w, b, m, v, training, "relu").is_inference()
        assert ours(x, r, w.detach(), b, m, v, training, "relu").grad_fn is None
        assert ours(x, r, w, b, m, v, training, "relu").requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [dense, last])
def test_kernels_get_the_tensors_memory(dtype, layout, monkeypatch):
    """No copies: what crosses to NumPy and back are the same addresses."""
    x, r, w, b, m, v = make((3, 5, 7, 9), dtype, layout)
    assert tensors.dense(x) is x
    for t in (x, w):
        a = tensors.array(t)
        assert a.ctypes.data == t.data_ptr() and a.dtype.name == str(t.dtype).removeprefix("torch.")
        assert tensors.tensor(a, t).data_ptr() == t.data_ptr() and tensors.tensor(a, t).dtype is t.dtype
    monkeypatch.setattr(torch.Tensor, "clone", None)
    monkeypatch.setattr(np, "array", None)
    x.requires_grad_()
    y = ours(x, r, w, b, m, v, True, "relu")
    torch.autograd.grad(y, x, r)


def test_empty_batches_leave_the_statistics_alone():
    for shape in ((0, 5), (3, 5, 0)):
        x, r, w, b, m, v = make(shape, torch.float32)
        w.requires_grad_()
        before = m.clone(), v.clone()
        y = ours(x, r, w, b, m, v, True, "relu")
        y.sum().backward()
        assert y.shape == shape and torch.equal(m, before[0]) and torch.equal(v, before[1])
        assert torch.equal(w.grad, torch.zeros(5))


def test_more_accurate_at_a_large_mean():
    x = torch.randn((16, 8, 28, 28), generator=torch.Generator().manual_seed(0)) + 1e4
    want = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    mine = (batch_norm(x, None, None, training=True) - want).abs().max()
    other = (torch.nn.functional.batch_norm(x, None, None, training=True) - want).abs().max()
    assert mine <= 1e-6 and mine < other / 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_half_parameters_are_pytorchs(dtype, training):
    x, _, w, b, m, v = (t.to(dtype) for t in make((6, 5, 8), dtype))
    want = theirs(x, None, w, b, m.clone(), v.clone(), training, "relu")
    assert torch.equal(ours(x, None, w, b, m, v, training, "relu"), want)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # by forward_ad, once
def test_what_pytorch_must_see_goes_to_its_operator():
    x, r, w, b, m, v = make((6, 5, 8), torch.float32)
    batch = torch.stack([x, x + 1])
    got = torch.func.vmap(lambda x: batch_norm(x, None, None, w, b, True))(batch)
    torch.testing.assert_close(got[1], batch_norm(x + 1, None, None, w, b, True))

    def loss(w, call):
        return call(x, r, w, b, m, v, False, "relu").square().sum()

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(loss)(w, ours), transform(loss)(w, theirs))
    tangents = [torch.func.jvp(lambda w, f=f: loss(w, f), (w,), (b,))[1] for f in (ours, theirs)]
    torch.testing.assert_close(*tangents)
    with torch.autograd.forward_ad.dual_level():
        y = ours(torch.autograd.forward_ad.make_dual(x, r), None, w, b, m, v, False, None)
        assert torch.autograd.forward_ad.unpack_dual(y).tangent is not None
    assert ours(x.to("meta"), None, *(t.to("meta") for t in (w, b, m, v)), False, None).device.type == "meta"
    y = batch_norm(x.requires_grad_(), m, v, w, b)
    both = [torch.autograd.grad(y, x, torch.stack([r, r + 1]), is_grads_batched=True, retain_graph=True)[0]]
    both.append(torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in (r, r + 1)]))
    torch.testing.assert_close(*both)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traces_hold_the_operator_not_its_result():
    x, _, w, b, m, v = make((6, 5, 8), torch.float32)
    traced = torch.jit.trace(lambda x: ours(x, None, w, b, m, v, False, "relu"), (x,))
    torch.testing.assert_close(traced(x + 1), ours(x + 1, None, w, b, m, v, False, "relu"))


def test_recorded_operations_are_the_operator_not_its_result():
    from torch.fx.experimental.proxy_tensor import make_fx

    x, _, w, b, m, v = make((6, 5, 8), torch.float32)
    recorded = make_fx(lambda x: ours(x, None, w, b, m, v, False, "relu"))(x)
    torch.testing.assert_close(recorded(x + 1), ours(x + 1, None, w, b, m, v, False, "relu"))


def test_parameters_may_go_on_being_resized():
    """As sharded models do with the memory of parameters that they have gathered; ``Tensor.numpy`` rules it out."""
    x, _, w, b, m, v = make((6, 5), torch.float32)
    w.requires_grad_()
    batch_norm(x, m, v, w, b, True).sum().backward()
    assert w.untyped_storage().resizable() and b.untyped_storage().resizable()


WRONG = {
    "input: expected a torch.Tensor, got ndarray": {"input": np.ones((6, 5), np.float32)},
    "input: expected a torch.Tensor, got NoneType": {"input": None},
    "input: expected an array of float32": {"input": torch.ones(6, 5, dtype=torch.int64)},
    "input: expected an array of rank >= 2, got shape (5,)": {"input": torch.ones(5)},
    "input: expected more than 1 value per channel when training": {"input": torch.ones(1, 5), "residual": None},
    "weight: expected one number per channel, shape (5,), got shape (4,)": {"weight": torch.ones(4)},
    "weight: expected float32": {"weight": torch.ones(5, dtype=torch.float64)},
    "weight: expected a torch.Tensor, got list": {"weight": [1.0] * 5},
    "bias: expected float32": {"bias": torch.ones(5, dtype=torch.float16)},
    "running_mean: expected one number per channel": {"running_mean": torch.ones(5, 1)},
    "running_var: expected both running statistics or neither": {"running_var": None},
    "running_var: expected float32": {"running_var": torch.ones(5, dtype=torch.bfloat16)},
    "residual: expected the shape of input, (6, 5), got (6, 1)": {"residual": torch.ones(6, 1)},
    "residual: expected the dtype of input, float32, got float64": {"residual": torch.ones(6, 5, dtype=torch.float64)},
    "eps: expected a number > 0, got 0.0": {"eps": 0.0},
    "momentum: expected a number, got NoneType": {"momentum": None},
    'activation: expected None or "relu", got \'x\'': {"activation": "x"},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("learning", [True, False])
def test_errors_name_the_argument_before_anything_is_written(message, learning):
    x, r, w, b, m, v = make((6, 5), torch.float32)
    arguments = {"input": x, "running_mean": m, "running_var": v, "weight": w.requires_grad_(learning), "bias": b,
                 "training": True, "residual": r}  # fmt: skip
    before = m.clone(), v.clone()
    with pytest.raises((ArgumentValueError, ArgumentTypeError)) as error:
        batch_norm(**arguments | WRONG[message])
    assert str(error.value).startswith(message)
    assert torch.equal(m, before[0]) and torch.equal(v, before[1])


def test_statistics_are_needed_in_evaluation():
    with pytest.raises(ValueError, match="running_mean"):
        batch_norm(torch.ones(6, 5), None, None)


def test_import_without_torch_says_how_to_get_it(python):
    code = """
import sys
import fastbn
assert "torch" not in sys.modules
sys.modules["torch"] = None
try:
    import fastbn.torch
except ImportError as error:
    assert 'pip install "fastbn[torch]"' in str(error), error
else:
    raise AssertionError
"""
    python(code)
