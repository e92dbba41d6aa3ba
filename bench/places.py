"""Results that begin elsewhere in a page than the input: ``python -m bench.places``.

A CPU that compares the low 12 bits of addresses takes a load of x for one of what was just stored where ``out`` begins
a line or two further into its page, as arrays do that NumPy allocates one after the other. One thread and one process;
minima of short bursts in turn, each place checked first. Results go to ``bench/results/places-<machine>.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import fastbn
from bench import machine
from bench.cases import RESNET50, Case
from bench.data import Data, empty
from bench.peers import PEERS, Call
from bench.worker import TOLERANCE, burst, error

PLACES = (0, 16, 48, 64, 128, 2048)  # bytes further into its page than x
OPS = ("infer", "train", "backward")
CASES = [Case(op, shape) for shape in (*RESNET50[1:5], (8192, 1024), (65536, 64)) for op in OPS]
CASES += [Case(op, shape) for shape in ((64, 100), (1024, 256)) for op in (*OPS, "train_fused")]  # in the cache
CASES += [Case(op, (32, 32, 14, 14), layout) for op in OPS for layout in ("channels_first", "channels_last")]
CASES += [Case(op, shape) for shape in ((8192, 1024), (65536, 128)) for op in ("layer_norm", "layer_norm_backward")]
CASES += [Case(op, (32, 64, 56, 56)) for op in ("group_norm", "group_norm_backward")]


def calls(case: Case) -> Iterator[Call]:
    """Return the call into an output at each place, checked."""
    data = Data(case)
    for place in PLACES:
        data.out = empty(data.shape, data.dtype, 64 + place)
        call = PEERS["fastbn"](data)
        call()
        if not error(data) <= TOLERANCE[case.dtype]:
            raise ArithmeticError(f"{case.id}, {place} bytes on: wrong numbers")
        yield call


def main() -> None:
    """Measure and write."""
    fastbn.set_num_threads(1)
    rows = []
    for case in CASES:
        ready = list(calls(case))
        least = [math.inf] * len(ready)
        for _ in range(9):
            for i, call in enumerate(ready):
                least[i] = min(least[i], *burst(call, 0.03, 200))
        rows.append({"case": case.id, "unit": "s"} | dict(zip(map(str, PLACES), least, strict=True)))
        times = "  ".join(f"+{place}: {t / least[0]:.2f}" for place, t in zip(PLACES, least, strict=True))
        print(f"{case.id:50} {1e3 * least[0]:9.3f} ms  {times}", flush=True)
    path = Path(__file__).parent / "results" / f"places-{machine.slug()}.json"
    result = {"machine": machine.name(), "versions": machine.versions(), "date": machine.today(), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    machine.without_options(__doc__)
    main()
