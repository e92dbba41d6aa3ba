"""Add, Sub, Mul, Div and Sum: constants take the map, branches share it."""

from __future__ import annotations

import pytest

from .folding import Model, check, is_folded, is_left, ops


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 4, 1, 1), (1, 4, 3, 3)])
@pytest.mark.parametrize("linear", [True, False])
def test_constant_operand_before_a_normalization(kind, flipped, shape, linear):
    m = Model()
    x = m.input(2, 4, 3, 3)
    y = m.op("Conv", x, m.weight(4, 4, 1, 1)) if linear else m.op("Sigmoid", x)
    operand = m.constant((m.rng.uniform(0.5, 1.5, shape)).astype("f"))
    y = m.op(kind, *((operand, y) if flipped else (y, operand)))
    parameters = m.positive(4) if kind in ("Mul", "Div") and not linear else None
    result = check(m.build(m.bn(y, 4, parameters=parameters)))
    if linear and shape != (1, 4, 3, 3) and (kind, flipped) != ("Div", True):
        assert ops(result.model) == ["Conv"]


def test_branches():
    for kind in ("Add", "Sub", "Sum"):
        m = Model()
        x = m.input(2, 3, 6, 6)
        y = m.op(kind, m.op("Conv", x, m.weight(4, 3, 3, 3)), m.op("Conv", x, m.weight(4, 3, 3, 3)))
        is_folded(m.build(m.bn(y, 4)), "Conv", "Conv", kind)


def test_one_branch_does_not_absorb():
    m = Model()
    x = m.input(2, 4, 6, 6)
    y = m.op("Add", m.op("Conv", x, m.weight(4, 4, 1, 1)), m.op("Relu", x))
    is_left(m.build(m.bn(y, 4)), "Relu")


def test_width_wise_product_is_not_channel_wise():
    m = Model()
    y = m.op("Conv", m.input(2, 4, 6, 6), m.weight(4, 4, 3, 3))
    is_left(m.build(m.op("Add", m.op("Mul", y, m.weight(4)), m.weight(4))), "the map lies along axis 3")


def test_constant_that_enlarges_is_no_map():
    m = Model()
    y = m.op("Conv", m.input(2, 4, 6, 6), m.weight(1, 4, 3, 3))
    result = check(m.build(m.op("Add", m.op("Mul", y, m.weight(4, 1, 1)), m.weight(4, 1, 1))))
    assert ops(result.model) == ["Conv", "Mul", "Add"]
