"""What is a batch normalization: every form that is one, and the reasons why others are not."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export.fold import fold
from onnx import AttributeProto, helper, numpy_helper

from .folding import Model, check, folded, ops


@pytest.mark.parametrize("epsilon", [None, 0.0, 1e-2])
def test_epsilon(epsilon):
    m = Model()
    gamma, beta, mean, _ = m.statistics(4)
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    small = (gamma, beta, mean, np.full(4, 1e-3, "f"))
    assert folded(check(m.build(m.bn(y, 4, parameters=small, epsilon=epsilon))))


def left_reason(model):
    result = fold(model)
    assert result.model == model
    return result.report.entries[0].reason


def test_training_forms_are_left():
    m = Model(opset=15)
    arrays = [m.constant(a) for a in m.statistics(4)]
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    outs = m.op("BatchNormalization", y, *arrays, training_mode=1, outputs=3)
    assert "training form" in left_reason(m.build(outs[0]))
    m = Model(opset=9)
    arrays = [m.constant(a) for a in m.statistics(4)]
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    outs = m.op("BatchNormalization", y, *arrays, outputs=5)
    assert "training form" in left_reason(m.build(outs[0]))


def test_per_activation_forms():
    m = Model(opset=8, ir_version=4)
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    parameters = [m.constant(np.ones((4, 4, 4), "f")) for _ in range(4)]
    y = m.op("BatchNormalization", y, *parameters, spatial=0)
    assert "spatial=0" in left_reason(m.build(y))
    m = Model(opset=8, ir_version=4)
    y = m.op("Gemm", m.input(2, 3), m.weight(3, 4), m.weight(4))
    assert folded(check(m.build(m.bn(y, 4, spatial=0))))


def test_parameters_from_outside():
    m = Model()
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    _, beta, mean, variance = map(m.constant, m.statistics(4))
    assert "is a graph input" in left_reason(m.build(m.op("BatchNormalization", y, m.input(4), beta, mean, variance)))


@pytest.mark.parametrize("reader", ["Unsqueeze", "ReduceMean", "Relu"])
def test_a_vector_has_no_channel_axis(reader):
    """It is one channel by the specification; its shape is not stated where it is computed."""
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(5)), 1, parameters=m.positive(1))
    more = {"Unsqueeze": [m.ints(1)]}.get(reader, [])
    y = m.op(reader, y, *more, **({"axes": [0]} if reader == "ReduceMean" else {}))
    assert "no axis 1" in str(check(m.build(y)).report.entries[0].reason)


def test_negative_variance_is_left():
    m = Model()
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    gamma, beta, mean, variance = m.statistics(4)
    assert "not finite" in left_reason(m.build(m.bn(y, 4, parameters=(gamma, beta, mean, -variance))))


def test_identity_between_fixed_names():
    ones, zeros = np.ones(4, "f"), np.zeros(4, "f")
    m = Model()
    result = check(m.build(m.bn(m.input(2, 4, 3), 4, parameters=(ones, zeros, zeros, ones), epsilon=0.0)))
    assert "two names that must both stay" in str(result.report.entries[0].reason)
    m = Model()
    y = m.bn(m.op("Relu", m.input(2, 4, 3)), 4, parameters=(ones, zeros, zeros, ones - np.float32(1e-3)))
    assert folded(check(m.build(y)))


def test_an_identity_in_float32_is_none_in_float64():
    """Parameters of float32 beside data of float64, since opset 15: a scale of 1 - 2.5e-8 shows."""
    ones, zeros = np.ones(4, "f"), np.zeros(4, "f")
    m = Model(dtype=np.float64)
    model = m.build(m.bn(m.op("Relu", m.input(2, 4, 3)), 4, parameters=(ones, zeros, zeros, ones), epsilon=5e-8))
    assert fold(model).report.left == 1
    m = Model()
    model = m.build(m.bn(m.op("Relu", m.input(2, 4, 3)), 4, parameters=(ones, zeros, zeros, ones), epsilon=5e-8))
    assert fold(model).report.left == 0


def written_out(kind):
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6), m.weight(4, 3, 3, 3))
    mean, std, gamma, beta = (m.constant(m.rng.uniform(0.5, 1.5, (1, 4, 1, 1)).astype("f")) for _ in range(4))
    if kind == "div":
        y = m.op("Div", m.op("Sub", y, mean), std)
    elif kind == "sqrt":
        y = m.op("Div", m.op("Sub", y, mean), m.op("Sqrt", m.op("Add", std, m.constant(np.float32(1e-3)))))
    elif kind == "reciprocal":
        y = m.op("Mul", m.op("Sub", y, mean), m.op("Reciprocal", m.op("Sqrt", std)))
    elif kind == "pow":
        y = m.op("Mul", m.op("Sub", y, mean), m.op("Pow", std, m.constant(np.float32(-0.5))))
    elif kind == "unsqueeze":
        gamma = m.op("Unsqueeze", m.weight(4), m.ints(1, 2))
    elif kind == "expand":
        gamma = m.op("Expand", gamma, m.ints(2, 4, 4, 4))
    return m.build(m.op("Relu", m.op("Add", m.op("Mul", gamma, y), beta)))


@pytest.mark.parametrize("kind", ["plain", "div", "sqrt", "reciprocal", "pow", "unsqueeze", "expand"])
def test_written_out(kind):
    result = check(written_out(kind))
    assert ops(result.model) == ["Conv", "Relu"] and result.report.entries[0].kind == "decomposed"


@pytest.mark.parametrize("readers", [1, 2])
def test_written_out_with_an_identity_in_between(readers):
    m = Model()
    y = m.op("Mul", m.op("Conv", m.input(1, 3, 6, 6), m.weight(4, 3, 3, 3)), m.weight(4, 1, 1))
    y = m.op("Identity", y)
    outputs = [m.op("Add", y, m.weight(4, 1, 1)), *(m.op("Relu", y) for _ in range(readers - 1))]
    left = ["Conv", "Identity"] if readers == 1 else ["Conv", "Identity", "Add", "Relu"]
    assert ops(check(m.build(*outputs)).model) == left


@pytest.mark.parametrize("constant", [np.float32(0), np.float32(2), np.arange(4, dtype="f").reshape(4, 1, 1)])
def test_a_constant_added_behind_a_normalization_goes_into_it(constant):
    m = Model()
    y = m.op("Add", m.constant(constant), m.bn(m.op("Sigmoid", m.input(2, 4, 6, 6)), 4))
    result = check(m.build(m.op("Relu", y)))
    assert ops(result.model) == ["Sigmoid", "BatchNormalization", "Relu"] and result.report.left == 1


def test_written_out_channels_last():
    m = Model()
    y = m.op("Transpose", m.op("Conv", m.input(2, 3, 6, 6), m.weight(4, 3, 3, 3)), perm=[0, 2, 3, 1])
    y = m.op("Add", m.op("Mul", y, m.weight(4)), m.weight(4))
    assert ops(check(m.build(y)).model) == ["Conv", "Transpose"]


def test_a_function_of_that_name_is_none():
    f, m = Model(), Model()
    y = f.op("Sigmoid", "X")
    imports = [helper.make_opsetid("", 17)]
    m.functions.append(helper.make_function("local", "BatchNormalization", list("XSBMV"), [y], f.nodes, imports))
    y = m.op("Conv", m.input(2, 3, 4, 4), m.weight(4, 3, 1, 1))
    y = m.op("BatchNormalization", y, *map(m.constant, m.statistics(4)), domain="local")
    m.output(m.op("Relu", y), shape=[2, 4, 4, 4])
    assert not check(m.build()).report.entries


def test_constants_normalized_by_given_statistics():
    """By those, and not by their own, which are for training forms."""
    m = Model()
    flat = m.op("Reshape", m.weight(6, 4, 3, 3), m.ints(1, 6, -1))
    w = m.op("Reshape", m.bn(flat, 6), m.ints(6, 4, 3, 3))
    assert folded(check(m.build(m.op("Conv", m.input(2, 4, 6, 6), w))))


@pytest.mark.parametrize("attribute", ["epsilon", "alpha"])
def test_an_attribute_that_the_caller_of_a_function_gives(attribute):
    f, m = Model(seed=5), Model()
    f.count = 900
    arrays = [f.rng.standard_normal((4, 4, 1, 1)).astype("f"), *f.statistics(4)]
    names = [f.op("Constant", value=numpy_helper.from_array(a)) for a in arrays]
    y = f.op("BatchNormalization", f.op("Conv", "X", names[0]), *names[1:])
    y = f.op("LeakyRelu", y)
    node = f.nodes[-2 if attribute == "epsilon" else -1]
    node.attribute.append(AttributeProto(name=attribute, ref_attr_name="given", type=AttributeProto.FLOAT))
    m.functions.append(
        helper.make_function("local", "Block", ["X"], [y], f.nodes, [helper.make_opsetid("", 17)], ["given"])
    )
    x = m.input(2, 4, 6, 6, name="x")
    for given in (0.5, 0.25):
        x = m.op("Block", x, domain="local", given=given)
    m.output(x, shape=[2, 4, 6, 6])
    assert folded(check(m.build()))
