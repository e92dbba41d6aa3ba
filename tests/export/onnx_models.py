"""Small ONNX graphs written down in a line or two."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def value(name, dtype=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(nodes, inputs, outputs, constants=(), opset=17, ir_version=8):
    """Return a model; ``constants`` are (name, array) pairs."""
    made = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(v, n) for n, v in constants])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def corrupt(model, change, which=""):
    """Return a copy of the model with its first initialiser of such a name changed by a function of its array."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(t for t in copy.graph.initializer if t.name.endswith(which))
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(array)).astype(array.dtype), tensor.name))
    return copy


def initializers(model):
    """Return name -> array of the main graph's initialisers."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def endless():
    """A model that runs for ever, as far as anybody will wait."""
    io = [value("x", shape=[1])], [value("y", shape=[1])]
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Add", ["a", "a"], ["a2"])],
        "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("a", shape=[1])],
        [value("c2", TensorProto.BOOL, []), value("a2", shape=[1])],
    )
    return graph([helper.make_node("Loop", ["turns", "", "x"], ["y"], body=body)], *io, [("turns", np.array(2**40))])
