"""What all absorbers share: writing weights back where they came from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

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
    if not (factor != 1.0).any():  # a shift alone: shared or quantized weights can stay
        return []
    value = site.input(index)
    weight = site.constant(index, what)
    quantized = dequantizer(value)
    if quantized is not None:
        inner = _untransposed(value, factor, quantized)
        if inner is None:
            raise Refused(f"the {what} of {site.node.op_type} is dequantized, and transformed or shared after that")
        shape = site.facts.constant(quantized.outputs[0])
        return rescale(site, quantized, weight.shape if shape is None else shape.shape, inner)
    return [SetConstant(site.node, index, lambda: scaled(weight, factor), site.dtype(value), axis)]


def _untransposed(value: ir.Value, factor: Array, maker: ir.Node) -> Array | None:
    """The factor on the output of `maker` that `factor` is on `value`, behind nothing but transpositions."""
    while len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None or node is maker:
            return None if node is None else factor
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm", tuple(range(factor.ndim))[::-1])
            factor = factor.transpose(np.argsort(np.asarray(perm)))
        elif node.op_type != "Identity":
            return None
        before = node.inputs[0]
        if before is None:
            return None
        value = before
    return None


def bias_edit(site: Site, index: int, compute: Callable[[Array], Array], size: int, hint: str) -> Edit:
    """Replace the bias at input `index` (zero if absent) by a function of it; both of shape (size,)."""
    if site.has(index):
        bias = site.constant(index, "bias")
        if bias.size and not bias.any():  # an exporter writes zeros of a wrong shape for Conv of three dimensions
            bias = np.zeros(size)
        if bias.shape != (size,):
            raise Refused(f"the bias of {site.node.op_type} has shape {bias.shape}, expected ({size},)")
    else:
        bias = np.zeros(size)
    dtype = site.dtype(site.input(index) if site.has(index) else site.input(1))
    wide = bias.astype(np.float64)
    return SetConstant(site.node, index, lambda: compute(wide), dtype, None, hint)
