"""What all absorbers share: writing weights back where they came from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..affine import Array
from ..plan import Edit, Refused, SetConstant, scaled
from ..registry import Site
from .quantized import dequantizer, rescale

__all__ = ["bias_edit", "vector_shape", "weight_edit"]


def vector_shape(size: int, axis: int, rank: int) -> tuple[int, ...]:
    """Shape of a vector that lies along `axis` of a tensor of `rank` dimensions."""
    return tuple(size if i == axis else 1 for i in range(rank))


def weight_edit(site: Site, index: int, what: str, factor: Array, axis: int | tuple[int, ...]) -> list[Edit]:
    """Multiply constant input `index` by `factor`, broadcast against it; `axis` has the channels of the result."""
    value = site.input(index)
    weight = site.constant(index, what)
    quantized = dequantizer(value)
    if quantized is not None:
        if quantized is not value.producer() or len(value.uses()) != 1:
            raise Refused(f"the {what} of {site.node.op_type} is dequantized, and transformed or shared after that")
        return rescale(site, quantized, weight.shape, factor)
    return [SetConstant(site.node, index, lambda: scaled(weight, factor), site.dtype(value), axis)]


def bias_edit(site: Site, index: int, compute: Callable[[Array], Array], size: int, hint: str) -> Edit:
    """Replace the bias at input `index` (zero if absent) by a function of it; both of shape (size,)."""
    if site.has(index):
        bias = site.constant(index, "bias")
        if bias.shape != (size,):
            raise Refused(f"the bias of {site.node.op_type} has shape {bias.shape}, expected ({size},)")
    else:
        bias = np.zeros(size)
    dtype = site.dtype(site.input(index) if site.has(index) else site.input(1))
    wide = bias.astype(np.float64)
    return SetConstant(site.node, index, lambda: compute(wide), dtype, None, hint)
