"""Every absorber, every attribute: the normalization is gone and the numbers are the same."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from fastbn_export.fold import fold
from onnx import numpy_helper

from .folding import Model, check, folded, ops


def is_folded(model, *expected, **options):
    result = check(model, **options)
    assert folded(result), [e.reason for e in result.report.entries]
    if expected:
        assert ops(result.model) == list(expected)
    return result


def is_left(model, reason, **options):
    result = check(model, **options)
    reasons = [e.reason for e in result.report.entries if not e.folded]
    assert any(reason in r for r in reasons), reasons
    return result


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


@pytest.mark.parametrize(
    ("transposed", "c"), list(itertools.product([0, 1], [None, (), (1,), (4,), (1, 4), (3, 1), (3, 4)]))
)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0)])
def test_gemm(transposed, c, alpha, beta):
    m = Model()
    extra = [] if c is None else [m.weight(*c)]
    y = m.op("Gemm", m.input(3, 5), m.weight(*((4, 5) if transposed else (5, 4))), *extra,
             alpha=alpha, beta=beta, transB=transposed)  # fmt: skip
    is_folded(m.build(m.bn(y, 4)), "Gemm")


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_rows(trans):
    m = Model()
    y = m.op("Gemm", m.weight(*((5, 4) if trans else (4, 5))), m.input(5, 3), m.weight(3), transA=trans)
    is_folded(m.build(m.bn(m.op("Transpose", y, perm=[1, 0]), 4)), "Gemm", "Transpose")


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_gemm_with_an_offset_computed_by_another(beta):
    m = Model()
    c = m.op("Gemm", m.input(3, 6), m.weight(6, 4), m.weight(4))
    y = m.op("Gemm", m.input(3, 5), m.weight(5, 4), c, beta=beta, alpha=0.7)
    is_folded(m.build(m.op("Relu", m.bn(y, 4))), "Gemm", "Gemm", "Relu")


def test_gemm_with_an_offset_from_outside():
    m = Model()
    is_left(
        m.build(m.bn(m.op("Gemm", m.input(3, 5), m.weight(5, 4), m.input(4)), 4)), "offset C of Gemm is a graph input"
    )


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 2, 3, 5)])
@pytest.mark.parametrize("add", [None, "after", "before"])
def test_matmul(shape, add):
    m = Model()
    y = m.op("MatMul", m.input(*shape), m.weight(5, 4))
    if add:
        y = m.op("Add", *([y, m.weight(4)] if add == "after" else [m.weight(4), y]))
    rank = len(shape)
    perm = [0, rank - 1, *range(1, rank - 1)]
    if rank > 2:
        y = m.op("Transpose", y, perm=perm)
    z = m.bn(y, 4)
    if rank > 2:
        z = m.op("Transpose", z, perm=[perm.index(i) for i in range(rank)])
    result = is_folded(m.build(z))
    assert ops(result.model).count("Add") == (0 if rank == 2 and not add else 1)


def test_matmul_constant_on_the_left():
    m = Model()
    is_folded(m.build(m.bn(m.op("MatMul", m.weight(4, 5), m.input(2, 5, 7)), 4)), "MatMul", "Add")


def test_matmul_batched_weight():
    m = Model()
    is_folded(m.build(m.bn(m.op("MatMul", m.input(2, 4, 3, 5), m.weight(4, 5, 6)), 4)), "MatMul", "Add")


def test_matmul_square_and_transposed():
    m = Model()
    y = m.op("Transpose", m.op("MatMul", m.input(4, 5), m.weight(5, 4)), perm=[1, 0])
    is_left(m.build(m.bn(y, 4)), "axis of MatMul's data")


@pytest.mark.parametrize("equation", ["btk,kc->bct", "kc,btk->bct"])
def test_einsum(equation):
    m = Model()
    x, w = m.input(2, 7, 5), m.weight(5, 4)
    y = m.op("Einsum", *((x, w) if equation.startswith("b") else (w, x)), equation=equation)
    is_folded(m.build(m.bn(y, 4)), "Einsum", "Add")


def test_norms():
    m = Model()
    y = m.op("InstanceNormalization", m.input(2, 4, 3, 3), m.weight(4), m.weight(4))
    is_folded(m.build(m.bn(y, 4)), "InstanceNormalization")
    m = Model()
    y = m.op("LayerNormalization", m.input(2, 5, 4), m.weight(5, 4), axis=1)
    is_folded(m.build(m.bn(y, 5)), "LayerNormalization")
    m = Model(opset=21, ir_version=10)
    y = m.op("GroupNormalization", m.input(2, 4, 3, 3), m.weight(4), m.weight(4), num_groups=2)
    out = m.bn(y, 4)
    m.output(out, shape=[2, 4, 3, 3])
    is_folded(m.build(), "GroupNormalization")
    m = Model()
    result = check(m.build(m.bn(m.bn(m.op("Relu", m.input(2, 4, 3)), 4), 4)))
    assert ops(result.model) == ["Relu", "BatchNormalization"]


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_dequantized_weight(kind):
    m = Model()
    gamma, beta, mean, variance = m.statistics(4)
    q = m.constant(m.rng.integers(-9, 9, (4, 3, 3, 3)).astype(np.int8))
    scale = m.constant(np.float32(0.1) if kind == "tensor" else m.rng.uniform(0.1, 0.2, 4).astype(np.float32))
    zero = m.constant(np.int8(1) if kind == "tensor" else np.arange(4, dtype=np.int8))
    w = m.op("DequantizeLinear", q, scale, zero, **({} if kind == "tensor" else {"axis": 0}))
    y = m.bn(m.op("Conv", m.input(2, 3, 5, 5), w), 4, parameters=(np.abs(gamma), beta, mean, variance))
    is_folded(m.build(y), "DequantizeLinear", "Conv")


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_dequantized_weight_whose_channels_lie_along_axis_1(kind):
    """Those that a ConvTranspose delivers, and those that a Conv reads."""
    m = Model()
    q = m.constant(m.rng.integers(-90, 90, (3, 4, 2, 2)).astype(np.int8))
    step, along = m.constant(np.full(() if kind == "tensor" else 4, 0.01, np.float32)), {"axis": 1}
    w = m.op("DequantizeLinear", q, step, **({} if kind == "tensor" else along))
    y = m.bn(m.op("ConvTranspose", m.input(2, 3, 5, 5), w), 4)
    is_folded(m.build(m.op("Relu", y)), "DequantizeLinear", "ConvTranspose", "Relu")
    m = Model()
    q = m.constant(m.rng.integers(-90, 90, (4, 3, 2, 2)).astype(np.int8))
    step = m.constant(np.full(() if kind == "tensor" else 3, 0.01, np.float32))
    w = m.op("DequantizeLinear", q, step, **({} if kind == "tensor" else along))
    y = m.op("Conv", m.bn(m.op("Sigmoid", m.input(2, 3, 5, 5)), 3), w)
    is_folded(m.build(y), "DequantizeLinear", "Sigmoid", "Conv")


@pytest.mark.parametrize("stored", [np.int8, np.uint8])
@pytest.mark.parametrize("faked", [False, True])
def test_dequantized_weight_and_scales_of_both_signs_and_zero(stored, faked):
    m = Model()
    step, zero = m.constant(np.full(4, 0.1, np.float32)), m.constant(np.full(4, 5, stored))
    if faked:
        q = m.op("QuantizeLinear", m.weight(4, 3, 1, 1), step, zero, axis=0)
    else:
        q = m.constant(m.rng.integers(0, 11, (4, 3, 1, 1)).astype(stored))
    w = m.op("DequantizeLinear", q, step, zero, axis=0)
    bias = m.op("DequantizeLinear", m.constant(np.arange(4, dtype=np.int32)), m.constant(np.float32(0.01)))
    gamma = np.array([1.5, -0.5, 0, -2], np.float32)
    y = m.bn(m.op("Conv", m.input(2, 3, 4, 4), w, bias), 4, parameters=(gamma, *m.statistics(4)[1:]))
    is_folded(m.build(m.op("Relu", y)), "DequantizeLinear", "Conv", "Relu")


def test_dequantized_weight_that_has_no_room_for_the_sign():
    m = Model()
    w = m.op("DequantizeLinear", m.constant(np.full((4, 3, 1, 1), -128, np.int8)), m.constant(np.float32(0.1)))
    y = m.bn(m.op("Conv", m.input(2, 3, 4, 4), w), 4, parameters=(-np.ones(4, np.float32), *m.statistics(4)[1:]))
    is_left(m.build(m.op("Relu", y)), "a negative factor does not fit into quantized weights of type int8")


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("shift", [False, True])
def test_quantized_activations(axis, shift):
    m = Model()
    size = () if axis is None else (4,)
    step, zero = m.constant(np.full(size, 0.1, np.float32)), m.constant(np.full(size, 3, np.uint8))
    along = {} if axis is None else {"axis": axis}
    q = m.op("QuantizeLinear", m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1)), step, zero, **along)
    y = m.bn(m.op("DequantizeLinear", q, step, zero, **along), 4, parameters=None if shift else m.positive(4))
    model = m.build(m.op("Relu", y))
    if shift:
        is_left(model, "a shift does not pass DequantizeLinear")
    else:
        is_folded(model, "Conv", "QuantizeLinear", "DequantizeLinear", "Relu")


@pytest.mark.parametrize("kind", ["tensor", "channel"])
def test_dequantized_weight_behind_transpositions(kind):
    m = Model()
    q = m.constant(m.rng.integers(-90, 90, (4, 6)).astype(np.int8))
    step = m.constant(np.full(() if kind == "tensor" else 4, 0.01, np.float32))
    w = m.op("DequantizeLinear", q, step, **({} if kind == "tensor" else {"axis": 0}))
    y = m.op("MatMul", m.input(3, 6), m.op("Identity", m.op("Transpose", w, perm=[1, 0])))
    result = is_folded(m.build(m.op("Relu", m.bn(m.op("Add", y, m.weight(4)), 4))))
    assert ops(result.model) == ["DequantizeLinear", "Transpose", "Identity", "MatMul", "Add", "Relu"]


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


# Downstream


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


@pytest.mark.parametrize(("ta", "tb", "c"), list(itertools.product([0, 1], [0, 1], [None, (5,), (1,), (3, 1), (3, 5)])))
def test_into_a_gemm(ta, tb, c):
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(3, 4)), 4)
    y = m.op("Transpose", y, perm=[1, 0]) if ta else y
    extra = [] if c is None else [m.weight(*c)]
    y = m.op("Gemm", y, m.weight(*((5, 4) if tb else (4, 5))), *extra, alpha=0.5, beta=0.3, transA=ta, transB=tb)
    result = is_folded(m.build(y))
    assert ops(result.model)[-1] == "Gemm"


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_into_a_matmul(add, rank):
    m = Model()
    y = m.op("Sigmoid", m.input(*[2, 3, 4][3 - rank :]))
    y = m.bn(y, 4) if rank == 2 else m.op("Transpose", m.bn(m.op("Transpose", y, perm=[0, 2, 1]), 4), perm=[0, 2, 1])
    y = m.op("MatMul", y, m.weight(4, 5))
    is_folded(m.build(m.op("Relu", m.op("Add", y, m.weight(5)) if add else y)))


def test_into_both_readers_or_none():
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4)
    is_folded(m.build(m.op("Conv", y, m.weight(4, 4, 1, 1)), m.op("Conv", y, m.weight(4, 2, 1, 1), group=2)))
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4)
    is_left(m.build(m.op("Conv", y, m.weight(4, 4, 1, 1)), m.op("Tanh", y)), "Tanh neither carries nor absorbs")


def test_into_conv_transpose():
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 5, 5)), 4)
    is_folded(m.build(m.op("ConvTranspose", y, m.weight(4, 3, 1, 1), group=2)), "Sigmoid", "ConvTranspose")
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 5, 5)), 4)
    is_left(m.build(m.op("ConvTranspose", y, m.weight(4, 3, 2, 2))), "borders less often than its middle")


def test_into_an_einsum():
    m = Model()
    y = m.op("Transpose", m.bn(m.op("Sigmoid", m.input(2, 4, 3)), 4), perm=[0, 2, 1])
    is_folded(m.build(m.op("Relu", m.op("Einsum", y, m.weight(4, 5), equation="btk,kc->btc"))))


def test_layer_norm_affine_into_gemm():
    m = Model()
    y = m.op("LayerNormalization", m.input(2, 4), m.constant(np.ones(4, "f")))
    y = m.op("Add", m.op("Mul", y, m.weight(4)), m.weight(4))
    is_folded(m.build(m.op("Gemm", y, m.weight(4, 5))), "LayerNormalization", "Gemm")


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


# Elementwise operators


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


# Precision


def test_half_precision():
    m = Model(dtype=np.float16)
    y = m.op("Conv", m.input(2, 3, 5, 5), m.weight(4, 3, 3, 3))
    tiny = (*m.statistics(4)[:3], np.full(4, 6e-8, np.float16))
    is_folded(m.build(m.bn(y, 4, parameters=tiny, epsilon=1e-5)))


@pytest.mark.parametrize(("gamma", "reason"), [(6e4, "overflow"), (1e-5, "lose range in float16")])
def test_half_precision_refused(gamma, reason):
    m = Model(dtype=np.float16)
    _, beta, mean, _ = m.statistics(4)
    parameters = (np.full(4, gamma, np.float16), beta, mean, np.full(4, 1e-2 if gamma > 1 else 1, np.float16))
    y = m.op("Conv", m.input(2, 3, 5, 5), m.weight(4, 3, 3, 3))
    before = m.build(m.op("Tanh", m.bn(y, 4, parameters=parameters)))
    is_left(before, reason)


def test_mixed_precision():
    m = Model(dtype=np.float16)
    y = m.op("Cast", m.op("Conv", m.input(2, 3, 5, 5), m.weight(4, 3, 3, 3)), to=1)
    out = m.bn(y, 4, dtype=np.float32)
    m.output(out, np.float32)
    is_folded(m.build(), "Conv", "Cast", tolerance=1e-2)


# Constants


def wrapped(m, way, array):
    if way == "node":
        return m.op("Constant", value=numpy_helper.from_array(array))
    if way == "identity":
        return m.op("Identity", m.constant(array))
    if way == "cast":
        return m.op("Cast", m.constant(array.astype(np.float64)), to=1)
    if way == "reshape":
        return m.op("Reshape", m.constant(array.reshape(-1)), m.ints(*array.shape))
    if way == "transpose":
        return m.op("Transpose", m.constant(np.ascontiguousarray(array.T)))
    assert way == "arithmetic"
    return m.op("Sqrt", m.op("Add", m.op("Mul", m.constant(array), m.constant(array)), m.constant(np.float32(0))))


@pytest.mark.parametrize("way", ["node", "identity", "cast", "reshape", "transpose", "arithmetic"])
def test_ways_to_write_a_constant(way):
    m = Model()
    x = m.input(2, 3, 6, 6)
    arrays = m.rng.uniform(0.1, 1, (4, 3, 3, 3)).astype("f"), m.rng.uniform(0.1, 1, 4).astype("f")
    y = m.op("Conv", x, *(wrapped(m, way, a) for a in arrays))
    parameters = [wrapped(m, way, np.abs(p) + np.float32(0.1)) for p in m.statistics(4)]
    is_folded(m.build(m.op("BatchNormalization", y, *parameters)), "Conv")


def test_constant_of_shape():
    m = Model()
    w = m.op("ConstantOfShape", m.ints(4, 3, 3, 3), value=numpy_helper.from_array(np.array([0.5], "f")))
    result = check(m.build(m.bn(m.op("Conv", m.input(2, 3, 6, 6), w), 4)))
    assert folded(result)


def test_fake_quantized_weight():
    m = Model()
    gamma, beta, mean, variance = m.statistics(4)
    scale, zero = m.constant(np.float32(0.01)), m.constant(np.int8(3))
    w = m.op("DequantizeLinear", m.op("QuantizeLinear", m.weight(4, 3, 1, 1), scale, zero), scale, zero)
    y = m.bn(m.op("Conv", m.input(2, 3, 5, 5), w), 4, parameters=(np.abs(gamma), beta, mean, variance))
    is_folded(m.build(y), "QuantizeLinear", "DequantizeLinear", "Conv")


def test_bfloat16():
    m = Model(dtype=ml_dtypes.bfloat16, opset=22, ir_version=10)
    y = m.op("Conv", m.input(1, 3, 2, 2), m.weight(4, 3, 1, 1, name="w"), name="conv")
    model = m.build(m.bn(y, 4))
    result = fold(model)
    assert folded(result) and ops(result.model) == ["Conv"]
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in (*model.graph.initializer,)}
    new = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    gamma, beta, mean, variance = (arrays[n] for n in model.graph.node[1].input[1:])
    scale = gamma / np.sqrt(variance + np.float32(1e-3))
    expected = (arrays["w"] * scale[:, None, None, None]).astype(ml_dtypes.bfloat16)
    assert new["w"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(new["w"], expected)
    np.testing.assert_array_equal(new["conv.bias"], (beta - mean * scale).astype(ml_dtypes.bfloat16))


def test_overridable_initializer():
    m = Model()
    w = m.weight(4, 3, 3, 3, name="w")
    x = m.input(2, 3, 6, 6)
    m.input(4, 3, 3, 3, name="w")
    is_left(m.build(m.bn(m.op("Conv", x, w), 4)), "the caller may override")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_into_a_recurrent_layer(kind, direction, bias, shift):
    m = Model()
    hidden, features, ways = 3, 5, 2 if direction == "bidirectional" else 1
    gates = hidden * {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    x = m.op("Tanh", m.input(6, features, 2))  # time, features, batch
    x = m.op("Transpose", m.bn(x, features, parameters=None if shift else m.positive(features)), perm=[0, 2, 1])
    extra = [m.weight(ways, 2 * gates)] if bias else []
    w, r = m.weight(ways, gates, features), m.weight(ways, gates, hidden)
    y = m.op(kind, x, w, r, *extra, outputs=1, hidden_size=hidden, direction=direction)
    m.output(y, shape=[6, ways, 2, hidden])
    is_folded(m.build(), "Tanh", "Transpose", kind)


def test_a_map_along_the_time_of_a_recurrent_layer_stays():
    m = Model()
    x = m.op("Transpose", m.bn(m.op("Tanh", m.input(2, 6, 5)), 6), perm=[1, 0, 2])
    y = m.op("RNN", x, m.weight(1, 3, 5), m.weight(1, 3, 3), outputs=1, hidden_size=3)
    m.output(y, shape=[6, 1, 2, 3])
    is_left(m.build(), "does not lie along the features that RNN reads")
