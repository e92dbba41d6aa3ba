"""Constants of ``fastbn.cuda.tuning`` that only a measurement can decide: each beside its alternatives, on one case.

A trial takes a fraction of a second, so that the one run on a GPU says which constants to change. What an alternative
computes is checked as everything else is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from bench import gpu_peers as peers
from bench import gpu_timing as timing
from bench.gpu_cases import Case

LARGE, HALF, SMALL = (64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14)
MANY = 1 << 30  # channels: more than any tensor has
Trial = tuple[Case, str, tuple[Any, ...]]
# Most telling first: what no GPU has decided yet, then what might be otherwise on another one.
TRIALS: list[Trial] = [
    (Case("infer", "NHWC", "bfloat16", HALF), "FLAT", (False,)),
    (Case("infer", "NCHW", "float32", LARGE), "FLAT", (False,)),
    (Case("train", "NHWC", "float32", LARGE), "PERSISTENT_POOL", (0, 4)),
    (Case("backward", "NHWC", "float32", LARGE), "PERSISTENT_POOL", (0, 4)),
    (Case("train", "NHWC", "bfloat16", SMALL), "PERSISTENT_EARLY", (False,)),
    (Case("train", "NHWC", "bfloat16", SMALL), "PERSISTENT_POOL", (0, 2)),
    (Case("infer", "NHWC", "bfloat16", HALF), "FLAT_HALVES", (1,)),
    (Case("infer", "NHWC", "float32", HALF), "FLAT_COLUMNS", (2,)),
    (Case("infer", "NCHW", "float32", LARGE), "FLAT_DEPTH", (2,)),
    (Case("backward", "NCHW", "float32", LARGE), "GANG_FEW", (0,)),
    (Case("train", "NCHW", "float32", LARGE), "GANG_LAYERS", ((2,), (3,))),
    (Case("train", "NCHW", "float32", (64, 2048, 7, 7)), "BUNDLE", (False,)),
    (Case("backward", "NCHW", "bfloat16", SMALL), "BUNDLE", (False,)),
]


@contextlib.contextmanager
def changed(values: dict[str, Any]) -> Iterator[None]:
    """Use other constants for a while."""
    from fastbn.cuda import choice, gang_backward, persistent, tuning

    kept = {name: getattr(tuning, name) for name in values}

    def put(some: dict[str, Any]) -> None:
        for name, value in some.items():
            setattr(tuning, name, value)
        for kernels in (gang_backward.backward, persistent.train, persistent.backward):
            kernels.cache_clear()  # they read constants when they are made
        choice.forget()

    put(values)
    try:
        yield
    finally:
        put(kept)


def measure(torch: Any, number: int) -> dict[str, Any]:
    """Time a case with a constant as it is, with each alternative, and as it is once more."""
    from fastbn.cuda import tuning

    case, name, values = TRIALS[number]
    buffers = [peers.buffers(torch, case, i) for i in range(timing.sets(case.floor_bytes))]
    now = getattr(tuning, name)
    found: dict[str, Any] = {"case": [*case], "constant": name, "value": now, "us": [], "others": {}}
    found["us"].append(_time(torch, case, buffers))
    for value in values:
        with changed({name: value}):
            try:
                wrong = _error(torch, case)
                found["others"][str(value)] = _time(torch, case, buffers) if wrong is None else wrong
            except Exception as error:
                torch.cuda.synchronize()  # raises where nothing works any more
                found["others"][str(value)] = f"{type(error).__name__}: {str(error)[:200]}"
    found["us"].append(_time(torch, case, buffers))
    return found


def _time(torch: Any, case: Case, buffers: list[Any]) -> float:
    return timing.microseconds(torch, [peers.fastbn(torch, case, b) for b in buffers])


def _error(torch: Any, case: Case) -> str | None:
    b = peers.buffers(torch, case, 1)
    want = peers.reference(torch, case, b)
    peers.fastbn(torch, case, b)()
    found = peers.error(torch, case, b.out, want)
    return None if found <= peers.ALLOWED[case.dtype] else f"wrong, error {found if math.isfinite(found) else 1e9:.3g}"


def lines(trials: list[dict[str, Any]]) -> list[str]:
    """Say of each trial what an alternative takes of the time that the constant as it is takes, at its best."""
    said = []
    for t in trials:
        best, shape = min(t["us"]), "x".join(map(str, t["case"][3]))
        others = [f"{v}: {us if isinstance(us, str) else f'{us / best:.3f}'}" for v, us in t["others"].items()]
        same = f"again: {max(t['us']) / best:.3f}"
        about = f"{t['constant']} {t['value']}, {' '.join(t['case'][:3])} {shape}: {best:.1f} us"
        said.append(f"trial: {about}; times of that, {', '.join([*others, same])}")
    return said
