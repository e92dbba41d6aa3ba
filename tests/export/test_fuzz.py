"""Random models: valid, equal, idempotent, no exception; a few hundred here, as many as wanted by hand.

``python -m tests.export.test_fuzz 0 10000`` runs a range of seeds and prints what was folded.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter

import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from onnx.reference import ReferenceEvaluator

from .folding import feeds_for, run
from .fuzzing import random_model


def judge(seed, dtype):
    """Fold one random model and compare: float64 in the reference evaluator, float32 in onnxruntime."""
    model = random_model(seed, dtype)
    before, copies = model.SerializeToString(), seed % 3 == 0
    result = fold(model, duplicate=copies)
    assert model.SerializeToString() == before
    onnx.checker.check_model(result.model, full_check=True)
    assert fold(result.model, duplicate=copies).model.SerializeToString() == result.model.SerializeToString()
    assert copies or sum(result.report.ops_after.values()) <= sum(result.report.ops_before.values())
    assert [o.name for o in result.model.graph.output] == [o.name for o in model.graph.output]
    feeds = feeds_for(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype == np.float64:
            try:
                old = ReferenceEvaluator(model).run(None, feeds)
            except Exception:  # the evaluator of onnx 1.23 fails on some legal Reshapes
                return result.report
            new, limit = ReferenceEvaluator(result.model).run(None, feeds), 1e-9
        else:
            old, new, limit = run(model, feeds), run(result.model, feeds), 1e-3
    for a, b in zip(old, new, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0) <= limit * max(1.0, np.abs(a).max(initial=0)), seed
    return result.report


@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_random_models(dtype, block):
    total = Counter()
    for seed in range(20 * block, 20 * block + 20):
        report = judge(seed, dtype)
        total["folded"] += report.folded
    assert total["folded"] > 0


if __name__ == "__main__":
    totals = Counter()
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        for kind in (np.float64, np.float32):
            report = judge(number, kind)
            totals.update(models=1, folded=report.folded, left=report.left)
    print(dict(totals))
