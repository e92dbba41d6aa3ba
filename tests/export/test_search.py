"""Who else reads a value: other readers, graph outputs, copies; and how far a search goes."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export.fold import fold
from onnx import helper

from .folding import Model, check, folded, ops


def linear_with_readers():
    m = Model()
    y = m.op("Conv", m.input(2, 4, 5, 5), m.weight(4, 4, 1, 1))
    return m.build(m.bn(y, 4), m.op("Relu", y))


def test_other_readers():
    result = check(linear_with_readers())
    assert "has other readers" in str(result.report.entries[0].reason)
    result = check(linear_with_readers(), duplicate=True)
    assert folded(result) and ops(result.model).count("Conv") == 2


def test_graph_output_in_between():
    m = Model()
    y = m.op("Conv", m.input(2, 4, 5, 5), m.weight(4, 4, 1, 1))
    model = m.build(m.bn(y, 4), y)
    assert "is also a graph output" in str(check(model).report.entries[0].reason)
    assert folded(check(model, duplicate=True))


def test_shape_is_no_reader():
    m = Model()
    y = m.op("Conv", m.input("N", 4, 5, 5), m.weight(4, 4, 1, 1))
    batch = m.op("Slice", m.op("Shape", y), m.ints(0), m.ints(1))
    shape = m.op("Concat", batch, m.ints(4, -1), axis=0)
    assert folded(check(m.build(m.op("Reshape", m.bn(y, 4), shape))))


def test_cast_like_is_no_reader_of_what_it_is_cast_like():
    m = Model(opset=17)
    y = m.op("Conv", m.input(1, 3, 6, 6), m.weight(4, 3, 3, 3))
    ones = m.op("Expand", m.op("CastLike", m.constant(np.float64(1)), y), m.ints(4))
    zeros = [m.constant(np.zeros(4, "f")) for _ in range(2)]
    result = check(m.build(m.op("BatchNormalization", y, ones, *zeros, m.constant(np.full(4, 2, "f")))))
    assert folded(result) and ops(result.model) == ["Conv"]


def test_growth_is_refused():
    """Two MatMuls without a bias would need two Adds in the place of one normalization."""
    m = Model()
    x = m.input(2, 3, 5)
    y = m.op("Concat", m.op("MatMul", x, m.weight(5, 2)), m.op("MatMul", x, m.weight(5, 2)), axis=2)
    result = check(m.build(m.bn(m.op("Transpose", y, perm=[0, 2, 1]), 4)))
    assert "more operators than it removes" in str(result.report.entries[0].reason)


def test_a_copy_that_reads_the_middle_of_a_run():
    """The copy of the last Div reads what the run computes half-way: the run must not vanish around it."""
    m = Model()
    y = m.op("Div", m.op("Mul", m.input(2, 5, 4), m.weight(5, 1)), m.constant(np.full((5, 1), 2, np.float32)))
    turned = m.bn(m.op("Transpose", y, perm=[2, 1, 0]), 5)
    check(m.build(m.bn(y, 5, parameters=m.positive(5)), m.op("Relu", turned)), duplicate=True)


@pytest.mark.parametrize("duplicate", [False, True])
def test_a_copy_for_a_reader_that_reads_twice(duplicate):
    """Of two pieces of one value only one gets the shift: no copy of its operator is right for both."""
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6), m.weight(4, 3, 3, 3))
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    pieces = m.op("Split", m.op("Concat", y, y, axis=1), outputs=2, axis=1)
    z = m.bn(m.op("Add", *pieces), 4, parameters=(one, np.arange(4, dtype="f"), zero, one), epsilon=0.0)
    check(m.build(m.op("Relu", z)), duplicate=duplicate)


@pytest.mark.parametrize("count", [2000])
def test_long_chains_do_not_recurse(count):
    m = Model()
    y = m.op("Conv", m.input(1, 4, 2, 2), m.weight(4, 4, 1, 1))
    for _ in range(count):
        y = m.op("Identity", y)
    graph = helper.make_graph(
        m.nodes, "g", m.inputs, [helper.make_tensor_value_info(m.bn(y, 4), 1, [1, 4, 2, 2])], m.initializers
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert folded(fold(model))
