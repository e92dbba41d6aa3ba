"""``fastbn.torch``'s modules: PyTorch's in everything but speed, and models converted to them and back."""

from __future__ import annotations

import copy
import io
import pickle
import shutil

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from torch import nn  # noqa: E402

import fastbn.torch as ft  # noqa: E402

PAIRS = [
    (ft.BatchNorm1d, nn.BatchNorm1d, (6, 5)), (ft.BatchNorm1d, nn.BatchNorm1d, (6, 5, 8)),
    (ft.BatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 7)), (ft.BatchNorm3d, nn.BatchNorm3d, (3, 5, 2, 3, 4)),
]  # fmt: skip
OPTIONS = [
    {}, {"affine": False}, {"momentum": None}, {"momentum": 0.7}, {"track_running_stats": False}, {"bias": False},
    {"affine": False, "track_running_stats": False}, {"eps": 0.1, "momentum": None, "track_running_stats": False},
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, bias=False),
        nn.Sequential(nn.BatchNorm2d(8, momentum=None), nn.ReLU()), nn.Flatten(), nn.Linear(8 * 6 * 6, 10),
        nn.BatchNorm1d(10, affine=False),
    )  # fmt: skip


def same_state(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("own", "other", "shape"), PAIRS)
def test_three_steps_of_training_then_evaluation(own, other, shape, options):
    ours, theirs = own(5, **options), other(5, **options)
    same_state(ours, theirs)
    assert repr(ours) == repr(theirs) and isinstance(ours, other)
    for mode in (True, True, True, False, False, True):
        ours.train(mode), theirs.train(mode)
        x = torch.randn(shape) * 2 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), theirs(b)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        g = torch.randn(shape)
        y.backward(g), z.backward(g)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
        same_state(ours, theirs)


@pytest.mark.parametrize("mode", [True, False])
def test_activation_and_residual(mode):
    ours, theirs = ft.BatchNorm2d(5, activation="relu").train(mode), nn.BatchNorm2d(5).train(mode)
    x, r = torch.randn(4, 5, 6, 7), torch.randn(4, 5, 6, 7)
    torch.testing.assert_close(ours(x, r), torch.relu(theirs(x) + r))
    assert "activation='relu'" in repr(ours)
    with pytest.raises(ValueError, match="activation"):
        ft.BatchNorm2d(5, activation="gelu")


def test_refusals_leave_the_state_alone():
    bn = ft.BatchNorm2d(5)
    state = copy.deepcopy(bn.state_dict())
    for x, error in (
        (torch.ones(4, 5), ValueError), (torch.ones(1, 5, 1, 1), ValueError), (torch.ones(4, 6, 2, 2), ValueError),
        (torch.ones(4, 5, 2, 2).double(), TypeError), (torch.ones(4, 5, 2, 2).long(), TypeError),
    ):  # fmt: skip
        with pytest.raises(error):
            bn(x)
    torch.testing.assert_close(dict(bn.state_dict()), dict(state))


def test_converted_modules_are_the_same_objects():
    model = network()
    objects = list(model.modules()), list(model.parameters()), list(model.buffers()), copy.deepcopy(model.state_dict())
    model[1].eval()
    model[1].register_forward_hook(lambda *_: calls.append(1))
    calls = []
    assert ft.convert(model) is model
    assert [type(m) for m in (model[1], model[4][0], model[7])] == [ft.BatchNorm2d, ft.BatchNorm2d, ft.BatchNorm1d]
    for before, after in zip(objects, (model.modules(), model.parameters(), model.buffers()), strict=False):
        assert all(a is b for a, b in zip(before, after, strict=True))
    assert not model[1].training and model[4][0].momentum is None and not model[7].affine
    model.eval()(torch.randn(2, 3, 10, 10))
    assert calls == [1]
    torch.testing.assert_close(dict(model.state_dict()), dict(objects[3]))
    assert ft.revert(model) is model and type(model[1]) is nn.BatchNorm2d and type(model[7]) is nn.BatchNorm1d
    assert "activation" not in vars(model[1])


def test_only_exact_types_are_converted():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Own(5), nn.SyncBatchNorm(5), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(5))
    types = [type(m) for m in model]
    assert [type(m) for m in ft.convert(model)] == types
    assert type(ft.convert(nn.BatchNorm3d(4))) is ft.BatchNorm3d
    for wrong in (None, torch.ones(3), nn.BatchNorm1d):
        for call in (ft.convert, ft.revert):
            with pytest.raises(TypeError, match=r"module: expected a torch.nn.Module"):
                call(wrong)
    fused = nn.Sequential(ft.BatchNorm1d(5), ft.BatchNorm1d(5, activation="relu"))
    with pytest.raises(ValueError, match="activation"):
        ft.revert(fused)
    assert type(fused[0]) is ft.BatchNorm1d


def test_modules_that_are_not_converted_are_not_touched():
    """Some forward every assignment to a module they wrap."""

    class Wrapper(nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

        def __setattr__(self, name, value):
            if name == "__class__":
                raise AttributeError(name)
            super().__setattr__(name, value)

    model = Wrapper(nn.Sequential(nn.BatchNorm2d(3)))
    assert type(ft.convert(model).wrapped[0]) is ft.BatchNorm2d
    assert type(ft.revert(model).wrapped[0]) is nn.BatchNorm2d


def test_recomputed_batches_count_as_pytorchs():
    """A checkpoint stops recomputing where it has all it needs, in the midst of the last module."""
    from torch.utils.checkpoint import checkpoint

    found = []
    for kind in (ft.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4, momentum=None))
        for i in range(1, 4):
            x = (torch.randn(8, 3, 9, 9) * i + i).requires_grad_()
            checkpoint(model, x, use_reentrant=False).square().sum().backward()
        found.append(model[1])
    assert int(found[0].num_batches_tracked) == 6
    same_state(*found)


def test_without_initialisation():
    assert type(nn.utils.skip_init(ft.BatchNorm2d, 3)) is ft.BatchNorm2d


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_network_learns_the_same(memory):
    """Converted after its optimizer was made; the losses agree to rounding."""
    theirs = network().to(memory_format=memory)
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (ours, theirs)]
    ft.convert(ours)
    losses = []
    x, target = torch.randn(16, 3, 10, 10).contiguous(memory_format=memory), torch.arange(16) % 10
    for _ in range(10):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-2] < losses[0] / 2
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-3)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2, atol=1e-2)


def test_copies_and_pickles():
    model = ft.convert(network())
    model.append(ft.BatchNorm1d(10, activation="relu"))
    x = torch.randn(4, 3, 10, 10)
    model(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()] and twin[-1].activation == "relu"
        torch.testing.assert_close(twin.eval()(x), model.eval()(x), rtol=0, atol=0)
    fresh = network()
    fresh.append(nn.BatchNorm1d(10))
    fresh.load_state_dict(model.state_dict())
    model.load_state_dict(fresh.state_dict())


def test_update_bn():
    ours, theirs = ft.convert(network()), network()
    theirs.load_state_dict(ours.state_dict())
    batches = [torch.randn(8, 3, 10, 10) + i for i in range(3)]
    for model in (ours, theirs):
        torch.optim.swa_utils.update_bn(batches, model)
    same_state(ours, theirs)
    assert ours[1].momentum == 0.1 and ours[1].num_batches_tracked == 3


def test_functional_call_and_ensembles():
    model = ft.convert(network())
    x = torch.randn(4, 3, 10, 10)
    own = {k: v + 0.5 if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}
    before = copy.deepcopy(model.state_dict())
    y = torch.func.functional_call(model, own, (x,))
    torch.testing.assert_close(dict(model.state_dict()), dict(before))
    assert own["1.num_batches_tracked"] == 1 and not torch.equal(own["1.running_mean"], before["1.running_mean"] + 0.5)
    assert not torch.equal(y, model(x))
    models = [ft.convert(network()).eval() for _ in range(2)]
    state = torch.func.stack_module_state(models)
    found = torch.func.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,)))(*state)
    torch.testing.assert_close(found, torch.stack([m(x) for m in models]), rtol=1e-4, atol=1e-5)


def test_fusion_and_parametrization():
    conv, bn = nn.Conv2d(3, 8, 3).eval(), ft.BatchNorm2d(8)
    bn(torch.randn(4, 8, 6, 6))
    bn.eval()
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(nn.utils.fusion.fuse_conv_bn_eval(conv, bn)(x), bn(conv(x)), rtol=1e-4, atol=1e-5)

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    nn.utils.parametrize.register_parametrization(bn, "weight", Double())
    y = torch.randn(2, 8, 4, 4)
    want = nn.functional.batch_norm(y, bn.running_mean, bn.running_var, 2 * torch.ones(8), bn.bias)
    torch.testing.assert_close(bn(y), want, rtol=1e-4, atol=1e-5)


def test_autocast_and_half_models():
    ours, theirs = ft.convert(network()), network()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(8, 3, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), theirs(x), rtol=0.1, atol=0.1)
    ours.bfloat16(), theirs.bfloat16()
    assert torch.equal(ours(x.bfloat16()), theirs(x.bfloat16()))
    assert ours[1].num_batches_tracked == 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_without_a_trace_of_us(strict):
    model = ft.convert(network()).eval()
    x = torch.randn(2, 3, 10, 10)
    exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x + 1), model(x + 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_training_with_lengths(strict):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = ft.BatchNorm1d(3)

        def forward(self, x, lengths):
            return self.bn(x, lengths=lengths)

    x, lengths = torch.randn(4, 3, 10), torch.tensor([10, 5, 3, 7])
    exported = torch.export.export(Padded(), (x, lengths), strict=strict).module()
    plain = Padded()
    torch.testing.assert_close(exported(x, lengths - 1), plain(x, lengths - 1), rtol=1e-4, atol=1e-5)
    assert int(exported.bn.num_batches_tracked) == int(plain.bn.num_batches_tracked) == 1


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of itself
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled(backend):
    """The graph breaks around the module; numbers, gradients and statistics are right."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("needs a C++ compiler")
    plain = nn.Sequential(nn.Linear(6, 5), ft.BatchNorm1d(5, activation="relu"), nn.Linear(5, 4), nn.BatchNorm1d(4))
    ft.convert(plain)
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend=backend)
    for mode in (True, True, False):
        plain.train(mode), twin.train(mode)
        x = torch.randn(8, 6)
        y, z = compiled(x), plain(x)
        torch.testing.assert_close(y, z)
        g = torch.randn_like(y)
        y.backward(g), z.backward(g)
        for p, q in zip(twin.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        same_state(twin, plain)
    assert twin[1].num_batches_tracked == 2
