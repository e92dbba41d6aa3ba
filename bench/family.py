"""Layer, group and instance norm: what is measured, by whom, and how it is checked; in cases of ``cases.Case``.

``op`` is the function's name, with "_backward" for its gradients. Floors: one read and one write, two reads and one
write. Layer norm is measured on (rows, features), the others channels-first with C/8 groups, 32 at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.data import Data
from fastbn import reference

Call = Callable[[], object]
Array = npt.NDArray[Any]
EPS = 1e-5


def split(op: str) -> tuple[str, bool]:
    """Return the norm's name, and whether its gradients are meant."""
    return op.removesuffix("_backward"), op.endswith("_backward")


def groups(data: Data) -> int:
    """Return the number of groups of group norm."""
    return max(1, min(32, data.weight.size // 8))


def fastbn(data: Data) -> Call:
    """Ours, through the public functions."""
    import fastbn as f

    d, out = data, data.out
    name, back = split(d.case.op)
    call: dict[str, Callable[[Array], Any]] = {
        "layer_norm": lambda out: f.layer_norm(d.x, d.weight, d.bias, eps=EPS, out=out),
        "group_norm": lambda out: f.group_norm(d.x, groups(d), d.weight, d.bias, eps=EPS, out=out),
        "instance_norm": lambda out: f.instance_norm(d.x, d.weight, d.bias, eps=EPS, out=out),
    }
    if not back:
        return lambda: call[name](out)
    saved = call[name](d.out2)[1]
    return lambda: f.backward(d.grad, saved, out=out)


def torch(data: Data) -> Call:
    """PyTorch eager, through the native operators that take an output."""
    import torch as t

    from bench.peers import _tensor

    d = data
    name, back = split(d.case.op)
    x, grad, out = (_tensor(a, d) for a in (d.x, d.grad, d.out))
    w, b = (t.from_numpy(a.copy()) for a in (d.weight, d.bias))
    mask = [True, True, True]
    if name == "instance_norm":
        return _torch_instance_norm(d, x, w, b, grad, out)
    if name == "layer_norm":
        sizes: tuple[Any, ...] = ([w.numel()],)
        forward, gradient, shape = t.ops.aten.native_layer_norm, t.ops.aten.native_layer_norm_backward, (x.shape[0], 1)
    else:
        N, C = x.shape[:2]
        sizes = (N, C, x[0, 0].numel(), groups(d))
        forward, gradient, shape = t.ops.aten.native_group_norm, t.ops.aten.native_group_norm_backward, (N, groups(d))
    mean, rstd = t.empty(shape, dtype=w.dtype), t.empty(shape, dtype=w.dtype)
    arguments = (x, *sizes, w, b, EPS) if name == "layer_norm" else (x, w, b, *sizes, EPS)

    def normalise() -> Any:
        return forward.out(*arguments, out0=out, out1=mean, out2=rstd)

    if not back:
        return normalise
    normalise()
    into = {"out0": out, "out1": t.empty_like(w), "out2": t.empty_like(w)}
    saved = (*sizes, mean, rstd, w, b, mask) if name == "layer_norm" else (mean, rstd, w, *sizes, mask)
    return lambda: gradient.out(grad, x, *saved, **into)


def _torch_instance_norm(d: Data, x: Any, w: Any, b: Any, grad: Any, out: Any) -> Call:
    """PyTorch's own way, batch norm of (1, N*C, ...), but into a given output."""
    import torch as t

    N, C = x.shape[:2]
    x, grad, out = (a.view(1, N * C, *x.shape[2:]) for a in (x, grad, out))
    w, b = w.repeat(N), b.repeat(N)
    save, into = (t.empty_like(w), t.empty_like(w)), (t.empty_like(w), t.empty_like(w))

    def forward() -> Any:
        return t.ops.aten.native_batch_norm.out(
            x, w, b, None, None, True, 0.1, EPS, out=out, save_mean=save[0], save_invstd=save[1]
        )

    if not d.case.op.endswith("_backward"):
        return forward
    forward()
    return lambda: t.ops.aten.native_batch_norm_backward.out(
        grad, x, w, None, None, *save, True, EPS, [True, True, True], out0=out, out1=into[0], out2=into[1]
    )


def error(data: Data, result: Array) -> float:
    """Compare three samples with the float64 reference."""
    d = data
    name, back = split(d.case.op)
    samples = np.unique(np.linspace(0, d.x.shape[0] - 1, 3).astype(int))
    x, grad, found = (np.asarray(a[samples], np.float64) for a in (d.x, d.grad, result))
    C = d.weight.size
    shape: tuple[int, ...] = (len(samples), 1, -1)
    wide: tuple[int, ...] = (1, C)
    if name != "layer_norm":
        G = groups(d) if name == "group_norm" else C
        shape, wide = (len(samples), G, C // G, d.x[0, 0].size), (G, C // G, 1)
    x, grad = x.reshape(shape), grad.reshape(shape)
    axes = tuple(range(2, x.ndim))
    w, b = (np.asarray(p, np.float64).reshape(wide) for p in (d.weight, d.bias))
    if back:
        expected = reference.normalise_backward(grad, x, axes, w, eps=EPS)[0]
    else:
        expected = reference.normalise(x, axes, w, b, eps=EPS)
    return float(np.abs(found.reshape(shape) - expected).max() / max(1.0, np.abs(expected).max()))
