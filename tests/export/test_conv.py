"""Conv, ConvTranspose and DeformConv of every form, upstream and downstream."""

from __future__ import annotations

import pytest

from .folding import Model, is_folded, is_left


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bias", [None, "", "vector"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv(group, bias, rank):
    m = Model()
    x = m.input(2, 4, *[5] * rank)
    extra = [] if bias is None else [m.weight(8) if bias else ""]
    y = m.op("Conv", x, m.weight(8, 4 // group, *[3] * rank), *extra, group=group, pads=[1] * (2 * rank))
    is_folded(m.build(m.op("Relu", m.bn(y, 8))), "Conv", "Relu")


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_transpose(group, bias):
    m = Model()
    extra = [m.weight(3 * group)] if bias else []
    y = m.op("ConvTranspose", m.input(2, 4, 5, 5), m.weight(4, 3, 3, 3), *extra, group=group, strides=[2, 2],
             output_padding=[1, 1], pads=[1, 0, 0, 1])  # fmt: skip
    is_folded(m.build(m.bn(y, 3 * group)), "ConvTranspose")


def deformed(m, x, channels, biased):
    weight, offsets = m.weight(channels, 2, 3, 3), m.input(2, 18, 4, 4)
    return m.op("DeformConv", x, weight, offsets, *([m.weight(channels)] if biased else []), group=2)


@pytest.mark.parametrize("biased", [False, True])
def test_deformed_convolution(biased):
    m = Model(opset=19)
    y = m.bn(deformed(m, m.input(2, 4, 6, 6), 6, biased), 6)
    is_folded(m.build(m.op("Relu", y)), "DeformConv", "Relu")
    m = Model(opset=19)
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4, parameters=m.positive(4))
    is_folded(m.build(deformed(m, y, 6, biased)), "Sigmoid", "DeformConv")
    m = Model(opset=19)
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4)
    is_left(m.build(deformed(m, y, 6, biased)), "may sample zeros outside")


@pytest.mark.parametrize("group", [1, 2, 4])
def test_into_a_conv(group):
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4)
    is_folded(m.build(m.op("Conv", y, m.weight(8, 4 // group, 3, 3), group=group)), "Sigmoid", "Conv")


@pytest.mark.parametrize("pads", [{"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}])
def test_into_a_padded_conv(pads):
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4)
    is_left(m.build(m.op("Conv", y, m.weight(4, 4, 3, 3), **pads)), "pads with zeros, and the shift is not zero")
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4, parameters=m.positive(4))
    is_folded(m.build(m.op("Conv", y, m.weight(4, 4, 3, 3), **pads)), "Sigmoid", "Conv")


def test_into_conv_transpose():
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 5, 5)), 4)
    is_folded(m.build(m.op("ConvTranspose", y, m.weight(4, 3, 1, 1), group=2)), "Sigmoid", "ConvTranspose")
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 5, 5)), 4)
    is_left(m.build(m.op("ConvTranspose", y, m.weight(4, 3, 2, 2))), "borders less often than its middle")
