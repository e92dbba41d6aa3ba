"""NUMBA_DISABLE_JIT=1: the same functions in NumPy float64, same results within rounding, same errors."""

from __future__ import annotations

import itertools
import os
import sys

import numba
import numpy as np
import pytest

import fastbn
from fastbn.cpu import fallback, launch
from tests.oracle import SHAPES, case, check_backward, check_frozen, check_infer, check_train, normal, same_bits
from tests.tolerances import DTYPES, arithmetic

OPTIONS = list(itertools.product((None, "relu"), (False, True)))


@pytest.fixture
def without_jit(monkeypatch):
    monkeypatch.setattr("fastbn.dispatch.kernels", lambda: fallback)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("shape", [SHAPES["planes"][0], SHAPES["rows"][1]], ids=str)
def test_every_operation(shape, dtype, without_jit, rng):
    for activation, residual in OPTIONS:
        c = case(rng, shape, dtype, activation=activation, residual=residual)
        grad = rng.standard_normal(shape).astype(dtype)
        _, saved = check_train(c)
        check_backward(c, saved, grad)
        mean, var = saved.mean.astype(arithmetic(dtype)), saved.variance.astype(arithmetic(dtype))
        check_infer(c, mean, var)
        check_backward(c, check_frozen(c, mean, var)[1], grad, is_frozen=True)


def test_moments(without_jit, rng):
    x = normal(rng, (7, 3, 5), np.float64)
    m = fastbn.Moments.of(x)
    np.testing.assert_allclose(m.mean, x.mean((0, 2)), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(m.variance(), x.var((0, 2)), rtol=1e-12)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="needs the kernels")
@pytest.mark.parametrize("kind", [np.uint16, np.int16], ids=["float16", "bfloat16"])
def test_half_types_are_decoded_and_rounded_as_the_kernels_do(kind, rng):
    """Every one of the 65536 codes, through inference with a scale that has to round."""
    codes = np.arange(1 << 16, dtype=np.uint16).view(kind)
    one, stats = np.ones(1, np.float32), np.array([0.0, 0.75, 1.0])
    got, want = np.empty_like(codes), np.empty_like(codes)
    fallback.infer(codes, None, got, one, np.zeros(1, np.float32), stats, (1, 1, 1 << 16), None)
    launch.infer(codes, None, want, one, np.zeros(1, np.float32), stats, (1, 1, 1 << 16), None)
    exponent = {np.uint16: 0x7C00, np.int16: 0x7F80}[kind]
    nan = (codes.view(np.uint16) & 0x7FFF) > exponent
    assert same_bits(got[~nan], want[~nan])
    assert ((got.view(np.uint16)[nan] & 0x7FFF) > exponent).all()


def test_a_process_without_the_jit(python):
    """The real switch, in a process of its own, over a small set."""
    code = """
import numpy as np, numba, fastbn
assert numba.config.DISABLE_JIT
from fastbn import dispatch
from fastbn.cpu import fallback
assert dispatch.kernels() is fallback
from tests.oracle import case, check_backward, check_infer, check_train
from tests.tolerances import DTYPES, arithmetic
rng = np.random.default_rng(0)
for dtype in DTYPES:
    c = case(rng, (5, 3, 7), dtype, activation="relu", residual=True)
    y, saved = check_train(c)
    check_backward(c, saved, rng.standard_normal((5, 3, 7)).astype(dtype))
    check_infer(c, np.zeros(3, arithmetic(dtype)), np.ones(3, arithmetic(dtype)))
bn = fastbn.BatchNorm(3)
bn.eval()(bn(np.ones((4, 3, 2), np.float32)))
assert fastbn.Moments.of(np.ones((4, 3))).count == 4
try:
    fastbn.batch_norm_train(np.ones((1, 3)))
except ValueError as error:
    print(error)
"""
    result = python(code, NUMBA_DISABLE_JIT=1, PYTHONPATH=os.pathsep.join(sys.path))
    assert result.stdout.startswith("x: expected more than 1 value per channel")
