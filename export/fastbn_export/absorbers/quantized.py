"""Weights behind DequantizeLinear: ``(q - zero) * scale`` takes a positive factor per channel into its scale."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..affine import Array
from ..plan import Edit, Refused, SetAttribute, SetConstant
from ..registry import Site

__all__ = ["dequantizer", "rescale"]


def dequantizer(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that a constant expression starts from, if any."""
    node = value.producer()
    while node is not None and node.op_type != "DequantizeLinear":
        data = node.inputs[0] if node.inputs else None
        node = None if data is None else data.producer()
    return node


def rescale(site: Site, node: ir.Node, shape: tuple[int, ...], factor: Array) -> list[Edit]:
    """Multiply the dequantized tensor of `shape` by `factor`, which must be positive and vary along one axis only."""
    axes = [i for i, d in enumerate(factor.shape) if d != 1]
    if len(axes) > 1:
        raise Refused("a dequantized weight takes a factor along one axis only")
    if np.any(factor <= 0):
        raise Refused("a dequantized weight takes positive factors only")
    if node.attributes.get_int("block_size", 0):
        raise Refused("the weight is quantized by blocks")
    inner = Site(site.facts, node, 0, site.affine)
    scale = inner.constant(1, "scale").astype(np.float64)
    dtype = site.dtype(inner.input(1))
    axis = axes[0] if axes else 0
    if scale.size > 1 and node.attributes.get_int("axis", 1) % len(shape) != axis and axes:
        raise Refused("the weight is quantized along another axis")
    if not axes:
        return [SetConstant(node, 1, lambda: scale * factor.reshape(-1)[0], dtype, 0 if scale.ndim else None)]
    if site.opset < 13 and scale.size == 1:
        raise Refused("a weight cannot be quantized per channel before opset 13")
    vector = scale.reshape(-1) * factor.reshape(-1)
    edits: list[Edit] = [
        SetConstant(node, 1, lambda: vector, dtype, 0),
        SetAttribute(node, ir.AttrInt64("axis", axis)),
    ]
    if inner.has(2) and scale.size == 1:
        zero = inner.constant(2, "zero point")
        wide = np.repeat(zero.reshape(-1)[:1], shape[axis])
        edits.append(SetConstant(node, 2, lambda: wide, site.facts.dtype(inner.input(2)) or dtype, None, exact=True))
    return edits
