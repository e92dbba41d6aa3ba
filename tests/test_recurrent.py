"""Statistics per time step: each step is a batch norm of its own, with one weight and bias."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn


def make(dtype=np.float64, **options):
    return fastbn.RecurrentBatchNorm(3, 4, dtype=dtype, **options)


def test_weight_starts_at_a_tenth():
    layer = make()
    assert (layer.weight == 0.1).all() and not layer.bias.any() and layer.running_mean.shape == (4, 3)
    assert (fastbn.RecurrentBatchNorm(3, 4, weight_init=1).weight == 1).all()


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("steps", [1, 4, 6])
@pytest.mark.parametrize("ragged", [False, True])
def test_whole_sequences_are_their_steps(rng, steps, ragged, momentum):
    whole, each, plain = make(momentum=momentum), make(momentum=momentum), fastbn.BatchNorm(3, dtype=np.float64)
    for _ in range(2):
        x, g = rng.standard_normal((2, 5, steps, 3)) + np.arange(steps)[:, None]
        lengths = rng.integers(2, steps + 1, 5) if ragged and steps > 1 else None
        y = whole(x, lengths=lengths)
        grads = whole.backward(g)
        dweight = np.zeros(3)
        for t in range(steps):
            mask = None if lengths is None else lengths > t
            got, saved = each.step(x[:, t], t, mask=mask)
            np.testing.assert_allclose(y[:, t], got, rtol=1e-10, atol=1e-12)
            own = fastbn.backward(g[:, t], saved)
            np.testing.assert_allclose(grads.input[:, t], own.input, rtol=1e-9, atol=1e-12)
            dweight = dweight + own.weight
            if mask is None:
                np.testing.assert_allclose(got, 0.1 * plain(x[:, t]), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(grads.weight, dweight, rtol=1e-9)
    for key, value in whole.state_dict().items():
        np.testing.assert_allclose(value, each.state_dict()[key], rtol=1e-10)


def test_later_steps_reuse_the_last_statistics(rng):
    layer = make(momentum=1.0)
    x = rng.standard_normal((8, 3, 3)) + np.arange(3)[:, None] * 5
    layer(x)
    layer.eval()
    assert list(layer.rows(6)) == [0, 1, 2, 2, 2, 2]
    longer = rng.standard_normal((8, 6, 3))
    y = layer(longer)
    for t in range(6):
        row = min(t, 2)
        want = fastbn.batch_norm_infer(
            longer[:, t], layer.running_mean[row], layer.running_var[row], layer.weight, layer.bias
        )
        np.testing.assert_allclose(y[:, t], want, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(layer.step(longer[:, t], t)[0], want, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(
        layer.backward(np.ones_like(longer)).input[0, 5], 0.1 / np.sqrt(layer.running_var[2] + 1e-5)
    )


def test_rows_before_and_between_training():
    layer = make().eval()
    assert list(layer.rows(6)) == [0, 1, 2, 3, 3, 3]
    layer.num_batches_tracked[:] = [0, 1, 0, 1]
    assert list(layer.rows(6)) == [0, 1, 1, 3, 3, 3]
    assert list(layer.rows(1, 2)) == [1] and list(layer.rows(2, 9)) == [3, 3]


def test_ragged_ends(rng):
    layer = make(np.float32)
    x = rng.standard_normal((3, 4, 3)).astype(np.float32)
    x[:, 3:] = np.nan
    y = layer(x, lengths=[1, 3, 2])
    assert np.isfinite(y).all() and not y[0, 1:].any() and not y[2, 2:].any()
    assert list(layer.num_batches_tracked) == [1, 1, 0, 0]  # step 2 has one sequence left, step 3 none
    np.testing.assert_allclose(y[1, 2], 0.1 * x[1, 2] / np.sqrt(1 + 1e-5), rtol=1e-5)
    dx = layer.backward(np.ones_like(x)).input
    assert not dx[0, 1:].any() and not dx[:, 3].any()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make(np.float32, on_single="error")(x, lengths=[1, 3, 2])
    evaluated = layer.eval()(x, lengths=[1, 3, 2])
    assert np.isfinite(evaluated).all() and not evaluated[:, 3].any()


def test_gradients_are_finite_differences(rng):
    x, g = rng.standard_normal((2, 4, 3, 3))
    layer = make()
    layer.weight[:] = rng.uniform(0.5, 2, 3)
    layer(x, lengths=[3, 2, 3, 2])
    grads = layer.backward(g)
    for got, array in ((grads.input, x), (grads.weight, layer.weight), (grads.bias, layer.bias)):
        for at in rng.choice(array.size, 3, replace=False):
            values, old = [], array.flat[at]
            for h in (1e-6, -1e-6):
                array.flat[at] = old + h
                values.append(np.sum(layer(x, lengths=[3, 2, 3, 2]) * g))
            array.flat[at] = old
            assert got.flat[at] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("given", ["loaded", "replaced"])
def test_statistics_in_another_memory_order_move(rng, given):
    """Whole sequences move all steps through one flat vector, which is a copy where steps do not lie in a row."""
    x = rng.standard_normal((5, 4, 3)) + 3
    layer, other = make(), make()
    if given == "loaded":
        other.load_state_dict({k: np.asfortranarray(v) for k, v in layer.state_dict().items()})
    else:
        other.running_mean, other.running_var = map(np.asfortranarray, (layer.running_mean, layer.running_var))
    for each in (layer, other):
        each(x)
        each(x[:, :2])
    assert layer.running_mean.all()
    for key, value in layer.state_dict().items():
        assert np.array_equal(other.state_dict()[key], value), key


def test_a_refused_sequence_moves_no_step(rng):
    layer, x = make(on_single="error"), rng.standard_normal((3, 4, 3))
    before = layer.state_dict()
    with pytest.raises(ValueError, match=r"^lengths: expected more than 1 value per channel .* got 1 at step 2"):
        layer(x, lengths=[4, 2, 2])
    assert all(np.array_equal(value, before[key]) for key, value in layer.state_dict().items())
    layer(x, lengths=[2, 2, 2])  # later steps without any value are fine
    layer.eval()(x, lengths=[4, 2, 2])


def test_steps_are_counted_by_integers_of_any_size(rng):
    layer, x = make(), rng.standard_normal((5, 3))
    want = layer.eval().step(x, 127)[0]
    assert np.array_equal(layer.step(x, np.int8(127))[0], want)


def test_moments_of_sequences(rng):
    layer, x = make(), rng.standard_normal((5, 4, 3))
    layer(x)
    np.testing.assert_allclose(layer.saved.moments.mean, x.mean(0).reshape(-1), rtol=0, atol=1e-14)
    layer(x, lengths=[4, 4, 3, 3, 3])
    with pytest.raises(ValueError, match=r"^moments: expected as many values at every step, got 2 to 5"):
        _ = layer.saved.moments


def test_state_and_out(rng):
    x = rng.standard_normal((5, 4, 3)).astype(np.float32)
    layer, other = make(np.float32), make(np.float32)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    assert layer.backward(x, out=out).input is out
    other.load_state_dict(layer.state_dict())
    assert list(other.num_batches_tracked) == [1, 1, 1, 1] and other.num_batches_tracked.dtype == np.int64
    assert np.array_equal(other.eval()(x), layer.eval()(x))
    assert layer(np.empty((5, 0, 3), np.float32)).shape == (5, 0, 3)
    assert make(np.float32, affine=False)(x).shape == x.shape


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: fastbn.RecurrentBatchNorm(3, 0), ValueError, "max_steps"),
        (lambda: fastbn.RecurrentBatchNorm(3, 4, on_single="x"), ValueError, "on_single"),
        (lambda: make()(np.zeros((2, 4, 5))), ValueError, "x"),
        (lambda: make()(np.zeros((2, 3))), ValueError, "x"),
        (lambda: make().step(np.zeros((2, 4)), 0), ValueError, "x"),
        (lambda: make().step(np.zeros((2, 3)), -1), ValueError, "t"),
        (lambda: make().step(np.zeros((2, 3)), 0.0), TypeError, "t"),
        (lambda: make()(np.zeros((2, 4, 3)), lengths=[5, 1]), ValueError, "lengths"),
        (lambda: make().backward(np.zeros((2, 4, 3))), ValueError, "backward"),
    ],
)
def test_errors_name_the_argument(call, error, named):
    with pytest.raises(error, match=rf"^{named}: expected"):
        call()


def test_the_saved_input_is_not_overwritten(rng):
    layer = fastbn.RecurrentBatchNorm(3, 5)
    x, g = rng.standard_normal((2, 5, 5, 3)).astype(np.float32)
    layer(x)
    before = x.copy()
    with pytest.raises(ValueError, match=r"^out: expected memory apart from x"):
        layer.backward(g, out=x)
    assert np.array_equal(x, before)


def test_no_steps_have_statistics():
    layer = make()
    assert layer(np.zeros((3, 0, 3))).shape == (3, 0, 3)
    assert layer.saved.mean.shape == layer.saved.invstd.shape == layer.saved.variance.shape == (0, 3)
    assert layer.saved.moments.mean.size == 0
