"""The forms in which the exporters of other frameworks write a batch normalization, by hand from their converters."""

import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from onnx import TensorProto, helper, numpy_helper

from tests.export.folding import Model, check, folded, ops

FORMS = {}


def form(make):
    FORMS[make.__name__] = make
    return make


def nchw(m, x):
    return m.op("Transpose", x, perm=[0, 3, 1, 2])


def nhwc(m, x):
    return m.op("Transpose", x, perm=[0, 2, 3, 1])


def written_out(m, x, channels, *shape):
    """Keras without fusion: ``x * (rsqrt(var + eps) * gamma) + (beta - mean * that)``, computed in the graph."""
    gamma, beta, mean, var = (m.constant(a) for a in m.statistics(channels))
    root = m.op("Sqrt", m.op("Add", var, m.constant(np.float32(1e-3))))
    scale = m.op("Mul", m.op("Reciprocal", root), gamma)
    shift = m.op("Sub", beta, m.op("Mul", mean, scale))
    if shape:
        scale, shift = (m.op("Reshape", v, m.ints(*shape)) for v in (scale, shift))
    return m.op("Add", m.op("Mul", x, scale), shift)


@form
def keras_convolution_with_bias_in_nhwc():
    m = Model(13)
    y = nhwc(m, m.op("Conv", nchw(m, m.input("N", 8, 8, 3)), m.weight(4, 3, 3, 3), auto_pad="SAME_UPPER"))
    return m.build(m.op("Relu", written_out(m, m.op("Add", y, m.weight(4)), 4)))


@form
def keras_fused_between_transpositions():
    m = Model(13)
    y = nhwc(m, m.op("Conv", nchw(m, m.input("N", 8, 8, 3)), m.weight(4, 3, 3, 3)))
    y = nhwc(m, m.bn(nchw(m, m.op("Add", y, m.weight(4))), 4))
    return m.build(m.op("Relu", y))


@form
def keras_separable_convolution_in_one_dimension():
    m = Model(13)
    x = m.op("Unsqueeze", m.op("Transpose", m.input("N", 10, 6), perm=[0, 2, 1]), m.ints(2))
    y = m.op("Conv", m.op("Conv", x, m.weight(6, 1, 1, 3), group=6), m.weight(4, 6, 1, 1))
    y = m.op("Transpose", m.op("Squeeze", y, m.ints(2)), perm=[0, 2, 1])
    return m.build(m.op("Relu", written_out(m, m.op("Add", y, m.weight(4)), 4)))


@form
def keras_dense_behind_time_distributed():
    m = Model(13)
    y = m.op("MatMul", m.op("Reshape", m.input("N", 7, 5), m.ints(-1, 5)), m.weight(5, 4))
    y = m.op("Reshape", m.op("Add", y, m.weight(4)), m.ints(-1, 7, 4))
    return m.build(m.op("Relu", written_out(m, y, 4, 1, 1, 4)))


@form
def keras_before_a_dense_layer():
    m = Model(13)
    y = m.op("GlobalAveragePool", m.bn(m.op("Relu", nchw(m, m.input("N", 8, 8, 3))), 3))
    y = m.op("Squeeze", y, m.ints(2, 3))
    return m.build(m.op("Add", m.op("MatMul", y, m.weight(3, 5)), m.weight(5)))


@form
def keras_transposed_convolution_with_cropping():
    m = Model(13)
    y = m.op("ConvTranspose", nchw(m, m.input(2, 4, 4, 3)), m.weight(3, 4, 3, 3), strides=[2, 2])
    y = m.op("Slice", y, m.ints(0, 0), m.ints(8, 8), m.ints(2, 3))
    return m.build(m.op("Relu", nhwc(m, m.bn(y, 4))))


@form
def keras_upsampling_and_concatenation():
    m = Model(13)
    x = nchw(m, m.input(2, 4, 4, 3))
    up = m.op("Resize", m.op("Conv", x, m.weight(4, 3, 1, 1)), "", m.constant(np.array([1, 1, 2, 2], np.float32)))
    other = m.op("ConvTranspose", x, m.weight(3, 2, 2, 2), strides=[2, 2])
    return m.build(m.op("Relu", m.bn(m.op("Concat", up, other, axis=1), 6)))


@form
def keras_on_torch_over_channels_last():
    m = Model(18)
    mean, var, gamma, beta = (m.constant(a) for a in (m.statistics(4)[i] for i in (2, 3, 0, 1)))
    y = nhwc(m, m.op("Conv", nchw(m, m.input(1, 8, 8, 3)), m.weight(4, 3, 3, 3), m.weight(4)))
    mean, var, gamma, beta = (m.op("Reshape", v, m.ints(1, 1, 1, 4)) for v in (mean, var, gamma, beta))
    inverse = m.op("Reciprocal", m.op("Sqrt", m.op("Add", var, m.constant(np.float32(1e-3)))))
    y = m.op("Mul", m.op("Sub", y, mean), m.op("Mul", inverse, gamma))
    return m.build(m.op("Relu", m.op("Add", y, beta)))


@form
def flax_over_channels_last():
    m = Model(21)
    y = nhwc(m, m.op("Conv", nchw(m, m.input("B", 8, 8, 3)), m.weight(4, 3, 3, 3), pads=[1, 1, 1, 1]))
    y = m.op("Add", y, m.op("Reshape", m.weight(4), m.ints(1, 1, 1, 4)))
    return m.build(m.op("Relu", nhwc(m, m.bn(nchw(m, y), 4))))


@form
def flax_parameters_expanded_to_the_whole_shape():
    m = Model(18)
    mean, var, gamma, beta = (m.statistics(4)[i] for i in (2, 3, 0, 1))
    y = nhwc(m, m.op("Conv", nchw(m, m.input(2, 6, 6, 3)), m.weight(4, 3, 3, 3)))

    def whole(v):
        return m.op("Expand", m.op("Reshape", m.constant(v), m.ints(1, 1, 1, 4)), m.ints(2, 4, 4, 4))

    inverse = m.op("Reciprocal", m.op("Sqrt", whole(var + np.float32(1e-3))))
    y = m.op("Mul", m.op("Sub", y, whole(mean)), m.op("Mul", inverse, whole(gamma)))
    return m.build(m.op("Relu", m.op("Add", y, whole(beta))))


@form
def flax_parameters_expanded_to_a_shape_at_run_time():
    m = Model(18)
    gamma, beta, mean, var = m.statistics(4)
    y = nhwc(m, m.op("Conv", nchw(m, m.input("B", 6, 6, 3)), m.weight(4, 3, 3, 3)))
    shape = m.op("Shape", y)

    def whole(v):
        return m.op("Expand", m.op("Reshape", m.constant(v), m.ints(1, 1, 1, 4)), shape)

    y = m.op("Mul", m.op("Sub", y, whole(mean)), whole(gamma / np.sqrt(var + np.float32(1e-3))))
    return m.build(m.op("Relu", m.op("Add", y, whole(beta))))


@form
def flax_dense_as_einsum():
    m = Model(18)
    y = m.op("Einsum", m.input("B", 7, 5), m.weight(5, 4), equation="abc,cd->abd")
    y = m.op("Transpose", m.op("Add", y, m.op("Reshape", m.weight(4), m.ints(1, 1, 4))), perm=[0, 2, 1])
    return m.build(m.op("Relu", m.op("Transpose", m.bn(y, 4), perm=[0, 2, 1])))


@form
def flax_half_precision_with_parameters_cast():
    m = Model(18, np.float16)
    x = m.op("Conv", m.input(2, 3, 6, 6), m.weight(4, 3, 3, 3))
    x = m.op("Cast", x, to=TensorProto.FLOAT)
    x = m.bn(x, 4, dtype=np.float32)
    return m.build(m.op("Relu", m.op("Cast", x, to=TensorProto.FLOAT16)))


@form
def paddle_bias_added_behind_the_convolution():
    m = Model(11)
    y = m.op("Conv", m.input("N", 3, 8, 8), m.weight(4, 3, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1])
    y = m.op("Add", y, m.op("Reshape", m.op("Identity", m.weight(4)), m.ints(1, 4, 1, 1)))
    return m.build(m.op("Relu", m.bn(y, 4, momentum=0.9)))


@form
def paddle_linear_of_one_dimension():
    m = Model(11)
    y = m.op("Add", m.op("MatMul", m.input("N", 5), m.weight(5, 4)), m.weight(4))
    y = m.op("Unsqueeze", m.op("Unsqueeze", y, axes=[2]), axes=[3])
    return m.build(m.op("Relu", m.op("Squeeze", m.bn(y, 4), axes=[2, 3])))


@form
def paddle_linear_reshaped_to_two_dimensions():
    m = Model(11)
    y = m.op("Add", m.op("MatMul", m.input("N", 5), m.weight(5, 4)), m.weight(4))
    y = m.bn(m.op("Reshape", y, m.ints(0, 4, 1, 1)), 4)
    return m.build(m.op("Relu", m.op("Reshape", y, m.ints(0, 4))))


@form
def torch_parameters_through_identities_and_casts():
    m = Model(18)
    w = m.op("Cast", m.op("Identity", m.weight(4, 3, 3, 3, dtype=np.float64)), to=TensorProto.FLOAT)
    parameters = [m.op("Identity", m.op("Cast", m.constant(a), to=TensorProto.FLOAT)) for a in m.statistics(4)]
    y = m.op("Conv", m.input(2, 3, 6, 6), w)
    return m.build(m.op("Relu", m.op("BatchNormalization", y, *parameters)))


@form
def torch_computed_zero_bias():
    m = Model(18)
    w = m.weight(4, 3, 3, 3)
    zero = m.op("CastLike", m.constant(np.float32(0)), w)
    length = m.op("Slice", m.op("Shape", w), m.ints(0), m.ints(1))
    y = m.op("Conv", m.input("N", 3, "H", "W"), w, m.op("Expand", zero, length))
    return m.build(m.op("Relu", m.bn(y, 4)))


@form
def torch_without_affine_and_optimization():
    """Scale and bias written as computed constants of the length that Shape selects; the batch is dynamic."""
    m = Model(18)
    y = m.op("Conv", m.input("N", 3, 6, 6), m.weight(4, 3, 3, 3))
    one, zero = (m.op("CastLike", m.constant(np.float32(v)), y) for v in (1, 0))
    length = m.op("Shape", y, start=1, end=2)
    _, _, mean, var = (m.constant(a) for a in m.statistics(4))
    y = m.op("BatchNormalization", y, m.op("Expand", one, length), m.op("Expand", zero, length), mean, var)
    return m.build(m.op("Relu", y))


@form
def torch_shuffle_made_contiguous():
    """Without optimization, `contiguous` is an Identity between Transpose and Reshape."""
    m = Model(18)
    y = m.op("Reshape", m.op("Conv", m.input(2, 3, 4, 4), m.weight(8, 3, 1, 1)), m.ints(2, 2, 4, 4, 4))
    y = m.op("Identity", m.op("Transpose", y, perm=[0, 2, 1, 3, 4]))
    return m.build(m.op("Relu", m.bn(m.op("Reshape", y, m.ints(2, 8, 4, 4)), 8)))


@pytest.mark.parametrize("name", FORMS)
def test_folds(name):
    result = check(FORMS[name](), sizes={"H": 6, "W": 6})
    assert folded(result) and result.report.folded, [e.reason for e in result.report.entries]
    left = {"Mul", "Sub", "Div", "Sqrt", "Reciprocal", "Expand", "Shape"} & set(ops(result.model))
    assert not left, left


def test_flax_module_as_a_function():
    m = Model(18)
    inner = [
        helper.make_node("Transpose", ["x"], ["a"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["a", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["b"]),
        helper.make_node("Transpose", ["b"], ["y"], perm=[0, 2, 3, 1]),
    ]
    inputs = ["x", "w", "scale", "bias", "mean", "var"]
    m.functions.append(helper.make_function("custom", "Block", inputs, ["y"], inner, [helper.make_opsetid("", 18)]))
    x = m.input("B", 6, 6, 3)
    for width in (3, 4):
        parameters = [m.constant(a) for a in m.statistics(4)]
        x = m.op("Relu", m.op("Block", x, m.weight(4, width, 1, 1), *parameters, domain="custom"))
    m.output(x, shape=["B", 6, 6, 4])
    result = check(m.build())
    assert folded(result) and result.report.folded == 2


def test_quantized_by_steps_stays():
    m = Model(13)
    scale, zero = m.constant(np.float32(0.1)), m.constant(np.int8(0))
    y = m.op("Conv", m.input(2, 3, 6, 6), m.weight(4, 3, 3, 3))
    y = m.op("DequantizeLinear", m.op("QuantizeLinear", y, scale, zero), scale, zero)
    result = check(m.build(m.op("Relu", m.bn(y, 4))))
    assert result.report.left == 1


def test_names_with_slashes_keep_their_scopes():
    condition = numpy_helper.from_array(np.array(True), "condition")
    m = Model()
    y = m.bn(m.op("Conv", "x", m.weight(4, 3, 3, 3)), 4)
    bodies = []
    for name in ("then", "else"):
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in m.nodes]
        for node in nodes:
            node.name, node.output[0] = f"/{node.name}", f"{node.output[0]}_{name}"
            node.input[0] = node.input[0] if node.input[0] == "x" else f"{node.input[0]}_{name}"
        out = helper.make_tensor_value_info(f"{y}_{name}", TensorProto.FLOAT, [2, 4, 4, 4])
        bodies.append(helper.make_graph(nodes, name, [], [out]))
    choice = helper.make_node(
        "If", ["condition"], ["y"], name="/block/If", then_branch=bodies[0], else_branch=bodies[1]
    )
    graph = helper.make_graph(
        [choice],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4, 4, 4])],
        [*m.initializers, condition],
    )
    result = check(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert [e.scope for e in result.report.entries] == ["/block/If", "/block/If"]
    assert folded(result)


def test_torch_recurrent_layer_whose_state_has_the_shape_of_a_copy():
    """A transposition of the normalized data of which only Shape is read."""
    m = Model(18)
    x = m.bn(m.op("Sigmoid", m.input("N", 3, 7)), 3)
    batch = m.op("Gather", m.op("Shape", m.op("Transpose", x, perm=[0, 2, 1])), m.ints(0))
    state = m.op("ConstantOfShape", m.op("Concat", m.ints(1), batch, m.ints(4), axis=0))
    y = m.op("Transpose", x, perm=[2, 0, 1])
    y = m.op("RNN", y, m.weight(1, 4, 3), m.weight(1, 4, 4), "", "", state, hidden_size=4)
    assert folded(check(m.build(y)))


def test_torch_zero_bias_of_another_shape():
    """What torch.export's exporter writes for a convolution of three dimensions without bias; no runtime takes it."""
    models = []
    for shape in ((4,), (4, 2)):
        m = Model(18)
        bias = m.op("Expand", m.constant(np.float32(0)), m.ints(*shape))
        y = m.op("Conv", m.input("N", 3, 4, 4, 4), m.weight(4, 3, 2, 2, 2, name="w"), bias)
        models.append(fold(m.build(m.op("Relu", m.bn(y, 4)))).model)
    assert ops(models[1]) == ["Conv", "Relu"]
    arrays = [[numpy_helper.to_array(t) for t in model.graph.initializer] for model in models]
    for good, bad in zip(*arrays, strict=True):
        np.testing.assert_array_equal(good, bad)
