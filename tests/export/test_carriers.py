"""Every carrier, upstream behind a convolution and downstream before one."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export.fold import fold

from .folding import Model, check, conv, folded, is_folded, is_left


def reduced_in_front(m):
    return m.op("ReduceMean", m.op("Transpose", conv(m, 2, 4, 5), perm=[2, 0, 1]), axes=[0], keepdims=0)


UP = {
    "Identity": lambda m: (m.op("Identity", conv(m, 2, 4, 5, 5)), 4),
    "Dropout": lambda m: (m.op("Dropout", conv(m, 2, 4, 5, 5)), 4),
    "Cast": lambda m: (m.op("Cast", m.op("Cast", conv(m, 2, 4, 5, 5), to=11), to=1), 4),
    "Transpose": lambda m: (m.op("Transpose", conv(m, 2, 4, 5, 6), perm=[3, 1, 0, 2]), 4),
    "Reshape flat": lambda m: (m.op("Reshape", conv(m, 2, 4, 5, 6), m.ints(0, 0, -1)), 4),
    "Reshape finer": lambda m: (m.op("Reshape", conv(m, 2, 4, 5, 6), m.ints(2, 2, 2, 30)), 2),
    "Reshape batch": lambda m: (m.op("Reshape", m.op("Transpose", conv(m, 2, 4, 5), perm=[0, 2, 1]), m.ints(-1, 4)), 4),
    "Flatten": lambda m: (m.op("Flatten", conv(m, 2, 4, 1, 1)), 4),
    "Squeeze": lambda m: (m.op("Squeeze", conv(m, 2, 4, 1, 5), m.ints(-2)), 4),
    "Squeeze all": lambda m: (m.op("Squeeze", conv(m, 2, 4, 1, 5)), 4),
    "Unsqueeze": lambda m: (m.op("Unsqueeze", conv(m, 2, 4, 5), m.ints(-1)), 4),
    "Concat": lambda m: (m.op("Concat", conv(m, 2, 4, 5), conv(m, 2, 3, 5, out=3), axis=1), 7),
    "Concat other axis": lambda m: (m.op("Concat", conv(m, 2, 4, 5), conv(m, 2, 4, 3), axis=-1), 4),
    "Split": lambda m: (m.op("Split", conv(m, 2, 4, 5), m.ints(1, 3), axis=1, outputs=2)[1], 3),
    "Slice channels": lambda m: (m.op("Slice", conv(m, 2, 4, 5), m.ints(1), m.ints(4), m.ints(1), m.ints(2)), 2),
    "Slice backwards": lambda m: (m.op("Slice", conv(m, 2, 4, 5), m.ints(-1), m.ints(-9), m.ints(1), m.ints(-1)), 4),
    "Slice to the first": lambda m: (m.op("Slice", conv(m, 2, 4, 5), m.ints(-9), m.ints(-9), m.ints(1), m.ints(-1)), 1),
    "Slice elsewhere": lambda m: (m.op("Slice", conv(m, 2, 4, 5), m.ints(1), m.ints(4), m.ints(2)), 4),
    "Gather": lambda m: (m.op("Gather", conv(m, 2, 4, 5), m.ints(3, 0), axis=1), 2),
    "Gather elsewhere": lambda m: (m.op("Gather", conv(m, 2, 4, 5, 6), m.constant(np.int64(3)), axis=3), 4),
    "AveragePool": lambda m: (m.op("AveragePool", conv(m, 2, 4, 5, 5), kernel_shape=[2, 2], pads=[1, 1, 0, 0]), 4),
    "GlobalAveragePool": lambda m: (m.op("GlobalAveragePool", conv(m, 2, 4, 5, 5)), 4),
    "ReduceMean": lambda m: (m.op("ReduceMean", conv(m, 2, 4, 5, 5), axes=[-1], keepdims=0), 4),
    "ReduceMean front": lambda m: (reduced_in_front(m), 4),
    "ReduceSum": lambda m: (m.op("ReduceSum", conv(m, 2, 4, 5, 5), m.ints(2, 3)), 4),
    "DepthToSpace": lambda m: (m.op("DepthToSpace", conv(m, 2, 8, 5, 5, out=8), blocksize=2), 2),
    "DepthToSpace CRD": lambda m: (m.op("DepthToSpace", conv(m, 2, 8, 5, 5, out=8), blocksize=2, mode="CRD"), 2),
    "Resize nearest": lambda m: (m.op("Resize", conv(m, 2, 4, 5, 5), "", m.constant(np.array([1, 1, 2, 2], "f"))), 4),
    "Resize linear": lambda m: (m.op("Resize", conv(m, 2, 4, 5, 5), "", "", m.ints(2, 4, 7, 3), mode="linear"), 4),
    "Resize cubic": lambda m: (m.op("Resize", conv(m, 2, 4, 5, 5), "", "", m.ints(2, 4, 7, 3), mode="cubic"), 4),
    "Neg": lambda m: (m.op("Neg", conv(m, 2, 4, 5)), 4),
    "const - x": lambda m: (m.op("Sub", m.constant(np.float32(3)), conv(m, 2, 4, 5)), 4),
    "Pad reflect": lambda m: (m.op("Pad", conv(m, 2, 4, 5), m.ints(0, 0, 1, 0, 0, 2), mode="reflect"), 4),
    "Pad nothing": lambda m: (m.op("Pad", conv(m, 2, 4, 5), m.ints(0, 0, 0, 0, 0, 0)), 4),
}  # fmt: skip


@pytest.mark.parametrize("case", UP)
def test_upstream(case):
    m = Model(opset=17)
    y, channels = UP[case](m)
    is_folded(m.build(m.bn(y, channels)))


POSITIVE = {
    "Relu": lambda m, y: m.op("Relu", y),
    "LeakyRelu": lambda m, y: m.op("LeakyRelu", y),
    "PRelu": lambda m, y: m.op("PRelu", y, m.weight(4, 1, 1)),
    "Abs": lambda m, y: m.op("Abs", y),
    "MaxPool": lambda m, y: m.op("MaxPool", y, kernel_shape=[2, 2], pads=[1, 1, 1, 1]),
    "GlobalMaxPool": lambda m, y: m.op("GlobalMaxPool", y),
    "ReduceMax": lambda m, y: m.op("ReduceMax", y, axes=[2]),
    "ReduceMin": lambda m, y: m.op("ReduceMin", y, axes=[2]),
    "Pad": lambda m, y: m.op("Pad", y, m.ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "AveragePool": lambda m, y: m.op("AveragePool", y, kernel_shape=[2, 2], pads=[1] * 4, count_include_pad=1),
    "Mul": lambda m, y: m.op("Mul", y, m.op("Sigmoid", m.input(2, 1, 5, 5))),
}
REASON = {"Pad": "would differ between channels", "AveragePool": "counts padded zeros", "Mul": "Mul of two branches"}


@pytest.mark.parametrize("case", POSITIVE)
def test_scale_without_shift(case):
    m = Model()
    is_folded(m.build(m.bn(POSITIVE[case](m, conv(m, 2, 4, 5, 5)), 4, parameters=m.positive(4))))
    m = Model()
    model = m.build(m.bn(POSITIVE[case](m, conv(m, 2, 4, 5, 5)), 4))
    is_left(
        model, REASON.get(case, "negative scale" if "Max" in case or "Min" in case else f"a shift does not pass {case}")
    )


@pytest.mark.parametrize("case", POSITIVE)
def test_scale_without_shift_downstream(case):
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 5, 5)), 4, parameters=m.positive(4))
    is_folded(m.build(m.op("Conv", POSITIVE[case](m, y), m.weight(3, 4, 1, 1))))


def test_max_pool_carries_a_shift():
    m = Model()
    gamma, *rest = m.statistics(4)
    y = m.op("MaxPool", conv(m, 2, 4, 5, 5), kernel_shape=[2, 2], pads=[1, 1, 1, 1])
    is_folded(m.build(m.bn(y, 4, parameters=(np.abs(gamma), *rest))))


def test_max_pool_with_indices():
    m = Model()
    gamma, *rest = m.statistics(4)
    y, indices = m.op("MaxPool", conv(m, 2, 4, 5, 5), kernel_shape=[2, 2], outputs=2)
    m.output(indices, np.int64)
    is_left(m.build(m.bn(y, 4, parameters=(np.abs(gamma), *rest))), "indices of MaxPool are used")


def test_pad_value_maps_along():
    m = Model()
    uniform = tuple(np.full(4, v, "f") for v in (2, 1, 0.5, 3))
    y = m.op("Pad", conv(m, 2, 4, 5, 5), m.ints(0, 0, 1, 1, 0, 0, 1, 1), m.constant(np.float32(0.7)))
    is_folded(m.build(m.bn(y, 4, parameters=uniform)), "Conv", "Pad")
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 5, 5)), 4, parameters=uniform)
    y = m.op("Pad", y, m.ints(0, 0, 1, 1, 0, 0, 1, 1), m.constant(np.float32(0.7)))
    is_folded(m.build(m.op("Conv", y, m.weight(3, 4, 3, 3))), "Sigmoid", "Pad", "Conv")
    m = Model()
    y = m.op("Pad", conv(m, 2, 4, 5, 5), m.ints(0, 1, 0, 0, 0, 0, 0, 0))
    is_left(m.build(m.bn(y, 5)), "pads the channel axis")


@pytest.mark.parametrize("size", [6, 5, "H"])
def test_average_pool_that_rounds_up(size):
    """The form of torch's default, which counts padding; only windows behind the end could count some."""
    m = Model()
    y = m.op("Conv", m.input(2, 3, size, size), m.weight(4, 3, 1, 1))
    y = m.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1, count_include_pad=1)
    y = m.op("GlobalAveragePool", m.op("Tanh", m.bn(y, 4)))
    model = m.build(y)
    is_folded(model) if size == 6 else is_left(model, "counts padded zeros", sizes={"H": 6})


@pytest.mark.parametrize("signs", [(1, 1, 1, 1), (1, -1, 1, 1)])
def test_padding_with_infinity(signs):
    """What a maximum behind it does not see; a positive scale keeps it, for channels of any shift."""
    m = Model()
    gamma, *rest = m.statistics(4)
    pads = m.ints(0, 0, 1, 1, 0, 0, 1, 1), m.constant(np.float32(-np.inf))
    y = m.op("Pad", conv(m, 2, 4, 5, 5), *pads)
    y = m.bn(y, 4, parameters=(np.abs(gamma) * np.float32(signs), *rest))
    model = m.build(m.op("Relu", y) if min(signs) > 0 else m.op("Sigmoid", y))
    if min(signs) > 0:
        is_folded(model, "Conv", "Pad", "Relu")
    else:
        is_left(model, "would differ between channels")


@pytest.mark.parametrize(
    ("opset", "operands", "attributes"),
    [
        (17, ["", np.array([1, 1.2, 2, 2], "f")], {}),
        (10, [np.array([1, 1.2, 2, 2], "f")], {}),
        (18, ["", np.array([1.2, 2], "f")], {"axes": [-3, 3]}),
        (18, ["", "", np.array([4, 8])], {"axes": [1, 2], "keep_aspect_ratio_policy": "not_larger"}),
    ],
)
def test_a_factor_that_mixes_channels_and_keeps_their_number(opset, operands, attributes):
    """The runtime leaves an axis alone whose length stays; the specification, and onnx's evaluator, do not."""
    m = Model(opset=opset)
    given = [m.constant(o) if isinstance(o, np.ndarray) else o for o in operands]
    y = m.op("Resize", conv(m, 2, 4, 5, 5), *given, mode="nearest", **attributes)
    y = m.op("Reshape", y, m.ints(2, 4, -1))
    result = fold(m.build(m.bn(y, 4)))
    assert any(text in result.report.entries[0].reason for text in ("may resize the channel axis", "aspect ratio"))


DOWN = {
    "Identity": lambda m, y: m.op("Identity", y),
    "Transpose": lambda m, y: m.op("Transpose", y, perm=[2, 1, 0]),
    "Squeeze": lambda m, y: m.op("Squeeze", m.op("Unsqueeze", y, m.ints(0)), m.ints(0)),
    "Concat": lambda m, y: m.op("Slice", m.op("Concat", y, m.input(2, 2, 5), axis=1), m.ints(0), m.ints(4), m.ints(1)),
    "Slice": lambda m, y: m.op("Slice", y, m.ints(2), m.ints(5), m.ints(2)),
    "Gather": lambda m, y: m.op("Gather", y, m.ints(2, 3, 1, 0), axis=1),
    "Add const": lambda m, y: m.op("Add", y, m.weight(4, 1)),
    "Mul const": lambda m, y: m.op("Mul", y, m.weight(4, 1)),
    "const - x": lambda m, y: m.op("Sub", m.constant(np.float32(2)), y),
    "Div": lambda m, y: m.op("Div", y, m.constant(np.float32(2))),
    "Neg": lambda m, y: m.op("Neg", y),
    "ReduceMean": lambda m, y: m.op("ReduceMean", y, axes=[2]),
    "ReduceSum": lambda m, y: m.op("ReduceSum", y, m.ints(2)),
    "Reshape": lambda m, y: m.op("Reshape", m.op("Reshape", y, m.ints(2, 2, 2, 5)), m.ints(2, 4, 5)),
    "Dropout": lambda m, y: m.op("Dropout", y),
    "MatMul on another axis": lambda m, y: m.op("MatMul", y, m.weight(5, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", DOWN)
def test_downstream(case):
    m = Model()
    parameters = m.positive(4) if case == "MatMul on another axis" else None
    y = DOWN[case](m, m.bn(m.op("Sigmoid", m.input(2, 4, 5)), 4, parameters=parameters))
    model = m.build(m.op("Conv", y, m.weight(3, 4, 1)))
    if case == "Reshape":
        is_left(model, "cannot be followed through Reshape")
    else:
        is_folded(model)


@pytest.mark.parametrize("upstream", [True, False])
def test_a_gather_behind_the_end(upstream):
    """No runtime runs it; it may stand in a branch that is never taken."""
    m = Model()
    x = conv(m, 2, 4, 5) if upstream else m.bn(m.op("Sigmoid", m.input(2, 4, 5)), 4)
    y = m.op("Gather", x, m.ints(0, 4), axis=1)
    result = fold(m.build(m.bn(y, 2) if upstream else m.op("Conv", y, m.weight(3, 2, 1))))
    assert "reads behind the end" in str(result.report.entries[0].reason)


def test_a_slice_backwards_from_before_the_first_channel():
    """ONNX clips the bounds and delivers the first channel; Python's slice is empty."""
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 4, 5)), 4)
    y = m.op("Slice", y, m.ints(-9), m.ints(-9), m.ints(1), m.ints(-1))
    is_folded(m.build(m.op("Conv", y, m.weight(3, 1, 1))))


def test_flatten_into_gemm():
    m = Model()
    y = m.op("Flatten", m.bn(m.op("Relu", m.input(2, 4, 3, 3)), 4))
    is_folded(m.build(m.op("Gemm", y, m.weight(36, 5))), "Relu", "Flatten", "Gemm")


def test_split_into_two_convs():
    m = Model()
    y = m.bn(m.op("Relu", m.input(2, 4, 5)), 4)
    a, b = m.op("Split", y, m.ints(1, 3), axis=1, outputs=2)
    is_folded(m.build(m.op("Conv", a, m.weight(2, 1, 1)), m.op("Conv", b, m.weight(2, 3, 1))))


def test_a_shift_passes_a_sum():
    m = Model()
    ones, zeros = np.ones(4, "f"), np.zeros(4, "f")
    shift = m.bn(m.op("Relu", m.input(2, 4, 5)), 4, parameters=(ones, m.statistics(4)[1], zeros, ones), epsilon=0.0)
    y = m.op("Add", shift, m.op("Sigmoid", m.input(2, 4, 5)))
    is_folded(m.build(m.op("Conv", y, m.weight(2, 4, 1))))


def test_space_to_depth():
    m = Model()
    y = m.op("SpaceToDepth", m.bn(m.op("Relu", m.input(2, 3, 4, 4)), 3), blocksize=2)
    is_folded(m.build(m.op("Conv", y, m.weight(2, 12, 1, 1))))
    m = Model()
    y = m.op("SpaceToDepth", conv(m, 2, 4, 4, 4), blocksize=2)
    is_left(m.build(m.bn(y, 16)), "differs within a block")


@pytest.mark.parametrize("op", ["Sigmoid", "Softmax", "Exp"])
def test_not_linear(op):
    m = Model()
    is_left(m.build(m.op("Tanh", m.bn(m.op(op, conv(m, 2, 4, 5)), 4))), f"{op} neither carries nor absorbs")


def test_channels_are_not_confused_with_their_neighbours():
    """MatMul -> Reshape that moves channels: the map is no longer one along the columns."""
    m = Model()
    y = m.op("Reshape", m.op("MatMul", m.input(4, 5), m.weight(5, 4)), m.ints(2, 4, 2))
    result = check(m.build(m.bn(y, 4)))
    assert not folded(result)


UNIFORM = {
    "Unsqueeze": lambda m: m.bn(m.op("Unsqueeze", m.op("MatMul", m.input(2, 6, 3), m.weight(3, 5)), m.ints(1)), 1),
    "Unsqueeze behind Flatten": lambda m: m.bn(
        m.op("Unsqueeze", m.op("Flatten", conv(m, 2, 4, 3, 3), axis=4), m.ints(2)), 1
    ),
    "Reshape": lambda m: m.bn(m.op("Reshape", conv(m, 2, 4, 3, 3), m.ints(8, 1, -1)), 1),
    "Squeeze": lambda m: m.op(
        "Conv", m.op("Squeeze", m.bn(m.op("Sigmoid", m.input(2, 1, 4, 5)), 1), m.ints(1)), m.weight(3, 4, 2)
    ),
}


@pytest.mark.parametrize("case", UNIFORM)
def test_the_map_of_one_channel_lies_along_any_axis(case):
    m = Model()
    is_folded(m.build(m.op("Relu", UNIFORM[case](m))))


def test_disjoint_slices():
    m = Model()
    y = conv(m, 2, 6, 5, out=6)
    a = m.op("Slice", y, m.ints(0), m.ints(2), m.ints(1))
    b = m.op("Slice", y, m.ints(2), m.ints(6), m.ints(1))
    is_folded(m.build(m.op("Concat", m.op("Tanh", a), m.bn(b, 4), axis=1)))
    m = Model()
    y = conv(m, 2, 6, 5, out=6)
    a = m.op("Slice", y, m.ints(0), m.ints(3), m.ints(1))
    b = m.op("Slice", y, m.ints(2), m.ints(6), m.ints(1))
    is_left(m.build(m.op("Concat", m.op("Tanh", a), m.bn(b, 4), axis=1)), "other readers")


@pytest.mark.parametrize("batch", [2, "N"])
def test_channel_shuffle(batch):
    m = Model()
    y = m.op("Conv", m.input(batch, 3, 5, 5), m.weight(6, 3, 1, 1))
    y = m.op("Reshape", y, m.ints(-1, 2, 3, 5, 5))
    y = m.op("Reshape", m.op("Transpose", y, perm=[0, 2, 1, 3, 4]), m.ints(-1, 6, 5, 5))
    is_folded(m.build(m.bn(y, 6)))


def test_channels_shuffled_with_positions():
    m = Model()
    y = m.op("Reshape", conv(m, 2, 4, 3, 3), m.ints(2, 2, 2, 9))
    y = m.op("Reshape", m.op("Transpose", y, perm=[0, 2, 3, 1]), m.ints(2, 4, 3, 3))
    is_left(m.build(m.bn(y, 4)), "cannot be followed")


def test_shapes_that_only_constants_tell():
    """Weights cut to size at run time, sizes computed from shapes: inference alone does not know the channels."""
    m = Model()
    whole = m.weight(8, 3, 1, 1)
    start, end = (m.op("Unsqueeze", m.constant(np.int64(v)), m.ints(0)) for v in (2, 6))
    y = m.op("Conv", m.input(2, 3, 4, 4), m.op("Slice", whole, start, end, m.ints(0)))
    sizes = m.op("Concat", m.op("Slice", m.op("Shape", y), m.ints(0), m.ints(2)), m.ints(8, 8), axis=0)
    y = m.op("Add", m.op("Resize", y, "", "", sizes), m.op("Conv", m.input(2, 3, 8, 8), m.weight(4, 3, 1, 1)))
    out = m.bn(y, 4)
    m.output(out, shape=[2, 4, 8, 8])
    is_folded(m.build())
