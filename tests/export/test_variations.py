"""Other sizes and other optional inputs, as far as the model takes them; the number of samples stays."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export.samples import guesses
from fastbn_export.variations import overridden, resized, vary
from onnx import TensorProto, helper

from .onnx_models import graph, value


def model(*inputs, constants=()):
    return graph([helper.make_node("Identity", [inputs[0].name], ["y"])], list(inputs), [value("y")], constants)


def tries(m, sample):
    return list(resized(m, sample, np.random.default_rng(0)))


def test_the_batch_is_another_in_every_try_that_comes_first():
    m = model(value("x", shape=["n", 3, "h", "w"]), value("i", TensorProto.INT64, ["n", "h"]))
    sample = next(guesses(m, 1, 0))[0]
    first, *rest = tries(m, sample)
    assert first["x"].shape == (1, 3, 8, 9) and first["i"].shape == (1, 8)
    assert first["i"].dtype == np.int64 and set(first["i"].flat) <= set(sample["i"].flat)
    assert [t["x"].shape for t in rest] == [(1, 3, 32, 36), (1, 3, 16, 18), (3, 3, 8, 9), (3, 3, 32, 36)]


def test_fixed_sizes_stay():
    m = model(value("x", shape=[2, 3]))
    assert tries(m, {"x": np.ones((2, 3), np.float32)}) == []
    m = model(value("x", shape=["n", 3]), value("s", TensorProto.FLOAT, []))
    sample = {"x": np.ones((3, 3), np.float32), "s": np.float32(2) * np.ones((), np.float32)}
    (only,) = tries(m, sample)
    assert only["x"].shape == (1, 3) and only["s"] is sample["s"]


def test_large_samples_do_not_grow():
    m = model(value("x", shape=["n", 3, "h", "w"]))
    (*shapes,) = (t["x"].shape for t in tries(m, {"x": np.ones((1, 3, 224, 224), np.float32)}))
    assert shapes == [(2, 3, 112, 112), (2, 3, 224, 224), (1, 3, 112, 112)]


@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_as_many_samples_and_the_first_as_it_was(samples):
    m = model(value("x", shape=["n", 2]), value("w", shape=[2]), constants=[("w", np.ones(2, np.float32))])
    feeds = next(guesses(m, samples, 0))
    varied, outputs = vary(m, feeds, [None] * samples, lambda feed: [feed], 0)
    assert len(varied) == len(outputs) == samples and varied[0] is feeds[0]
    assert {feed["x"].shape for feed in varied} == ({(3, 2), (1, 2)} if samples > 1 else {(3, 2)})
    assert sum("w" in feed for feed in varied) == (samples > 1)
    assert all(made is None or made[0] is feed for feed, made in zip(varied, outputs, strict=True))
    refused, _ = vary(m, feeds, [None] * samples, lambda feed: None, 0)
    assert all(a is b for a, b in zip(refused, feeds, strict=True))


def override(m, sample, accepts=lambda feed: True):
    return overridden(m, sample, lambda feed: [feed] if accepts(feed) else None, np.random.default_rng(0))


def test_floats_are_moved_and_stay_positive():
    variance = np.array([1e-3, 2.0, 0.0], np.float32)
    m = model(value("x", shape=[2]), value("v", shape=[3]), constants=[("v", variance)])
    feed, _ = override(m, {"x": np.ones(2, np.float32)})
    assert feed["v"].dtype == np.float32 and (feed["v"] > 0).all() and (feed["v"] != variance).all()
    assert override(m, {"x": np.ones(2, np.float32)}, lambda feed: False) is None
    assert override(model(value("x", shape=[2])), {"x": np.ones(2, np.float32)}) is None


def test_integers_one_by_one_until_one_is_taken():
    constants = [("shape", np.array([-1, 6, 8])), ("flag", np.array(True))]
    m = model(value("x", shape=[2]), value("shape", TensorProto.INT64, [3]), value("flag", TensorProto.BOOL, []),
              constants=constants)  # fmt: skip
    feed, _ = override(m, {"x": np.ones(2)}, lambda feed: feed.get("shape", [0, 6])[1] == 6 and "x" in feed)
    assert feed["shape"].tolist() == [8, 6, -1] and feed["flag"] == np.array(False)
    feed, _ = override(m, {"x": np.ones(2)}, lambda feed: feed.get("shape", np.array([-1]))[0] == -1)
    assert feed["shape"].tolist() == [-1, 6, 4]


def test_outputs_stay_about_as_large():
    """A tolerance is relative to the largest output of all samples."""
    weight = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    weight[:32] = 0
    m = model(value("x", shape=[2]), value("w", shape=[64, 64]), constants=[("w", weight)])
    moved = override(m, {"x": np.ones(2, np.float32)})[0]["w"]
    assert 0.9 < np.linalg.norm(moved) / np.linalg.norm(weight) < 1.1
    assert abs(moved.mean() - weight.mean()) < 0.01 and (moved[:32] != 0).all()


def test_tries_are_few():
    """However many integers a model takes, or refuses."""
    names = [f"i{i}" for i in range(30)]
    inputs = [value(name, TensorProto.INT64, [5]) for name in names]
    m = model(value("x", shape=[2]), *inputs, constants=[(name, np.arange(5)) for name in names])
    for taken in (True, False):
        tries = []
        override(m, {"x": np.ones(2, np.float32)}, lambda feed, tries=tries, taken=taken: tries.append(feed) or taken)
        assert len(tries) == 12


def test_an_optional_input_of_dynamic_size():
    """It has the batch of the sample, and another length than its default if the model takes one."""
    default = np.ones((2, 6, 4), np.float32)
    m = model(value("x", shape=["n", 2]), value("z", shape=["n", 6, "t"]), constants=[("z", default)])
    sample = {"x": np.ones((3, 2), np.float32)}
    assert override(m, sample)[0]["z"].shape == (3, 6, 2)
    assert override(m, sample, lambda feed: feed["z"].shape[2] == 4)[0]["z"].shape == (3, 6, 4)
