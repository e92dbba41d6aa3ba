"""What shape inference is told of models before operator set 14."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fastbn_export.shapes import infer
from onnx import helper

from .folding import Model, check, folded

OLD = (9, 10, 11, 12, 13)


def flat(m, x):
    """``x.flatten(2)`` as exporters write it for a symbolic batch."""
    inputs = [] if m.opset < 10 else [m.ints(0), m.ints(2), m.ints(0)]
    attributes = {} if inputs else {"starts": [0], "ends": [2], "axes": [0]}
    kept = m.op("Slice", m.op("Shape", x), *inputs, **attributes)
    return m.op("Reshape", x, m.op("Concat", kept, m.ints(-1), axis=0))


@pytest.mark.parametrize("opset", [*OLD, 14])
def test_a_symbolic_batch_hides_no_rank(opset):
    m = Model(opset=opset)
    y = m.op("Transpose", flat(m, m.input("n", 4, 5, 6)), perm=[0, 2, 1])
    y = m.op("Transpose", m.op("Add", m.op("MatMul", y, m.weight(4, 7)), m.weight(7)), perm=[0, 2, 1])
    m.output(m.bn(y, 7), shape=["n", 7, 30])
    assert folded(check(m.build()))


# What each operator makes of (n, 4, 6, 8), and since which operator set an input says what these attributes said.
MOVED = {
    "Squeeze": (13, {"axes": [1]}, ("n", 4, 6, 8)),
    "Unsqueeze": (13, {"axes": [1]}, ("n", 1, 1, 4, 6, 8)),
    "ReduceSum": (13, {"axes": [2, 3]}, ("n", 1, 1, 1, 8)),
    "Split": (13, {"split": [1, 3], "axis": 2}, ("n", 1, 1, 6, 8)),
    "Pad": (11, {"pads": [0, 0, 0, 0, 0, 0, 0, 2, 0, 1]}, ("n", 1, 6, 6, 9)),
    "Slice": (10, {"starts": [1], "ends": [3], "axes": [3]}, ("n", 1, 4, 2, 8)),
    "TopK": (10, {"k": 3, "axis": 4}, ("n", 1, 4, 6, 3)),
}
STAY = ("axis",)


@pytest.mark.parametrize("opset", OLD)
@pytest.mark.parametrize("op_type", MOVED)
def test_attributes_that_became_inputs(op_type, opset):
    since, attributes, expected = MOVED[op_type]
    m = Model(opset=opset)
    x = m.input("n", 1, 4, 6, 8)
    inputs = []
    if opset >= since:
        inputs = [m.ints(*np.atleast_1d(v)) for k, v in attributes.items() if k not in STAY]
        attributes = {k: v for k, v in attributes.items() if k in STAY}
    y = m.op(op_type, x, *inputs, **attributes, outputs=2 if op_type in ("Split", "TopK") else 1)
    assert inferred(m, y if isinstance(y, str) else y[0]) == expected


@pytest.mark.parametrize("opset", OLD)
def test_resized_shapes(opset):
    m = Model(opset=opset)
    x, scales = m.input("n", 4, 6, 8), m.constant(np.array([1, 1, 2, 0.5], "f"))
    inputs = (x, scales) if opset < 11 else (x, "", scales)
    y = m.op("Upsample" if opset < 10 else "Resize", *inputs)
    assert inferred(m, y)[1:] == (4, 12, 4)


@pytest.mark.parametrize("opset", OLD)
def test_a_training_form_keeps_its_shape(opset):
    m = Model(opset=opset)
    y = m.op("BatchNormalization", m.input("n", 4, 6), *map(m.constant, m.statistics(4)), outputs=5)[0]
    assert inferred(m, m.op("Flatten", y)) == ("n", 24)


def inferred(m, y):
    """The shape of `y`; without a Reshape in the model nothing would be told anew."""
    m.op("Reshape", m.op("Relu", y), m.ints(-1))
    graph = helper.make_graph(m.nodes, "g", m.inputs, [onnx.ValueInfoProto(name=y)], m.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", m.opset)], ir_version=8)
    found = infer(ir.serde.deserialize_model(model))
    return next(dims for value, (dims, _) in found.items() if value.name == y)
