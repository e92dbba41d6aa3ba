"""Batch norm for PyTorch on these kernels: the functional call, the modules, and a converter of whole models.

>>> import fastbn.torch
>>> model = fastbn.torch.convert(model)     # doctest: +SKIP

Imported only when asked for. Tensors and arrays share their memory: nothing is copied on the way to a kernel and back.
"""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError('fastbn.torch needs PyTorch: pip install "fastbn[torch]"') from None

from fastbn.torch.functional import batch_norm
from fastbn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert, revert

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "batch_norm", "convert", "revert"]
