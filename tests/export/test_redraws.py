"""An unlucky rounding is no wrong fold: the original's errors are drawn again; one that loses precision still fails."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from fastbn_export import redraws
from fastbn_export.build import build
from fastbn_export.compare import Tolerance
from fastbn_export.float64 import lift
from fastbn_export.judge import Judge
from fastbn_export.layers import Linear, ReLU
from fastbn_export.redraws import REDRAWS, Redraws
from fastbn_export.verify import Checker, verify
from fastbn_export.worker import Worker
from onnx import helper

from .onnx_models import corrupt, graph, initializers, value
from .plain_fold import folded, norm

TRUTH = np.linspace(-1, 1, 40).reshape(4, 10)


def judged(off, errors, theirs=TRUTH, user=None):
    """Judge a candidate off by ``off``, the original being off by the first of ``errors`` and, redrawn, by the rest."""
    own, *others = [(TRUTH + e).astype(np.float32) for e in errors]
    read = []

    def draws():
        for other in others:
            read.append(other)
            yield [other]

    judge = Judge("float32", False, user)
    have = [(TRUTH + off).astype(np.float32)]
    return judge.output("y", [own], have, [TRUTH], [theirs], [], draws()), len(read)


@pytest.mark.parametrize(
    ("off", "errors", "ok", "read"),
    [
        (1e-5, [1e-6, 1e-2], True, 0),  # within what float32 allows
        (3e-3, [1e-3, 1e-2], True, 0),  # within 4 times the original's own error
        (7e-3, [1e-3, 1e-3, 3e-3, 1e-2], True, 2),  # an unlucky draw: no more of them than needed
        (9e-3, [1e-3, 1e-3, 1e-3], False, 2),  # truly worse
    ],
)
def test_the_largest_of_the_originals_errors_counts(off, errors, ok, read):
    report, asked = judged(off, errors)
    assert report.ok == ok and asked == read and report.same_in_float64


def test_nothing_is_drawn_for_what_is_wrong_in_float64_or_judged_by_the_user():
    report, asked = judged(9e-3, [1e-3, 1e-2], theirs=TRUTH + 9e-3)
    assert not report.ok and asked == 0 and report.same_in_float64 is False
    report, asked = judged(9e-3, [1e-3, 1e-2], user=Tolerance(0, 5e-3))
    assert not report.ok and asked == 0


def unstable(seed, depth=40, width=24):
    """Return a net and its fold by hand, whose normalizations amplify errors by 1.2 at every layer, as deep ones do."""
    rng = np.random.default_rng(seed)
    batch, layers, by_hand = rng.normal(size=(64, width)), [], []
    for _ in range(depth):
        linear = Linear((rng.normal(size=(width, width)) / np.sqrt(width)).astype(np.float32))
        bn = norm(rng, width)
        h = batch @ np.asarray(linear.weight).T
        bn.running_mean[:], bn.running_var[:] = h.mean(0), h.var(0)
        batch = np.maximum((h - h.mean(0)) / np.sqrt(h.var(0) + bn.eps) * bn.weight + bn.bias, 0)
        layers += [linear, bn, ReLU()]
        by_hand += [folded(linear, bn), ReLU()]
    last = Linear(rng.normal(size=(1, width)).astype(np.float32))
    return [build([*part, last], (None, width), fold=False) for part in (layers, by_hand)]


def outputs_of(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": row[None]})[0][0] for row in x])


def test_an_original_that_was_lucky_condemns_no_right_fold(monkeypatch):
    """Its error on one input in six is less than a quarter of the fold's, on any machine; those are looked for."""
    original, right = unstable(0)
    x = np.random.default_rng(1).normal(size=(800, 24)).astype(np.float32)
    truth = outputs_of(lift(original), x.astype(np.float64))
    own, have = (np.abs(outputs_of(model, x) - truth) for model in (original, right))
    unlucky = np.flatnonzero(have > 5 * own + 2e-4 * np.abs(truth))[:5]
    assert len(unlucky) == 5
    feeds = [{"input": x[i : i + 1]} for i in unlucky]
    for feed in feeds:
        report = verify(original, right, inputs=feed)
        assert report.ok, str(report)
    monkeypatch.setattr(redraws, "REDRAWS", 0)
    assert any(not verify(original, right, inputs=feed).ok for feed in feeds)


def test_redraws_are_as_far_from_each_other_as_rounding_takes_them():
    original, right = unstable(0)
    with Checker(original, samples=1) as checker:
        assert checker.check(right).ok
        scale = max(float(np.abs(own[0]).max()) for own in checker.own)
        outputs = [rows[0][0] for rows in checker.redraws.rows(checker.feeds)]
        assert len(outputs) == REDRAWS and len({a.tobytes() for a in outputs}) == REDRAWS
        errors = [float(np.abs(a - checker.own[0][0]).max()) / scale for a in outputs]
        own = checker.check(right).outputs[0].reference_abs / scale
        assert max(own, 1e-6) / 30 < max(errors) < 30 * max(own, 1e-6)


def test_right_folds_of_unstable_nets_pass_and_wrong_ones_do_not():
    for seed in range(2):
        original, right = unstable(seed)
        report = verify(original, right, samples=1)
        assert report.ok, str(report)
        wrong = corrupt(right, lambda a: a * 1.01, "[40].weight")
        assert not verify(original, wrong, samples=1).ok


def test_the_original_is_redrawn_once_for_all_candidates(monkeypatch):
    original, lossy = centred()
    loads = []
    load = Worker.load
    monkeypatch.setattr(Worker, "load", lambda self, key, *a, **k: (loads.append(key), load(self, key, *a, **k))[1])
    with Checker(original, inputs={"x": DATA}) as checker:
        assert checker.check(original).ok and loads.count("moved") == 0
        for _ in range(2):
            assert not checker.check(lossy).ok and loads.count("moved") == REDRAWS


def test_a_model_that_cannot_be_redrawn_is_judged_by_its_own_error():
    with Worker(30) as worker:
        assert list(Redraws(worker).rows([])) == []  # it has no reference


DATA = (1e4 + np.random.default_rng(0).integers(-2048, 2048, size=(8, 16)) / 1024).astype(np.float32)


def centred():
    """Return a model that subtracts a large mean exactly, and one that does so behind the product: right, and worse."""
    rng = np.random.default_rng(0)
    weight, mean = rng.normal(size=(16, 4)).astype(np.float32), np.full(16, 1e4, np.float32)
    io = [value("x", shape=["n", 16])], [value("y", shape=["n", 4])]
    nodes = [helper.make_node("Sub", ["x", "mean"], ["c"]), helper.make_node("MatMul", ["c", "weight"], ["y"])]
    original = graph(nodes, *io, [("mean", mean), ("weight", weight)])
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["p"]), helper.make_node("Sub", ["p", "shift"], ["y"])]
    shift = (mean.astype(np.float64) @ weight).astype(np.float32)
    return original, graph(nodes, *io, [("weight", weight), ("shift", shift)])


def fails_in_its_own_types_only(report):
    return not report.ok and report.only_rounding and all("in float64" not in o.reason for o in report.outputs)


def test_a_fold_that_cancels_where_the_original_does_not_fails():
    original, lossy = centred()
    assert fails_in_its_own_types_only(verify(original, lossy, inputs={"x": DATA}))


@pytest.mark.parametrize(("dtype", "exponents"), [(np.float32, (-141, 71, 70)), (np.float16, (-20, 10, 10))])
def test_a_fold_whose_weights_underflow_fails(dtype, exponents):
    """A Relu passes a scale, so that all is right but the few bits that subnormal weights keep."""
    rng = np.random.default_rng(0)
    weights = [(rng.normal(size=(16, 16)) / 4).astype(dtype) for _ in exponents]
    small = [np.ldexp(w, e).astype(dtype) for w, e in zip(weights, exponents, strict=True)]

    def net(matrices):
        first, second, third = map(Linear, matrices)
        return build([first, ReLU(), second, ReLU(), third], (None, 16), fold=False)

    original, lossy = net(weights), net(small)
    assert all(np.isfinite(a).all() for a in initializers(lossy).values())
    assert fails_in_its_own_types_only(verify(original, lossy))
