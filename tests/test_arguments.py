"""Bad input to every public function: a clear error that names the argument, and nothing written."""

from __future__ import annotations

import re
import sys
import types
from fractions import Fraction

import numpy as np
import pytest

import fastbn
from fastbn import ArgumentTypeError, ArgumentValueError, DeviceError, arguments
from tests.tolerances import BF16

SHAPE = (4, 3, 5)
F32, F64 = np.float32, np.float64


def array(shape=SHAPE, dtype=F32):
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def vector(n=3, dtype=F32):
    return np.linspace(0.5, 1.5, n).astype(dtype)


def read_only(x):
    x.flags.writeable = False
    return x


class OnDevice:
    __cuda_array_interface__ = {"shape": (4, 3), "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


# What no tensor argument may be: (value, error, what the message says it got).
NOT_TENSORS = {
    "list": ([[1.0, 2.0, 3.0]], TypeError, "list"),
    "scalar": (3.0, TypeError, "float"),
    "none": (None, TypeError, "NoneType"),
    "int": (array().astype(np.int64), TypeError, "int64"),
    "bool": (array() > 0, TypeError, "bool"),
    "complex": (array().astype(np.complex64), TypeError, "complex64"),
    "object": (array().astype(object), TypeError, "object"),
    "text": (array().astype(str), TypeError, "<U"),
    "big-endian": (array().astype(">f4"), TypeError, ">f4"),
    "big-endian half": (array().astype(">f2"), TypeError, ">f2"),
    "longdouble": (array().astype(np.longdouble), TypeError, ""),
    "record": (np.zeros(SHAPE, [("a", "f4")]), TypeError, ""),
    "masked": (np.ma.masked_invalid(array()), TypeError, "a masked array"),
    "0-d": (np.array(1.0, F32), ValueError, "shape ()"),
    "1-d": (vector(), ValueError, "shape (3,)"),
    "cuda": (OnDevice(), DeviceError, "a CUDA array"),
}
# What no parameter of three channels in float32 may be.
NOT_PARAMETERS = {
    "short": (vector(2), ValueError, "shape (2,)"),
    "long": (vector(4), ValueError, "shape (4,)"),
    "scalar": (1.0, ValueError, "shape ()"),
    "matrix": (vector().reshape(3, 1), ValueError, "shape (3, 1)"),
    "float64": (vector(dtype=F64), TypeError, "float64"),
    "float16": (vector(dtype=np.float16), TypeError, "float16"),
    "int": (np.arange(3), TypeError, "int64"),
    "complex": (vector().astype(np.complex64), TypeError, "complex64"),
    "object": (vector().astype(object), TypeError, "object"),
    "big-endian": (vector().astype(">f4"), TypeError, ">f4"),
    "text": ("abc", ValueError, "shape ()"),
    "list of text": (["a", "b", "c"], TypeError, "<U1"),
    "ragged": ([[1.0], [1.0, 2.0], 3.0], TypeError, "list"),
    "masked": (np.ma.masked_equal(vector(), 1.0), TypeError, "a masked array"),
}
NUMBERS = {
    "nan": (np.nan, ValueError, "nan"),
    "inf": (np.inf, ValueError, "inf"),
    "text": ("0.1", TypeError, "str"),
    "bool": (True, TypeError, "bool"),
    "array": (np.ones(2), TypeError, "ndarray"),
    "complex": (1j, TypeError, "complex"),
    "huge": (10**400, ValueError, "an int beyond float64"),
}
EPS = NUMBERS | {"negative": (-1e-5, ValueError, "-1e-05"), "none": (None, TypeError, "NoneType")}
AXES = {
    "high": (3, ValueError, "3"),
    "low": (-4, ValueError, "-4"),
    "float": (1.0, TypeError, "float"),
    "none": (None, TypeError, "NoneType"),
    "text": ("1", TypeError, "str"),
    "tuple": ((1,), TypeError, "tuple"),
    "bool": (True, TypeError, "bool"),
}
OTHER_TENSORS = NOT_TENSORS | {
    "other shape": (array((4, 3, 6)), ValueError, "(4, 3, 6)"),
    "broadcastable": (array((1, 3, 5)), ValueError, "(1, 3, 5)"),
    "float64": (array(dtype=F64), TypeError, "float64"),
}
OUTPUTS = OTHER_TENSORS | {
    "read-only": (read_only(array()), ValueError, "a read-only one"),
    "gaps": (array((4, 3, 10))[:, :, ::2], ValueError, "strides"),
    "backwards": (array()[::-1], ValueError, "strides"),
    "broadcast": (np.lib.stride_tricks.as_strided(array(), SHAPE, (12, 4, 0)), ValueError, "strides"),
    "unaligned": (np.zeros(241, np.uint8)[1:].view(F32).reshape(SHAPE), ValueError, "an unaligned one"),
    "subclass": (array().view(type("Sub", (np.ndarray,), {})), TypeError, "Sub"),
    "masked": (np.ma.masked_invalid(array()), TypeError, "MaskedArray"),
    "cuda": (OnDevice(), TypeError, "OnDevice"),
}
ACTIVATIONS = {
    "unknown": ("gelu", ValueError, "'gelu'"),
    "case": ("ReLU", ValueError, "'ReLU'"),
    "callable": (np.tanh, ValueError, "tanh"),
    "bool": (True, ValueError, "True"),
}
RUNNING = NOT_PARAMETERS | {
    "scalar": (1.0, TypeError, "float"),
    "text": ("abc", TypeError, "str"),
    "list": ([0.0, 0.0, 0.0], TypeError, "list"),
    "list of text": (["a", "b", "c"], TypeError, "list"),
    "read-only": (read_only(vector()), ValueError, "a read-only one"),
    "alone": (None, ValueError, "None"),
}
MASKS = {
    "float": (np.ones((4, 5), F32), TypeError, "float32"),
    "int": (np.ones((4, 5), int), TypeError, "int64"),
    "shape": (np.ones((4, 4), bool), ValueError, "(4, 4)"),
    "shape of x": (np.ones(SHAPE, bool), ValueError, "(4, 3, 5)"),
    "ragged": ([[True], [True, False]], TypeError, "list"),
    "masked": (np.ma.masked_equal(np.ones((4, 5)), 0) > 0, TypeError, "a masked array"),
    "cuda": (OnDevice(), DeviceError, "a CUDA array"),
}


def optional(table):
    return {key: row for key, row in table.items() if row[0] is not None}


TRAIN = {
    "x": NOT_TENSORS, "weight": NOT_PARAMETERS, "bias": NOT_PARAMETERS, "running_mean": RUNNING,
    "running_var": RUNNING, "momentum": NUMBERS | {"none": (None, TypeError, "NoneType")},
    "eps": EPS | {"zero": (0.0, ValueError, "0.0")}, "axis": AXES, "activation": ACTIVATIONS,
    "residual": optional(OTHER_TENSORS), "mask": MASKS, "out": optional(OUTPUTS),
}  # fmt: skip
INFER = {
    "x": NOT_TENSORS, "weight": NOT_PARAMETERS, "bias": NOT_PARAMETERS,
    "running_mean": NOT_PARAMETERS | {"none": (None, ValueError, "shape ()")},
    "running_var": NOT_PARAMETERS | {"none": (None, ValueError, "shape ()")},
    "eps": EPS, "axis": AXES, "activation": ACTIVATIONS, "residual": optional(OTHER_TENSORS), "out": optional(OUTPUTS),
}  # fmt: skip


def rows(tables):
    return [
        pytest.param(name, *row, id=f"{name}: {key}") for name, table in tables.items() for key, row in table.items()
    ]


def refused(name, error, got):
    """Expect an error of the family that reads ``name: expected ..., got ...``."""
    kind = error if error is DeviceError else {ValueError: ArgumentValueError, TypeError: ArgumentTypeError}[error]
    return pytest.raises(kind, match=rf"^{name}: expected .+, got .*{re.escape(got)}")


@pytest.mark.parametrize(("name", "value", "error", "got"), rows(TRAIN))
def test_train_refuses_and_writes_nothing(name, value, error, got):
    good = {
        "x": array(), "weight": vector(), "bias": vector(), "running_mean": vector(), "running_var": vector(),
        "residual": array(), "out": np.full(SHAPE, 7.0, F32),
    }  # fmt: skip
    before = {key: v.copy() for key, v in good.items()}
    with refused(name, error, got):
        fastbn.batch_norm_train(**(good | {name: value}))
    assert all(np.array_equal(good[key], before[key]) for key in good)


@pytest.mark.parametrize(("name", "value", "error", "got"), rows(INFER))
def test_infer_refuses_and_writes_nothing(name, value, error, got):
    good = {
        "x": array(), "running_mean": vector(), "running_var": vector(), "weight": vector(), "bias": vector(),
        "residual": array(), "out": np.full(SHAPE, 7.0, F32),
    }  # fmt: skip
    with refused(name, error, got):
        fastbn.batch_norm_infer(**(good | {name: value}))
    assert (good["out"] == 7.0).all() and np.array_equal(good["residual"], array())


@pytest.mark.parametrize(
    ("name", "value", "error", "got"), rows({"grad_output": OTHER_TENSORS, "out": optional(OUTPUTS)})
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_refuses_and_writes_nothing(activation, name, value, error, got):
    _, saved = fastbn.batch_norm_train(array(), activation=activation, residual=array())
    good = {"grad_output": array(), "out": np.full(SHAPE, 7.0, F32)}
    with refused(name, error, got):
        fastbn.backward(**(good | {name: value}), saved=saved)
    assert (good["out"] == 7.0).all()


@pytest.mark.parametrize("saved", [None, (), "saved", array()], ids=["none", "tuple", "text", "array"])
def test_backward_needs_what_forward_returned(saved):
    with refused("saved", TypeError, ""):
        fastbn.backward(array(), saved)


@pytest.mark.parametrize(("name", "value", "error", "got"), rows({"x": NOT_TENSORS, "axis": AXES, "mask": MASKS}))
def test_moments_refuse(name, value, error, got):
    with refused(name, error, got):
        fastbn.Moments.of(**({"x": array()} | {name: value}))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)], ids=str)
def test_one_value_per_channel(shape):
    running, out = vector(), np.full(shape, 7.0, F32)
    with refused("x", ValueError, f"shape {shape}"):
        fastbn.batch_norm_train(array(shape), running_mean=running, running_var=running.copy(), out=out)
    assert np.array_equal(running, vector()) and (out == 7.0).all()
    assert fastbn.batch_norm_infer(array(shape), vector(), vector()).shape == shape


def test_one_valid_value_per_channel_under_a_mask():
    mask = np.zeros((4, 5), bool)
    mask[2, 1] = True
    with refused("x", ValueError, ""):
        fastbn.batch_norm_train(array(), mask=mask)


@pytest.mark.parametrize("function", [fastbn.batch_norm_train, fastbn.batch_norm_infer])
def test_float64_with_float32_parameters(function):
    for name in ("running_mean", "running_var", "weight", "bias"):
        good = {"x": array(dtype=F64), "running_mean": vector(dtype=F64), "running_var": vector(dtype=F64)}
        with refused(name, TypeError, "float32"):
            function(**(good | {name: vector()}))


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_half_parameters_for_half_data(dtype):
    with refused("weight", TypeError, np.dtype(dtype).name):
        fastbn.batch_norm_train(array(dtype=dtype), vector(dtype=dtype))


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0)], ids=str)
def test_empty_batches_are_checked_like_others(shape):
    x = np.empty(shape, F32)
    for value in (np.empty((0, 4), F32), np.empty(shape, F64), "out"):
        with pytest.raises((ArgumentValueError, ArgumentTypeError), match=r"^out: expected"):
            fastbn.batch_norm_infer(x, vector(), vector(), out=value)
        with pytest.raises((ArgumentValueError, ArgumentTypeError), match=r"^out: expected"):
            fastbn.batch_norm_train(x, out=value)


def test_torch_tensors_are_named_without_importing_torch(monkeypatch):
    class Tensor:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(Tensor=Tensor))
    for call in (
        lambda: arguments.tensor("x", Tensor()),
        lambda: arguments.parameter("x", Tensor(), 3, np.dtype(F32)),
    ):
        with refused("x", TypeError, "a torch.Tensor"):
            call()


def test_numbers_of_every_kind_are_numbers():
    for value in (1, 0.5, np.float32(0.5), np.int8(1), Fraction(1, 2)):
        assert arguments.number("n", value) == float(value)


def test_subclasses_without_meaning_are_plain_arrays(tmp_path):
    x = array()
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", F32, "r", shape=SHAPE)
    want, _ = fastbn.batch_norm_train(x, vector())
    got, _ = fastbn.batch_norm_train(mapped, read_only(vector()))
    assert type(got) is np.ndarray and np.array_equal(got, want)


def test_parameters_come_as_kernels_like_them():
    for given in (read_only(vector()), vector(6)[::2], np.broadcast_to(F32(2), 3)):
        got = arguments.parameter("weight", given, 3, np.dtype(F32))
        assert got.flags.carray and np.array_equal(got, given)
    kept = vector()
    assert arguments.parameter("weight", kept, 3, np.dtype(F32)) is kept
