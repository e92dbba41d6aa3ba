"""The README's cases under pytest-benchmark; every call was compared with the float64 reference before it is timed."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import cases
from bench.peers import Unsupported
from bench.worker import prepare


@pytest.mark.parametrize("case", cases.quick(), ids=lambda case: case.id)
def test_batch_norm(benchmark: BenchmarkFixture, library: str, case: cases.Case) -> None:
    try:
        call, error = prepare(library, case)
    except Unsupported as reason:
        pytest.skip(f"{library}: no {reason}")
    benchmark.group = case.id
    benchmark.extra_info |= {"error": error, "floor_copies": case.floor, "bytes": case.nbytes}
    benchmark.pedantic(call, rounds=7, warmup_rounds=1)
