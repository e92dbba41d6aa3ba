"""What a caller can give must still be there and still matter; what never mattered need not be."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export.interface import difference, optional_read
from onnx import TensorProto, helper

from .onnx_models import graph, value

W = ("w", np.ones(4, np.float32))
X, Y, OPTIONAL = value("x", shape=["n", 4]), value("y", shape=["n", 4]), value("w", shape=[4])
MUL = [helper.make_node("Mul", ["x", "w"], ["y"])]
SAME = [helper.make_node("Identity", ["x"], ["y"])]


def test_optional_inputs_must_stay_where_they_matter():
    model = graph(MUL, [X, OPTIONAL], [Y], [W])
    assert difference(model, model) is None
    assert difference(model, graph(MUL, [X], [Y], [W])) == "optional inputs differ: ['w'] became []"
    double = graph(MUL, [X, value("w", TensorProto.DOUBLE, [4])], [Y], [("w", np.ones(4))])
    assert difference(model, double) == "optional inputs differ: types of w"
    unread = graph(SAME, [X, OPTIONAL], [Y], [W])
    assert difference(model, unread) == "optional inputs differ: the candidate does not depend on ['w']"
    assert difference(unread, graph(SAME, [X], [Y])) is None
    assert difference(graph(MUL, [X], [Y], [W]), model) is None, "an input more is no loss"
    assert difference(model, graph(MUL, [X, OPTIONAL], [Y])) == "inputs differ: ['x'] became ['w', 'x']"


def test_before_version_4_initialisers_are_constants():
    old = graph(MUL, [X, OPTIONAL], [Y], [W], opset=8, ir_version=3)
    assert optional_read(old) == {}
    assert difference(old, graph(MUL, [X], [Y], [W])) is None
    assert difference(graph(MUL, [X, OPTIONAL], [Y], [W]), old) is not None


@pytest.mark.parametrize(("shape", "matters"), [([4], False), (["k"], True), ([-1], True), (None, True)])
def test_a_shape_is_no_value_unless_it_may_change(shape, matters):
    nodes = [helper.make_node("Shape", ["w"], ["k"]), helper.make_node("Expand", ["x", "k"], ["y"])]
    model = graph(nodes, [X, value("w", shape=shape)], [Y], [W])
    assert bool(optional_read(model)) is matters


def test_what_bodies_read_matters():
    body = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["b"])], "b", [], [value("b")])
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    model = graph([node], [X, OPTIONAL, value("c", TensorProto.BOOL, [])], [Y], [W])
    assert list(optional_read(model)) == ["w"]
