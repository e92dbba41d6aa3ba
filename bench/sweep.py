"""Where shapes are slow: every kind of shape against a streaming copy, ``python -m bench.sweep [--megabytes N]``.

Cases of real networks do not show a shape that nobody thought of: (49152, 16, 16) once took 25 times as long as it had
to, layer norm's gradients of (65536, 100) 4 times. Each row is a shape (N, C, S), arrays beginning 16 bytes into a line
as NumPy's large ones do, and each number the best time over that of the copy; the slowest of each column come last.
One process, no peers, no checks: those are for ``python -m bench``.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import fastbn
from bench.copying import stream_copy

Array = npt.NDArray[Any]
Calls = dict[str, Callable[[], Any]]
RUNS = (1, 4, 9, 16, 25, 49, 64, 100, 225, 1000, 3136)
CHANNELS = (1, 3, 16, 33, 100, 512, 2048)
INSIDE = 16  # bytes into a line


def shapes(elements: int) -> Iterator[tuple[int, ...]]:
    """Yield shapes of about so many elements."""
    for S in RUNS:
        for C in CHANNELS:
            N = max(1, elements // (S * C))
            shape = (N, C, S) if S > 1 else (N, C)
            if N * S > 1 and math.prod(shape) < 2 * elements:
                yield shape


def arrays(shape: tuple[int, ...], dtype: np.dtype[Any], count: int) -> Iterator[Array]:
    """Yield arrays of random numbers."""
    size = math.prod(shape)
    for seed in range(count):
        memory = np.zeros(size * dtype.itemsize + 4096, np.uint8)
        start = -memory.ctypes.data % 64 + INSIDE
        found = memory[start : start + size * dtype.itemsize].view(dtype)
        found[...] = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
        yield found.reshape(shape)


def calls(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Calls:
    """Return what is timed for a shape, by name."""
    x, grad, residual, y, dx = arrays(shape, dtype, 5)
    C = shape[1]
    weight, bias, mean, var = (np.full(C, value, np.float32) for value in (1.0, 0.0, 0.0, 1.0))
    wide = np.ones(shape[1:], np.float32), np.zeros(shape[1:], np.float32)
    fused: Any = {"activation": "relu", "residual": residual}
    forward: Calls = {
        "train": lambda: fastbn.batch_norm_train(x, weight, bias, out=y),
        "fused": lambda: fastbn.batch_norm_train(x, weight, bias, out=y, **fused),
    }
    if len(shape) > 2 and C > 1:
        forward["instance"] = lambda: fastbn.instance_norm(x, weight, bias, out=y)
        forward["group"] = lambda: fastbn.group_norm(x, math.gcd(C, 32), weight, bias, out=y)
    if x[0].size > 1:
        forward["layer"] = lambda: fastbn.layer_norm(x, *wide, axis=1, out=y)
    found: Calls = {"infer": lambda: fastbn.batch_norm_infer(x, mean, var, weight, bias, out=y)}
    for name, call in forward.items():
        saved = call()[1]
        found[name], found[f"{name} back"] = call, functools.partial(fastbn.backward, grad, saved, out=dx)
    return found


def best(call: Callable[[], Any], times: int) -> float:
    """Return the shortest of some runs, in seconds."""
    call()
    least = math.inf
    for _ in range(times):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least


def main() -> None:
    """Run the sweep from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=32, help="of a float32 tensor")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    args = parser.parse_args()
    fastbn.set_num_threads(1)
    dtype, elements = np.dtype(args.dtype), args.megabytes << 18
    slowest: dict[str, list[tuple[float, str]]] = {}
    for shape in shapes(elements):
        source, target = (np.ones(math.prod(shape) * dtype.itemsize // 4, np.float32) for _ in range(2))
        copied = best(functools.partial(stream_copy, source, target), 6)
        ratios = {name: best(call, 3) / copied for name, call in calls(shape, dtype).items()}
        print(
            f"{'x'.join(map(str, shape)):>16}", *(f"{name} {r:.1f}" for name, r in ratios.items()), sep="  ", flush=True
        )
        for name, r in ratios.items():
            slowest.setdefault(name, []).append((r, "x".join(map(str, shape))))
    for name, found in slowest.items():
        print(f"{name:14}", *(f"{shape} {r:.1f}" for r, shape in sorted(found)[::-1][:4]), sep="  ")


if __name__ == "__main__":
    main()
