"""Constants where data stands: they take the map themselves, where they are read."""

from __future__ import annotations

import numpy as np

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


def test_a_scalar_is_no_vector():
    m = Model()
    x = m.input(2, 4, 6, 6)
    y = m.op("Max", m.op("Conv", x, m.weight(6, 4, 3, 3)), m.constant(np.float32(2)))
    (entry,) = check(m.build(m.bn(y, 6, parameters=m.positive(6)))).report.entries
    assert not entry.folded and "broadcast along the channels" in entry.reason


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
