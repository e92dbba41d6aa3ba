"""A training step of one module, forward and backward: ``fastbn.torch`` against ``torch.nn``, module by module.

One process, one thread, short bursts in turn, minima; ours is checked against float64 first. Prints how many times as
long PyTorch's own module takes: ``python -m bench.torch_module [--batch N] [--dtype D] [--rounds N]``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch

import fastbn
import fastbn.torch
from bench.cases import RESNET50

Step = Callable[[], Any]
MODULES = {2: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the largest gradient; PyTorch's own errors are near


def step(module: Any, x: Any, grad: Any) -> Step:
    """Return one step: forward, and the gradients of input, weight and bias."""
    sources = (x, *module.parameters())

    def call() -> Any:
        y = module(x)
        return y, *torch.autograd.grad(y, sources, grad)

    return call


def check(shape: tuple[int, ...], x: Any, grad: Any, found: Any) -> None:
    """Raise if y or a gradient is not that of PyTorch's module in float64."""
    exact = MODULES[len(shape)](shape[1], dtype=torch.float64)
    wanted = step(exact, x.detach().double().requires_grad_(), grad.double())()
    for got, want in zip(found, wanted, strict=True):
        got, want = got.detach().double(), want.detach()
        error = float((got - want).abs().max() / want.abs().max().clamp(min=1.0))
        if not error <= ALLOWED[x.dtype]:
            raise ArithmeticError(f"{shape}: error {error:.1e}")


def best(steps: list[Step], rounds: int, seconds: float) -> list[float]:
    """Return the shortest time of each, in seconds."""
    least = [math.inf] * len(steps)
    for _ in range(rounds):
        for i, call in enumerate(steps):
            end = time.perf_counter() + seconds
            call()
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                least[i] = min(least[i], now - start)
                if now > end:
                    break
    return least


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.torch_module", description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    fastbn.set_num_threads(1)
    planes = [(args.batch, *shape[1:]) for shape in RESNET50]
    formats = {"": torch.contiguous_format, " channels last": torch.channels_last}
    cases = [((60, 100), "")] + [(shape, name) for shape in planes for name in formats]
    for shape, name in cases:
        x, grad = (
            torch.randn(shape).to(getattr(torch, args.dtype)).contiguous(memory_format=formats[name]) for _ in range(2)
        )
        x.requires_grad_()
        theirs, ours = MODULES[len(shape)](shape[1]), fastbn.torch.convert(MODULES[len(shape)](shape[1]))
        steps = [step(ours, x, grad), step(theirs, x, grad)]
        check(shape, x, grad, steps[0]())
        mine, other = best(steps, args.rounds, 0.1)
        print(f"{'x'.join(map(str, shape)) + name:32} {mine * 1e3:9.3f} ms   torch.nn {other / mine:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
