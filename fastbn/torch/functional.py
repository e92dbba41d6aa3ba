"""Batch norm of tensors, with gradients.

``torch.autograd.Function`` rather than ``torch.library.custom_op``, which PyTorch's documentation prefers: around the
same kernels, forward and backward of (64, 100) take 67 us in the one and 139 in the other (PyTorch's own module 62).
What a custom operator would bring is done here: ``torch.compile`` breaks its graph around the call, and where tensors
have no memory to look at, or PyTorch must see every operation, its own operator does the work.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastbn import functional
from fastbn.errors import ArgumentTypeError, FastbnError
from fastbn.torch import gradients, masked, native
from fastbn.torch.native import Args
from fastbn.torch.tensors import Opaque, array, dense, parameter, tensor

HALF = (torch.float16, torch.bfloat16)

_grad_enabled, _compiling, _tracing = torch.is_grad_enabled, torch.compiler.is_compiling, torch.jit.is_tracing
_exporting = getattr(torch.compiler, "is_exporting", lambda: False)
_transforming = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    activation: str | None = None, residual: Tensor | None = None, mask: Tensor | None = None, lengths: Any = None,
) -> Tensor:  # fmt: skip
    """Batch norm as ``torch.nn.functional.batch_norm``, with a ReLU and a residual in the same pass.

    y = activation(weight*(input - mean)/sqrt(var + eps) + bias + residual), mean and biased var those of the batch in
    training, else the running ones. Source: Ioffe & Szegedy 2015 (arXiv:1502.03167); gradients: ``fastbn.backward``.

    Parameters
    ----------
    input : torch.Tensor, shape (N, C, ...)
        float32, float64, float16 or bfloat16, on the CPU or a CUDA device. Any strides; no copy is made of a tensor
        without gaps in memory.
    running_mean, running_var : torch.Tensor, shape (C,), optional
        float64 for float64 input, else float32. In training both or neither, and moved in place:
        running = (1 - momentum)*running + momentum*new, with the unbiased variance.
    weight, bias : torch.Tensor, shape (C,), optional
        Scale (1) and shift (0); dtype as the running statistics.
    training : bool
        Normalise by the batch.
    momentum : float
        Weight of the new value in the running statistics.
    eps : float
        Added to the variance inside the root; > 0 in training.
    activation : {None, "relu"}
        Applied last.
    residual : torch.Tensor, optional
        Added before the activation; shape and dtype of input.
    mask : torch.Tensor of bool, optional
        Broadcastable to input without its channel axis; only values where it is true count. The result and the
        gradients of input and residual are zero elsewhere, whatever input holds there.
    lengths : torch.Tensor or sequence of int, shape (N,), optional
        Instead of a mask, for input of shape (N, C, L): the first lengths[n] steps of sample n count.

    Returns
    -------
    torch.Tensor
        Shape, dtype and memory order of input; differentiable in input, weight, bias and residual.

    Raises
    ------
    ValueError
        Shapes that do not fit, eps out of range, one value per channel in training, one running statistic alone.
    TypeError
        Not a tensor, other dtypes.
    fastbn.DeviceError
        Tensors on different devices, or on a GPU that fastbn cannot reach here.

    Notes
    -----
    PyTorch's own operator works where these kernels cannot: under ``torch.jit.trace``, ``torch.export``, ``vmap``,
    ``torch.func.grad`` and forward-mode differentiation, on other devices, where parameters are half types too, and for
    gradients with a graph of their own (``create_graph=True``). ``torch.compile`` breaks its graph around the call.
    fastbn's threads are its own: ``fastbn.set_num_threads``, not ``torch.set_num_threads``.
    """
    args = (
        input, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation, mask, lengths,
    )  # fmt: skip
    if not _compiling():
        return _run(args)
    return _native(args) if _exporting() else _uncompiled(args)


def _run(args: Args) -> Tensor:
    """Do it by kernels, recorded for backward where autograd asks for it."""
    input, residual, weight, bias, running_mean = args[:5]
    try:
        if _watched() or _half_parameters(input, weight, bias, running_mean):
            return _native(args)
        if running_mean is not None and running_mean.requires_grad and not args[6] and _grad_enabled():
            return _native(args)  # raises: no gradient of it
        if (own := dense(input)) is not input:
            input, args = own, (own, *args[1:])
        if _grad_enabled() and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            return _record(input, residual, weight, bias, args)
        return _forward(args, keep=False)[0]
    except Opaque:
        return _native(args)
    except FastbnError as error:
        raise _renamed(error) from None
    except AttributeError:
        _check_tensors(args)
        raise


def _watched() -> bool:
    """Tell whether PyTorch must see every operation: a function transform, a trace, forward-mode differentiation."""
    watched: bool = _transforming() or _tracing() or getattr(forward_ad, "_current_level", -1) >= 0
    return watched or _recording()


def _recording() -> bool:
    """Tell whether ``make_fx`` records operations."""
    if not _modes():
        return False
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    return mode is not None


def _half_parameters(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None) -> bool:
    """Tell whether parameters are half types as the input is, which these kernels do not have."""
    first = running_mean if weight is None and bias is None else bias if weight is None else weight
    return input.dtype in HALF and first is not None and first.dtype is input.dtype


def hidden() -> bool:
    """Tell whether values cannot be looked at: a graph is made of operations on them."""
    return _compiling() or _watched()


def count(counter: Tensor) -> None:
    """Add 1 in place, as a number: between other work an addition of arrays, PyTorch's or NumPy's, takes 12 us."""
    if not hidden():
        with contextlib.suppress(Opaque):
            array(counter)[()] += 1
            return
    counter.add_(1)


def _native(args: Args) -> Tensor:
    """Do it by PyTorch's own operators."""
    if _compiling() or _tracing() or _recording():  # a check would become part of the graph
        return native.run(args)
    return native.checked(args, hidden())


def _uncompiled(args: Args) -> Tensor:
    """Do it outside of a graph that is being compiled."""
    y: Tensor = torch.compiler.disable(_run)(args)
    return y


def _forward(args: Args, keep: bool) -> tuple[Tensor, Any]:
    """Return y and, if it is to be kept, what backward needs."""
    input, residual, weight, bias, mean, var, training, momentum, eps, activation, mask, lengths = args
    x, r = array(input), None if residual is None else array(residual)
    w, b = None if weight is None else parameter(weight), None if bias is None else parameter(bias)
    m, v = None if mean is None else array(mean), None if var is None else array(var)
    given = {"eps": eps, "activation": activation, "residual": r}
    some = mask is not None or lengths is not None
    if some:
        given |= masked.options(mask, lengths)
    if training:
        y, saved = functional.batch_norm_train(x, w, b, m, v, momentum=momentum, **given)
    elif keep or some:
        y, saved = functional.frozen(x, m, v, w, b, **given)
    else:
        y, saved = functional.batch_norm_infer(x, m, v, w, b, **given), None
    return tensor(y, input), saved


class _BatchNorm(torch.autograd.Function):  # type: ignore[misc]
    """What autograd records: the tensors are its own to keep, so it sees changes to them, and hooks may move them."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Any, weight: Any, bias: Any, args: Args) -> Tensor:
        y, saved = _forward(args, keep=True)
        gradients.keep(ctx, saved, y, args)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        seen = _grad_enabled() or _watched()
        return (gradients.differentiable if seen else gradients.by_kernels)(ctx, grad_output)


# The ``apply`` below ``Function.apply``, which looks for what is ruled out here and takes 3 us for it.
_record = super(torch.autograd.Function, _BatchNorm).apply


def _renamed(error: Any) -> Exception:
    """Return an error of the public functions, which call it x, about the input."""
    parts = getattr(error, "_parts", error.args)
    named = [re.sub(r"\bx\b", "input", part) for part in parts[:2]]  # not in what was given
    renamed: Exception = type(error)(*named, *parts[2:])
    return renamed


def _check_tensors(args: Args) -> None:
    """Raise if something is no tensor."""
    for name, value in zip(("input", "residual", "weight", "bias", "running_mean", "running_var"), args, strict=False):
        if not isinstance(value, Tensor) and (value is not None or name == "input"):
            raise ArgumentTypeError(name, "a torch.Tensor", type(value).__name__)
