"""What is a per-channel affine map: BatchNormalization in inference, and runs of Mul/Add/Sub/Div by constants.

Requirement: training forms, per-activation forms and anything not certain are told apart here, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from .affine import ChannelAffine
from .facts import Facts
from .plan import FLOATS, Refused
from .registry import not_constant

__all__ = ["BatchNorm", "Source", "find"]


class Source:
    """Something that applies a per-channel map and could vanish.

    Attributes
    ----------
    nodes : tuple of Node
        The operators, in order; they vanish together.
    """

    kind = ""

    def __init__(self, nodes: tuple[ir.Node, ...]):
        self.nodes = nodes

    @property
    def anchor(self) -> ir.Node:
        """The operator whose name the report uses."""
        return self.nodes[0]

    @property
    def name(self) -> str:
        """Name in reports and in ``keep`` and ``skip``."""
        return self.anchor.name or self.anchor.outputs[0].name or self.anchor.op_type

    @property
    def alive(self) -> bool:
        """Whether all operators are still in the model."""
        return all(node.graph is not None for node in self.nodes)

    def data(self) -> list[tuple[ir.Node, int]]:
        """For each operator, which input the data comes in by."""
        raise NotImplementedError

    def affine(self, facts: Facts) -> ChannelAffine:
        """The map, from the constants as they are now; raises `Refused` with the reason why there is none."""
        raise NotImplementedError


class BatchNorm(Source):
    """``y = (x - mean) / sqrt(var + epsilon) * scale + B``, every opset."""

    kind = "BatchNormalization"

    def data(self) -> list[tuple[ir.Node, int]]:
        """Input 0."""
        return [(self.anchor, 0)]

    def affine(self, facts: Facts) -> ChannelAffine:
        """Scale ``gamma / sqrt(var + epsilon)`` and shift ``B - mean * scale`` along axis 1, in float64."""
        node = self.anchor
        _must_infer(node, facts)
        if len(node.inputs) < 5 or node.inputs[0] is None:
            raise Refused("BatchNormalization lacks inputs")
        parameters = []
        for name, value in zip(("scale", "bias", "mean", "variance"), node.inputs[1:5], strict=True):
            array = facts.constant(value)
            if array is None or value is None:
                what = f"the {name} of the normalization"
                raise Refused(not_constant(facts, value, what) if value is not None else f"{what} is missing")
            parameters.append(array.astype(np.float64))
        gamma, beta, mean, variance = parameters
        if gamma.ndim != 1 or any(p.shape != gamma.shape for p in parameters):
            raise Refused("per-activation normalization: its parameters are not one value per channel")
        epsilon = np.float64(np.float32(node.attributes.get_float("epsilon", 1e-5)))
        with np.errstate(all="ignore"):
            scale = gamma / np.sqrt(variance + epsilon)
            result = ChannelAffine(scale, beta - mean * scale, 1)
        if not result.is_finite:
            raise Refused("the scale or the shift is not finite (variance + epsilon is not positive?)")
        return result


def _must_infer(node: ir.Node, facts: Facts) -> None:
    """Refuse whatever is not inference with one mean and variance per channel."""
    opset = facts.opset(node)
    if any(a.is_ref() for a in node.attributes.values()):
        raise Refused("an attribute of the normalization is a parameter of the enclosing function")
    if any(o.name and (o.uses() or o.is_graph_output() or opset < 14) for o in node.outputs[1:]):
        raise Refused("training form: it also delivers statistics")
    if opset >= 14:
        if node.attributes.get_int("training_mode", 0):
            raise Refused("training form: training_mode=1")
    elif opset < 7 and not node.attributes.get_int("is_test", 0):
        raise Refused("training form: is_test=0")
    if opset < 9 and not node.attributes.get_int("spatial", 1):
        data = node.inputs[0]
        if data is None or facts.rank(data) != 2:
            raise Refused("per-activation normalization: spatial=0")
    data = node.inputs[0]
    if data is not None:
        if facts.rank(data) == 1:
            raise Refused("the normalization of a vector has no channel axis")
        dtype = facts.dtype(data)
        if dtype is not None and dtype not in FLOATS:
            raise Refused(f"its input is of type {dtype.name}")


def find(facts: Facts, graph: ir.Graph) -> Iterator[Source]:
    """All sources of one graph, in its order."""
    for node in graph:
        if node.op_type == "BatchNormalization" and node.domain == "" and node.outputs:
            yield BatchNorm((node,))
