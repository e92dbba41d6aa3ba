"""Constants where data stands: they take the map themselves, where they are read."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from onnx import numpy_helper

from .folding import Model, check, folded, ops


def test_a_class_token():
    m = Model()
    y = m.op("Add", m.op("MatMul", m.input(2, 5, 4), m.weight(4, 6)), m.weight(6))
    y = m.op("Transpose", m.op("Concat", m.weight(2, 1, 6), y, axis=1), perm=[0, 2, 1])
    result = check(m.build(m.op("Transpose", m.bn(y, 6), perm=[0, 2, 1])))
    assert folded(result)
    assert sorted(ops(result.model)) == ["Add", "Concat", "MatMul", "Transpose", "Transpose"]


def test_among_the_branches():
    m = Model()
    x = m.input(2, 4, 6, 6)
    branches = [m.op("Conv", x, m.weight(6, 4, 3, 3)) for _ in range(2)]
    chosen = m.op("Where", m.input(2, 1, 1, 1, dtype=bool), m.op("Conv", x, m.weight(6, 4, 3, 3)), m.weight(1, 6, 1, 1))
    assert folded(check(m.build(m.bn(m.op("Sum", *branches, m.weight(1, 6, 1, 1), chosen), 6))))


@pytest.mark.parametrize("shape", [(), (4, 4)])
def test_a_scalar_becomes_a_vector_and_a_plane_no_volume(shape):
    m = Model()
    x = m.input(2, 4, 6, 6)
    y = m.op("Max", m.op("Conv", x, m.weight(6, 4, 3, 3)), m.constant(np.full(shape, 2, np.float32)))
    result = check(m.build(m.bn(y, 6, parameters=m.positive(6))))
    (entry,) = result.report.entries
    if shape:
        assert not entry.folded and "would grow beyond both of its axes" in entry.reason
    else:
        assert entry.folded and [6, 1, 1] in [list(t.dims) for t in result.model.graph.initializer]


def test_normalized_weights():
    m = Model()
    weight = m.weight(6, 36)
    w = m.bn(m.op("Reshape", weight, m.ints(6, 4, 3, 3)), 4)
    x = m.input(2, 4, 6, 6)
    result = check(m.build(m.op("Conv", x, w), m.op("Relu", w), m.op("Neg", weight)))
    assert folded(result) and ops(result.model) == ["Conv", "Relu", "Neg"]
    assert result.report.entries[0].absorber


def test_a_constant_output_stays():
    m = Model()
    (entry,) = check(m.build(m.bn(m.weight(2, 4, 3), 4))).report.entries
    assert "it stands between a constant and a graph output" in entry.reason


@pytest.mark.parametrize("opset", [12, 15])
def test_standardised_weights(opset):
    m = Model(opset=opset)
    flat = m.op("Reshape", m.weight(6, 4, 3, 3), m.ints(1, 6, -1))
    parameters = [m.constant(a) for a in m.statistics(6)]
    training = {"training_mode": 1} if opset >= 14 else {}
    w, *_ = m.op("BatchNormalization", flat, *parameters, outputs=3 if opset >= 14 else 5, **training)
    x = m.input(2, 4, 6, 6)
    model = m.build(m.bn(m.op("Conv", x, m.op("Reshape", w, m.ints(6, 4, 3, 3))), 6))
    result = fold(model)
    onnx.checker.check_model(result.model, full_check=True)
    assert folded(result) and ops(result.model) == ["Conv"]
    if opset >= 14:
        check(model)
    weight = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float64).reshape(6, -1)
    gamma, beta = (numpy_helper.to_array(model.graph.initializer[i]).astype(np.float64)[:, None] for i in (2, 3))
    standard = (weight - weight.mean(1, keepdims=True)) / np.sqrt(weight.var(1, keepdims=True) + 1e-5) * gamma + beta
    new = numpy_helper.to_array(next(t for t in result.model.graph.initializer if len(t.dims) == 4)).reshape(6, -1)
    np.testing.assert_allclose(new / new[:, :1], standard / standard[:, :1], rtol=1e-4)


def test_training_whose_statistics_are_read_stays():
    m = Model(opset=15)
    parameters = [m.constant(a) for a in m.statistics(4)]
    outputs = m.op("BatchNormalization", m.weight(2, 4, 3), *parameters, outputs=3, training_mode=1)
    (entry,) = check(m.build(m.op("Relu", outputs[0]), outputs[1])).report.entries
    assert not entry.folded and "training form" in entry.reason
