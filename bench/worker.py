"""One library in one process: ``python -m bench.worker PEER`` prepares cases, checks them and times bursts on demand.

Talks JSON lines over stdin and stdout. A case is checked against ``fastbn.reference`` before it may be timed.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from bench.cases import Case
from bench.data import Data
from bench.peers import OTHERS, PEERS, Call, Unsupported
from fastbn import reference

TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "float16": 2e-2, "bfloat16": 1e-1}


def result(data: Data) -> Any:
    """Return the output as a NumPy array in the memory order of the data."""
    fresh = getattr(data, "fresh", None)
    if fresh is None:
        return data.out
    if hasattr(fresh, "to_dense"):
        fresh = (fresh.to_dense() if fresh.is_mkldnn else fresh).float().detach()
        fresh = fresh.movedim(1, -1) if data.axis != 1 and fresh.ndim > 2 else fresh
        fresh = fresh.numpy()
    return np.asarray(fresh).reshape(data.shape)


def error(data: Data, slack: float = 1.0) -> float:
    """Compare a sample of the channels with the float64 reference; ``slack``: of the tolerance."""
    d, op = data, data.case.op
    if op in OTHERS:
        own: float = OTHERS[op].error(d, result(d))
        return own
    channels = np.unique(np.linspace(0, d.weight.size - 1, 3).astype(int))

    def take(a: Any) -> Any:
        return np.take(a, channels, axis=d.axis).astype(np.float64)

    x = take(d.x)
    w, b, m, v = (a[channels] for a in (d.weight, d.bias, d.mean, d.var))
    extra: dict[str, Any] = {"activation": "relu", "residual": take(d.residual)} if op.endswith("_fused") else {}
    if op != "infer":
        m, v = reference.statistics(x, d.axis)
    if op.startswith("backward"):
        expected = reference.backward(take(d.grad), x, m, v, w, b, axis=d.axis, **extra)[0]
    else:
        expected = reference.apply(x, m, v, w, b, axis=d.axis, **extra)
    found = take(result(d))
    if op == "backward_fused":  # where the ReLU's input is zero but for rounding, either gradient is right
        z = reference.apply(x, m, v, w, b, axis=d.axis, residual=extra["residual"])
        found = np.where(np.abs(z) < slack * TOLERANCE[d.case.dtype], expected, found)
    return float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))


def prepare(peer: str, case: Case) -> tuple[Call, float]:
    """Set up a case and check it; raises ArithmeticError if the numbers are wrong."""
    data = Data(case)
    call = PEERS[peer](data)
    # Others may be less exact than we hold ourselves to, PyTorch's channels-last gradients are; not wrong, though.
    slack = 1.0 if peer.startswith("fastbn") else 50.0
    call()
    if peer == "copy":
        found = 0.0 if np.array_equal(data.x.view(np.uint8), data.out.view(np.uint8)) else np.inf
    else:
        found = error(data, slack)
    if not found <= TOLERANCE[case.dtype] * slack:
        raise ArithmeticError(f"{peer} on {case.id}: error {found:.1e}")
    return call, found


def burst(call: Call, seconds: float, most: int) -> list[float]:
    """Time single calls until ``seconds`` have passed, at most ``most``."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    call()
    while len(times) < most and (not times or time.perf_counter() < end):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _answer(peer: str, line: str, state: dict[str, Any]) -> dict[str, Any]:
    request = json.loads(line)
    if "case" in request:
        state.clear()
        case = Case(*[tuple(v) if isinstance(v, list) else v for v in request["case"]])
        state["call"], found = prepare(peer, case)
        return {"error": found}
    return {"times": burst(state["call"], request["seconds"], request["most"])}


def main(peer: str) -> None:
    """Serve requests until stdin ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries that print must not break the protocol
    if peer.startswith("torch") or peer == "onednn":
        import os

        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            reply = _answer(peer, line, state)
        except Unsupported as e:
            reply = {"unsupported": str(e)}
        except Exception as e:
            reply = {"failed": f"{type(e).__name__}: {e}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
