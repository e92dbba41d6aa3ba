"""Bodies of If and Loop, and local functions; Scan and bodies in bodies are in test_bodies."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

from .folding import Model, check, folded


def body(name, seed, source, inputs=(), activation="Relu"):
    b = Model(seed=seed)
    b.count = 100 * seed
    y = b.op(activation, b.bn(b.op("Conv", source, "w", pads=[1] * 4), 4))
    return b, y


def test_if_bodies_and_captured_weights():
    m = Model()
    m.input(2, 4, 6, 6, name="x")
    m.weight(4, 4, 3, 3, name="w")
    graphs = {}
    for seed, branch in ((1, "then_branch"), (2, "else_branch")):
        b, y = body(branch, seed, "x")
        info = [helper.make_tensor_value_info(y, 1, [2, 4, 6, 6])]
        graphs[branch] = helper.make_graph(b.nodes, branch, [], info, b.initializers)
    m.count = 900
    condition = m.input(name="c", dtype=np.int64)
    y = m.op("If", m.op("Cast", condition, to=9), **graphs)
    result = check(m.build(m.op("Relu", y)))
    assert folded(result) and [e.scope != "" for e in result.report.entries] == [True, True]


@pytest.mark.parametrize("where", ["initializer", "Constant", "overridable"])
def test_a_shape_from_outside_a_body(where):
    """Inference sees no values of the graph around a body; one that the caller may override is not certain."""
    m = Model()
    m.input(2, 4, 6, 6, name="x")
    sizes = np.array([2, 4, 36])
    if where == "Constant":
        m.op("Constant", value=numpy_helper.from_array(sizes), outputs=["sizes"])
    else:
        m.constant(sizes, "sizes")
    if where == "overridable":
        m.input(3, name="sizes", dtype=np.int64)
    graphs = {}
    for seed, branch in ((1, "then_branch"), (2, "else_branch")):
        b = Model(seed=seed)
        b.count = 100 * seed
        y = b.op("Relu", b.bn(b.op("Reshape", b.op("Conv", "x", b.weight(4, 4, 1, 1)), "sizes"), 4))
        info = [helper.make_tensor_value_info(y, 1, [2, 4, 36])]
        graphs[branch] = helper.make_graph(b.nodes, branch, [], info, b.initializers)
    m.count = 900
    y = m.op("If", m.constant(np.bool_(True)), **graphs)
    m.output(y, shape=[2, 4, 36])
    assert folded(check(m.build())) == (where != "overridable")


def test_loop_body():
    m = Model()
    x = m.input(2, 4, 6, 6, name="x")
    m.weight(4, 4, 3, 3, name="w")
    b, y = body("body", 1, "v")
    go_on = b.op("Identity", "go")
    state = [
        helper.make_tensor_value_info(n, t, s) for n, t, s in (("i", 7, []), ("go", 9, []), ("v", 1, [2, 4, 6, 6]))
    ]
    outs = [helper.make_tensor_value_info(n, t, s) for n, t, s in ((go_on, 9, []), (y, 1, [2, 4, 6, 6]))]
    graph = helper.make_graph(b.nodes, "body", state, outs, b.initializers)
    m.count = 900
    y = m.op("Loop", m.constant(np.int64(3)), m.constant(np.bool_(True)), x, body=graph)
    m.output(y, shape=[2, 4, 6, 6])
    assert folded(check(m.build()))


def test_a_body_does_not_reach_outside():
    m = Model()
    m.input(2, 4, 6, 6, name="x")
    outer = m.op("Conv", "x", m.weight(4, 4, 1, 1))
    graphs = {}
    for seed, branch in ((1, "then_branch"), (2, "else_branch")):
        b = Model(seed=seed)
        b.count = 100 * seed
        y = b.bn(outer, 4) if seed == 1 else b.op("Relu", "x")
        info = [helper.make_tensor_value_info(y, 1, [2, 4, 6, 6])]
        graphs[branch] = helper.make_graph(b.nodes, branch, [], info, b.initializers)
    m.count = 900
    result = check(m.build(m.op("If", m.constant(np.bool_(True)), **graphs)))
    assert "border of a control-flow body" in str(result.report.entries[0].reason)


def with_function(inside, opset=17):
    m = Model()
    x = m.input(2, 4, 6, 6, name="x")
    f = Model(seed=5)
    f.count = 900
    arrays = [f.rng.standard_normal((4, 4, 1, 1)).astype("f"), *f.statistics(4)]
    if inside:
        names, inputs = [f.op("Constant", value=numpy_helper.from_array(a)) for a in arrays], ["X"]
    else:
        names = ["W", "S", "B", "M", "V"]
        inputs = ["X", *names]
    y = f.op("BatchNormalization", f.op("Conv", "X", names[0]), *names[1:])
    imports = [helper.make_opsetid("", opset)]
    m.functions.append(helper.make_function("local", "Block", inputs, [y], f.nodes, imports))
    for _ in range(2):
        args = [] if inside else [m.weight(4, 4, 1, 1), *map(m.constant, m.statistics(4))]
        x = m.op("Relu", m.op("Block", x, *args, domain="local"))
    m.output(x, shape=[2, 4, 6, 6])
    return m.build()


def test_inside_a_function():
    result = check(with_function(True))
    assert folded(result) and "local::Block" in result.report.ops_after
    assert result.report.entries[0].scope == "function Block"


def test_a_function_of_its_parameters_is_inlined():
    result = check(with_function(False))
    assert folded(result) and result.report.ops_after == {"Conv": 2, "Relu": 2}
