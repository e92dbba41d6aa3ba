"""Layer, group, instance norm, masked batch norm and ghosts on the GPU against float64; layer norm timed, too."""

from __future__ import annotations

import math
from typing import Any

from bench import gpu_peers as peers
from bench import gpu_timing as timing
from bench import gpu_trials as trials

EPS = 1e-5
# Warps, blocks, sets that are split; whole vectors and not; runs of 7x7; masks and ghosts by every kernel in one launch
# and by several launches; (operation, shape, groups or ghosts).
CHECKED = [
    ("layer", (1024, 768), 1), ("layer", (37, 67), 1), ("layer", (300, 4096), 1), ("layer", (130, 30000), 1),
    ("layer", (2, 400000), 1), ("layer", (3000, 8192), 1), ("layer", (999, 1160), 1), ("layer", (3, 100003), 1),
    ("group", (2, 32, 7, 7), 4), ("group", (4, 64, 32, 32), 32),
    ("group", (2, 64, 128, 256), 2), ("group", (33, 24), 8), ("instance", (3, 5, 17, 19), 5),
    ("instance", (8, 64, 56, 56), 64), ("instance", (1, 2, 512, 512), 2), ("masked", (64, 128, 50), 1),
    ("masked", (33, 5, 7), 1), ("masked", (4099, 64), 1), ("masked", (50, 7), 1),
    ("masked", (8, 16, 64), 1), ("masked", (64, 128, 784), 1), ("masked", (100, 72), 1), ("masked", (2, 3, 400000), 1),
    ("masked", (300000, 7), 1), ("ghosts", (64, 24, 8, 8), 8), ("ghosts", (64, 24, 7, 7), 8),
    ("ghosts", (8, 64, 64, 64), 4), ("ghosts", (4096, 64), 4), ("ghosts", (16384, 128), 128),
    ("ghosts", (32768, 256), 64),
]  # fmt: skip
TIMED = [(512 * 64, 768), (4096, 4096), (8192, 1024), (16384, 8192), (65536, 256)]
DTYPES = ("float32", "bfloat16", "float16", "float64")
EVERY_DTYPE = (0, 5, 9, 15)  # of the cases checked; the others in the first two: compiling takes a second a kernel


def draw(torch: Any, op: str, shape: tuple[int, ...], dtype: str, seed: int, device: str) -> dict[str, Any]:
    """Random tensors of a case; outputs begin as NaN, and so is what a mask excludes."""
    g = torch.Generator(device=device).manual_seed(seed)
    parameters = torch.float64 if dtype == "float64" else torch.float32
    size = shape[-1:] if op == "layer" else shape[1:2]

    def tensor(scale: float, shift: float) -> Any:
        return (torch.randn(shape, generator=g, device=device) * scale + shift).to(getattr(torch, dtype))

    found = {"x": tensor(1.5, 0.7), "grad": tensor(1.0, 0.0)}
    for name, low in (("weight", 0.5), ("bias", -1.0)):
        found[name] = (torch.rand(size, generator=g, device=device) * 1.5 + low).to(parameters)
        found[f"{name}_like"] = found[name].to(found["x"].dtype)  # PyTorch wants them in the dtype of x
    if op == "masked":
        found["mask"] = torch.rand((shape[0], *shape[2:]), generator=g, device=device) < 0.7
        excluded = (~found["mask"]).unsqueeze(1).expand(shape)
        found["x"][excluded] = found["grad"][excluded] = math.nan
    found["out"], found["dx"] = (torch.full_like(found["x"], math.nan) for _ in range(2))
    return found


def call(op: str, groups: int, t: dict[str, Any]) -> Any:
    """Our forward pass: (y, saved)."""
    import fastbn
    from fastbn import device, device_family

    if op == "layer":
        return device_family.layer_norm(t["x"], t["weight"], t["bias"], -1, EPS, t["out"])
    if op == "group":
        return device_family.group_norm(t["x"], groups, t["weight"], t["bias"], 1, EPS, t["out"])
    if op == "instance":
        return device_family.instance_norm(t["x"], t["weight"], t["bias"], 1, EPS, t["out"])
    if op == "ghosts":
        size = t["x"].shape[0] // groups
        return fastbn.batch_norm_train(t["x"], t["weight"], t["bias"], eps=EPS, ghost=size, out=t["out"])
    return device.train(
        t["x"], t["weight"], t["bias"], None, None, 0.1, EPS, 1, None, None, t["out"], mask=t["mask"]
    )  # fmt: skip


def reference(torch: Any, op: str, groups: int, t: dict[str, Any]) -> dict[str, Any]:
    """The results in float64, in a few lines of tensors."""
    x, grad, weight, bias = (t[name].double() for name in ("x", "grad", "weight", "bias"))
    shape = x.shape
    keep = torch.ones((), dtype=torch.bool, device=x.device)
    if op == "masked":
        keep = t["mask"].unsqueeze(1).expand(shape)
        x, grad = torch.where(keep, x, 0.0), torch.where(keep, grad, 0.0)
    if op == "layer":
        view, axes, wide, over = shape, [-1], shape[-1:], list(range(x.ndim - 1))
    elif op == "masked":
        view, axes = shape, [0, *range(2, x.ndim)]
        wide, over = (shape[1], *[1] * (x.ndim - 2)), axes
    elif op == "ghosts":
        view, axes = (groups, shape[0] // groups, *shape[1:]), [1, *range(3, x.ndim + 1)]
        wide, over = (shape[1], *[1] * (x.ndim - 2)), [0, *axes]
    else:
        view = (shape[0], groups, shape[1] // groups, *shape[2:])
        axes, over = list(range(2, len(view))), [0, *range(3, len(view))]
        wide = (groups, shape[1] // groups, *[1] * (x.ndim - 2))
    x, grad, w, b = x.reshape(view), grad.reshape(view), weight.reshape(wide), bias.reshape(wide)
    n = keep.expand(view).sum(axes, keepdim=True) if op == "masked" else math.prod(view[a] for a in axes)
    mean = x.sum(axes, keepdim=True) / n
    d = torch.where(keep, x - mean, 0.0)
    invstd = (d.square().sum(axes, keepdim=True) / n + EPS).rsqrt()
    xhat, v = d * invstd, grad * w
    dx = invstd * (v - v.sum(axes, keepdim=True) / n - xhat * ((v * xhat).sum(axes, keepdim=True) / n))
    results = {"y": torch.where(keep, xhat * w + b, 0.0), "input": torch.where(keep, dx, 0.0)}
    sums = {"weight": (grad * xhat).sum(over), "bias": grad.sum(over)}
    return {k: r.reshape(shape) for k, r in results.items()} | {k: s.reshape(t[k].shape) for k, s in sums.items()}


def worst(torch: Any, got: Any, want: Any) -> float:
    """Largest error relative to max(1, |truth|); inf for NaN."""
    wrong = (got.double() - want).abs() / want.abs().clamp_min(1.0)
    return float(torch.where(wrong.isnan(), torch.full_like(wrong, math.inf), wrong).max())


def checks() -> list[tuple[int, str]]:
    """Return what is checked: (number of the case, dtype)."""
    return [(n, d) for n in range(len(CHECKED)) for d in (DTYPES if n in EVERY_DTYPE else DTYPES[:2])]


def check(torch: Any, number: int, dtype: str, device: str = "cuda") -> list[str]:
    """Check one case, forward and backward; return what is wrong."""
    op, shape, groups = CHECKED[number]
    t = draw(torch, op, shape, dtype, number, device)
    want = reference(torch, op, groups, t)
    y, saved = call(op, groups, t)
    grads = saved.gradients(t["grad"], t["dx"])
    found = []
    for name, got in (("y", y), *grads._asdict().items()):
        if got is None:
            continue
        error = worst(torch, got, want[name])
        rounded = dtype if name in ("y", "input") else ("float64" if dtype == "float64" else "float32")
        allowed = (5 if name == "input" else 1 if name == "y" else 10) * peers.ALLOWED[rounded]
        if not error <= allowed:
            found.append(f"{op} {dtype} {shape}: {name} is off by {error:.3g}, allowed {allowed:.3g}")
    return found


def timed() -> list[tuple[str, tuple[int, ...]]]:
    """Return what is timed: layer norm of (dtype, shape)."""
    return [(dtype, shape) for dtype in DTYPES[:3] for shape in TIMED]


def measure(torch: Any, dtype: str, shape: tuple[int, ...], device: str = "cuda") -> list[dict[str, Any]]:
    """Time layer norm beside PyTorch's, forward and backward."""
    one = draw(torch, "layer", shape, dtype, 0, device)
    nbytes = one["x"].numel() * one["x"].element_size()
    sets = [one, *(draw(torch, "layer", shape, dtype, i, device) for i in range(1, timing.sets(3 * nbytes)))]
    return [
        _row(torch, op, dtype, shape, moved * nbytes, sets)
        for op, moved in (("layer_norm", 2), ("layer_norm_backward", 3))
    ]


def _row(
    torch: Any, op: str, dtype: str, shape: tuple[int, ...], moved: int, sets: list[dict[str, Any]]
) -> dict[str, Any]:
    forward = op == "layer_norm"
    ours = [lambda t=t: call("layer", 1, t) for t in sets] if forward else [_backward(t) for t in sets]
    us = timing.microseconds(torch, ours)
    with trials.changed({"HELD": False}):  # sets in shared memory, gradients by two kernels
        kept = timing.microseconds(torch, ours)
    two = None
    if not forward and dtype in ("float16", "bfloat16"):
        with trials.changed({"HELD_HALVES": 0}):
            two = timing.microseconds(torch, ours)
    error = worst(
        torch, sets[0]["out" if forward else "dx"], reference(torch, "layer", 1, sets[0])["y" if forward else "input"]
    )
    row: dict[str, Any] = {"op": op, "layout": "rows", "dtype": dtype, "shape": list(shape), "kernel": "sets", "us": us}
    row |= {
        "moved": moved,
        "us_gpu": timing.gpu_microseconds(torch, ours),
        "us_copy": None,
        "us_split": kept,
        "max_err": error,
        "x_cudnn": None,
        "x_compile": None,
    }
    row |= {"us_two_vectors": two} if two is not None else {}
    if not error <= (1 if forward else 5) * peers.ALLOWED[dtype]:
        row |= {"error": f"wrong: error {error:.3g}", "us": None, "max_err": error if math.isfinite(error) else None}

    def theirs() -> list[peers.Call]:
        return [_torch(torch, forward, t) for t in sets]

    return row | {"x_torch": peers.time_over(torch, theirs, us, f"{op} {dtype} {shape}")}


def _torch_forward(torch: Any, t: dict[str, Any]) -> Any:
    return torch.ops.aten.native_layer_norm(t["x"], t["x"].shape[-1:], t["weight_like"], t["bias_like"], EPS)


def _torch(torch: Any, forward: bool, t: dict[str, Any]) -> Any:
    return (lambda: _torch_forward(torch, t)) if forward else _torch_backward(torch, t)


def _backward(t: dict[str, Any]) -> Any:
    saved = call("layer", 1, t)[1]
    return lambda: saved.gradients(t["grad"], t["dx"])


def _torch_backward(torch: Any, t: dict[str, Any]) -> Any:
    _, mean, invstd = _torch_forward(torch, t)
    back, shape = torch.ops.aten.native_layer_norm_backward, t["x"].shape[-1:]
    weight, bias = t["weight_like"], t["bias_like"]
    return lambda: back(t["grad"], t["x"], shape, mean, invstd, weight, bias, [True, True, True])
