"""Behind DequantizeLinear: ``(q - zero) * scale`` takes a factor per channel, its size into the scale."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir

from ..affine import Array
from ..plan import Edit, Refused, SetAttribute, SetConstant, Step
from ..registry import Operator, Site, operator

__all__ = ["DequantizeLinear", "dequantizer", "rescale"]


def dequantizer(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that a constant expression starts from, if any."""
    node = value.producer()
    while node is not None and node.op_type != "DequantizeLinear":
        data = node.inputs[0] if node.inputs else None
        node = None if data is None else data.producer()
    return node


def rescale(site: Site, node: ir.Node, shape: tuple[int, ...], factor: Array) -> list[Edit]:
    """Multiply the dequantized tensor of `shape` by `factor`, which may vary along one axis.

    The scale takes its size. Its sign, and zero, are taken by the integers: ``-(q - zero) = (2 zero - q) - zero``.
    """
    axes = [i for i, d in enumerate(factor.shape) if d != 1]
    if len(axes) > 1:
        raise Refused("a dequantized weight takes a factor along one axis only")
    if node.attributes.get_int("block_size", 0):
        raise Refused("the weight is quantized by blocks")
    inner = Site(site.facts, node, 0, site.affine)
    scale = inner.constant(1, "scale").astype(np.float64)
    axis = axes[0] if axes else 0
    if scale.size > 1 and node.attributes.get_int("axis", 1) % len(shape) != axis and axes:
        raise Refused("the weight is quantized along another axis")
    edits = _turned(inner, factor) if np.any(factor <= 0) else []
    dtype, size = site.dtype(inner.input(1)), np.where(factor == 0, 1.0, np.abs(factor)).reshape(-1)
    if not axes:
        return [*edits, SetConstant(node, 1, lambda: scale * size[0], dtype, 0 if scale.ndim else None)]
    if site.opset < 13 and scale.size == 1:
        raise Refused("a weight cannot be quantized per channel before opset 13")
    vector = scale.reshape(-1) * size
    edits += [SetConstant(node, 1, lambda: vector, dtype, 0), SetAttribute(node, ir.AttrInt64("axis", axis))]
    if inner.has(2) and scale.size == 1:
        zero = inner.constant(2, "zero point")
        wide = np.repeat(zero.reshape(-1)[:1], shape[axis])
        edits.append(SetConstant(node, 2, lambda: wide, site.facts.dtype(inner.input(2)) or dtype, None, exact=True))
    return edits


def _turned(inner: Site, factor: Array) -> list[Edit]:
    """The integers whose differences from the zero point have changed their sign where `factor` is negative."""
    node, dtype = inner.node, inner.facts.dtype(inner.input(0))
    whole = inner.facts.constant(inner.input(0))
    if whole is None or dtype is None or not dtype.is_integer():
        raise Refused("a dequantized tensor takes positive factors only")
    zero = inner.constant(2, "zero point").astype(np.int64) if inner.has(2) else np.zeros((), np.int64)
    if zero.size > 1:
        along = [1] * whole.ndim
        along[node.attributes.get_int("axis", 1)] = -1
        zero = zero.reshape(along)
    zero = zero if zero.size > 1 else zero.reshape(())
    wide = whole.astype(np.int64)
    turned = np.where(factor < 0, 2 * zero - wide, np.where(factor == 0, zero, wide))
    info = ml_dtypes.iinfo(whole.dtype)
    if turned.size and (turned.min() < info.min or turned.max() > info.max):
        raise Refused(f"a negative factor does not fit into quantized weights of type {dtype.name.lower()}")
    value = turned.astype(whole.dtype)
    return [SetConstant(node, 0, lambda: value, dtype, None, exact=True)]


@operator("DequantizeLinear")
class DequantizeLinear(Operator):
    """``(q - zero) * scale`` of integers at run time: the scale takes a positive factor, per channel since opset 13."""

    upstream = "absorbs a positive scale into its own, without shift: a shift is no whole number of quantization steps"

    def pull(self, site: Site) -> Sequence[Step]:
        """Rescale."""
        a = site.affine
        if a.has_shift:
            raise Refused("a shift does not pass DequantizeLinear: it is no whole number of quantization steps")
        rank = site.rank(site.node.outputs[0])
        factor = a.scale[:1].reshape((1,) * rank) if a.is_uniform else a.broadcast(a.scale, rank)
        shape = tuple(a.size if i == a.axis else 1 for i in range(rank))
        return [Step.absorbed(*rescale(site, site.node, shape, factor))]
