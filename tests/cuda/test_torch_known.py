"""Calls that were seen before: what is the same about them, what is still refused, what they leave."""

from __future__ import annotations

import pytest

from fastbn import device, device_family, device_known, device_remembered, device_sets
from fastbn.cuda import choice, libraries, recorded
from tests.cuda.test_torch import _arrays, cpu_tensors, slow, step

torch = pytest.importorskip("torch")

__all__ = ["cpu_tensors", "slow"]  # fixtures


NORMS = {
    "layer": (lambda x, w, b, out: device_family.layer_norm(x, w, b, -1, 1e-5, out), (6, 8), 8),
    "planes": (lambda x, w, b, out: device_family.layer_norm(x, w, b, 1, 1e-5, out), (3, 4, 8), (4, 8)),
    "group": (lambda x, w, b, out: device_family.group_norm(x, 2, w, b, 1, 1e-5, out), (3, 4, 2, 4), 4),
    "instance": (lambda x, w, b, out: device_family.instance_norm(x, w, b, 1, 1e-5, out), (3, 4, 2, 4), 4),
}


@pytest.fixture
def slow_sets(monkeypatch):
    """Count the calls of layer, group and instance norm that are checked in full, and their gradients."""
    calls, back = [], device_sets.DeviceSetsSaved._gradients
    genuine = device_sets._normalise
    monkeypatch.setattr(device_sets, "_normalise", lambda *a: (calls.append("forward"), genuine(*a))[1])
    monkeypatch.setattr(device_sets.DeviceSetsSaved, "_gradients", lambda *a: (calls.append("backward"), back(*a))[1])
    device_family._calls.clear()
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("given", ["both", "weight", "bias", "neither"])
def test_known_sets_compute_the_same(name, given, dtype, slow_sets):
    norm, shape, parameters = NORMS[name]
    x, grad = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(2))
    kind = torch.float64 if dtype == "float64" else torch.float32
    weight, bias = (torch.rand(parameters, dtype=kind) + 0.5 for _ in range(2))
    weight, bias = (weight if given in ("both", "weight") else None), (bias if given in ("both", "bias") else None)
    results = []
    for turn in range(6):
        out = torch.empty_like(x) if turn % 2 else None
        y, saved = norm(x.clone(), weight, bias, out)
        assert out is None or y is out
        dx = grad.clone() if turn in (3, 5) else None
        grads = saved.gradients(grad if dx is None else dx, dx)
        assert dx is None or grads.input is dx
        assert (grads.weight is None, grads.bias is None) == (weight is None, bias is None)
        assert grads.weight is None or grads.weight.shape == weight.shape
        found = [y, saved.mean, saved.variance, grads.input, grads.weight, grads.bias]
        results.append([t.clone() for t in found if t is not None])
        assert saved.moments.count == saved.count == x.numel() // saved.mean.numel() and saved.updated == 0
    assert slow_sets.count("forward") == 2 and slow_sets.count("backward") == 3
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later, strict=True))


def test_known_sets_still_refuse_what_does_not_fit(slow_sets):
    norm, shape, parameters = NORMS["layer"]
    x, grad, w = torch.randn(shape), torch.randn(shape), torch.rand(parameters)
    for _ in range(3):
        _, saved = norm(x, w, None, torch.empty_like(x))
        saved.gradients(grad, torch.empty_like(x))
    both = torch.empty(7, 8)
    both[:6] = x
    for message, call in {
        "out: expected memory apart from x, got the same": lambda: norm(x, w, None, x),
        "out: expected memory apart from x, got overlapping": lambda: norm(both[:6], w, None, both[1:]),
        "weight: expected one number per channel": lambda: norm(x, w[:4], None, torch.empty_like(x)),
        "weight: expected float32": lambda: norm(x, w.double(), None, torch.empty_like(x)),
        "out: expected the dtype": lambda: norm(x, w, None, torch.empty_like(x).double()),
        "grad_output: expected the shape": lambda: saved.gradients(grad[:5], torch.empty_like(x)),
        "out: expected memory apart from x": lambda: saved.gradients(grad, x),
        "out: expected memory apart from grad": lambda: saved.gradients(both[:6], both[1:]),
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    turned = x.t().contiguous().t()
    for _ in range(3):  # copied each time
        assert torch.equal(norm(turned, w, None, None)[0], norm(x, w, None, None)[0])
    skewed, target = torch.empty(49)[1:].view(6, 8).copy_(x), torch.empty(49)[1:].view(6, 8)
    for _ in range(3):
        torch.testing.assert_close(norm(skewed, w, None, target)[0], norm(x, w, None, None)[0])


def test_running_statistics_that_share_memory_are_refused_in_a_known_call(slow):
    x, grad, vectors = _arrays((6, 4))
    for _ in range(3):
        step(x, grad, vectors)
    one = torch.rand(6)
    with pytest.raises(ValueError, match="running_var: expected memory apart from running_mean"):
        step(x, grad, [*vectors[:2], one[:4], one[2:]])


def test_known_calls_still_refuse_an_output_that_is_memory_of_a_vector(slow, slow_sets):
    x, grad, vectors = _arrays((6, 4))
    norm, both = NORMS["layer"][0], torch.rand(34) + 0.5
    out, part = both[:24].view(6, 4), both[22:26]
    for _ in range(3):
        _, saved, _ = step(x, grad, vectors, out=torch.empty_like(x))
        saved.gradients(grad, torch.empty_like(x))
        device_known.infer(x, *vectors[2:], *vectors[:2], 1e-5, 1, None, torch.empty_like(x))
        device_known.infer(x.clone(), *vectors[2:], *vectors[:2], 1e-5, 1, None, x)
        _, layer = norm(x, vectors[0], None, torch.empty_like(x))
        layer.gradients(grad, torch.empty_like(x))
    weight, bias, mean, var = vectors
    _, saved, _ = step(x, grad, [part, bias, mean, var])
    _, layer = norm(x, part, None, torch.empty_like(x))
    before = both.clone()
    for name, call in {
        "out: expected memory apart from bias": lambda: step(x, grad, [weight, part, mean, var], out=out),
        "running_mean: expected memory apart from out": lambda: step(x, grad, [weight, bias, part, var], out=out),
        "running_var: expected memory apart from x": lambda: step(out, grad, [weight, bias, mean, part]),
        "out: expected memory apart from running_var": lambda: device_known.infer(
            x, mean, part, weight, bias, 1e-5, 1, None, out
        ),
        "out: expected memory apart from running_mean": lambda: device_known.infer(
            out, part, var, weight, bias, 1e-5, 1, None, out
        ),
        "out: expected memory apart from weight": lambda: norm(x, part, None, out),
        "out: expected memory apart from weight, got": lambda: saved.gradients(grad, out),
        "out: expected memory apart from weight, got over": lambda: layer.gradients(grad, out),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            call()
    assert torch.equal(both, before)


@pytest.mark.parametrize("guards", [True, False])
def test_guards_tell_tensors_apart(guards, monkeypatch):
    library = libraries.Torch(torch)
    assert library._guards is not None
    if not guards:
        monkeypatch.setattr(library, "_guards", None)
    a, b = torch.empty(4, 6), torch.empty(6)
    same = library.guard((a, b))
    assert same(torch.ones(4, 6), torch.ones(6))
    others = a[:2], a.double(), torch.empty(6, 4).t(), torch.nn.Parameter(a), a[0], a.numpy(), None
    assert not any(same(other, b) for other in others)
    watched = torch.empty(4, 6, requires_grad=True)
    same = library.guard((watched, b))
    assert same(watched, b)
    with torch.enable_grad():
        assert not same(watched, b)


def test_what_a_known_call_saves_can_be_released_and_restored(slow):
    x, grad, vectors = _arrays((6, 4))
    for _ in range(3):
        _, saved, want = step(x, grad, vectors)
    with pytest.raises(ValueError, match="grad_output"):
        saved.gradients(grad[:3], None)
    saved.release()
    for attempt in (lambda: saved.x, lambda: saved.gradients(grad, None)):
        with pytest.raises(AttributeError):
            attempt()
    for other in (x.clone(), x.t().contiguous().t()):
        again = saved.restored(other, None)
        assert (again.count, again.updated, again.affine, again.frozen) == (6, 1, (True, True), False)
        assert torch.equal(again.mean, saved.mean) and again.moments.count == 6
        if other.is_contiguous():
            assert torch.equal(again.gradients(grad, None).input, want.input)


@pytest.fixture
def looked(monkeypatch):
    """Count how often addresses are compared, of calls and of gradients."""
    calls = []
    for owner, name in (
        (device_known.KnownBatch, "right"), (device_family.KnownSets, "right"), (device_remembered.Known, "_gradients"),
    ):  # fmt: skip
        genuine = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=genuine: (calls.append(f.__qualname__), f(*a))[1])
    return calls


def test_addresses_that_were_right_are_not_compared_again(slow, slow_sets, looked):
    x, grad, vectors = _arrays((6, 4))
    norm, out, dx = NORMS["layer"][0], torch.empty_like(x), torch.empty_like(x)
    _, saved, _ = step(x, grad, vectors, out=out)
    _, layer = norm(x, vectors[0], vectors[1], out)
    for turn in range(6):
        step(x, grad, vectors, out=out)
        norm(x, vectors[0], vectors[1], out)
        for known in (saved, layer):
            known.gradients(grad, dx if turn < 5 else dx.clone())
        counted = [looked.count(f"{who}.right") for who in ("KnownBatch", "KnownSets")]
        assert counted == [min(turn + 1, 2)] * 2  # when it is recorded, and when that is first replayed
    x, out = x.clone(), out.clone()
    step(x, grad, vectors, out=out)
    norm(x, vectors[0], vectors[1], out)
    assert [looked.count(f"{who}.right") for who in ("KnownBatch", "KnownSets")] == [3, 3]
    assert len(slow) == 1 and slow_sets.count("forward") == 1


def test_more_addresses_than_are_remembered(slow, slow_sets, monkeypatch):
    monkeypatch.setattr(device_remembered, "PROVEN", 3)
    norm, kept = NORMS["layer"][0], []
    for turn in range(24):
        x, grad, vectors = _arrays((6, 4), seed=turn % 2)
        dx = grad.clone() if turn % 3 else torch.empty_like(grad)
        y, saved, grads = step(x, grad, vectors, out=torch.empty_like(x))
        z, layer = norm(x, vectors[0], vectors[1], torch.empty_like(x))
        found = [y, z, *grads[:3], *vectors[2:], layer.gradients(dx if turn % 3 else grad, dx).input]
        kept.append((x, grad, vectors, found, saved, layer))  # so that no address comes again
        assert all(torch.equal(a, b) for a, b in zip(found, kept[turn % 2][3], strict=True))
        for known in (saved.known, layer.known):
            backs = [back.proven for back in known.backs if back is not None]
            assert all(len(proven) <= 3 for proven in (known.proven, *backs))
    assert len(slow) == 1 and slow_sets.count("forward") == 1 and slow_sets.count("backward") == 2
    assert len(saved.known.separate) <= 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tail", [True, False])
def test_gradients_are_replayed_whichever_call_saved_them(dtype, tail, slow_sets, monkeypatch):
    """Of the first call and of replayed ones, with scratch by itself, and anew after choices were made anew."""
    monkeypatch.setattr(recorded, "TAIL", recorded.TAIL if tail else 0)
    norm, shape, parameters = NORMS["layer"]
    x, grad = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(2))
    w, b = (torch.rand(parameters) for _ in range(2))
    calls = [norm(x, w, b, torch.empty_like(x))[1] for _ in range(4)]
    want = [t.clone() for t in calls[0].gradients(grad, torch.empty_like(x))[:3]]
    for anew in range(3):
        choice.forget() if anew else None
        del slow_sets[:]
        for turn in range(3):
            for saved in calls:
                found = saved.gradients(grad, torch.empty_like(x))[:3]
                assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
            assert slow_sets == ["backward"] * (anew > 0), turn
    replay, out = saved.known.backs[2].apart, torch.empty_like(x)
    made, _ = replay.runner(saved.known.library, x)(x, [*saved.ats, grad.data_ptr(), out.data_ptr()])
    assert len(replay.made.sizes) == (1 if tail else 3) and [made[0].numel(), made[1].numel()] == [8, 8]
    assert {t.dtype for t in made} == {torch.float32}


def test_batch_norms_gradients_are_known_again_after_choices_were_made_anew(slow, monkeypatch):
    x, grad, vectors = _arrays((6, 4))
    full, genuine = [], device.DeviceSaved._gradients
    monkeypatch.setattr(device.DeviceSaved, "_gradients", lambda *a: (full.append(1), genuine(*a))[1])
    for _ in range(3):
        _, saved, want = step(x, grad, vectors)
    assert len(full) == 1
    for anew in (1, 2):
        choice.forget()
        for _ in range(3):
            assert torch.equal(saved.gradients(grad, None).input, want.input)
        assert len(full) == 1 + anew
