"""A wrong fold among right ones is found, undone and reported; the rest stands."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export import checked
from fastbn_export.build import build
from fastbn_export.checked import fold_checked
from fastbn_export.fold import FoldResult, fold
from fastbn_export.layers import Linear, Sigmoid
from fastbn_export.truth import Truth
from fastbn_export.verdict import OutputReport, VerifyReport
from fastbn_export.verify import Checker
from onnx import helper, numpy_helper

from .onnx_models import corrupt
from .plain_fold import norm

LAYERS = 5


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    layers = []
    for _ in range(LAYERS):
        weight = rng.normal(size=(6, 6)).astype(np.float32) / 2
        layers += [Linear(weight), norm(rng, 6), Sigmoid()]
    return build(layers, (None, 6), fold=False)


def name_of(index):
    return f"layers[{3 * index + 1}].BatchNormalization"


def wrong_at(*indices):
    """Return a fold that corrupts what it folds at these places."""

    def broken(model, skip=()):
        result = fold(model, skip=skip)
        folded = result.model
        for index in indices:
            if name_of(index) not in skip:
                before = {t.name for t in folded.graph.initializer}
                gemm = next(n for n in folded.graph.node if n.name == f"layers[{3 * index}].Gemm")
                assert gemm.input[1] in before
                folded = corrupt(folded, lambda a: a * 1.01, gemm.input[1])
        return FoldResult(folded, result.report)

    return broken


def check(network, folder, **options):
    with Checker(network, **options) as checker:
        return fold_checked(network, checker, folder)


def test_right_folds_stand(network):
    result = check(network, fold)
    assert result.verdict.ok and not result.undone and result.report.folded == LAYERS


@pytest.mark.parametrize("wrong", [(0,), (2,), (4,), (1, 3)])
def test_wrong_folds_are_undone_and_the_rest_stands(network, wrong):
    result = check(network, wrong_at(*wrong))
    assert result.verdict.ok
    assert sorted(result.undone) == sorted(name_of(index) for index in wrong)
    assert result.report.folded == LAYERS - len(wrong)
    reasons = {e.name: e.reason for e in result.report.entries if not e.folded}
    assert set(reasons) == set(result.undone)
    assert all("undone" in reason and "output" in reason for reason in reasons.values())
    assert sum(n.op_type == "BatchNormalization" for n in result.model.graph.node) == len(wrong)
    assert result.to_dict()["undone"] == result.undone


def test_a_tolerance_nobody_can_meet_blames_no_fold_wrongly(network):
    result = check(network, fold, rtol=0.0, atol=0.0)
    assert not result.verdict.ok or not result.report.folded


def test_a_model_that_disagrees_with_itself_blames_nobody(network):
    class NeverSure:
        calls = 0

        def check(self, candidate):
            self.calls += 1
            return VerifyReport(False, notes=["it draws random numbers"])

    checker = NeverSure()
    result = fold_checked(network, checker, fold)
    assert not result.verdict.ok and not result.undone and checker.calls == 2


class Fake:
    """A checker that accepts the model itself and folds of nobody, and says how often and how it was asked."""

    def __init__(self, same_in_float64):
        self.asked = []
        wrong = OutputReport("y", "float32", 1, 1, 0, 1, 0, False, "off", same_in_float64)
        self.no = VerifyReport(False, [wrong])

    def check(self, candidate, in_float64=True):
        self.asked.append(in_float64)
        is_folded = isinstance(candidate, FoldResult) and candidate.report.folded > 0
        return self.no if is_folded else VerifyReport(True)


@pytest.mark.parametrize("same", [True, False])
def test_the_search_ends_after_so_many_checks_and_says_so(network, same, monkeypatch):
    monkeypatch.setattr(checked, "_MOST_CHECKS", 5)
    checker = Fake(same)
    result = fold_checked(network, checker, fold)
    assert not result.verdict.ok and result.undone == [name_of(0)]
    assert any("ended after 5 checks, 1 undone" in note for note in result.verdict.notes)
    # all, none, three to the first culprit, all but that, and two more; float64 only where it was what failed
    assert len(checker.asked) == 3 + 5
    assert checker.asked.count(False) == (5 if same else 0)


def test_a_fold_that_loses_precision_is_found_without_float64(network, monkeypatch):
    """The third layer's sum goes up by a million and down again: right, but for the bits that are lost on the way."""

    def lossy(model, skip=()):
        result = fold(model, skip=skip)
        made = result.model
        if name_of(2) not in skip:
            gemm = next(n for n in made.graph.node if n.name == "layers[6].Gemm")
            made = corrupt(made, lambda a: a + 2.0**20, gemm.input[2])
            gemm = next(n for n in made.graph.node if n.name == "layers[6].Gemm")
            made.graph.initializer.append(numpy_helper.from_array(np.float32([2.0**20]), "million"))
            back = helper.make_node("Sub", ["up", "million"], [gemm.output[0]])
            gemm.output[0] = "up"
            made.graph.node.insert(list(made.graph.node).index(gemm) + 1, back)
        return FoldResult(made, result.report)

    asked = []
    compare = Truth.compare
    monkeypatch.setattr(Truth, "compare", lambda *a: (asked.append(1), compare(*a))[1])
    result = check(network, lossy)
    assert result.verdict.ok and result.undone == [name_of(2)]
    assert len(asked) == 3  # all folded, none folded, all but the culprit
