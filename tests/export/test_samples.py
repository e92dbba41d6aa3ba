"""Made-up inputs fit the declared types and shapes; one name is one size."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export.samples import given, guesses, read_npz, required_inputs
from fastbn_export.verify import verify
from onnx import TensorProto, helper

from .onnx_models import graph, value


def model(*inputs, constants=()):
    return graph([helper.make_node("Identity", [inputs[0].name], ["y"])], list(inputs), [value("y")], constants)


def test_one_name_one_size_and_different_names_different_sizes():
    a, b = value("a", shape=["batch", "time", "time", 4]), value("b", shape=["batch", "other", None])
    (first, *_) = guesses(model(a, b), 2, 0)
    assert len(first) == 2
    for feeds in first:
        assert feeds["a"].shape[0] == feeds["b"].shape[0]
        assert feeds["a"].shape[1] == feeds["a"].shape[2] != feeds["b"].shape[1]
        assert feeds["a"].shape[3] == 4
    assert not np.array_equal(first[0]["a"], first[1]["a"])
    again = next(guesses(model(a, b), 2, 0))
    assert np.array_equal(first[1]["b"], again[1]["b"])


KINDS = ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT64", "INT8", "UINT8", "BOOL", "STRING", "COMPLEX64"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind):
    code = getattr(TensorProto, kind)
    (feeds,) = next(guesses(model(value("x", code, [5])), 1, 0))
    assert feeds["x"].shape == (5,)
    assert feeds["x"].dtype == helper.tensor_dtype_to_np_dtype(code)


def test_overridable_initialisers_are_not_asked_for():
    x, w = value("x", shape=[2]), value("w", shape=[2])
    assert [v.name for v in required_inputs(model(x, w, constants=[("w", np.ones(2, np.float32))]))] == ["x"]


def test_absurd_sizes_are_refused():
    with pytest.raises(ValueError, match="at most"):
        next(guesses(model(value("x", shape=[10**6, 10**6])), 1, 0))


def test_a_sequence_must_be_given():
    x = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    with pytest.raises(TypeError, match="others: inputs="):
        next(guesses(model(x), 1, 0))
    nodes = [helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0)]
    concat = graph(nodes, [x], [value("y", shape=None)])
    assert verify(concat, concat, inputs={"x": [np.ones(2, np.float32), np.zeros(1, np.float32)]}).ok


def test_given_inputs_are_cast_only_within_their_kind():
    m = model(value("x", shape=[None, 2]))
    (feeds,) = given(m, {"x": [[1.0, 2.0]]})
    assert feeds["x"].dtype == np.float32
    for wrong, error in (({"x": [["a", "b"]]}, TypeError), ({"x": [1.0, 2.0]}, ValueError), (["x"], TypeError)):
        with pytest.raises(error, match="expected"):
            given(m, wrong)


def test_sizes_that_only_some_models_take():
    """Two strided convolutions and a sum demand multiples of 4: the first guess fails, a later one fits."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("ReduceSum", ["r"], ["y"], keepdims=0),
    ]
    shape = np.array([-1, 32], np.int64)
    m = graph(nodes, [value("x", shape=["n"])], [value("y", shape=None)], [("shape", shape)])
    assert not verify(m, m).ok, "no guess for a first axis is a multiple of 32"
    m = graph(nodes, [value("x", shape=[1, "n"])], [value("y", shape=None)], [("shape", shape)])
    report = verify(m, m)
    assert report.ok and report.inputs["x"] == "float32[1, 32]"


def test_negative_sizes_are_unknown_ones():
    x = value("x", shape=[-1, 4, -1])
    ((feeds,), *_) = guesses(model(x), 1, 0)
    assert feeds["x"].shape[1] == 4 and min(feeds["x"].shape) > 0
    assert given(model(x), {"x": np.ones((2, 4, 3), np.float32)})[0]["x"].shape == (2, 4, 3)
    with pytest.raises(ValueError, match=r"x: expected shape \[None, 4, None\], got \[2, 3, 3\]"):
        given(model(x), {"x": np.ones((2, 3, 3), np.float32)})


@pytest.mark.parametrize("none", [[], (), iter([])])
def test_no_samples_are_refused(none):
    with pytest.raises(ValueError, match="inputs: expected at least one sample, got none"):
        given(model(value("x", shape=[2])), none)


def test_inputs_of_another_type():
    with pytest.raises(TypeError, match="inputs: expected a mapping"):
        given(model(value("x", shape=[2])), 5)


def test_npz_of_one_array(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(2))
    with pytest.raises(ValueError, match="npz"):
        read_npz(tmp_path / "a.npy")
