"""Gradients of batch norm: by kernels, and by PyTorch's operators where it must see every operation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbn import functional, signs, views
from fastbn.saved import BatchSaved
from fastbn.torch import masked, native
from fastbn.torch.tensors import Opaque, arithmetic, array, laid_out, parameter, tensor, vector

Found = tuple[Tensor | None, ...]


def keep(ctx: Any, saved: Any, y: Tensor, args: native.Args) -> None:
    """Leave what ``by_kernels`` and ``differentiable`` need to autograd, which then sees changes to it.

    Behind a residual and a ReLU y, or its signs as bytes.
    """
    input, _, weight, bias, _, _, _, _, eps, _, mask, lengths = args
    through, behind = (not saved.residual, saved.residual) if saved.relu else (False, False)
    bits = getattr(saved, "signs", None)
    sign = y if behind else None
    if bits is not None:
        sign = torch.from_numpy(bits)
    saved.release()
    ctx.save_for_backward(input, weight, bias if through else None, sign, mask)
    if bias is not None and not through and isinstance(saved, BatchSaved):  # what nobody keeps must not be read, either
        saved.bias = views.constant(0.0, saved.bias.size, saved.bias.dtype)
    ctx.saved, ctx.strides, ctx.eps, ctx.lengths = saved, input.stride(), eps, masked.kept(lengths)
    ctx.at = 0 if weight is None else weight.data_ptr(), bias.data_ptr() if through and bias is not None else 0


def by_kernels(ctx: Any, grad_output: Tensor) -> Found:
    """Gradients of input, residual, weight and bias."""
    input, weight, bias, y, _ = ctx.saved_tensors
    try:
        grad = array(grad_output)
        input = laid_out(input, ctx.strides)
        if _are_signs(y):
            saved = ctx.saved.restored(array(input), signs=array(y.contiguous()))
        else:
            saved = ctx.saved.restored(array(input), None if y is None else array(laid_out(y, ctx.strides)))
        _moved(ctx, saved, weight, bias)
    except Opaque:
        return differentiable(ctx, grad_output)
    dx, dw, db, dr = functional.backward(grad, saved)
    wanted = ctx.needs_input_grad
    if dr is not None:
        dr = grad_output if dr is grad else tensor(dr, input)
    return (
        tensor(dx, input) if wanted[0] else None,
        dr if wanted[1] else None,
        vector(dw) if wanted[2] else None,
        vector(db) if wanted[3] else None,
        None,
    )


def _moved(ctx: Any, saved: Any, weight: Tensor | None, bias: Tensor | None) -> None:
    """Take weight and bias from where hooks on saved tensors have put them; what lay there before may be gone.

    On a GPU they are looked up by their tensors.
    """
    for name, now, before in (("weight", weight, ctx.at[0]), ("bias", bias, ctx.at[1])):
        if now is not None and now.data_ptr() != before:
            if now.is_cuda:
                raise Opaque(f"{name} lies elsewhere than in the forward pass")
            setattr(saved, name, np.ascontiguousarray(parameter(now)))


def differentiable(ctx: Any, grad_output: Tensor) -> Found:
    """Gradients with a graph of their own if one is asked for (``create_graph=True``): PyTorch's operator has one.

    With respect to aliases: where one argument was computed from another, or from what this layer did before, that path
    is another node's.
    """
    create, wanted, saved = torch.is_grad_enabled(), ctx.needs_input_grad, ctx.saved
    input, weight, bias, y, mask = ctx.saved_tensors
    with torch.enable_grad():
        before = grad_output if y is None else _before_relu(grad_output, y, ctx, input)
        if mask is not None or ctx.lengths is not None:
            before = before.masked_fill(~masked.valid(input, mask, ctx.lengths), 0.0)
        given = {0: input, 2: weight, 3: bias}
        ones = torch.ones(input.shape[1:2], dtype=arithmetic(input), device=input.device)
        if weight is None and given[3] is not None:  # PyTorch has no second derivative of bias alone
            given[2] = ones
        alias = {i: None if t is None else t.view_as(t) for i, t in given.items()}
        again = _again(ctx, saved, alias, mask, "relu" if saved.relu and y is None else None)
        sources = [i for i in (0, 2, 3) if wanted[i] and given[i] is not None]
        grads = torch.autograd.grad(
            again, [alias[i] for i in sources], _in_order(before, input), create_graph=create
        ) if sources else ()  # fmt: skip
        found = dict(zip(sources, grads, strict=True)) | ({1: before} if wanted[1] else {})
        if bias is None and wanted[3]:  # nothing but its own gradient depends on it
            found[3] = before.sum([0, *range(2, input.dim())], dtype=ones.dtype)
    return tuple(found.get(i) for i in range(5))


def _are_signs(y: Tensor | None) -> bool:
    """Tell whether these are the signs of an output rather than itself."""
    return y is not None and y.dtype is torch.uint8


def _before_relu(grad: Tensor, y: Tensor, ctx: Any, input: Tensor) -> Tensor:
    """Return the gradient in front of the ReLU, by the output or by its signs."""
    if not _are_signs(y):
        return grad.masked_fill(y <= 0, 0.0)
    order = ctx.saved.layout.order
    bits = (y[signs.HEAD :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    places = torch.arange(input.numel()) + y[:8].clone().view(torch.int64)  # the phase: a checkpoint's second differs
    positive = bits.flatten()[places].view([input.shape[a] for a in order])
    return grad.masked_fill(positive.permute(*np.argsort(order).tolist()) == 0, 0.0)


def _again(ctx: Any, saved: Any, alias: dict[int, Any], mask: Any, relu: str | None) -> Tensor:
    """Return what the forward pass returned in front of the residual."""
    input, mean, var = alias[0], None, None
    if saved.frozen:
        mean, var = (torch.as_tensor(s).to(arithmetic(input)) for s in (saved.mean, saved.variance))
    weight = None if alias[2] is None else alias[2].contiguous()  # PyTorch's own gradients of others are wrong
    args = (input, None, weight, alias[3], mean, var, not saved.frozen, 0.0, ctx.eps, relu, mask, ctx.lengths)
    return native.run(args)


def _in_order(grad: Tensor, input: Tensor) -> Tensor:
    """Return the gradient in the memory format of the input: PyTorch's operator is wrong about some others."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    if last is not None and not input.is_contiguous() and input.is_contiguous(memory_format=last):
        return grad.movedim(1, -1).contiguous().movedim(-1, 1)  # vmap cannot say contiguous(memory_format=...)
    return grad.contiguous()
