import numpy as np
import onnx_ir as ir
import pytest
from fastbn_export.affine import same_size
from fastbn_export.channels import known_dims
from fastbn_export.facts import Facts
from fastbn_export.fold import fold
from onnx import helper

from .folding import Model, check, folded
from .fuzzing import random_model


def dims_of(model):
    """What is known of every value without inference, by name, and what inference knows."""
    edited = ir.from_proto(model)
    facts, other = Facts(edited), Facts(edited)
    values = [v for node in edited.graph for v in node.outputs]
    return {v.name: (known_dims(facts, v, {}), other.dims(v)) for v in values}


@pytest.mark.parametrize("seed", range(60))
def test_nothing_contradicts_inference(seed):
    for known, inferred in dims_of(random_model(seed, np.float32)).values():
        if known is not None and inferred is not None:
            assert len(known) == len(inferred)
            assert all(a is None or a == b for a, b in zip(known, inferred, strict=True)), (known, inferred)


def test_channels_behind_convolutions():
    m = Model()
    x = m.input("N", 4, "H", "W")
    grouped = m.op("Conv", x, m.weight(6, 2, 3, 3), group=2)
    turned = m.op("ConvTranspose", x, m.weight(4, 3, 2, 2), group=2)
    joined = m.op("Concat", m.op("MaxPool", grouped, kernel_shape=[2, 2]), turned, axis=1)
    pooled = m.op("GlobalAveragePool", m.op("Mul", joined, m.weight(12, 1, 1)))
    last = m.op("Transpose", m.op("Unsqueeze", m.op("Relu", pooled), m.ints(0)), perm=[4, 3, 2, 1, 0])
    m.output(last, shape=[1, 1, 12, "N", 1])
    known = {name: dims[0] for name, dims in dims_of(m.build()).items()}
    assert known[grouped] == ("N", 6, None, None)
    assert known[turned] == ("N", 6, None, None)
    assert known[joined] == ("N", 12, None, None)
    assert known[pooled] == ("N", 12, 1, 1)
    assert known[last] == (1, 1, 12, "N", 1)


def test_an_unknown_operator_in_front_hides_nothing_that_weights_fix():
    """Inference stops at an operator of another domain; the convolution behind it still says how many channels."""
    m = Model()
    y = m.op("Conv", m.op("Odd", m.input(2, 3, 6, 6), domain="other"), m.weight(4, 3, 3, 3))
    y = m.op("Add", m.op("Mul", m.op("Relu", y), m.weight(4, 1, 1)), m.weight(4, 1, 1))
    m.output(m.op("Conv", y, m.weight(2, 4, 1, 1)), shape=[2, 2, 4, 4])
    graph = helper.make_graph(m.nodes, "g", m.inputs, m.outputs, m.initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("other", 1)]
    result = fold(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    assert [n.op_type for n in result.model.graph.node] == ["Odd", "Conv", "Relu", "Conv"]


def test_a_cycle_ends():
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    nodes.append(helper.make_node("BatchNormalization", ["b", "w", "w", "w", "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [2, 3])],
        [helper.make_tensor_value_info("y", 1, [2, 3])],
        [helper.make_tensor("w", 1, [3], [1.0] * 3)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert fold(model).report.left == 1


def test_symbols_are_kept():
    m = Model()
    y = m.op("Conv", m.input("N", 3, "L"), m.weight(4, 3, 1))
    y = m.op("Reshape", m.op("Transpose", y, perm=[0, 2, 1]), m.ints(-1, 4))
    assert same_size(("N", 4), (4, "N"))
    assert folded(check(m.build(m.op("Relu", m.bn(y, 4))), sizes={"L": 5}))


def test_a_permutation_that_is_none_makes_the_shape_unknown():
    """The checker lets it pass, no runtime does: a model to say something about, not to fail on."""
    m = Model()
    turned = m.op("Transpose", m.op("Conv", m.input(1, 3, 4, 4), m.weight(2, 3, 1, 1)), perm=[0, 1, 2, 3])
    model = m.build(m.bn(turned, 2))
    model.graph.node[1].attribute[0].ints[:] = [0, 1, 2, 4]
    assert dims_of(model)[turned][0] is None
    fold(model)
