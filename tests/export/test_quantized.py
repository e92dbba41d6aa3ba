"""Dequantized weights that several folds meet: what one has rewritten, the next reads afresh."""

from __future__ import annotations

import numpy as np
import pytest

from .folding import Model, check, folded, ops


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "Conv"])
@pytest.mark.parametrize("between", [[], ["Identity"]])
def test_a_shift_through_weights_that_were_rescaled(op, between):
    m = Model()
    shape, x = ((6, 4, 3, 3), m.input(2, 4, 6, 6)) if op == "Conv" else ((4, 6), m.input(5, 4))
    whole = m.constant(m.rng.integers(-100, 100, shape).astype(np.int8))
    w = m.op("DequantizeLinear", whole, m.constant(np.float32(0.01)))
    for layer in between:
        w = m.op(layer, w)
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    y = m.op(op, m.bn(x, 4, parameters=(ones, ones, zeros, ones), epsilon=0.0), w)
    y = m.op("Add", y, m.weight(6)) if op == "MatMul" else y
    result = check(m.build(m.bn(y, 6)))
    assert folded(result)
    assert ops(result.model) == ["DequantizeLinear", *between, op, *(["Add"] if op == "MatMul" else [])]


def test_a_shift_alone_leaves_shared_weights_alone():
    m = Model()
    w = m.weight(6, 4, 3, 3)
    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
    y = m.op("Conv", m.input(2, 4, 6, 6), w)
    model = m.build(m.bn(y, 6, parameters=(ones, ones, zeros, ones), epsilon=0.0), m.op("Relu", w))
    result = check(model)
    assert folded(result) and len(result.model.graph.initializer) == 2  # the weights and a new bias


def test_a_copy_does_not_rescale_the_weights_of_the_original():
    m = Model()
    whole = m.constant(m.rng.integers(-100, 100, (6, 4, 3, 3)).astype(np.int8))
    y = m.op("Conv", m.input(2, 4, 6, 6), m.op("DequantizeLinear", whole, m.constant(np.float32(0.01))))
    model = m.build(m.bn(y, 6), m.op("Relu", y))
    for duplicate in (False, True):
        (entry,) = check(model, duplicate=duplicate).report.entries
        assert not entry.folded and "has other readers" in entry.reason
