"""Norms, recurrent layers and constants of every form; the other absorbers have files of their own."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from .folding import Model, check, folded, is_folded, is_left, ops


def test_norms():
    m = Model()
    y = m.op("InstanceNormalization", m.input(2, 4, 3, 3), m.weight(4), m.weight(4))
    is_folded(m.build(m.bn(y, 4)), "InstanceNormalization")
    m = Model()
    y = m.op("LayerNormalization", m.input(2, 5, 4), m.weight(5, 4), axis=1)
    is_folded(m.build(m.bn(y, 5)), "LayerNormalization")
    m = Model(opset=21, ir_version=10)
    y = m.op("GroupNormalization", m.input(2, 4, 3, 3), m.weight(4), m.weight(4), num_groups=2)
    out = m.bn(y, 4)
    m.output(out, shape=[2, 4, 3, 3])
    is_folded(m.build(), "GroupNormalization")
    m = Model()
    result = check(m.build(m.bn(m.bn(m.op("Relu", m.input(2, 4, 3)), 4), 4)))
    assert ops(result.model) == ["Relu", "BatchNormalization"]


def test_into_both_readers_or_none():
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4)
    is_folded(m.build(m.op("Conv", y, m.weight(4, 4, 1, 1)), m.op("Conv", y, m.weight(4, 2, 1, 1), group=2)))
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4)
    is_left(m.build(m.op("Conv", y, m.weight(4, 4, 1, 1)), m.op("Tanh", y)), "Tanh neither carries nor absorbs")


def test_layer_norm_affine_into_gemm():
    m = Model()
    y = m.op("LayerNormalization", m.input(2, 4), m.constant(np.ones(4, "f")))
    y = m.op("Add", m.op("Mul", y, m.weight(4)), m.weight(4))
    is_folded(m.build(m.op("Gemm", y, m.weight(4, 5))), "LayerNormalization", "Gemm")


def wrapped(m, way, array):
    if way == "node":
        return m.op("Constant", value=numpy_helper.from_array(array))
    if way == "identity":
        return m.op("Identity", m.constant(array))
    if way == "cast":
        return m.op("Cast", m.constant(array.astype(np.float64)), to=1)
    if way == "reshape":
        return m.op("Reshape", m.constant(array.reshape(-1)), m.ints(*array.shape))
    if way == "transpose":
        return m.op("Transpose", m.constant(np.ascontiguousarray(array.T)))
    assert way == "arithmetic"
    return m.op("Sqrt", m.op("Add", m.op("Mul", m.constant(array), m.constant(array)), m.constant(np.float32(0))))


@pytest.mark.parametrize("way", ["node", "identity", "cast", "reshape", "transpose", "arithmetic"])
def test_ways_to_write_a_constant(way):
    m = Model()
    x = m.input(2, 3, 6, 6)
    arrays = m.rng.uniform(0.1, 1, (4, 3, 3, 3)).astype("f"), m.rng.uniform(0.1, 1, 4).astype("f")
    y = m.op("Conv", x, *(wrapped(m, way, a) for a in arrays))
    parameters = [wrapped(m, way, np.abs(p) + np.float32(0.1)) for p in m.statistics(4)]
    is_folded(m.build(m.op("BatchNormalization", y, *parameters)), "Conv")


def test_constant_of_shape():
    m = Model()
    w = m.op("ConstantOfShape", m.ints(4, 3, 3, 3), value=numpy_helper.from_array(np.array([0.5], "f")))
    result = check(m.build(m.bn(m.op("Conv", m.input(2, 3, 6, 6), w), 4)))
    assert folded(result)


def test_overridable_initializer():
    m = Model()
    w = m.weight(4, 3, 3, 3, name="w")
    x = m.input(2, 3, 6, 6)
    m.input(4, 3, 3, 3, name="w")
    is_left(m.build(m.bn(m.op("Conv", x, w), 4)), "the caller may override")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_into_a_recurrent_layer(kind, direction, bias, shift):
    m = Model()
    hidden, features, ways = 3, 5, 2 if direction == "bidirectional" else 1
    gates = hidden * {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    x = m.op("Tanh", m.input(6, features, 2))  # time, features, batch
    x = m.op("Transpose", m.bn(x, features, parameters=None if shift else m.positive(features)), perm=[0, 2, 1])
    extra = [m.weight(ways, 2 * gates)] if bias else []
    w, r = m.weight(ways, gates, features), m.weight(ways, gates, hidden)
    y = m.op(kind, x, w, r, *extra, outputs=1, hidden_size=hidden, direction=direction)
    m.output(y, shape=[6, ways, 2, hidden])
    is_folded(m.build(), "Tanh", "Transpose", kind)


def test_a_map_along_the_time_of_a_recurrent_layer_stays():
    m = Model()
    x = m.op("Transpose", m.bn(m.op("Tanh", m.input(2, 6, 5)), 6), perm=[1, 0, 2])
    y = m.op("RNN", x, m.weight(1, 3, 5), m.weight(1, 3, 3), outputs=1, hidden_size=3)
    m.output(y, shape=[6, 1, 2, 3])
    is_left(m.build(), "does not lie along the features that RNN reads")
