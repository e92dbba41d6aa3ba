"""Half and mixed types: one rounding, and no fold that loses the range."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from fastbn_export.fold import fold
from onnx import numpy_helper

from .folding import Model, folded, is_folded, is_left, ops


def test_half_precision():
    m = Model(dtype=np.float16)
    y = m.op("Conv", m.input(2, 3, 5, 5), m.weight(4, 3, 3, 3))
    tiny = (*m.statistics(4)[:3], np.full(4, 6e-8, np.float16))
    is_folded(m.build(m.bn(y, 4, parameters=tiny, epsilon=1e-5)))


@pytest.mark.parametrize(("gamma", "reason"), [(6e4, "overflow"), (1e-5, "lose range in float16")])
def test_half_precision_refused(gamma, reason):
    m = Model(dtype=np.float16)
    _, beta, mean, _ = m.statistics(4)
    parameters = (np.full(4, gamma, np.float16), beta, mean, np.full(4, 1e-2 if gamma > 1 else 1, np.float16))
    y = m.op("Conv", m.input(2, 3, 5, 5), m.weight(4, 3, 3, 3))
    before = m.build(m.op("Tanh", m.bn(y, 4, parameters=parameters)))
    is_left(before, reason)


def test_mixed_precision():
    m = Model(dtype=np.float16)
    y = m.op("Cast", m.op("Conv", m.input(2, 3, 5, 5), m.weight(4, 3, 3, 3)), to=1)
    out = m.bn(y, 4, dtype=np.float32)
    m.output(out, np.float32)
    is_folded(m.build(), "Conv", "Cast", tolerance=1e-2)


def test_bfloat16():
    m = Model(dtype=ml_dtypes.bfloat16, opset=22, ir_version=10)
    y = m.op("Conv", m.input(1, 3, 2, 2), m.weight(4, 3, 1, 1, name="w"), name="conv")
    model = m.build(m.bn(y, 4))
    result = fold(model)
    assert folded(result) and ops(result.model) == ["Conv"]
    arrays = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in (*model.graph.initializer,)}
    new = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    gamma, beta, mean, variance = (arrays[n] for n in model.graph.node[1].input[1:])
    scale = gamma / np.sqrt(variance + np.float32(1e-3))
    expected = (arrays["w"] * scale[:, None, None, None]).astype(ml_dtypes.bfloat16)
    assert new["w"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(new["w"], expected)
    np.testing.assert_array_equal(new["conv.bias"], (beta - mean * scale).astype(ml_dtypes.bfloat16))
