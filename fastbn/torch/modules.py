"""PyTorch's batch norm modules on these kernels, and whole models converted to them and back.

They are subclasses that only replace ``forward``: constructor, state dict, and whatever looks for PyTorch's class finds
it.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from fastbn import arguments
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.torch.functional import batch_norm, count, hidden
from fastbn.torch.tensors import readable

Module = TypeVar("Module", bound=Any)

REFUSED = (TypeError, ValueError, RuntimeError, MemoryError)  # before anything moves


class _Forward:
    """What replaces ``forward`` of PyTorch's classes."""

    activation: str | None = None  # here too: a converted module has none of its own

    # ``torch.nn.utils.skip_init`` looks for ``device``.
    def __init__(self, *args: Any, activation: str | None = None, device: Any = None, **options: Any):
        super().__init__(*args, **({"device": device} if device is not None else {}), **options)
        arguments.activation(activation)
        self.activation = activation

    def forward(
        self: Any, input: Tensor, residual: Tensor | None = None, *, mask: Tensor | None = None, lengths: Any = None
    ) -> Tensor:
        """Normalise: activation(batch_norm(input) + residual); see ``batch_norm`` and PyTorch's class.

        Parameters
        ----------
        input : torch.Tensor
            C channels along axis 1, of the rank that PyTorch's class takes.
        residual : torch.Tensor, optional
            Shape and dtype of input.
        mask, lengths : optional
            Which values count, as in ``batch_norm``; a batch without any moves and counts nothing.

        Returns
        -------
        torch.Tensor
            Shape, dtype and memory order of input.
        """
        self._check_input_dim(input)
        try:  # half the time that PyTorch's attributes take
            own, state = self._parameters, self._buffers
            weight, bias, mean, var = own["weight"], own["bias"], state["running_mean"], state["running_var"]
        except KeyError:  # parametrized, sharded
            weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
        training, momentum, counter = self.training, self.momentum, None
        if training:
            if self.track_running_stats:
                counter = self.num_batches_tracked
            else:
                mean = var = None
        if momentum is None:
            momentum = 0.0 if counter is None else 1.0 / (float(counter) + 1.0)
        try:
            y = batch_norm(
                input, mean, var, weight, bias, training or (mean is None and var is None), momentum, self.eps,
                activation=self.activation, residual=residual, mask=mask, lengths=lengths,
            )  # fmt: skip
        except Exception as error:
            if counter is not None and not isinstance(error, REFUSED):
                _count(counter, mask, lengths)  # a checkpoint that has recomputed enough; the statistics have moved
            raise
        if counter is not None:
            _count(counter, mask, lengths)
        return y

    def extra_repr(self: Any) -> str:
        shown: str = super().extra_repr()  # type: ignore[misc]
        return shown if self.activation is None else f"{shown}, activation={self.activation!r}"


def _count(counter: Tensor, mask: Tensor | None, lengths: Any) -> None:
    """Count a batch, unless no value counts."""
    some = lengths if mask is None else mask
    if some is None:
        count(counter)
    elif hidden() or not readable(some):
        counter.add_(torch.as_tensor(some, device=counter.device).any().to(counter.dtype))
    elif torch.as_tensor(some).any():
        count(counter)


class BatchNorm1d(_Forward, torch.nn.BatchNorm1d):  # type: ignore[misc]
    """``torch.nn.BatchNorm1d`` on fastbn's kernels: input of shape (N, C) or (N, C, L).

    Parameters
    ----------
    *args, **options
        As PyTorch's class: num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True, device=None,
        dtype=None, *, bias=True.
    activation : {None, "relu"}
        Applied last, in the same pass. PyTorch's own tools do not know it and drop it (``fuse_conv_bn_eval``,
        ``convert_sync_batchnorm``).
    """


class BatchNorm2d(_Forward, torch.nn.BatchNorm2d):  # type: ignore[misc]
    """``torch.nn.BatchNorm2d`` on fastbn's kernels: input of shape (N, C, H, W); parameters as ``BatchNorm1d``."""


class BatchNorm3d(_Forward, torch.nn.BatchNorm3d):  # type: ignore[misc]
    """``torch.nn.BatchNorm3d`` on fastbn's kernels: input of shape (N, C, D, H, W); parameters as ``BatchNorm1d``."""


OURS = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def convert(module: Module) -> Module:
    """Put every ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` of a model on fastbn's kernels, the model itself included.

    Each stays the object it was, with its parameters, buffers, settings and hooks, and only changes its class (as
    PyTorch's lazy modules do): an optimizer made before goes on working. Subclasses, and ``SyncBatchNorm``, are left
    alone. A result has the memory order of its input, where PyTorch's is contiguous for some. Convert back
    (``revert``) before tools that look for PyTorch's exact classes: ``torch.fx``, quantization, ``torch.jit.script``.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.

    Returns
    -------
    torch.nn.Module
        The same module.

    Raises
    ------
    TypeError
        Not a module.
    """
    for found in _modules(module):
        if type(found) in OURS:
            found.__class__ = OURS[type(found)]
    return module


def revert(module: Module) -> Module:
    """Undo ``convert``: every module of ours becomes PyTorch's, in place; subclasses are left alone.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place.

    Returns
    -------
    torch.nn.Module
        The same module.

    Raises
    ------
    TypeError
        Not a module.
    ValueError
        A module has an activation, which PyTorch's has not; nothing is changed then.
    """
    ours = [found for found in _modules(module) if type(found) in THEIRS]
    for found in ours:
        if found.activation is not None:
            raise ArgumentValueError("module", "batch norms without activation", f"{found}")
    for found in ours:
        found.__dict__.pop("activation", None)
        found.__class__ = THEIRS[type(found)]
    return module


def _modules(module: Any) -> list[Any]:
    if not isinstance(module, torch.nn.Module):
        raise ArgumentTypeError("module", "a torch.nn.Module", type(module).__name__)
    return list(module.modules())
