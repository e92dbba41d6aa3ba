"""Graphs one step beside those that fold: every guard of an absorber must be seen to hold."""

from __future__ import annotations

import numpy as np
import pytest

from .folding import Model, is_folded, is_left


def scaled(m, x, channels):
    """A normalization without shift and with positive scales, which most operators let through."""
    return m.bn(x, channels, parameters=m.positive(channels))


def conv(m, channels=4):
    return m.op("Conv", m.input(2, 3, 5, 5), m.weight(channels, 3, 3, 3))


def offsets_of_a_deformed_convolution(m):
    offsets = scaled(m, m.op("Sigmoid", m.input(2, 2, 4, 4)), 2)
    return m.op("DeformConv", m.input(2, 2, 4, 4), m.weight(6, 2, 1, 1), offsets)


def weights_of_a_convolution(m):
    return m.op("Conv", m.input(2, 3, 5, 5), scaled(m, m.op("Sigmoid", m.input(4, 3, 3, 3)), 3))


def transposed(**attributes):
    def build(m):
        y = m.bn(m.op("Sigmoid", m.input(2, 4, 5, 5)), 4)
        return m.op("ConvTranspose", y, m.weight(4, 3, 1, 1), **attributes)

    return build


def dequantized(between):
    """Weights that something else than a transposition lies behind."""

    def build(m):
        q = m.constant(m.rng.integers(1, 90, (4, 3, 3, 3)).astype(np.int8))
        w = between(m, m.op("DequantizeLinear", q, m.constant(np.float32(0.01))))
        return scaled(m, m.op("Conv", m.input(2, 3, 5, 5), w), 4)

    return build


def offset_of_a_gemm(m):
    return m.op("Gemm", m.input(3, 5), m.weight(5, 4), m.bn(m.op("Sigmoid", m.input(3, 4)), 4))


def gated_einsum(m):
    gate = m.input(2, 5)
    return m.op("Einsum", m.bn(m.input(2, 3), 3), m.weight(3, 5), gate, equation="bc,ck,bk->bk")


def repeated_label(m):
    return m.op("Einsum", m.bn(m.input(2, 3, 3), 3), m.weight(3, 5), equation="bcc,ck->bk")


def divisor(m):
    return m.op("Div", m.input(2, 4, 5, 5), scaled(m, m.op("Exp", m.input(2, 4, 5, 5)), 4))


def square(m):
    y = conv(m)
    return scaled(m, m.op("Mul", y, y), 4)


def summed_twice(m):
    y = conv(m)
    return m.bn(m.op("Sum", y, conv(m), y), 4)


def taken_from_itself(m):
    y = conv(m)
    return m.bn(m.op("Sub", y, y), 4)


def broadcast(op):
    """One channel, normalized, beside four."""

    def build(m):
        y = scaled(m, m.op("Sigmoid", m.input(2, 1, 5, 5)), 1)
        return m.op("Conv", m.op(op, y, m.input(2, 4, 5, 5)), m.weight(2, 4, 1, 1))

    return build


def added_to_four(m):
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    y = m.bn(m.op("Sigmoid", m.input(2, 1, 5, 5)), 1, parameters=(one, one, zero, one), epsilon=0.0)
    return m.op("Conv", m.op("Add", y, m.input(2, 4, 5, 5)), m.weight(2, 4, 1, 1))


LEFT = {
    "offsets of DeformConv": (19, offsets_of_a_deformed_convolution, "feeds the weights of a DeformConv"),
    "weights of Conv": (17, weights_of_a_convolution, "feeds the weights of a Conv"),
    "ConvTranspose, pads": (17, transposed(pads=[1, 1, 1, 1]), "borders less often"),
    "ConvTranspose, output_padding": (17, transposed(output_padding=[1, 1], strides=[2, 2]), "borders less often"),
    "ConvTranspose, output_shape": (17, transposed(output_shape=[5, 5]), "borders less often"),
    "ConvTranspose, auto_pad": (17, transposed(auto_pad="SAME_UPPER", strides=[2, 2]), "borders less often"),
    "dequantized, then Sqrt": (17, dequantized(lambda m, w: m.op("Sqrt", w)), "dequantized, and transformed"),
    "offset of Gemm": (17, offset_of_a_gemm, "feeds the offset C of a Gemm"),
    "gated Einsum": (17, gated_einsum, "does not stay a vector"),
    "repeated label": (17, repeated_label, "repeats a label"),
    "divisor": (17, divisor, "does not pass Div of two branches"),
    "square": (17, square, "twice"),
    "sum with itself": (17, summed_twice, "twice"),
    "difference with itself": (17, taken_from_itself, "twice"),
    "one channel times four": (17, broadcast("Mul"), "broadcasts along the channels"),
    "one channel plus four": (17, added_to_four, "broadcasts along the channels"),
}


@pytest.mark.parametrize(("opset", "build", "reason"), LEFT.values(), ids=LEFT)
def test_left(opset, build, reason):
    m = Model(opset=opset)
    is_left(m.build(build(m)), reason)


def test_a_scale_alone_leaves_no_sum_behind_an_einsum():
    m = Model()
    y = m.op("Einsum", m.input(2, 7, 5), m.weight(5, 4), equation="btk,kc->bct")
    is_folded(m.build(scaled(m, y, 4)), "Einsum")
