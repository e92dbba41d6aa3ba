"""Weights and activations behind DequantizeLinear: a scale takes the factor, integers its sign."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from .folding import Model, is_folded, is_left, ops


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


@pytest.mark.parametrize("smallest", [-7, -8])
def test_weights_of_four_bits_turn_their_sign_where_there_is_room(smallest):
    m = Model(opset=21, ir_version=10)
    whole = m.constant(np.arange(-8, 8).clip(smallest).reshape(4, 4).astype(ml_dtypes.int4))
    w = m.op("DequantizeLinear", whole, m.constant(np.full(4, 0.1, np.float32)), axis=1)
    gamma = np.array([-1.5, -0.5, 0, 2], np.float32)
    y = m.bn(m.op("MatMul", m.input(3, 4), w), 4, parameters=(gamma, *m.statistics(4)[1:]))
    m.output(y, shape=[3, 4])
    if smallest == -7:
        is_folded(m.build(), "DequantizeLinear", "Gemm")
    else:
        is_left(m.build(), "does not fit into quantized weights of type int4")


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


def test_fake_quantized_weight():
    m = Model()
    gamma, beta, mean, variance = m.statistics(4)
    scale, zero = m.constant(np.float32(0.01)), m.constant(np.int8(3))
    w = m.op("DequantizeLinear", m.op("QuantizeLinear", m.weight(4, 3, 1, 1), scale, zero), scale, zero)
    y = m.bn(m.op("Conv", m.input(2, 3, 5, 5), w), 4, parameters=(np.abs(gamma), beta, mean, variance))
    is_folded(m.build(y), "QuantizeLinear", "DequantizeLinear", "Conv")
