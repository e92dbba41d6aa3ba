"""The libraries that are measured on a GPU: case and buffers -> a call. None where a library has no such operation."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from bench import gpu_timing as timing
from bench.gpu_cases import Case

Call = Callable[[], Any]
EPS, MOMENTUM = 1e-5, 0.1


class Buffers(NamedTuple):
    """Fresh random tensors of a case; ``out`` and ``dr`` begin as NaN."""

    x: Any
    grad: Any
    residual: Any
    out: Any
    weight: Any
    bias: Any
    mean: Any
    var: Any


def buffers(torch: Any, case: Case, seed: int, device: str = "cuda") -> Buffers:
    """Draw the tensors of a case."""
    g = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    memory = torch.channels_last if case.layout == "NHWC" and len(case.shape) == 4 else torch.contiguous_format
    parameters = torch.float64 if case.dtype == "float64" else torch.float32
    C = case.shape[1]

    def tensor(scale: float, shift: float) -> Any:
        values = torch.randn(case.shape, generator=g, device=device, dtype=torch.float32)
        return (values * scale + shift).to(dtype).contiguous(memory_format=memory)

    def vector(low: float, high: float) -> Any:
        return torch.rand(C, generator=g, device=device, dtype=parameters) * (high - low) + low

    x, grad = tensor(1.5, 0.7), tensor(1.0, 0.0)
    residual = tensor(1.0, 0.0) if case.fused else None
    out = torch.full_like(x, float("nan"))
    return Buffers(x, grad, residual, out, vector(0.5, 2.0), vector(-1.0, 1.0), vector(-1.0, 1.0), vector(0.5, 2.0))


def fastbn(torch: Any, case: Case, b: Buffers) -> Call:
    """Ours, through the public functions."""
    import fastbn

    options: dict[str, Any] = {"eps": EPS, "out": b.out}
    if case.fused:
        options |= {"activation": "relu", "residual": b.residual}
    if case.op == "infer":
        return lambda: fastbn.batch_norm_infer(b.x, b.mean, b.var, b.weight, b.bias, **options)
    if not case.backward:
        return lambda: fastbn.batch_norm_train(b.x, b.weight, b.bias, b.mean, b.var, momentum=MOMENTUM, **options)
    _, saved = fastbn.batch_norm_train(b.x, b.weight, b.bias, **options | {"out": None})
    return lambda: fastbn.backward(b.grad, saved, out=b.out)


def torch_native(torch: Any, case: Case, b: Buffers) -> Call | None:
    """PyTorch's own kernels."""
    native = torch.ops.aten.native_batch_norm
    if case.op == "infer":
        return lambda: native(b.x, b.weight, b.bias, b.mean, b.var, False, MOMENTUM, EPS)[0]

    def forward() -> Any:
        return native(b.x, b.weight, b.bias, b.mean, b.var, True, MOMENTUM, EPS)

    def fused() -> Any:
        return torch.relu_(forward()[0].add_(b.residual))

    if not case.backward:
        return fused if case.fused else forward
    _, mean, invstd = forward()
    gate = _gate(torch, case, b, fused)
    back = torch.ops.aten.native_batch_norm_backward
    every = [True, True, True]
    return lambda: back(gate(), b.x, b.weight, b.mean, b.var, mean, invstd, True, EPS, every)


def _gate(torch: Any, case: Case, b: Buffers, fused: Call) -> Call:
    """The gradient in front of the ReLU."""
    if not case.fused:
        return lambda: b.grad
    y = fused()
    return lambda: torch.ops.aten.threshold_backward(b.grad, y, 0.0)


def torch_cudnn(torch: Any, case: Case, b: Buffers) -> Call | None:
    """CuDNN through PyTorch; it has no inference of its own there."""
    if case.op == "infer" or len(case.shape) != 4:
        return None
    ops = torch.ops.aten

    def forward() -> Any:
        return ops.cudnn_batch_norm(b.x, b.weight, b.bias, b.mean, b.var, True, MOMENTUM, EPS)

    def fused() -> Any:
        return torch.relu_(forward()[0].add_(b.residual))

    if not case.backward:
        return fused if case.fused else forward
    _, mean, invstd, reserve = forward()
    gate = _gate(torch, case, b, fused)
    back = ops.cudnn_batch_norm_backward
    return lambda: back(b.x, gate(), b.weight, b.mean, b.var, mean, invstd, EPS, reserve)


@functools.lru_cache(maxsize=1)
def _compiled(case: Case) -> Any:
    """One compilation a case, whatever its buffers; the cache holds the current case only."""
    import torch

    def forward(x: Any, weight: Any, bias: Any, mean: Any, var: Any, residual: Any) -> Any:
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, case.op != "infer", MOMENTUM, EPS)
        return torch.relu(y + residual) if case.fused else y

    torch._dynamo.reset()
    return torch.compile(forward, dynamic=False)


def torch_compile(torch: Any, case: Case, b: Buffers) -> Call | None:
    """torch.compile: forward as written, backward as autograd's graph of it."""
    compiled = _compiled(case)
    if not case.backward:
        return lambda: compiled(b.x, b.weight, b.bias, b.mean, b.var, b.residual)
    leaves = [t.detach().requires_grad_() for t in (b.x, b.weight, b.bias)]
    with torch.enable_grad():
        y = compiled(*leaves, b.mean, b.var, b.residual)
    return lambda: torch.autograd.grad(y, leaves, b.grad, retain_graph=True)


PEERS = {"x_torch": torch_native, "x_cudnn": torch_cudnn, "x_compile": torch_compile}


def time_over(torch: Any, make: Callable[[], list[Call]], us: float, about: str) -> float | None:
    """Return the time of a peer over ours; None where it has no such operation or fails, which must not cost a row."""
    try:
        calls = make()
        return timing.microseconds(torch, calls) / us if calls else None
    except Exception as error:
        print(f"  {about}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return None


def reference(torch: Any, case: Case, b: Buffers) -> Any:
    """The result in float64, in a few lines of tensors: y, or the gradient of x.

    Behind a ReLU the gradient goes by the output that our forward pass left: a value within rounding of zero may be cut
    off or not, and one of them moves the gradients of its whole channel.
    """
    x = b.x.double()
    others = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)

    def column(v: Any) -> Any:
        return v.double().reshape(shape)

    if case.op == "infer":
        mean, var = column(b.mean), column(b.var)
    else:
        mean = x.mean(others, keepdim=True)
        var = (x - mean).square().mean(others, keepdim=True)
    invstd = (var + EPS).rsqrt()
    xhat = (x - mean).mul_(invstd)
    del x
    z = xhat * column(b.weight) + column(b.bias)
    if case.fused:
        z += b.residual.double()
    if not case.backward:
        return torch.relu_(z) if case.fused else z
    del z
    u = b.grad.double()
    if case.fused:
        u = torch.where(_output(case, b) <= 0, torch.zeros_like(u), u)
    centred = u - u.mean(others, keepdim=True) - xhat * (u * xhat).mean(others, keepdim=True)
    return centred.mul_(column(b.weight) * invstd)


def _output(case: Case, b: Buffers) -> Any:
    """Our own output of the forward pass in front of a fused gradient."""
    import fastbn

    options = {"eps": EPS, "activation": "relu", "residual": b.residual}
    return fastbn.batch_norm_train(b.x, b.weight, b.bias, **options)[0]


ALLOWED = {"float32": 4e-6, "float64": 1e-13, "float16": 6e-4, "bfloat16": 5e-3}


def error(torch: Any, case: Case, got: Any, want: Any) -> float:
    """Largest error relative to max(1, |truth|), NaN (unwritten elements) included."""
    wrong = (got.double() - want).abs_() / want.abs().clamp_min(1.0)
    return float(torch.where(wrong.isnan(), torch.full_like(wrong, float("inf")), wrong).max())
