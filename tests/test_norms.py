"""Layer, instance and group norm as layers: state under PyTorch's names, training and evaluation."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn


def make(rng, name, **options):
    layer = {
        "layer": lambda: fastbn.LayerNorm((6, 5), **options),
        "instance": lambda: fastbn.InstanceNorm(4, affine=True, **options),
        "tracked": lambda: fastbn.InstanceNorm(4, affine=True, track_running_stats=True, **options),
        "group": lambda: fastbn.GroupNorm(2, 4, **options),
    }[name]()
    layer.weight[...] = rng.uniform(0.5, 2, layer.weight.shape)
    layer.bias[...] = rng.standard_normal(layer.bias.shape)
    return layer


NAMES = ["layer", "instance", "tracked", "group"]


def torch_twin(torch, layer, name):
    twin = {
        "layer": lambda: torch.nn.LayerNorm((6, 5)),
        "instance": lambda: torch.nn.InstanceNorm2d(4, affine=True),
        "tracked": lambda: torch.nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        "group": lambda: torch.nn.GroupNorm(2, 4),
    }[name]()
    twin.load_state_dict({k: torch.tensor(v) for k, v in layer.state_dict().items()})
    return twin


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_parity_with_torch(rng, name):
    torch = pytest.importorskip("torch")
    layer = make(rng, name)
    twin = torch_twin(torch, layer, name)
    for _ in range(3):
        x = (rng.standard_normal((3, 4, 6, 5)) * 2 + 1).astype(np.float32)
        g = rng.standard_normal(x.shape).astype(np.float32)
        tensor = torch.tensor(x, requires_grad=True)
        twin.zero_grad()
        want = twin(tensor)
        want.backward(torch.tensor(g))
        np.testing.assert_allclose(layer(x), want.detach().numpy(), rtol=1e-5, atol=1e-5)
        grads = layer.backward(g)
        np.testing.assert_allclose(grads.input, tensor.grad.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grads.weight, twin.weight.grad.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(grads.bias, twin.bias.grad.numpy(), rtol=1e-4, atol=1e-4)
    theirs = {k: v.numpy() for k, v in twin.state_dict().items()}
    assert set(theirs) == set(layer.state_dict())
    for key, value in layer.state_dict().items():
        if key == "num_batches_tracked":  # PyTorch's instance norm has the key and never counts
            continue
        np.testing.assert_allclose(value, theirs[key], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.eval()(x), twin.eval()(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_a_round_trip(rng, name):
    layer = make(rng, name)
    x = rng.standard_normal((3, 4, 6, 5)).astype(np.float32)
    layer(x)
    other = make(rng, name)
    other.load_state_dict(layer.state_dict())
    assert np.array_equal(other.eval()(x), layer.eval()(x))
    state = layer.state_dict()
    state["bias"] = np.zeros(99)
    state["weight"] = state["weight"] * 0
    with pytest.raises(ValueError, match=r"^bias: expected shape"):
        layer.load_state_dict(state)
    assert layer.weight.any()


def test_instance_norm_tracks_means_over_samples(rng):
    x = rng.standard_normal((3, 4, 6)) + 2
    for momentum in (0.1, None):
        layer = fastbn.InstanceNorm(4, momentum=momentum, track_running_stats=True, dtype=np.float64)
        layer(x)
        layer(2 * x)
        new = np.stack([x.mean(2).mean(0), x.var(2, ddof=1).mean(0)])
        weights = (0.1 * 0.9, 0.1, 0.81) if momentum else (0.5, 0.5, 0)
        want = weights[0] * new + weights[1] * new * [[2], [4]] + weights[2] * np.array([[0.0], [1.0]])
        np.testing.assert_allclose([layer.running_mean, layer.running_var], want, rtol=1e-12)
        y = layer.eval()(x)
        np.testing.assert_allclose(
            y, fastbn.batch_norm_infer(x, layer.running_mean, layer.running_var), rtol=1e-12, atol=1e-12
        )
        layer.backward(y)


@pytest.mark.parametrize("values", [(np.inf, -np.inf), (np.nan, 1.0), (1e30, -1e30)])
def test_instance_norm_moves_both_statistics_whatever_comes(rng, values):
    """Warnings are errors in the tests, as they may be where users are."""
    layer, x = fastbn.InstanceNorm(2, track_running_stats=True), rng.standard_normal((2, 2, 6)).astype(np.float32)
    x[:, 0, 0] = values
    with np.errstate(all="raise"):
        layer(x)
    assert not np.isfinite(layer.running_var[0]) and layer.num_batches_tracked == 1
    np.testing.assert_allclose(layer.running_mean[1], 0.1 * x[:, 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(layer.running_var[1], 0.9 + 0.1 * x[:, 1].var(1, ddof=1).mean(), rtol=1e-5)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_instance_norm_that_cannot_move_writes_nothing(rng, name):
    layer, x = fastbn.InstanceNorm(2, track_running_stats=True), rng.standard_normal((2, 2, 6)).astype(np.float32)
    setattr(layer, name, np.broadcast_to(np.float32(1), (2,)))
    before, out = layer.state_dict(), np.zeros_like(x)
    with pytest.raises(ValueError, match=rf"^{name}: expected a writeable array"):
        layer(x, out=out)
    assert not out.any() and all(np.array_equal(v, before[k]) for k, v in layer.state_dict().items())


def test_out_dtype_and_axis(rng):
    x = rng.standard_normal((3, 6, 5, 4))
    for name in ("instance", "group"):
        layer = make(rng, name, axis=-1, dtype=np.float64)
        first = make(rng, name, dtype=np.float64)
        first.load_state_dict(layer.state_dict())
        out = np.empty_like(x)
        assert layer(x, out=out) is out
        np.testing.assert_allclose(out, np.moveaxis(first(np.moveaxis(x, -1, 1)), 1, -1), rtol=1e-12, atol=1e-13)
        assert layer.backward(x).weight.dtype == np.float64


def test_layers_without_parameters(rng):
    x = rng.standard_normal((3, 4, 6)).astype(np.float32)
    for layer in (
        fastbn.LayerNorm(6, elementwise_affine=False),
        fastbn.InstanceNorm(4),
        fastbn.GroupNorm(2, 4, affine=False),
    ):
        assert layer.state_dict() == {}
        layer(x)
        assert layer.backward(x).weight is None
    assert set(fastbn.LayerNorm(6, bias=False).state_dict()) == {"weight"}


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: fastbn.LayerNorm(()), ValueError, "normalized_shape"),
        (lambda: fastbn.LayerNorm((3, 0)), ValueError, "normalized_shape"),
        (lambda: fastbn.LayerNorm(3.0), TypeError, "normalized_shape"),
        (lambda: fastbn.LayerNorm(3, eps=0), ValueError, "eps"),
        (lambda: fastbn.LayerNorm(3, dtype=np.float16), TypeError, "dtype"),
        (lambda: fastbn.LayerNorm(3, dtype="nonsense"), TypeError, "dtype"),
        (lambda: fastbn.LayerNorm(3)(np.zeros((2, 4), np.float32)), ValueError, "x"),
        (lambda: fastbn.GroupNorm(3, 4), ValueError, "num_groups"),
        (lambda: fastbn.GroupNorm(2, 4, axis=None), TypeError, "axis"),
        (lambda: fastbn.GroupNorm(2, 4)(np.zeros((2, 6, 3), np.float32)), ValueError, "x"),
        (lambda: fastbn.InstanceNorm(True), TypeError, "num_features"),
        (lambda: fastbn.InstanceNorm(4, momentum="m"), TypeError, "momentum"),
        (lambda: fastbn.InstanceNorm(4)([[1.0]]), TypeError, "x"),
        (lambda: fastbn.InstanceNorm(4).backward(np.zeros((2, 4, 3), np.float32)), ValueError, "backward"),
    ],
)
def test_errors_name_the_argument(call, error, named):
    with pytest.raises(error, match=rf"^{named}: expected"):
        call()


def test_samples_without_values_move_nothing():
    layer = fastbn.InstanceNorm(3, track_running_stats=True)
    for shape in ((2, 3, 0), (0, 3, 5)):
        layer(np.zeros(shape, np.float32))
    assert not layer.running_mean.any() and (layer.running_var == 1).all() and layer.num_batches_tracked == 2


@pytest.mark.parametrize("other", ["weight", "bias", "running_mean"])
def test_running_statistics_that_are_another_array_are_refused(other):
    layer = fastbn.InstanceNorm(3, track_running_stats=True, affine=True)
    layer.running_var = getattr(layer, other)
    with pytest.raises(ValueError, match=f"^running_var: expected memory apart from {other}"):
        layer(np.ones((4, 3, 5), np.float32))
