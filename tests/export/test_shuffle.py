"""Channel shuffles beside a batch of unknown size; the plain ones are in test_carriers."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export.fold import fold
from onnx import TensorProto, helper

from .folding import Model, check, folded, run


def agree(model, make):
    """Fold and compare for several sizes of the batch; returns the result."""
    result = fold(model)
    for batch in (2, 4, 6, 12):
        x = make(batch)
        np.testing.assert_allclose(run(result.model, {"x": x})[0], run(model, {"x": x})[0], atol=1e-5)
    return result


@pytest.mark.parametrize("op", ["Mul", "DequantizeLinear"])
def test_channels_out_of_an_unknown_batch(op):
    """Twelve samples of 4 become two of (6, 4): the channels lie along the batch, whatever its size."""
    m = Model()
    element = TensorProto.FLOAT if op == "Mul" else TensorProto.INT8
    m.inputs.append(helper.make_tensor_value_info("x", element, ["n", 4]))
    y = m.op("Reshape", m.op(op, "x", m.constant(np.float32(0.5))), m.ints(-1, 6, 4))
    y = m.bn(y, 6, parameters=m.positive(6))
    m.output(y, shape=[None, 6, 4])
    kind = np.float32 if op == "Mul" else np.int8
    result = agree(m.build(), lambda n: np.arange(12 * n).reshape(3 * n, 4).astype(kind) % 7)
    assert "BatchNormalization" in result.report.ops_after


@pytest.mark.parametrize("batch", [4, "n"])
def test_a_batch_that_is_moved_inside(batch):
    """(n, 8) as (2, 2 n, 2) and turned: which column holds which channel depends on n."""
    m = Model()
    m.input(batch, 5, name="x")
    y = m.op("Reshape", m.op("MatMul", "x", m.weight(5, 8)), m.ints(2, -1, 2), outputs=["u"])
    y = m.bn(m.op("Reshape", m.op("Transpose", y, perm=[1, 0, 2]), m.ints(-1, 4)), 4)
    m.output(y, shape=[None, 4])
    m.infos.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, [2, None, 2]))
    sizes = {} if batch == 4 else {"n": 4}
    assert not folded(check(m.build(), sizes=sizes))
    if batch == "n":
        agree(m.build(), lambda n: np.random.default_rng(n).standard_normal((n, 5)).astype("f"))


def test_turned_where_every_size_is_known():
    m = Model()
    m.input(2, 5, name="x")
    y = m.op("Reshape", m.op("MatMul", "x", m.weight(5, 6)), m.ints(2, 2, 3))
    y = m.op("Reshape", m.op("Transpose", y, perm=[2, 0, 1]), m.ints(2, 6))
    y = m.op("Transpose", m.op("Reshape", y, m.ints(3, 2, 2)), perm=[1, 2, 0])
    assert folded(check(m.build(m.bn(m.op("Reshape", y, m.ints(2, 6)), 6))))


def shuffled(reader=None):
    """A shuffle whose tensor between the steps is read by somebody else too."""
    m = Model()
    y = m.op("Conv", m.input(2, 3, 6, 6), m.weight(6, 3, 3, 3))
    y = m.op("Reshape", y, m.ints(2, 2, 3, 16))
    y = m.op("Transpose", y, perm=[0, 2, 1, 3])
    if reader == "output":
        m.output(y, shape=(2, 3, 2, 16))
    elif reader is not None:
        m.output(m.op(reader, y), shape=(2, 3, 2, 16))
    return check(m.build(m.bn(m.op("Reshape", y, m.ints(2, 6, 4, 4)), 6)))


@pytest.mark.parametrize("reader", [None, "output", "Sigmoid"])
def test_what_is_read_within_a_shuffle_stays(reader):
    assert folded(shuffled(reader)) == (reader is None)
