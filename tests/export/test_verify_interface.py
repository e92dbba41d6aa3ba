"""A candidate must take what the original takes: its optional inputs, and the sizes that it does not fix."""

from __future__ import annotations

import numpy as np
import onnx
from fastbn_export.verify import verify
from onnx import TensorProto, helper, numpy_helper

from .onnx_models import graph, value


def written(model, name, array):
    """Return the model with a constant changed, and no longer an input."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for values in (copy.graph.input, copy.graph.initializer):
        kept = [v for v in values if v.name != name]
        del values[:]
        values.extend(kept)
    copy.graph.initializer.append(numpy_helper.from_array(array, name))
    return copy


def optional(constants, nodes, shape, out=None):
    """A model of x whose constants are all optional inputs as well."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in constants}
    inputs = [value("x", shape=shape), *(value(name, kinds[name], array.shape) for name, array in constants)]
    return graph(nodes, inputs, [value("y", shape=out)], constants)


def test_an_optional_input_that_is_lost_or_frozen():
    """Mul by w: a candidate may not lose the input, nor read a copy of its default instead; more inputs are no loss."""
    w = np.arange(1, 5, dtype=np.float32)
    model = optional([("w", w)], [helper.make_node("Mul", ["x", "w"], ["y"])], ["n", 4])
    assert verify(model, model).ok
    lost = written(model, "w", w)
    report = verify(model, lost)
    assert not report.ok and "optional inputs differ: ['w'] became []" in str(report)
    assert verify(lost, model).ok
    nodes = [helper.make_node("Mul", ["w", "zero"], ["z"]), helper.make_node("Add", ["copy", "z"], ["sum"])]
    frozen = onnx.ModelProto()
    frozen.CopyFrom(model)
    frozen.graph.node[0].input[1] = "sum"
    for node in reversed(nodes):
        frozen.graph.node.insert(0, node)
    frozen.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in (("zero", 0 * w), ("copy", w)))
    report = verify(model, frozen)
    assert not report.ok and "values are off" in str(report)
    assert verify(model, frozen, inputs={"x": np.ones((2, 4), np.float32)}).ok, "the user's inputs alone"
    assert not verify(model, frozen, inputs={"x": np.ones((2, 4), np.float32), "w": 2 * w}).ok


def test_an_optional_shape_that_is_frozen():
    """Shapes are integers that few of which a model takes."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), helper.make_node("Add", ["r", "one"], ["y"])]
    model = optional([("shape", np.array([-1, 6, 8])), ("one", np.ones((6, 1), np.float32))], nodes, ["n", 12, 4])
    assert verify(model, model).ok
    candidate = onnx.ModelProto()
    candidate.CopyFrom(model)
    one = numpy_helper.from_array(np.ones((6, 8), np.float32), "eight")
    candidate.graph.initializer.append(one)
    candidate.graph.node.insert(1, helper.make_node("Mul", ["one", "eight"], ["wide"]))
    candidate.graph.node[2].input[1] = "wide"
    report = verify(model, candidate)
    assert not report.ok and "the candidate cannot be run on x:" in str(report)


def test_candidates_of_one_batch_size():
    """A batch written into a declaration or into a shape; the original takes any."""
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    model = graph(nodes, [value("x", shape=["n", 4, 9])], [value("y", shape=None)], [("shape", np.array([-1, 36]))])
    for samples in (2, 3, 10):
        assert verify(model, model, samples=samples).samples == samples
        candidate = written(model, "shape", np.array([3, 36]))
        report = verify(model, candidate, samples=samples)
        assert not report.ok
        assert "the candidate cannot be run on x: float32[1, 4, 9], where the original can" in str(report)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.input[0].CopyFrom(value("x", shape=[3, 4, 9]))
    assert not verify(model, fixed).ok
    assert verify(fixed, fixed).ok
    assert verify(fixed, model).ok
    only = written(model, "shape", np.array([3, 36]))
    assert verify(only, only).ok, "one that takes a single size is judged on that"
    assert verify(only, fixed).ok


def test_sizes_vary_where_onnxruntime_crashes_too():
    ones = [(name, np.ones(3, np.float32)) for name in "sbmv"]
    nodes = [
        helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["h", "", "", "", ""]),
        helper.make_node("Reshape", ["h", "shape"], ["y"]),
    ]
    io = [value("x", TensorProto.FLOAT, ["n", 3, 4])], [value("y", shape=None)]
    model = graph(nodes, *io, [*ones, ("shape", np.array([-1, 12]))], opset=9)
    assert verify(model, model).ok
    assert not verify(model, written(model, "shape", np.array([3, 12]))).ok


def test_sequences_of_other_lengths_on_some_samples():
    """As many pieces as the batch has rows, and three in a candidate: on a batch of one they are not there."""
    out = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)
    pad, ones = (
        [("pads", np.array([0, 0, 2, 0]))],
        [("one", np.array([1])), ("zero", np.array([0])), ("three", np.array([3]))],
    )
    split = helper.make_node("SplitToSequence", ["x"], ["s"], axis=0)
    x = value("x", shape=["n", 4])
    model = graph([split], [x], [out])
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["more"]),
        helper.make_node("Slice", ["more", "zero", "three", "zero"], ["x3"]),
        helper.make_node("SplitToSequence", ["x3"], ["s"], axis=0),
    ]
    report = verify(model, graph(nodes, [x], [out], [*pad, *ones]))
    assert not report.ok and "on some samples only one" in str(report)
