"""Batch norm of tensors of which only some values count, for ``functional``; also by PyTorch's own operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbn.errors import ArgumentTypeError
from fastbn.torch.tensors import arithmetic, array


def check(mask: Any) -> None:
    """Raise if this is no mask."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = f"{mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ArgumentTypeError("mask", "a torch.Tensor of bool", got)


def options(mask: Any, lengths: Any) -> dict[str, Any]:
    """Return mask and lengths as the public functions take them."""
    if mask is not None:
        check(mask)
        mask = array(mask)
    return {"mask": mask, "lengths": array(lengths) if isinstance(lengths, Tensor) else lengths}


def kept(lengths: Any) -> Any:
    """Return lengths that stay what they are."""
    return lengths if lengths is None else torch.as_tensor(lengths).clone()


def valid(input: Tensor, mask: Tensor | None, lengths: Any) -> Tensor:
    """Return where values count, broadcastable to the input."""
    if mask is None:
        counts = torch.as_tensor(lengths, device=input.device).long()
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
    kind = arithmetic(input)
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
