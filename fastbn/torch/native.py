"""Batch norm by PyTorch's own operators: where it must see every operation, and where these kernels cannot work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbn import arguments, running
from fastbn import masked as arrays
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.torch import masked
from fastbn.torch.tensors import array, readable

Args = tuple[Any, ...]  # of ``functional.batch_norm``, input and residual first


def checked(args: Args, hidden: bool) -> Tensor:
    """Do it, once the arguments are what ``functional.batch_norm`` takes; ``hidden``: values cannot be looked at."""
    input, residual, weight, bias, mean, var, training, _, eps, _, mask, lengths = args
    shape = tuple(input.shape)
    if residual is not None:
        if residual.shape != input.shape:
            raise ArgumentValueError("residual", f"the shape of input, {shape}", tuple(residual.shape))
        if residual.dtype is not input.dtype:
            raise ArgumentTypeError("residual", f"the dtype of input, {input.dtype}", residual.dtype)
    for name, given in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
        if given is not None and given.shape != input.shape[1:2]:
            raise ArgumentValueError(name, f"one number per channel, shape {shape[1:2]}", f"shape {tuple(given.shape)}")
    running.both_or_neither(mean, var)
    if mean is None and not training:
        raise ArgumentTypeError("running_mean", "one number per channel", "NoneType")
    arguments.epsilon(eps, positive=training)
    if mask is not None or lengths is not None:
        _check_places(input, mask, lengths, training, hidden)
    return run(args)


def _check_places(input: Tensor, mask: Any, lengths: Any, training: bool, hidden: bool) -> None:
    """Raise if these do not say which values count; checked as arrays are, or others of their shape and dtype."""
    like: Any = SimpleNamespace(shape=tuple(input.shape), ndim=input.dim())
    stand_in = None
    if mask is not None:
        masked.check(mask)
        stand_in = np.broadcast_to(np.True_, tuple(mask.shape))
    arrays.valid(stand_in, _numbers(lengths, hidden), like, 1)
    if training and not hidden and all(map(readable, (input, lengths if mask is None else mask))) and (
        int(masked.valid(input, mask, lengths).sum()) == 1
    ):  # fmt: skip
        raise ArgumentValueError("input", "more than 1 value per channel when training", "1 that counts")


def _numbers(lengths: Any, hidden: bool) -> Any:
    """Return lengths as an array, zeros where they cannot be looked at."""
    if not isinstance(lengths, Tensor):
        return lengths
    if not hidden and readable(lengths):
        return array(lengths.detach())
    kind = bool if lengths.dtype is torch.bool else float if lengths.dtype.is_floating_point else int
    return np.zeros(tuple(lengths.shape), kind)


def run(args: Args) -> Tensor:
    """Do it."""
    input, residual, weight, bias, mean, var, training, momentum, eps, activation, mask, lengths = args
    relu = arguments.activation(activation)
    if mask is not None or lengths is not None:
        return masked.native(input, residual, weight, bias, mean, var, training, momentum, eps, relu, mask, lengths)
    y: Tensor = torch.nn.functional.batch_norm(input, mean, var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y
