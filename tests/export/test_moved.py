"""What multiplies is moved by one ulp, here and there; what is added, exact or of no ulp of its own stays."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from fastbn_export.moved import move_factors, neighbours
from onnx import TensorProto, helper, numpy_helper

from .onnx_models import graph, initializers, value

RNG = np.random.default_rng(0)


def model():
    """Return a model with a constant in every role."""
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Gemm", ["centred", "weight", "bias"], ["h"]),
        helper.make_node("Transpose", ["turned"], ["t"]),
        helper.make_node("MatMul", ["h", "t"], ["m"]),
        helper.make_node("Mul", ["m", "both"], ["p"]),
        helper.make_node("Add", ["p", "both"], ["q"]),
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(RNG.normal(size=64).astype("f"))),
        helper.make_node("Mul", ["q", "k"], ["r"]),
        helper.make_node("BatchNormalization", ["r", "scale", "shift", "average", "variance"], ["y"]),
    ]
    square = {name: RNG.normal(size=(64, 64)).astype("f") for name in ("weight", "turned")}
    names = ("mean", "bias", "both", "scale", "shift", "average", "variance", "out")
    flat = {name: RNG.uniform(0.5, 2, 64).astype("f") for name in names}
    outputs = [value("y", shape=["n", 64]), value("out", shape=[64])]
    nodes.append(helper.make_node("Mul", ["r", "out"], ["unused"]))
    return graph(nodes, [value("x", shape=["n", 64])], outputs, [*square.items(), *flat.items()])


def test_factors_move_and_nothing_else():
    before, after = model(), model()
    after.CopyFrom(before)
    move_factors(after, np.random.default_rng(1))
    old, new = initializers(before), initializers(after)
    assert {name for name in old if not np.array_equal(old[name], new[name])} == {"weight", "turned", "scale"}
    tables = [numpy_helper.to_array(m.graph.node[6].attribute[0].t) for m in (before, after)]
    assert not np.array_equal(*tables)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_one_value_in_four_moves_to_a_neighbour(dtype):
    array = RNG.normal(size=4000).astype(dtype)
    moved = neighbours(numpy_helper.from_array(array), np.random.default_rng(0))
    assert moved.dtype == array.dtype
    bits = {2: np.int16, 4: np.int32, 8: np.int64}[array.dtype.itemsize]
    steps = moved.view(bits) - array.view(bits)
    assert set(steps.tolist()) == {-1, 0, 1}
    if dtype in (np.float32, np.float64):  # the short types have few distinct values, which move alike
        assert 0.2 < np.mean(steps != 0) < 0.3 and abs(np.mean(steps)) < 0.05


def test_equal_values_move_alike_and_exact_ones_stay():
    odd = np.float32([0, np.inf, np.nan, 1, -0.25, 2.0**-140, np.finfo(np.float32).max])
    array = np.concatenate([np.full(50, 0.3, np.float32), odd])
    moved = [neighbours(numpy_helper.from_array(array), np.random.default_rng(seed)) for seed in range(40)]
    assert all(len(set(m[:50].tolist())) == 1 for m in moved)
    assert len({m[0] for m in moved}) == 3
    assert neighbours(numpy_helper.from_array(np.float32(0.3)), np.random.default_rng(0)).shape == ()
    assert all(np.array_equal(m[50:56], odd[:6], equal_nan=True) and np.isfinite(m[56]) for m in moved)


def test_integers_and_half_read_values_stay():
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    io = [value("x", TensorProto.INT64, [3])], [value("y", TensorProto.INT64, [3])]
    whole = graph(nodes, *io, [("w", np.arange(3)), ("unread", np.float32([0.1]))])
    before = whole.SerializeToString()
    move_factors(whole, np.random.default_rng(0))
    assert whole.SerializeToString() == before
