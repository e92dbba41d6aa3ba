"""``conv(x) + bn(x)``: the normalization is one more tap of the convolution beside it (RepVGG, MobileOne).

Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again": an identity branch is a 1x1 kernel of the identity,
and a 1x1 kernel is the tap of a larger one that sits on the input position.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..affine import Array, ChannelAffine
from ..plan import Bypass, Edit, Refused, SetConstant, Step
from ..registry import Site
from .common import bias_edit
from .quantized import dequantizer

__all__ = ["beside"]


def beside(site: Site) -> Step:
    """Fold a map that stands right before an Add into a Conv of the same input among the other operands.

    What is subtracted (FastViT: ``conv(x) - bn(x)``) is a tap of the other sign.
    """
    source, a = site.input(site.index).producer(), site.affine
    subtracted = site.node.op_type == "Sub" and site.index == 1
    if not (site.node.op_type == "Add" or subtracted) or source is None or source.op_type != "BatchNormalization":
        raise Refused(f"the other operand of {site.node.op_type} would need the same scale")
    other = site.input(1 - site.index)
    tap = ChannelAffine(-a.scale, -a.shift, a.axis) if subtracted else a
    conv = _find(Site(site.facts, site.node, site.index, tap), source.inputs[0], other)
    return Step([*_edits(conv), Bypass(site.node, 1 - site.index, rename=True)], [], True, by=conv.node)


def _find(site: Site, data: ir.Value | None, value: ir.Value) -> Site:
    """The Conv of `data` that `value` is, or is the sum of; nobody else may read what changes."""
    stack = [value]
    while stack:
        current = stack.pop()
        node = current.producer()
        if node is None or node.graph is not site.node.graph or current.is_graph_output() or len(current.uses()) != 1:
            continue
        if node.op_type == "Add" and node.domain == "":
            stack += [v for v in node.inputs if v is not None]
        if node.op_type == "Conv" and node.domain == "" and node.inputs[0] is data:
            return Site(site.facts, node, 0, site.affine)
    raise Refused(f"the other operand of {site.node.op_type} would need the same scale")


def _edits(conv: Site) -> list[Edit]:
    a, weight = conv.affine, conv.constant(1, "weight")
    kernel, group = weight.shape[2:], conv.int("group", 1)
    if a.axis != 1 or weight.shape[0] != a.size or weight.shape[1] * group != a.size:
        raise Refused("the Conv beside the normalization changes the number of channels")
    if dequantizer(conv.input(1)) is not None or conv.text("auto_pad", "NOTSET") not in ("NOTSET", ""):
        raise Refused("the Conv beside the normalization has no fixed floating kernel")
    ones = [1] * len(kernel)
    pads, dilations = conv.ints("pads") or [0] * (2 * len(kernel)), conv.ints("dilations") or ones
    tap = []
    for i, size in enumerate(kernel):
        before, after = pads[i], pads[i + len(kernel)]
        if before % dilations[i] or before + after != dilations[i] * (size - 1) or before < 0 or after < 0:
            raise Refused("the Conv beside the normalization moves the positions")
        tap.append(before // dilations[i])
    if (conv.ints("strides") or ones) != ones:
        raise Refused("the Conv beside the normalization skips positions")
    channels = np.arange(a.size)

    def with_tap() -> Array:
        new: Array = weight.astype(np.float64)
        new[(channels, channels % weight.shape[1], *tap)] += a.scale
        return new

    edits: list[Edit] = [SetConstant(conv.node, 1, with_tap, conv.dtype(conv.input(1)), 0)]
    if a.has_shift:
        edits.append(bias_edit(conv, 2, lambda b: b + a.shift, a.size, "bias"))
    return edits
