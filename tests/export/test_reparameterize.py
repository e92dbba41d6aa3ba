"""A normalization beside a Conv of the same input is one of its taps."""

from __future__ import annotations

import pytest

from .folding import Model, check, folded, is_folded


@pytest.mark.parametrize(("group", "kernel", "dilation"), [(1, 3, 1), (4, 3, 1), (2, 3, 2), (1, 1, 1), (1, 5, 1)])
@pytest.mark.parametrize("flipped", [False, True])
def test_beside_a_conv(group, kernel, dilation, flipped):
    m = Model()
    x = m.op("Relu", m.input(2, 4, 6, 6))
    pads = [dilation * (kernel // 2)] * 4
    y = m.op("Conv", x, m.weight(4, 4 // group, kernel, kernel), group=group, pads=pads, dilations=[dilation] * 2)
    z = m.bn(x, 4)
    result = is_folded(m.build(m.op("Relu", m.op("Add", *((z, y) if flipped else (y, z))))), "Relu", "Conv", "Relu")
    assert "(Conv)" in result.report.entries[0].absorber[0]


def test_subtracted_from_a_conv():
    m = Model()
    x = m.op("Relu", m.input(2, 4, 6, 6))
    y = m.op("Conv", x, m.weight(4, 4, 3, 3), pads=[1] * 4)
    is_folded(m.build(m.op("Relu", m.op("Sub", y, m.bn(x, 4)))), "Relu", "Conv", "Relu")
    result = check(m.build(m.op("Relu", m.op("Sub", m.bn(x, 4), m.op("Conv", x, m.weight(4, 4, 1, 1))))))
    assert "the other operand of Sub would need the same scale" in result.report.entries[-1].reason


def test_three_branches():
    m = Model()
    x = m.op("Relu", m.input(2, 4, 6, 6))
    y = m.bn(m.op("Conv", x, m.weight(4, 4, 3, 3), pads=[1] * 4), 4)
    y = m.op("Add", y, m.bn(m.op("Conv", x, m.weight(4, 4, 1, 1)), 4))
    is_folded(m.build(m.op("Relu", m.op("Add", y, m.bn(x, 4)))), "Relu", "Conv", "Conv", "Add", "Relu")


@pytest.mark.parametrize(
    "change",
    [
        {"strides": [2, 2], "pads": [1] * 4},
        {"pads": [1, 1, 3, 3], "dilations": [2, 2]},
        {"auto_pad": "SAME_LOWER"},
        {"pads": [1] * 4, "readers": 2},
    ],
)
def test_beside_a_conv_that_does_not_fit(change):
    readers = change.pop("readers", 1)
    m = Model()
    size = 1 if "strides" in change else 6
    x = m.op("Relu", m.input(2, 4, size, size))
    y = m.op("Conv", x, m.weight(4, 4, 3, 3), **change)
    z = m.op("Relu", m.op("Add", y, m.bn(x, 4)))
    result = check(m.build(*([z] if readers == 1 else [z, m.op("Tanh", y)])))
    assert not folded(result)
