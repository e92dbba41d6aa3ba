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
        return scaled(m, m.op("Conv", m.input(2, 3, 5, 5), between(m, quantized(m, 4, 3, 3, 3))), 4)

    return build


def offset_of_a_gemm(m):
    return m.op("Gemm", m.input(3, 5), m.weight(5, 4), m.bn(m.op("Sigmoid", m.input(3, 4)), 4))


def batched_weight(*shape):
    return lambda m: m.op("MatMul", m.bn(m.op("Sigmoid", m.input(3, 4)), 4), m.weight(*shape))


def behind(op_type, *weights, **attributes):
    """A normalization along an axis that another norm's own scale does not lie along, of the same length."""

    def build(m):
        y = m.op(op_type, m.input(2, 4, 4), *(m.weight(*shape) for shape in weights), **attributes)
        return m.bn(m.op("Transpose", y, perm=[0, 2, 1]) if op_type.startswith("I") else y, 4)

    return build


def into_another_axis(m):
    y = m.op("Transpose", m.bn(m.op("Sigmoid", m.input(2, 4, 4)), 4), perm=[0, 2, 1])
    return m.op("Sigmoid", m.bn(y, 4))


def shifted_rms(m):
    y = m.op("RMSNormalization", m.input(2, 4), m.weight(4), axis=-1)
    return m.bn(y, 4)


def recurrent(m, x, state=""):
    y = m.op("GRU", x, m.weight(1, 12, 4), m.weight(1, 12, 4), "", "", state, hidden_size=4, outputs=["y", "h"])
    return y[0]


def state_of_a_gru(m):
    state = m.bn(m.op("Sigmoid", m.input(3, 4)), 4)
    return recurrent(m, m.input(5, 3, 4), m.op("Unsqueeze", state, m.ints(0)))


def batch_of_a_gru(m):
    return recurrent(m, m.bn(m.op("Sigmoid", m.input(5, 4, 4)), 4))


def quantized(m, *shape, scales=(), **attributes):
    q = m.constant(m.rng.integers(1, 90, shape).astype(np.int8))
    return m.op("DequantizeLinear", q, m.constant(np.full(scales, 0.01, np.float32)), **attributes)


def quantized_groups(m):
    y = scaled(m, m.op("Sigmoid", m.input(2, 4, 5, 5)), 4)
    return m.op("Conv", y, quantized(m, 6, 2, 3, 3), group=2)


def quantized_along_another_axis(m):
    return scaled(m, m.op("Conv", m.input(2, 3, 5, 5), quantized(m, 4, 3, 1, 1, scales=3, axis=1)), 4)


def quantized_by_blocks(m):
    return scaled(m, m.op("MatMul", m.input(2, 4), quantized(m, 4, 6, scales=(2, 6), axis=0, block_size=2)), 6)


def quantized_as_a_whole(m):
    return scaled(m, m.op("Conv", m.input(2, 3, 5, 5), quantized(m, 4, 3, 1, 1)), 4)


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


def concatenated_with_itself(m):
    y = conv(m)
    return m.bn(m.op("Concat", y, y, axis=1), 8)


def read_twice(op_type):
    def build(m):
        y = scaled(m, m.op("Sigmoid", m.input(2, 4, 5, 5)), 4)
        return m.op("Conv", m.op(op_type, y, y), m.weight(2, 4, 1, 1))

    return build


def clipped(m):
    return m.bn(m.op("Clip", conv(m), m.constant(np.float32(-0.5)), m.constant(np.float32(0.5))), 4)


def dropped(m):
    rate, training = m.constant(np.float32(0)), m.constant(np.asarray(True))
    return m.bn(m.op("Dropout", conv(m), rate, training), 4)


def whole_numbers(m):
    return m.bn(m.op("Cast", m.op("Cast", conv(m), to=6), to=1), 4)


def behind_its_height(op_type, **attributes):
    """A map along axis 2, as long as there are channels."""

    def build(m):
        y = m.op(op_type, m.op("Sigmoid", m.input(2, 4, 8, 8)), **attributes)
        return m.bn(m.op("Transpose", y, perm=[0, 2, 1, 3]), 4)

    return build


def into_its_height(op_type, **attributes):
    def build(m):
        y = m.op("Transpose", m.bn(m.op("Sigmoid", m.input(2, 4, 4, 4)), 4), perm=[0, 2, 1, 3])
        return m.op("Sigmoid", m.op(op_type, y, **attributes))

    return build


def gathered(*indices):
    return lambda m: m.bn(m.op("Gather", conv(m), m.constant(np.asarray(indices)), axis=1), len(indices))


def mean_of_channels(m):
    return m.op("Sigmoid", m.op("ReduceMean", m.bn(m.op("Sigmoid", m.input(2, 4, 5)), 4), axes=[1], keepdims=1))


def normalized_mean_of_channels(m):
    y = m.op("ReduceMean", m.op("Sigmoid", m.input(2, 4, 5)), axes=[1], keepdims=1)
    return m.bn(y, 1)


def resized_beyond_its_borders(m):
    roi = m.constant(np.array([0, 0, -0.2, -0.2, 1, 1, 1.2, 1.2], np.float32))
    mode = "tf_crop_and_resize"
    y = m.op("Resize", conv(m), roi, "", m.ints(2, 4, 5, 5), coordinate_transformation_mode=mode, mode="linear")
    return m.bn(y, 4)


def resized_channels(m):
    return m.bn(m.op("Resize", conv(m, 2), "", "", m.ints(2, 4, 3, 3), mode="nearest"), 4)


def slopes_of_a_prelu(m):
    return m.op("PRelu", m.input(2, 4, 5), scaled(m, m.op("Sigmoid", m.input(2, 4, 5)), 4))


LEFT = {
    "offsets of DeformConv": (19, offsets_of_a_deformed_convolution, "feeds the weights of a DeformConv"),
    "weights of Conv": (17, weights_of_a_convolution, "feeds the weights of a Conv"),
    "ConvTranspose, pads": (17, transposed(pads=[1, 1, 1, 1]), "borders less often"),
    "ConvTranspose, output_padding": (17, transposed(output_padding=[1, 1], strides=[2, 2]), "borders less often"),
    "ConvTranspose, output_shape": (17, transposed(output_shape=[5, 5]), "borders less often"),
    "ConvTranspose, auto_pad": (17, transposed(auto_pad="SAME_UPPER", strides=[2, 2]), "borders less often"),
    "dequantized, then Sqrt": (17, dequantized(lambda m, w: m.op("Sqrt", w)), "dequantized, and transformed"),
    "offset of Gemm": (17, offset_of_a_gemm, "feeds the offset C of a Gemm"),
    "weights of a MatMul in batches": (17, batched_weight(2, 4, 5), "whose weight is no matrix"),
    "a vector's MatMul": (17, batched_weight(4), "whose weight is no matrix"),
    "another axis of InstanceNormalization": (
        17,
        behind("InstanceNormalization", (4,), (4,)),
        "does not lie along the channel axis of InstanceNorm",
    ),
    "another axis of LayerNormalization": (17, behind("LayerNormalization", (4,)), "LayerNormalization does not"),
    "another axis of BatchNormalization": (17, into_another_axis, "another axis of BatchNormalization"),
    "RMSNormalization with a shift": (23, shifted_rms, "no bias to take a shift"),
    "state of a GRU": (17, state_of_a_gru, "feeds a parameter of GRU"),
    "batch of a GRU": (17, batch_of_a_gru, "along the features that GRU reads"),
    "quantized groups": (17, quantized_groups, "takes a factor along one axis only"),
    "quantized along another axis": (17, quantized_along_another_axis, "quantized along another axis"),
    "quantized by blocks": (21, quantized_by_blocks, "quantized by blocks"),
    "quantized as a whole in opset 12": (12, quantized_as_a_whole, "per channel before opset 13"),
    "concatenated with itself": (17, concatenated_with_itself, "would need different maps"),
    "multiplied by itself": (17, read_twice("Mul"), "twice"),
    "a maximum of itself": (17, read_twice("Max"), "twice"),
    "Clip": (17, clipped, "Clip is not linear"),
    "Dropout in training": (17, dropped, "Dropout is in training form"),
    "Cast to whole numbers": (17, whole_numbers, "is of type INT32"),
    "height of MaxPool": (17, behind_its_height("MaxPool", kernel_shape=[2, 2], strides=[2, 2]), "axis of MaxPool"),
    "height of AveragePool": (
        17,
        behind_its_height("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),
        "axis of AveragePool",
    ),
    "height of SpaceToDepth": (17, behind_its_height("SpaceToDepth", blocksize=2), "axis of SpaceToDepth"),
    "into the height of SpaceToDepth": (17, into_its_height("SpaceToDepth", blocksize=2), "axis of SpaceToDepth"),
    "into the height of DepthToSpace": (17, into_its_height("DepthToSpace", blocksize=2), "axis of DepthToSpace"),
    "into the height of MaxPool": (17, into_its_height("MaxPool", kernel_shape=[2, 2]), "axis of MaxPool"),
    "a channel gathered twice": (17, gathered(0, 0, 1, 2), "delivers a channel twice"),
    "mean of channels": (17, mean_of_channels, "reduces the channel axis"),
    "normalized mean of channels": (17, normalized_mean_of_channels, "reduces the channel axis"),
    "resized beyond its borders": (17, resized_beyond_its_borders, "fills in values from outside"),
    "resized channels": (17, resized_channels, "may resize the channel axis"),
    "slopes of PRelu": (17, slopes_of_a_prelu, "feeds a parameter of PRelu"),
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


def test_copies_of_what_is_concatenated_with_itself():
    m = Model()
    is_left(m.build(concatenated_with_itself(m)), "would need different maps", duplicate=True)


@pytest.mark.parametrize("duplicate", [False, True])
def test_two_branches_of_what_a_third_reads(duplicate):
    """A copy of the Conv would be for one of the branches."""
    m = Model()
    y = conv(m)
    z = scaled(m, m.op("Add", m.op("Neg", y), m.op("Identity", y)), 4)
    is_left(m.build(z, m.op("Sigmoid", y)), "has other readers", duplicate=duplicate)


@pytest.mark.parametrize("whole", [False, True])
def test_a_piece_that_others_read_too(whole):
    m = Model()
    first, second = m.op("Split", conv(m), m.ints(2, 2), axis=1, outputs=2)
    outputs = [m.bn(first, 2), m.op("Sigmoid", second), first if whole else m.op("Sigmoid", first)]
    is_left(m.build(*outputs), "is also a graph output" if whole else "has other readers")
