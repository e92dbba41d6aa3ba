"""The statistics of a model are those of all its data, whatever the batches, each layer behind corrected ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from fastbn_export.build import build
from fastbn_export.layers import Conv, Linear, ReLU, Sigmoid
from fastbn_export.recalibrate import recalibrate
from numpy.testing import assert_allclose
from onnx import helper, numpy_helper

from .onnx_models import graph, initializers, value
from .plain_fold import norm

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(101, 4)) * 3 + 5).astype(np.float32)


def network():
    first, last = (Linear(RNG.normal(size=(4, 4)).astype(np.float32)) for _ in range(2))
    norms = [norm(RNG, 4), norm(RNG, 4)]
    return first, last, norms, build([first, norms[0], Sigmoid(), last, norms[1]], (None, 4), fold=False)


def statistics(model):
    """Return (mean, var) of each BatchNormalization, in order."""
    arrays = initializers(model)
    return [(arrays[n.input[3]], arrays[n.input[4]]) for n in model.graph.node if n.op_type == "BatchNormalization"]


def expected(first, last, norms, ddof):
    u = X.astype(np.float64) @ np.asarray(first.weight, np.float64).T
    mean, var = u.mean(0), u.var(0, ddof=ddof)
    z = (u - mean.astype(np.float32)) / np.sqrt(var.astype(np.float32) + 1e-5) * norms[0].weight + norms[0].bias
    v = 1 / (1 + np.exp(-z)) @ np.asarray(last.weight, np.float64).T
    return [(mean, var), (v.mean(0), v.var(0, ddof=ddof))]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("cuts", [[], [50], [7, 8, 90]])
def test_any_batches_give_the_statistics_of_all_data(unbiased, cuts):
    first, last, norms, model = network()
    before = model.SerializeToString()
    result = recalibrate(model, np.split(X, cuts), unbiased=unbiased)
    assert model.SerializeToString() == before
    for have, want in zip(statistics(result), expected(first, last, norms, int(unbiased)), strict=True):
        assert_allclose(have[0], want[0], rtol=1e-5, atol=1e-6)
        assert_allclose(have[1], want[1], rtol=1e-5, atol=1e-6)
    assert len(result.graph.initializer) == len(model.graph.initializer), "the old statistics are gone"


def test_sorted_batches_and_an_iterator_are_no_matter():
    *_, model = network()
    shuffled = recalibrate(model, [{"input": X}])
    ordered = recalibrate(model, iter(np.split(X[np.argsort(X[:, 0])], [30, 31])))
    for a, b in zip(statistics(shuffled), statistics(ordered), strict=True):
        assert_allclose(a, b, rtol=1e-5)


def test_convolutions_pool_over_space():
    x = RNG.normal(size=(5, 2, 6, 6)).astype(np.float32)
    weight = RNG.normal(size=(3, 2, 1, 1)).astype(np.float32)
    model = build([Conv(weight), norm(RNG, 3), ReLU()], (None, 2, 6, 6), fold=False)
    ((mean, var),) = statistics(recalibrate(model, [x[:2], x[2:]]))
    u = np.einsum("nchw,mc->nmhw", x.astype(np.float64), weight[:, :, 0, 0])
    assert_allclose(mean, u.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
    assert_allclose(var, u.var((0, 2, 3), ddof=1), rtol=1e-4)


def test_a_statistic_shared_by_two_nodes_is_split():
    ones = [(name, np.ones(4, np.float32)) for name in "sbmv"]
    nodes = [
        helper.make_node("BatchNormalization", ["x", *"sbmv"], ["p"]),
        helper.make_node("Mul", ["p", "p"], ["q"]),
        helper.make_node("BatchNormalization", ["q", *"sbmv"], ["y"]),
    ]
    model = graph(nodes, [value("x", shape=["n", 4])], [value("y", shape=["n", 4])], ones)
    (a, _), (b, _) = statistics(recalibrate(model, [X]))
    assert_allclose(a, X.mean(0), rtol=1e-5)
    assert not np.allclose(a, b) and "m" not in initializers(model).keys() - {"m"}


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
@pytest.mark.parametrize("wrap", ["Constant", "Identity"])
def test_statistics_that_are_no_initialisers_keep_their_type(dtype, wrap):
    ones, kind = numpy_helper.from_array(np.ones(4, dtype)), helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [helper.make_node("Constant", [], ["k"], value=ones)]
    nodes += [helper.make_node("Identity", ["k"], ["m"])] if wrap == "Identity" else []
    statistic = "m" if wrap == "Identity" else "k"
    nodes.append(helper.make_node("BatchNormalization", ["x", "k", "k", statistic, statistic], ["y"]))
    model = graph(nodes, [value("x", kind, ["n", 4])], [value("y", kind, ["n", 4])], opset=9)
    result = recalibrate(model, [X.astype(dtype)])
    onnx.checker.check_model(result, full_check=True)
    ((mean, var),) = statistics(result)
    assert mean.dtype == var.dtype == dtype
    assert_allclose(mean, X.mean(0), rtol=1e-2)


def test_initialisers_of_old_models_are_inputs_too():
    ones = [(name, np.ones(4, np.float32)) for name in "sbmv"]
    inputs = [value("x", shape=["n", 4]), *(value(name, shape=[4]) for name in "sbmv")]
    nodes = [helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y"])]
    model = graph(nodes, inputs, [value("y", shape=["n", 4])], ones, opset=8, ir_version=3)
    onnx.checker.check_model(recalibrate(model, [X]), full_check=True)


def declared(model):
    return [v.name for v in model.graph.input]


def one_norm(extra=(), constants="sbmv", name="y", **options):
    """One BatchNormalization of x; its parameters are constants, or inputs where ``extra`` says so."""
    nodes = [helper.make_node("BatchNormalization", ["x", *"sbmv"], [name])]
    inputs = [value("x", shape=["n", 4]), *(value(e, shape=[4]) for e in extra)]
    ones = [(c, np.ones(4, np.float32)) for c in constants]
    return graph(nodes, inputs, [value(name, shape=["n", 4])], ones, **options)


def test_statistics_that_the_caller_may_override_stay_so():
    model = one_norm(extra="smv")
    result = recalibrate(model, [X])
    onnx.checker.check_model(result, full_check=True)
    assert declared(result) == declared(model) == ["x", "s", "m", "v"]
    assert result.graph.node[0].input == model.graph.node[0].input
    assert_allclose(initializers(result)["m"], X.mean(0), rtol=1e-5)


def test_an_input_that_is_no_longer_read_stays_an_input():
    model = one_norm(extra="mv", constants="sb")
    result = recalibrate(model, [{"x": X, "m": np.ones(4), "v": np.ones(4)}])
    assert declared(result) == ["x", "m", "v"]
    assert_allclose(statistics(result)[0][0], X.mean(0), rtol=1e-5)


def test_one_statistic_in_two_places_of_a_node_becomes_two():
    model = one_norm(extra="m", constants="sbm")
    model.graph.node[0].input[4] = "m"
    ((mean, var),) = statistics(recalibrate(model, [X]))
    assert_allclose(mean, X.mean(0), rtol=1e-5)
    assert_allclose(var, X.var(0, ddof=1), rtol=1e-5)


def test_new_names_are_new_everywhere():
    """Neither an input that nobody reads nor a value within a body lends its name; k still reads the old statistics."""
    taken = "y.running_mean"
    model = one_norm(extra=[taken])
    bodies = {
        branch: helper.make_graph(
            [
                helper.make_node("Identity", ["m"], ["y.running_var"]),
                helper.make_node("Add", ["y.running_var", "v"], [branch]),
            ],
            branch,
            [],
            [value(branch, shape=[4])],
        )
        for branch in ("then_branch", "else_branch")
    }
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    model.graph.node.append(helper.make_node("If", ["c"], ["k"], **bodies))
    model.graph.output.append(value("k", shape=[4]))
    result = recalibrate(model, [{"x": X, taken: np.zeros(4)}])
    onnx.checker.check_model(result, full_check=True)
    assert declared(result) == ["x", taken]
    new = result.graph.node[0].input[3:]
    assert not {taken, "y.running_var", "m", "v"} & set(new)
    assert_allclose(initializers(result)[new[0]], X.mean(0), rtol=1e-5)


def test_what_cannot_be():
    *_, model = network()
    without = build([ReLU()], (None, 4), fold=False)
    for wrong, batches, message in (
        (without, [X], "none in the main graph"),
        (model, [], "at least one batch"),
        (model, [X[:, :3]], "shape"),
        (model, [{"other": X}], "none for"),
        (model, [X[:1]], "at least 2 values"),
    ):
        with pytest.raises(ValueError, match=message):
            recalibrate(wrong, batches)
