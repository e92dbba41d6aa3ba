"""Constant expressions: equal to the reference evaluator, or unknown."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from fastbn_export.facts import Facts
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from .folding import Model

X = np.arange(1, 25, dtype=np.float32).reshape(2, 3, 4)


def value_of(model):
    edited = ir.serde.deserialize_model(model)
    return Facts(edited).constant(edited.graph.outputs[0])


EXPRESSIONS = {
    "initializer": lambda m, x: m.op("Identity", x),
    "node": lambda m, x: m.op("Constant", value=numpy_helper.from_array(X)),
    "floats": lambda m, x: m.op("Constant", value_floats=[1.0, 2.5]),
    "ints": lambda m, x: m.op("Constant", value_ints=[1, 2]),
    "cast": lambda m, x: m.op("Cast", m.op("Cast", x, to=10), to=1),
    "cast like": lambda m, x: m.op("CastLike", x, m.constant(np.float64(1))),
    "add": lambda m, x: m.op("Add", x, m.constant(np.float32(0.1))),
    "sub": lambda m, x: m.op("Sub", m.constant(np.float32(0.1)), x),
    "mul": lambda m, x: m.op("Mul", x, m.constant(np.array([1, 2, 3, 4], "f"))),
    "div": lambda m, x: m.op("Div", x, m.constant(np.float32(3))),
    "integer division": lambda m, x: m.op("Div", m.ints(7, 8), m.ints(2)),
    "pow": lambda m, x: m.op("Pow", x, m.constant(np.float32(-0.5))),
    "sqrt": lambda m, x: m.op("Sqrt", x),
    "reciprocal": lambda m, x: m.op("Reciprocal", x),
    "neg": lambda m, x: m.op("Neg", x),
    "exp": lambda m, x: m.op("Exp", m.op("Neg", x)),
    "abs": lambda m, x: m.op("Abs", m.op("Neg", x)),
    "dropout": lambda m, x: m.op("Dropout", x),
    "reshape": lambda m, x: m.op("Reshape", x, m.ints(0, -1)),
    "flatten": lambda m, x: m.op("Flatten", x, axis=-1),
    "unsqueeze": lambda m, x: m.op("Unsqueeze", x, m.ints(0, -1)),
    "squeeze": lambda m, x: m.op("Squeeze", m.op("Unsqueeze", x, m.ints(0))),
    "transpose": lambda m, x: m.op("Transpose", x),
    "transpose perm": lambda m, x: m.op("Transpose", x, perm=[1, 2, 0]),
    "constant of shape": lambda m, x: m.op("ConstantOfShape", m.ints(2, 3)),
    "expand": lambda m, x: m.op("Expand", m.constant(np.ones((3, 1), "f")), m.ints(2, 1, 4)),
    "concat": lambda m, x: m.op("Concat", x, x, axis=-1),
    "gather": lambda m, x: m.op("Gather", x, m.ints(-1, 0), axis=2),
    "slice": lambda m, x: m.op("Slice", x, m.ints(1), m.ints(99), m.ints(-1), m.ints(2)),
    "shape": lambda m, x: m.op("Shape", m.input(2, 3), start=1),
    "size": lambda m, x: m.op("Size", m.input(2, 3)),
    "dequantize": lambda m, x: m.op(
        "DequantizeLinear",
        m.constant(np.array([[1, -2], [3, 4]], np.int8)),
        m.constant(np.array([0.1, 0.2], "f")),
        m.constant(np.array([1, 2], np.int8)),
        axis=0,
    ),
    "log": lambda m, x: m.op("Log", x),
    "sigmoid": lambda m, x: m.op("Sigmoid", x),
    "tanh": lambda m, x: m.op("Tanh", x),
    "softplus": lambda m, x: m.op("Softplus", x),
    "sum": lambda m, x: m.op("Sum", x, x, m.constant(np.float32(0.1))),
    "max": lambda m, x: m.op("Max", x, m.constant(np.float32(7))),
    "min": lambda m, x: m.op("Min", x, m.constant(np.float32(7))),
    "clip": lambda m, x: m.op("Clip", x, "", m.constant(np.float32(7))),
    "where": lambda m, x: m.op("Where", m.op("Less", m.ints(1, 2, 3, 4), m.ints(3)), x, m.op("Neg", x)),
    "equal": lambda m, x: m.op("Where", m.op("Equal", m.ints(-1, 2), m.ints(-1)), m.ints(1, 1), m.ints(5, 6)),
    "matmul": lambda m, x: m.op("MatMul", x, m.constant(np.ones((4, 2), "f"))),
    "reduce sum": lambda m, x: m.op("ReduceSum", x, m.ints(0, -1), keepdims=0),
    "reduce sum of integers": lambda m, x: m.op("ReduceSum", m.constant(np.arange(6, dtype=np.int32))),
    "reduce mean": lambda m, x: m.op("ReduceMean", x, m.ints(1)),
    "reduce max": lambda m, x: m.op("ReduceMax", x),
    "reduce product": lambda m, x: m.op("ReduceProd", m.ints(2, 3, 4)),
    "reduce l2": lambda m, x: m.op("ReduceL2", x, m.ints(1, 2)),
    "sign": lambda m, x: m.op("Sign", m.op("Reshape", m.constant(X - 5), m.ints(-1))),
    "round": lambda m, x: m.op("Round", m.constant(X / 2)),
    "greater": lambda m, x: m.op("Where", m.op("Greater", x, m.constant(np.float32(3))), x, m.op("Neg", x)),
    "pad": lambda m, x: m.op("Pad", x, m.ints(0, 1, 0, 2, 0, 0), m.constant(np.float32(0.5))),
    "tile": lambda m, x: m.op("Tile", x, m.ints(1, 2, 3)),
    "range": lambda m, x: m.op("Range", *(m.constant(np.int64(i)) for i in (7, 1, -2))),
    "slice backwards": lambda m, x: m.op("Slice", x, m.ints(-1, 2), m.ints(-(2**63), 0), m.ints(0, 2), m.ints(-1, -2)),
    "slice backwards from behind": lambda m, x: m.op("Slice", x, m.ints(9), m.ints(-4), m.ints(2), m.ints(-1)),
    "split": lambda m, x: m.op("Split", x, outputs=2, axis=2, num_outputs=2)[1],
    "split by sizes": lambda m, x: m.op("Split", x, m.ints(1, 2), outputs=2, axis=1)[1],
    "quantize": lambda m, x: m.op("QuantizeLinear", x, m.constant(np.float32(0.5)), m.constant(np.int8(-7))),
}


@pytest.mark.parametrize("case", EXPRESSIONS)
def test_expression(case):
    m = Model(opset=19, ir_version=9)  # the first version of DequantizeLinear that the evaluator has
    model = m.build(EXPRESSIONS[case](m, m.constant(X)))
    expected = ReferenceEvaluator(model).run(None, {i.name: np.zeros((2, 3), "f") for i in model.graph.input})[0]
    found = value_of(model)
    assert found is not None and found.shape == np.shape(expected)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-6)


UNKNOWN = {
    "input": lambda m: m.op("Add", m.input(3), m.constant(np.float32(1))),
    "random": lambda m: m.op("Add", m.op("RandomNormal", shape=[3]), m.constant(np.float32(1))),
    "negative integer division": lambda m: m.op("Div", m.ints(-7), m.ints(2)),
    "float to integer": lambda m: m.op("Cast", m.constant(np.float32([1.5])), to=7),
    "unknown shape": lambda m: m.op("Shape", m.input("N", 3)),
    "other operator": lambda m: m.op("Erf", m.constant(np.float32([1.5]))),
    "sign of a computed number": lambda m: m.op("Sign", m.op("Exp", m.constant(np.float32([1])))),
    "cast like to another kind": lambda m: m.op("CastLike", m.constant(np.float32([1.5])), m.constant(np.bool_(True))),
    "huge tile": lambda m: m.op("Tile", m.ints(1), m.ints(1 << 40)),
    "huge": lambda m: m.op("ConstantOfShape", m.ints(1 << 20, 1 << 20)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown(case):
    m = Model()
    assert value_of(m.build(UNKNOWN[case](m))) is None


def test_float_arithmetic_is_not_rounded_on_the_way():
    m = Model()
    y = m.op("Sub", m.op("Add", m.constant(np.float32(1e8)), m.constant(np.float32(1))), m.constant(np.float32(1e8)))
    assert value_of(m.build(y)) == 1.0


def test_a_slice_backwards_is_clipped_to_the_axis():
    """As the specification and onnxruntime have it; onnx's evaluator slices as Python does, which is empty."""
    m = Model()
    assert value_of(m.build(m.op("Slice", m.ints(5, 6, 7), m.ints(-9), m.ints(-10), m.ints(0), m.ints(-1)))) == [5]


def test_long_expressions_do_not_recurse():
    m = Model()
    y = m.constant(np.float32([2.0]))
    for _ in range(3000):
        y = m.op("Identity", y)
    assert value_of(m.build(y)) == 2.0


def test_sizes_are_known_beside_unknown_ones():
    m = Model()
    shape = m.op("Shape", m.input("N", 8, "H"))
    half = m.op("Div", m.op("Gather", shape, m.constant(np.int64(1))), m.constant(np.int64(2)))
    assert value_of(m.build(half)) == 4
    m = Model()
    assert value_of(m.build(m.op("Slice", m.op("Shape", m.input("N", 8, "H")), m.ints(1), m.ints(2)))) == [8]
    m = Model()
    assert value_of(m.build(m.op("Gather", m.op("Shape", m.input("N", 8, "H")), m.ints(1, 2)))) is None
