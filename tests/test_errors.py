"""Every error is a FastbnError and a built-in one, names its argument, and survives pickling."""

from __future__ import annotations

import pickle

import pytest

import fastbn
from fastbn import errors


@pytest.mark.parametrize(
    ("error", "family"),
    [
        (errors.ArgumentValueError("x", "a thing", "another"), ValueError),
        (errors.ArgumentTypeError("x", "a thing", "another"), TypeError),
    ],
)
def test_families(error, family):
    assert isinstance(error, errors.FastbnError) and isinstance(error, family)
    assert str(error) == "x: expected a thing, got another" and error.name == "x"


def test_device_error():
    assert issubclass(errors.DeviceError, errors.FastbnError) and issubclass(errors.DeviceError, RuntimeError)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_are_public(name):
    assert getattr(fastbn, name) is getattr(errors, name)


@pytest.mark.parametrize("kind", [errors.ArgumentValueError, errors.ArgumentTypeError])
def test_errors_travel_between_processes(kind):
    copy = pickle.loads(pickle.dumps(kind("eps", "a number > 0", -1)))
    assert type(copy) is kind and str(copy) == "eps: expected a number > 0, got -1" and copy.name == "eps"
