"""Branches of one value that meet again, constants where data stands, and values that are repeated."""

from __future__ import annotations

import numpy as np
import pytest

from .folding import Model, check, conv, folded, is_folded, is_left


def conv_pair(m):
    x = m.input(2, 3, 5, 5)
    return [m.op("Conv", x, m.weight(4, 3, 1, 1)) for _ in range(2)]


MEETING = {
    "x + x": lambda m: (lambda y: m.op("Add", y, y))(conv(m, 2, 4, 5, 5)),
    "x beside x": lambda m: (lambda y: m.op("Concat", y, y, axis=3))(conv(m, 2, 4, 5, 5)),
    "cut and joined": lambda m: m.op(
        "Concat", *m.op("Split", conv(m, 2, 4, 5, 5), m.ints(1, 3), axis=1, outputs=2)[::-1], axis=1
    ),
    "cut and joined along the height": lambda m: m.op(
        "Concat", *m.op("Split", conv(m, 2, 4, 5, 5), m.ints(1, 4), axis=2, outputs=2), axis=2
    ),
    "halves added": lambda m: m.op("Add", *m.op("Split", conv(m, 2, 8, 5, 5, out=8), m.ints(4, 4), axis=1, outputs=2)),
    "Where": lambda m: m.op("Where", m.constant(np.arange(5) < 3), *conv_pair(m)),
    "Mean": lambda m: m.op("Mean", *conv_pair(m)),
    "Max": lambda m: m.op("Max", *conv_pair(m)),
    "Min": lambda m: m.op("Min", *conv_pair(m)),
    "Tile": lambda m: m.op("Tile", conv(m, 2, 4, 5, 5), m.ints(2, 1, 2, 1)),
    "Expand": lambda m: m.op("Expand", conv(m, 2, 4, 5, 5), m.ints(1, 4, 1, 5)),
    "CastLike": lambda m: m.op("CastLike", conv(m, 2, 4, 5, 5), m.weight(1)),
    "Clip": lambda m: m.op("Clip", conv(m, 2, 4, 5, 5)),
    "Einsum": lambda m: m.op("Einsum", conv(m, 2, 4, 5, 6), equation="nchw->ncwh"),
    "GridSample": lambda m: m.op("GridSample", conv(m, 2, 4, 5, 5), m.input(2, 3, 3, 2), padding_mode="border"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEETING)
def test_branches_that_meet_and_repetitions(case):
    m = Model(opset=17)
    y = MEETING[case](m)
    positive = [np.abs(a) if i in (0, 3) else a for i, a in enumerate(m.statistics(4))]
    is_folded(m.build(m.op("Relu", m.bn(y, 4, parameters=positive))))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 1, 5, 5)])
@pytest.mark.parametrize("op", ["Sum", "Max", "Min", "Mean", "Where"])
def test_a_constant_branch_that_is_broadcast_along_the_channels(op, shape):
    """It grows to a value for each channel, but not beyond."""
    m = Model()
    mask = [m.constant(np.eye(5) > 0)] if op == "Where" else []
    y = m.op(op, *mask, conv(m, 2, 4, 5, 5), m.weight(*shape))
    gamma, *rest = m.statistics(4)
    model = m.build(m.bn(y, 4, parameters=(np.abs(gamma), *rest)))
    is_left(model, "grow beyond") if len(shape) == 4 else is_folded(model)


@pytest.mark.parametrize("ir_version", [3, 8])
def test_a_constant_branch_that_has_grown_once(ir_version):
    """In IR version 3 it is a graph input, whose shape inference states as it was."""
    m = Model(opset=8, ir_version=ir_version)
    y = m.op("Reshape", m.op("Sum", conv(m, 2, 4, 5, 5), m.constant(np.float32(0.3))), m.ints(2, 4, 25))
    is_folded(m.build(m.bn(m.op("Identity", m.bn(y, 4)), 4)))


@pytest.mark.parametrize("value", [0, -np.inf])
def test_a_constant_branch_that_the_map_leaves_as_it_is(value):
    m = Model()
    y = m.op("Max", conv(m, 2, 4, 5, 5), m.constant(np.float32(value)))
    result = is_folded(m.build(m.bn(y, 4, parameters=m.positive(4))), "Conv", "Max")
    assert [t.dims for t in result.model.graph.initializer].count([]) == 1


def test_a_constant_of_both_axes_minus_a_normalization():
    m = Model()
    y = m.op("Sub", m.weight(1, 4, 5, 5), m.bn(m.op("Sigmoid", m.input(2, 4, 5, 5)), 4))
    is_folded(m.build(m.op("Conv", y, m.weight(3, 4, 3, 3), pads=[1] * 4)), "Sigmoid", "Sub", "Conv")


DOWN_ALSO = ("Tile", "Expand", "CastLike", "Clip", "Einsum", "GridSample")


@pytest.mark.parametrize("case", DOWN_ALSO)
def test_repetitions_downstream(case):
    m = Model(opset=17)
    made = MEETING[case](m)
    data = m.nodes.pop(0).output[0]  # the convolution: the normalization takes its place
    m.op("BatchNormalization", m.op("Sigmoid", m.input(2, 4, 5, 6 if case == "Einsum" else 5)),
         *map(m.constant, m.statistics(4)), outputs=[data])  # fmt: skip
    m.nodes = m.nodes[-2:] + m.nodes[:-2]
    used = {i for node in m.nodes for i in node.input}
    m.inputs = [i for i in m.inputs if i.name in used]
    m.initializers = [t for t in m.initializers if t.name in used]
    is_folded(m.build(m.op("Conv", made, m.weight(5, 4, 1, 1))))


def test_what_does_not_meet_stays():
    m = Model(opset=17)
    y = conv(m, 2, 4, 5, 5)
    y = m.op("Concat", y, y, axis=1)  # each copy would need its own half of the map
    is_left(m.build(m.op("Relu", m.bn(y, 8))), "would need different maps")
    m = Model(opset=17)
    a, b = m.op("Split", conv(m, 2, 4, 5, 5), m.ints(1, 4), axis=2, outputs=2)
    is_left(m.build(m.op("Relu", m.bn(a, 4)), m.op("Sigmoid", b)), "the other outputs of Split")
    m = Model(opset=17)
    y = m.op("Tile", conv(m, 2, 4, 5, 5), m.ints(1, 2, 1, 1))
    is_left(m.build(m.op("Relu", m.bn(y, 8))), "differs between the periods")
    m = Model(opset=17)
    y = m.op("Expand", conv(m, 2, 1, 5, 5, out=1), m.ints(2, 4, 5, 5))
    is_left(m.build(m.op("Relu", m.bn(y, 4))), "repeats along the channels")
    m = Model(opset=17)
    y = m.op("Max", *conv_pair(m))
    gamma = -np.ones(4, np.float32)
    is_left(m.build(m.op("Relu", m.bn(y, 4, parameters=(gamma, *m.statistics(4)[1:])))), "a negative scale")
    m = Model(opset=17)
    y = m.op("GridSample", conv(m, 2, 4, 5, 5), m.input(2, 3, 3, 2))
    is_left(m.build(m.op("Relu", m.bn(y, 4))), "GridSample pads with zeros")


def test_a_copy_is_made_for_one_reader_only():
    m = Model(opset=17)
    y = conv(m, 2, 4, 5, 5)
    twice = m.op("Concat", y, y, axis=3)
    model = m.build(m.op("Relu", m.bn(twice, 4)), m.op("Sigmoid", y))
    assert folded(check(model, duplicate=True))
    m = Model(opset=17)
    y = conv(m, 2, 4, 5, 5)
    twice = m.op("Concat", y, m.op("Neg", y), axis=3)
    model = m.build(m.op("Relu", m.bn(twice, 4)), m.op("Sigmoid", y))
    is_left(model, "", duplicate=True)
    m = Model(opset=17)
    y = conv(m, 2, 4, 5, 5)
    twice = m.op("Concat", y, m.op("Identity", y), axis=3)
    model = m.build(m.op("Relu", m.bn(twice, 4)), m.op("Sigmoid", y))
    is_left(model, "has other readers", duplicate=True)
