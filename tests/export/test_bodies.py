"""Bodies of Scan, bodies in bodies; a plain Loop and If are in test_scopes."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from .folding import Model, check, folded

FLOAT = TensorProto.FLOAT


def info(name, *shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def scanned(m, weight, parameters, own=(), **attributes):
    """A Scan over x (5, 3, 4) whose state adds up ``bn(x @ weight)``."""
    b = Model(seed=3)
    b.count = 500
    y = b.op("BatchNormalization", b.op("MatMul", "piece", weight), *parameters)
    state = b.op("Add", "state", y)
    out = b.op("Relu", y)
    body = helper.make_graph(
        b.nodes, "body", [info("state", 3, 4), info("piece", 3, 4)], [info(state, 3, 4), info(out, 3, 4)], list(own)
    )
    return m.op("Scan", m.input(3, 4), m.input(5, 3, 4), outputs=2, body=body, num_scan_inputs=1, **attributes)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("backwards", [0, 1])
def test_scan_with_weights_of_its_own_or_from_outside(own, backwards):
    m = Model()
    names = [m.weight(4, 4), *map(m.constant, m.statistics(4))]
    inside = list(m.initializers) if own else []
    if own:
        m.initializers.clear()
    made = scanned(m, names[0], names[1:], inside, scan_input_directions=[backwards])
    m.output(made[0], shape=[3, 4])
    m.output(made[1], shape=[5, 3, 4])
    result = check(m.build())
    assert folded(result) and result.report.folded == 1 and result.report.entries[0].scope


def test_weights_that_are_also_read_outside_are_copied():
    m = Model()
    names = [m.weight(4, 4), *map(m.constant, m.statistics(4))]
    made = scanned(m, names[0], names[1:])
    m.output(made[0], shape=[3, 4])
    m.output(m.op("MatMul", m.input(2, 4), names[0]), shape=[2, 4])
    assert folded(check(m.build()))


def test_what_is_scanned_out_of_a_body_is_not_followed_into_it():
    m = Model()
    names = [m.weight(4, 4), *map(m.constant, m.statistics(4))]
    made = scanned(m, names[0], names[1:])
    y = m.op("Relu", m.bn(made[1], 3))
    m.output(y, shape=[5, 3, 4])
    result = check(m.build())
    assert [(e.folded, e.scope != "") for e in result.report.entries] == [(False, False), (True, True)]
    assert "Scan" in str(result.report.entries[0].reason)


def test_an_if_in_a_loop():
    m = Model()
    x = m.input(2, 4, 5, 5)
    m.weight(4, 4, 1, 1, name="w")
    first = m.op("Conv", x, "w")
    branches = {}
    for seed, branch in ((1, "then_branch"), (2, "else_branch")):
        b = Model(seed=seed)
        b.count = 100 * seed
        y = b.op("Relu", b.bn(b.op("Conv", "carried", "w"), 4))
        branches[branch] = helper.make_graph(b.nodes, branch, [], [info(y, 2, 4, 5, 5)], b.initializers)
    b = Model(seed=3)
    b.count = 300
    b.weight(4, 4, 1, 1, name="w_in")  # the body's own weight, beside the captured one
    odd = b.op("Cast", b.op("Mod", "count", b.ints(2)), to=TensorProto.BOOL)
    odd = b.op("Squeeze", b.op("Reshape", odd, b.ints(1)))
    y = b.op("If", odd, **branches)
    y = b.op("Tanh", b.bn(b.op("Conv", y, "w_in"), 4))
    go_on = b.op("Identity", "go")
    body = helper.make_graph(
        b.nodes,
        "body",
        [info("count", kind=TensorProto.INT64), info("go", kind=TensorProto.BOOL), info("carried", 2, 4, 5, 5)],
        [info(go_on, kind=TensorProto.BOOL), info(y, 2, 4, 5, 5)],
        b.initializers,
    )
    m.count = 900
    y = m.op("Loop", m.constant(np.int64(3)), m.constant(np.bool_(True)), m.op("Relu", m.bn(first, 4)), body=body)
    m.output(y, shape=[2, 4, 5, 5])
    result = check(m.build())
    assert folded(result) and result.report.folded == 4
    assert sorted(e.scope.count("/") for e in result.report.entries if e.scope) == [0, 1, 1]
