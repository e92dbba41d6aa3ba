"""Running statistics moved by moments."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn


def test_as_a_training_call_does(rng):
    x = rng.standard_normal((6, 3, 5))
    (m1, v1), (m2, v2) = ((np.full(3, 0.5), np.full(3, 2.0)) for _ in range(2))
    for unbiased in (True, False):
        fastbn.batch_norm_train(x, None, None, m1, v1, momentum=0.2, unbiased=unbiased)
        fastbn.update_running(m2, v2, fastbn.Moments.of(x), momentum=0.2, unbiased=unbiased)
        np.testing.assert_allclose(m1, m2, rtol=1e-12)
        np.testing.assert_allclose(v1, v2, rtol=1e-12)


def test_small_counts():
    m, v = np.full(2, 0.5, np.float32), np.full(2, 2.0, np.float32)
    fastbn.update_running(m, v, fastbn.Moments(0, np.ones(2), np.ones(2)))
    assert (m == 0.5).all()
    one = fastbn.Moments(1, np.ones(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"^moments: expected more than 1 value"):
        fastbn.update_running(m, v, one)
    fastbn.update_running(m, v, one, unbiased=False)
    assert m == pytest.approx([0.55] * 2) and v == pytest.approx([1.8] * 2)


def test_more_errors():
    m, v, moments = np.zeros(2), np.ones(2), fastbn.Moments(4, np.ones(2), np.ones(2))
    with pytest.raises(TypeError, match=r"^unbiased: expected True or False, got no"):
        fastbn.update_running(m, v, moments, unbiased="no")
    with pytest.raises(ValueError, match=r"^running_var: expected memory apart from running_mean"):
        fastbn.update_running(m, m, moments)
    with pytest.raises(ValueError, match=r"^moments: expected 3 channels, got 2"):
        fastbn.BatchNorm(3).update(moments)
    assert not m.any() and (v == 1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ((np.zeros(2), np.ones(2), None), TypeError, "moments"),
        ((None, None, "m"), TypeError, "running_mean"),
        ((np.zeros(2, int), np.ones(2), "m"), TypeError, "running_mean"),
        ((np.zeros(2), None, "m"), ValueError, "running_var"),
        ((np.zeros(2), np.ones(2, np.float32), "m"), TypeError, "running_var"),
        ((np.zeros(3), np.ones(3), "m"), ValueError, "running_mean"),
    ],
)
def test_errors_name_the_argument(arguments, error, named):
    moments = fastbn.Moments(4, np.zeros(2), np.ones(2)) if arguments[2] == "m" else arguments[2]
    with pytest.raises(error, match=rf"^{named}: expected"):
        fastbn.update_running(*arguments[:2], moments)
