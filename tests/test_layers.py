"""BatchNorm: PyTorch's semantics around the functions, its state, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import fastbn
from fastbn import ArgumentTypeError, ArgumentValueError, BatchNorm
from tests.oracle import normal, same_bits
from tests.tolerances import BF16


def layer(*args, **options):
    bn, rng = BatchNorm(*args, **options), np.random.default_rng(3)
    if bn.weight is not None:
        bn.weight[:], bn.bias[:] = rng.uniform(0.5, 2, bn.num_features), rng.normal(size=bn.num_features)
    return bn


def test_a_new_layer_is_pytorchs():
    bn = BatchNorm(3)
    assert (bn.eps, bn.momentum, bn.affine, bn.track_running_stats, bn.axis, bn.training) == (
        1e-5,
        0.1,
        True,
        True,
        1,
        True,
    )
    assert (bn.weight == 1).all() and (bn.bias == 0).all()
    assert (bn.running_mean == 0).all() and (bn.running_var == 1).all() and bn.num_batches_tracked == 0
    assert all(a.dtype == np.float32 for a in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
    assert "BatchNorm(3, eps=1e-05, momentum=0.1" in repr(bn)


def test_training_is_the_function(rng):
    bn, x = layer(3), normal(rng, (8, 3, 40), np.float32)
    rm, rv = np.zeros(3, np.float32), np.ones(3, np.float32)
    want, saved = fastbn.batch_norm_train(x, bn.weight, bn.bias, rm, rv)
    assert same_bits(bn(x), want)
    assert same_bits(bn.running_mean, rm) and same_bits(bn.running_var, rv) and bn.num_batches_tracked == 1
    grad = rng.standard_normal(x.shape).astype(np.float32)
    for got, expected in zip(bn.backward(grad)[:3], fastbn.backward(grad, saved)[:3], strict=True):
        assert same_bits(got, expected)


def test_evaluation_uses_the_running_statistics_and_moves_nothing(rng):
    bn, x = layer(3), normal(rng, (8, 3, 40), np.float32)
    bn(x)
    state = bn.state_dict()
    y = bn.eval()(x)
    want = fastbn.batch_norm_infer(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    assert same_bits(y, want)
    assert all(same_bits(v, state[k]) for k, v in bn.state_dict().items())
    grads = bn.backward(np.ones_like(x))
    scale = bn.weight / np.sqrt(bn.running_var + 1e-5)
    np.testing.assert_allclose(grads.input, np.broadcast_to(scale[:, None], x.shape), rtol=1e-6)
    assert bn.train() is bn and bn.training


def test_cumulative_average(rng):
    """momentum=None: the plain mean over batches, of the means and of the unbiased variances."""
    bn = BatchNorm(3, momentum=None, dtype=np.float64)
    batches = [normal(rng, (n, 3, 5), np.float64) for n in (4, 9, 2)]
    for x in batches:
        bn(x)
    np.testing.assert_allclose(bn.running_mean, np.mean([x.mean((0, 2)) for x in batches], 0), rtol=1e-13)
    np.testing.assert_allclose(bn.running_var, np.mean([x.var((0, 2), ddof=1) for x in batches], 0), rtol=1e-12)
    assert bn.num_batches_tracked == 3


def test_without_running_statistics_every_call_uses_the_batch(rng):
    bn, x = BatchNorm(3, track_running_stats=False), normal(rng, (8, 3, 40), np.float32)
    assert bn.running_mean is None and bn.running_var is None
    want, _ = fastbn.batch_norm_train(x)
    assert same_bits(bn(x), want) and same_bits(bn.eval()(x), want) and bn.num_batches_tracked == 0
    assert set(bn.state_dict()) == {"weight", "bias"}
    with pytest.raises(ArgumentValueError, match=r"^x: expected more than 1 value per channel"):
        bn(x[:1, :, :1])
    with pytest.raises(ArgumentValueError, match=r"^freeze: expected a layer with running statistics"):
        bn.freeze()


def test_without_affine(rng):
    bn, x = BatchNorm(3, affine=False), normal(rng, (8, 3, 40), np.float32)
    assert bn.weight is None and bn.bias is None and "weight" not in bn.state_dict()
    assert same_bits(bn(x), fastbn.batch_norm_train(x)[0])
    grads = bn.backward(x)
    assert grads.weight is None and grads.bias is None


def test_frozen_layers_stay_frozen_in_training(rng):
    bn, x = layer(3), normal(rng, (8, 3, 40), np.float32)
    bn(x)
    state, want = bn.state_dict(), bn.eval()(x)
    assert bn.train().freeze() is bn
    assert same_bits(bn(x), want) and same_bits(bn.train()(x), want)
    assert bn.backward(x).weight is not None
    assert all(same_bits(v, state[k]) for k, v in bn.state_dict().items())
    assert not same_bits(bn.freeze(False)(x), want)


def test_relu_residual_and_axis(rng):
    x, r = normal(rng, (8, 6, 5, 3), np.float32, 3), rng.standard_normal((8, 6, 5, 3)).astype(np.float32)
    bn = layer(3, axis=-1, activation="relu")
    want, _ = fastbn.batch_norm_train(x, bn.weight, bn.bias, axis=3, activation="relu", residual=r)
    out = np.empty_like(x)
    assert bn(x, residual=r, out=out) is out and same_bits(out, want)
    grads = bn.backward(r)
    assert grads.residual is not None and ((grads.residual == 0) == (want == 0) | (r == 0)).all()


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_half_types_keep_float32_statistics(dtype, rng):
    bn = BatchNorm(3)
    assert bn(normal(rng, (8, 3, 40), dtype)).dtype == dtype
    assert bn.running_var.dtype == np.float32 and bn.num_batches_tracked == 1


def test_empty_batch_counts_but_moves_nothing():
    bn = BatchNorm(3)
    y = bn(np.empty((0, 3, 7), np.float32))
    assert y.shape == (0, 3, 7) and (bn.running_mean == 0).all() and (bn.running_var == 1).all()
    assert bn.num_batches_tracked == 1  # as PyTorch
    grads = bn.backward(np.empty((0, 3, 7), np.float32))
    assert (grads.weight == 0).all() and (grads.bias == 0).all()


@pytest.mark.parametrize("options", [{}, {"ghost": 2}, {"ghost": 2, "renorm": (1, 0)}], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_without_valid_values_is_not_counted(rng, momentum, options):
    """The next one would weigh half in a cumulative average that has seen none; an empty one counts, as PyTorch's."""
    bn, x = BatchNorm(3, momentum=momentum, **options), rng.standard_normal((4, 3, 7)).astype(np.float32)
    bn(x, mask=np.zeros((4, 7), bool))
    bn(x, lengths=[0, 0, 0, 0])
    bn(x[:0], lengths=[])
    assert bn.num_batches_tracked == 0 and not bn.running_mean.any()
    bn(x[:0])
    assert bn.num_batches_tracked == 1 and not bn.running_mean.any()


def test_a_refused_call_changes_nothing(rng):
    bn = layer(3)
    bn(normal(rng, (8, 3, 4), np.float32))
    state = bn.state_dict()
    for bad in (normal(rng, (8, 4, 4), np.float32), normal(rng, (1, 3, 1), np.float32), np.ones((8, 3), int), "x"):
        with pytest.raises((ArgumentValueError, ArgumentTypeError), match=r"^x: expected"):
            bn(bad)
    with pytest.raises(ArgumentValueError, match=r"^out: expected"):
        bn(normal(rng, (8, 3, 4), np.float32), out=np.empty((8, 3, 5), np.float32))
    assert all(same_bits(v, state[k]) for k, v in bn.state_dict().items())


def test_mask_belongs_to_training(rng):
    bn, x, mask = BatchNorm(3), normal(rng, (8, 3, 4), np.float32), np.ones((8, 4), bool)
    assert same_bits(bn(x, mask=mask), BatchNorm(3)(np.ascontiguousarray(x))) or np.allclose(bn(x, mask=mask), bn(x))
    mask[3:] = False
    y = bn(x, mask=mask)
    assert (y[3:] == 0).all()
    np.testing.assert_allclose(y[:3], BatchNorm(3)(x[:3]), rtol=1e-5, atol=1e-6)


def test_state_round_trip(rng):
    bn = layer(3)
    bn(normal(rng, (8, 3, 4), np.float32))
    state = bn.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert state["num_batches_tracked"].dtype == np.int64 and state["num_batches_tracked"].shape == ()
    other = BatchNorm(3)
    other.load_state_dict(state)
    assert all(same_bits(v, state[k]) for k, v in other.state_dict().items())
    state["weight"][:] = 0
    assert (other.weight != 0).all() and (bn.weight != 0).all(), "copies, not views"


def test_state_is_cast_and_old_checkpoints_load():
    bn = BatchNorm(2)
    bn.num_batches_tracked = 5
    state = {"weight": [1, 2], "bias": np.zeros(2), "running_mean": np.ones(2), "running_var": np.ones(2, np.float16)}
    bn.load_state_dict(state)
    assert bn.weight.dtype == bn.running_var.dtype == np.float32 and bn.weight[1] == 2


def test_loading_goes_into_the_arrays_that_an_optimizer_holds():
    bn = BatchNorm(2)
    held = bn.weight, bn.bias, bn.running_mean, bn.running_var
    bn.bias = np.asfortranarray(np.zeros((2, 2), np.float32))[0]  # a stride; an array that the layer was given
    given = bn.bias
    bn.load_state_dict({k: v + 1 for k, v in bn.state_dict().items()})
    assert bn.weight is held[0] and bn.running_mean is held[2] and bn.running_var is held[3] and bn.bias is given
    assert held[0][0] == 2 and given[0] == 1 and held[3][0] == 2 and held[1][0] == 0
    bn.load_state_dict(bn.state_dict() | {"weight": bn.running_var * 3, "running_var": bn.weight})
    assert bn.weight[0] == 6 and bn.running_var[0] == 2
    bn.weight = np.broadcast_to(np.float32(5), (2,))  # read-only: nobody can hold it to write to it
    bn.load_state_dict(bn.state_dict() | {"weight": np.ones(2)})
    assert bn.weight[0] == 1


@pytest.mark.parametrize("state", [None, ["weight"], "weight", 3])
def test_no_state(state):
    with pytest.raises(ArgumentTypeError, match=r"^state: expected a mapping"):
        BatchNorm(2).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "^state: expected the keys"),
        ({"gamma": np.ones(3)}, "^state: expected the keys"),
        ({"running_var": np.ones(4)}, r"^running_var: expected shape \(3,\), got \(4,\)"),
        ({"num_batches_tracked": np.ones(1)}, r"^num_batches_tracked: expected shape \(\)"),
        ({"num_batches_tracked": np.array(-1)}, "^num_batches_tracked: expected"),
        ({"num_batches_tracked": np.uint64(1 << 63)}, "^num_batches_tracked: expected"),
        ({1: np.ones(3)}, "^state: expected the keys"),
        ({"bias": [[1], [2, 3]]}, "^bias: expected real numbers, got list"),
        ({"bias": np.ma.ones(3)}, "^bias: expected a plain array"),
        ({"num_batches_tracked": np.array(1.5)}, "^num_batches_tracked: expected"),
        ({"running_var": np.array(["a", "b", "c"])}, "^running_var: expected"),
        ({"running_mean": np.ones(3) * 1j}, "^running_mean: expected"),
    ],
    ids=[
        "missing",
        "unexpected",
        "shape",
        "count shape",
        "negative count",
        "count of 64 bits",
        "key",
        "ragged",
        "masked",
        "fractional count",
        "text",
        "complex",
    ],
)
def test_a_bad_state_changes_nothing(change, message):
    bn = layer(3)
    before = bn.state_dict()
    state = {k: v + 1 for k, v in before.items()} | change
    state = {k: v for k, v in state.items() if v is not None}
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=message):
        bn.load_state_dict(state)
    assert all(same_bits(v, before[k]) for k, v in bn.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_features": 0}, ArgumentValueError, "^num_features: expected an integer >= 1, got 0"),
        ({"num_features": -3}, ArgumentValueError, "^num_features: expected an integer >= 1, got -3"),
        ({"num_features": 3.0}, ArgumentTypeError, "^num_features: expected an integer, got float"),
        ({"num_features": True}, ArgumentTypeError, "^num_features: expected an integer, got bool"),
        ({"num_features": "3"}, ArgumentTypeError, "^num_features: expected an integer, got str"),
        ({"eps": -1e-5}, ArgumentValueError, "^eps: expected a number >=? 0, got -1e-05"),
        ({"eps": np.nan}, ArgumentValueError, "^eps: expected a finite number, got nan"),
        ({"eps": None}, ArgumentTypeError, "^eps: expected a number, got NoneType"),
        ({"momentum": "0.1"}, ArgumentTypeError, "^momentum: expected a number, got str"),
        ({"momentum": np.inf}, ArgumentValueError, "^momentum: expected a finite number, got inf"),
        ({"activation": "gelu"}, ArgumentValueError, '^activation: expected None or "relu", got'),
        ({"dtype": np.float16}, ArgumentTypeError, "^dtype: expected float32 .* got float16"),
        ({"dtype": int}, ArgumentTypeError, "^dtype: expected float32 .* got int64"),
        ({"dtype": "nonsense"}, ArgumentTypeError, "^dtype: expected float32 .* got"),
        ({"axis": "a"}, ArgumentTypeError, "^axis: expected an integer, got str"),
        ({"axis": 1.5}, ArgumentTypeError, "^axis: expected an integer, got float"),
        ({"axis": None}, ArgumentTypeError, "^axis: expected an integer, got NoneType"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_layers(options, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(**({"num_features": 3} | options))


def test_eps_zero_is_for_evaluation_only(rng):
    """As PyTorch's: the layer exists, evaluation divides by sqrt(running_var), training refuses."""
    bn, x = BatchNorm(3, eps=0.0), normal(rng, (4, 3, 5), np.float32)
    np.testing.assert_array_equal(bn.eval()(x), x)
    with pytest.raises(ArgumentValueError, match=r"^eps: expected a number > 0"):
        bn.train()(x)


def test_axis_outside_of_the_input():
    with pytest.raises(ArgumentValueError, match=r"^axis: expected an axis of an array of rank 2, got 3"):
        BatchNorm(3, axis=3)(np.ones((4, 3), np.float32))


def test_backward_before_forward():
    with pytest.raises(ArgumentValueError, match=r"^backward: expected a call"):
        BatchNorm(3).backward(np.ones((2, 3), np.float32))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))], ids=["copy", "pickle"])
def test_layers_can_be_copied_and_pickled(copied, rng):
    bn, x = layer(3), normal(rng, (8, 3, 4), np.float32)
    bn(x)
    other = copied(bn)
    assert all(same_bits(v, bn.state_dict()[k]) for k, v in other.state_dict().items())
    assert same_bits(other.eval()(x), bn.eval()(x))
    other.weight[:] = 7
    assert (bn.weight != 7).all()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_copies_are_without_the_last_batch(copied, rng):
    bn, x = layer(3), normal(rng, (8, 3, 4), np.float32)
    bn(x)
    with pytest.raises(ArgumentValueError, match=r"^backward: expected a call"):
        copied(bn).backward(x)
    bn.backward(x)
