"""Batch norm of tensors of which only some values count, for ``functional``: by kernels and by PyTorch's operators.

Channels last, as (N, L, C) lies when ``transpose(1, 2)`` shows it, is used where it lies; other orders are copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbn import functional
from fastbn.errors import ArgumentTypeError
from fastbn.torch.tensors import array


def forward(
    x: Any, w: Any, b: Any, m: Any, v: Any, training: bool, momentum: float, given: dict[str, Any], mask: Any,
    lengths: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Return y and what ``backward`` needs; ``given`` are the options that all calls have."""
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            got = f"{mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentTypeError("mask", "a torch.Tensor of bool", got)
        mask = array(mask)
    if isinstance(lengths, Tensor):
        lengths = array(lengths)
    given = given | {"mask": mask, "lengths": lengths}
    if last := _lies_last(x):
        x, r = np.moveaxis(x, 1, -1), given["residual"]
        given |= {"axis": -1, "residual": None if r is None else np.moveaxis(r, 1, -1)}
    if training:
        y, saved = functional.batch_norm_train(x, w, b, m, v, momentum=momentum, **given)
    else:
        y, saved = functional.frozen(x, m, v, w, b, **given)
    return np.moveaxis(y, -1, 1) if last else y, saved


def backward(saved: Any, x: Any, y: Any, grad: Any) -> tuple[Any, ...]:
    """Gradients of what ``forward`` left and let go of x and y."""
    if not _lies_last(x):
        return functional.backward(grad, saved.restored(x, y))
    x, moved, y = (None if t is None else np.moveaxis(t, 1, -1) for t in (x, grad, y))
    dx, dw, db, dr = functional.backward(moved, saved.restored(x, y))
    if dr is not None:
        dr = grad if dr is moved else np.moveaxis(dr, -1, 1)
    return np.moveaxis(dx, -1, 1), dw, db, dr


def _lies_last(x: Any) -> bool:
    """Tell whether an array's channels, axis 1, lie side by side in memory, all else in C order."""
    if type(x) is not np.ndarray or x.flags.c_contiguous:
        return False
    found: bool = np.moveaxis(x, 1, -1).flags.c_contiguous
    return found


def valid(input: Tensor, mask: Tensor | None, lengths: Any) -> Tensor:
    """Return where values count, broadcastable to the input."""
    if mask is None:
        counts = torch.as_tensor(lengths, device=input.device)
        mask = torch.arange(input.shape[2], device=input.device) < counts[:, None]
    rest = (*input.shape[:1], *input.shape[2:])
    return mask.expand(rest).unsqueeze(1)


def native(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, training: bool, momentum: float, eps: float, relu: bool | None, mask: Tensor | None,
    lengths: Any,
) -> Tensor:  # fmt: skip
    """Normalise by PyTorch's own operators, where it must see every operation.

    The mean is taken off before values are squared. In float32 for half types, as the kernels do.
    """
    keep, axes = valid(input, mask, lengths), [i for i in range(input.dim()) if i != 1]
    kind = torch.float64 if input.dtype is torch.float64 else torch.float32
    x = torch.where(keep, input, 0.0).to(kind)

    def column(v: Tensor) -> Tensor:
        return v.to(kind).reshape(-1, *[1] * (input.dim() - 2))

    if training:
        n = keep.sum()
        m = x.sum(axes, keepdim=True) / n.clamp(min=1)
        d = torch.where(keep, x - m, 0.0)
        v = (d * d).sum(axes, keepdim=True) / n.clamp(min=1)
        if mean is not None and var is not None:
            rate = momentum * (n > 0).to(torch.float64)
            with torch.no_grad():
                mean.lerp_(m.flatten().to(mean.dtype), rate.to(mean.dtype))
                var.lerp_((v * n / (n - 1).clamp(min=1)).flatten().to(var.dtype), rate.to(var.dtype))
    else:
        assert mean is not None and var is not None
        m, v = column(mean), column(var)
        d = x - m
    z = d * torch.rsqrt(v + eps)
    z = z if weight is None else z * column(weight)
    z = z if bias is None else z + column(bias)
    z = z if residual is None else z + residual
    z = torch.where(keep, torch.relu(z) if relu else z, 0.0)
    return z.to(input.dtype)
