"""What is no certain size: what the caller may override, and sizes below zero."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from onnx import helper, numpy_helper

from .folding import Model, check, folded, is_left, run


def reshaped(m, ints):
    """A Conv, whose channels a Reshape by `ints` halves."""
    return m.op("Reshape", m.op("Conv", m.input("n", 3, 4), m.weight(12, 3, 1)), ints)


def expanded(m, ints):
    """A sum over as many elements as an Expand makes."""
    y = m.op("Expand", m.op("Conv", m.input(2, 3, 1), m.weight(6, 3, 1)), ints)
    return m.op("ReduceSum", y, m.ints(2), keepdims=0)


def cut(m, ints):
    """Six channels that a Split cuts off."""
    return m.op("Split", m.op("Conv", m.input(2, 3, 4), m.weight(8, 3, 1)), ints, axis=1, outputs=2)[0]


CASES = {"Reshape": (reshaped, [-1, 6, 8]), "Expand": (expanded, [2, 6, 8]), "Split": (cut, [6, 2])}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("overridable", [True, False])
def test_integers_that_the_caller_may_override(case, overridable):
    make, ints = CASES[case]
    m = Model()
    y = m.bn(make(m, m.constant(np.array(ints), "ints")), 6)
    m.output(y, shape=[None] * (2 if case == "Expand" else 3))
    if overridable:
        m.input(len(ints), name="ints", dtype=np.int64)
        is_left(m.build(), "" if case == "Expand" else "that the caller may override")
    else:
        assert folded(check(m.build()))


@pytest.mark.parametrize("ir_version", [3, 8])
def test_inputs_of_old_models_are_constants(ir_version):
    """Before IR version 4 every initializer is a graph input."""
    m = Model(opset=8, ir_version=ir_version)
    y = m.op("Reshape", m.op("Conv", m.input("n", 3, 4), m.weight(12, 3, 1)), m.ints(-1, 6, 8))
    assert folded(check(m.build(m.bn(y, 6))))


def test_an_input_of_a_body_is_no_constant():
    m = Model()
    x = m.input(2, 4, 6, name="x")
    b = Model(seed=1)
    b.count = 100
    y = b.op("Relu", b.bn(b.op("Reshape", b.op("Conv", "v", b.weight(4, 4, 1)), "shape"), 4))
    y = b.op("Reshape", y, b.constant(np.array([2, 4, 6])))
    go_on = b.op("Identity", "go")
    shape = b.op("Identity", "shape")
    state = (("i", 7, []), ("go", 9, []), ("v", 1, [2, 4, 6]), ("shape", 7, [4]))
    states = [helper.make_tensor_value_info(n, t, s) for n, t, s in state]
    outs = ((go_on, 9, []), (y, 1, [2, 4, 6]), (shape, 7, [4]))
    infos = [helper.make_tensor_value_info(n, t, s) for n, t, s in outs]
    default = numpy_helper.from_array(np.array([2, 4, 2, 3]), "shape")
    body = helper.make_graph(b.nodes, "body", states, infos, [*b.initializers, default])
    m.count = 900
    y = m.op("Loop", m.constant(np.int64(2)), m.constant(np.bool_(True)), x, m.ints(2, 2, 2, 6), body=body, outputs=2)
    m.output(y[0], shape=[2, 4, 6])
    graph = helper.make_graph(m.nodes, "g", m.inputs, m.outputs, m.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert fold(model).report.folded == 0


def same(model, x):
    """Fold and compare on one input; returns the report."""
    result = fold(model)
    np.testing.assert_allclose(run(result.model, {"x": x})[0], run(model, {"x": x})[0], atol=1e-5)
    return result.report


@pytest.mark.parametrize("reader", ["ReduceSum", "Reshape"])
@pytest.mark.parametrize("last", ["t", 4])
def test_an_input_with_a_default_has_the_shape_that_is_declared(reader, last):
    m = Model()
    m.input("n", 6, last, name="x")
    y, size = m.bn(m.weight(2, 6, 4, name="x"), 6), 4
    if reader == "ReduceSum":
        y, size = m.op("ReduceSum", y, m.ints(2), keepdims=0), 3 if last == "t" else 4
    else:
        y = m.op("Reshape", y, m.ints(-1, 24))
    y = m.op("MatMul", y, m.weight(6 if reader == "ReduceSum" else 24, 5))
    m.output(y, shape=["n", 5])
    x = np.random.default_rng(0).standard_normal((6, 6, size)).astype("f")
    assert same(m.build(), x).left == (last == "t")


@pytest.mark.parametrize("upstream", [True, False])
def test_a_size_below_zero_is_unknown(upstream):
    m = Model()
    m.input(-1, 6, -1, name="x")
    if upstream:
        y = m.bn(m.op("Reshape", m.op("MatMul", "x", m.weight(4, 4)), m.ints(-1, 24), outputs=["r"]), 24)
    else:
        y = m.op("Reshape", m.bn("x", 6), m.ints(-1, 24), outputs=["r"])
        y = m.op("Gemm", y, m.weight(24, 5))
    m.output(y, shape=[-1, -1])
    m.infos.append(helper.make_tensor_value_info("r", 1, [-1, 24]))
    graph = helper.make_graph(m.nodes, "g", m.inputs, m.outputs, m.initializers, value_info=m.infos)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert same(model, np.random.default_rng(0).standard_normal((2, 6, 4)).astype("f")).left == 1


def test_sizes_below_zero_end_no_fold_with_an_error():
    m = Model()
    m.input(-1, 3, -1, name="x")
    y = m.bn(m.op("Flatten", m.op("Conv", "x", m.weight(6, 3, 1))), 24)
    m.output(y, shape=[-1, -1])
    graph = helper.make_graph(m.nodes, "g", m.inputs, m.outputs, m.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert same(model, np.random.default_rng(0).standard_normal((2, 3, 4)).astype("f")).left == 1


def test_sizes_below_zero_hide_no_channels():
    m = Model()
    m.input(-1, 3, -1, -1, name="x")
    y = m.op("Relu", m.bn(m.op("Conv", "x", m.weight(6, 3, 1, 1)), 6))
    m.output(m.op("Flatten", m.op("GlobalAveragePool", y)), shape=[-1, 6])
    graph = helper.make_graph(m.nodes, "g", m.inputs, m.outputs, m.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert same(model, np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype("f")).left == 0


@pytest.mark.parametrize("written", [True, False])
def test_symbols_that_a_tool_made_up_hide_no_sizes(written):
    """Inference without the propagation of data writes unk__0, unk__1 ... into the file where a size is computed."""
    m = Model()
    x = m.input("n", 3, 4)
    shape = m.op("Concat", m.op("Slice", m.op("Shape", x), m.ints(0), m.ints(1)), m.ints(6, 8), axis=0)
    m.output(m.bn(m.op("Reshape", m.op("Conv", x, m.weight(12, 3, 1)), shape, outputs=["r"]), 6), shape=["n", 6, 8])
    model = onnx.shape_inference.infer_shapes(m.build()) if written else m.build()
    stated = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    assert not written or all(stated["r"])
    assert folded(check(model))
