"""What is a per-channel affine map: BatchNormalization in inference, and runs of Mul/Add/Sub/Div by constants.

Requirement: training forms, per-activation forms and anything not certain are told apart here, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from .affine import Array, ChannelAffine
from .arithmetic import BINARY, ConstantOperand, constant_operand, lift, own_map
from .facts import Facts
from .plan import FLOATS, Refused
from .registry import not_constant

__all__ = ["BatchNorm", "Run", "Source", "find", "must_infer"]


class Source:
    """Something that applies a per-channel map and could vanish.

    Attributes
    ----------
    nodes : tuple of Node
        The operators, in order; they vanish together.
    """

    kind = ""
    complete = True

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


def _stored(facts: Facts, values: Iterable[ir.Value | None]) -> tuple[Any, ...]:
    return tuple(facts.stored(v) for v in values)


def _same(before: tuple[Any, ...], facts: Facts, values: Iterable[ir.Value | None]) -> bool:
    """Whether constants are stored where they were, so that what was computed from them still holds."""
    return all(a is not None and a is b for a, b in zip(before, _stored(facts, values), strict=True))


class BatchNorm(Source):
    """``y = (x - mean) / sqrt(var + epsilon) * scale + B``, every opset."""

    kind = "BatchNormalization"

    def __init__(self, nodes: tuple[ir.Node, ...]):
        super().__init__(nodes)
        self._known: tuple[tuple[Any, ...], ChannelAffine] | None = None

    def data(self) -> list[tuple[ir.Node, int]]:
        """Input 0."""
        return [(self.anchor, 0)]

    def affine(self, facts: Facts) -> ChannelAffine:
        """Scale ``gamma / sqrt(var + epsilon)`` and shift ``B - mean * scale`` along axis 1, in float64."""
        node = self.anchor
        if len(node.inputs) < 5 or node.inputs[0] is None:
            raise Refused("BatchNormalization lacks inputs")
        if (own := _own_statistics(node, facts)) is not None:
            return self._compute(facts, own)
        must_infer(node, facts)
        # What no fold has touched since it was last read need not be computed again.
        if self._known is None or not _same(self._known[0], facts, node.inputs[1:5]):
            computed = self._compute(facts)
            self._known = _stored(facts, node.inputs[1:5]), computed  # expressions are stored when they are read
        if facts.contradicts(node.inputs[0], 1, self._known[1].size):
            raise Refused("the data has no axis 1 of as many entries as the parameters of the normalization")
        return self._known[1]

    def _compute(self, facts: Facts, own: tuple[Array, Array] | None = None) -> ChannelAffine:
        node, parameters = self.anchor, []
        for name, value in zip(("scale", "bias", "mean", "variance"), node.inputs[1:5], strict=True):
            array = facts.constant(value)
            if array is None or value is None:
                what = f"the {name} of the normalization"
                raise Refused(not_constant(facts, value, what) if value is not None else f"{what} is missing")
            parameters.append(array.astype(np.float64))
        parameters[2:] = parameters[2:] if own is None else own
        gamma, beta, mean, variance = parameters
        if gamma.ndim != 1 or any(p.shape != gamma.shape for p in parameters):
            raise Refused("per-activation normalization: its parameters are not one value per channel")
        epsilon = np.float64(np.float32(node.attributes.get_float("epsilon", 1e-5)))
        with np.errstate(all="ignore"):
            scale = gamma / np.sqrt(variance + epsilon)
            result = ChannelAffine(scale, beta - mean * scale, 1)
        if not result.is_finite:
            raise Refused("the scale or the shift is not finite (variance + epsilon is not positive?)")
        return _snap(result, facts, node)


def _own_statistics(node: ir.Node, facts: Facts) -> tuple[Array, Array] | None:
    """Mean and variance of a constant that is normalized in training form (standardised weights); None otherwise."""
    if _training(node, facts) is None or any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        return None
    data = facts.constant(node.inputs[0])
    if data is None or data.ndim < 2 or not data.size:
        return None
    others = tuple(i for i in range(data.ndim) if i != 1)
    wide = data.astype(np.float64)
    return wide.mean(axis=others), wide.var(axis=others)


def _snap(affine: ChannelAffine, facts: Facts, node: ir.Node) -> ChannelAffine:
    """The identity, where the type of the tensor cannot tell a map from it (variance 1 - epsilon in float32).

    The type of the parameters is asked first, which needs no shape inference; data may be wider since opset 15.
    """
    if not affine.has_scale or affine.has_shift:
        return affine
    for value in (node.inputs[1], node.inputs[0]):
        dtype = (None if value is None else facts.dtype(value)) or ir.DataType.DOUBLE
        if dtype not in FLOATS or not (affine.scale.astype(dtype.numpy()) == 1).all():
            return affine
    return ChannelAffine(np.ones_like(affine.scale), affine.shift, affine.axis)


def must_infer(node: ir.Node, facts: Facts) -> None:
    """Refuse whatever is not inference with one mean and variance per channel."""
    opset = facts.opset(node)
    if any(a.is_ref() for a in node.attributes.values()):
        raise Refused("an attribute of the normalization is a parameter of the enclosing function")
    if (why := _training(node, facts)) is not None:
        raise Refused(f"training form: {why}")
    if opset < 9 and not node.attributes.get_int("spatial", 1):
        data = node.inputs[0]
        if data is None or facts.rank(data) != 2:
            raise Refused("per-activation normalization: spatial=0")
    data = node.inputs[0]
    if data is not None and data.shape is not None and len(data.shape) == 1:
        raise Refused("the normalization of a vector has no channel axis")


def _training(node: ir.Node, facts: Facts) -> str | None:
    """What says that the statistics are those of the batch, if anything does."""
    opset = facts.opset(node)
    if any(o.name and (o.uses() or o.is_graph_output() or opset < 14) for o in node.outputs[1:]):
        return "it also delivers statistics"
    if opset >= 14:
        return "training_mode=1" if node.attributes.get_int("training_mode", 0) else None
    return "is_test=0" if opset < 7 and not node.attributes.get_int("is_test", 0) else None


class Run(Source):
    """A batch normalization written out: a chain of Mul, Add, Sub and Div by constants, one after the other.

    Attributes
    ----------
    complete : bool
        Whether it both scales and shifts. A run that only scales is folded where possible, but not missed where not.
    """

    kind = "decomposed"

    def __init__(self, operands: list[ConstantOperand], anchor: ir.Node, facts: Facts, total: ChannelAffine):
        super().__init__(tuple(o.node for o in operands))
        self._data = [(o.node, o.data) for o in operands]
        self._anchor = anchor
        self._known = _stored(facts, self._constants()), total
        both = [{"Add": 0, "Sub": 0}.get(o.node.op_type, 1) for o in operands]
        self.complete = 0 in both and 1 in both

    @property
    def anchor(self) -> ir.Node:
        """The first operator that scales by channel."""
        return self._anchor

    def data(self) -> list[tuple[ir.Node, int]]:
        """The operand that is not constant."""
        return self._data

    def _constants(self) -> Iterator[ir.Value | None]:
        return (node.inputs[1 - data] for node, data in self._data)

    def affine(self, facts: Facts) -> ChannelAffine:
        """All operators as one map."""
        outputs = [node.outputs[0] for node, _ in self._data]
        if any(len(v.uses()) != 1 or v.is_graph_output() for v in outputs[:-1]):  # a copy reads it since it was found
            raise Refused("an operator within the run has other readers")
        chained = all(_origin(n.inputs[i]) is v for (n, i), v in zip(self._data[1:], outputs[:-1], strict=True))
        if chained and _same(self._known[0], facts, self._constants()):
            return self._known[1]
        total: ChannelAffine | None = None
        before: ir.Value | None = None
        for node, data in self._data:
            operand = constant_operand(facts, node)
            own = None if operand is None else own_map(facts, operand)
            if own is None or (before is not None and _origin(node.inputs[data]) is not before):
                raise Refused("the constants of the run are not one value per channel")
            total = own if total is None else _chain(total, own)
            if total is None:
                raise Refused("the operators of the run do not lie along one axis")
            before = node.outputs[0]
        if total is None or total.axis < 0:
            raise Refused("the run does not scale by channel")
        return total


def _identity(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Identity" and node.domain == ""


def _origin(value: ir.Value | None) -> ir.Value | None:
    """What a value is behind Identity operators that nobody else reads."""
    while value is not None and _identity(maker := value.producer()) and _reader(value) is not None:
        assert maker is not None
        value = maker.inputs[0]
    return value


def _reader(value: ir.Value) -> ir.Node | None:
    """The one operator that reads a value, once."""
    uses = value.uses()
    return next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None


def _chain(first: ChannelAffine, then: ChannelAffine) -> ChannelAffine | None:
    """`then` after `first`; scalars go along with any axis."""
    if first.axis == then.axis and first.size == then.size:
        return then.after(first)
    if then.axis == -1:
        lifted = lift(then, first.axis, first.size)
        return None if lifted is None else lifted.after(first)
    lifted = lift(first, then.axis, then.size)
    return None if lifted is None else then.after(lifted)


def find(facts: Facts, graph: ir.Graph) -> Iterator[BatchNorm | Run]:
    """All sources of one graph, in its order."""
    taken: set[ir.Node] = set()
    for node in graph:
        if node.domain != "" or not node.outputs:
            continue
        if node.op_type == "BatchNormalization":
            yield BatchNorm((node,))
        elif node.op_type in BINARY and node not in taken:
            run = _run(facts, node)
            if run is not None:
                taken.update(run.nodes)
                yield run


def _run(facts: Facts, node: ir.Node) -> Run | None:
    """The longest run that starts at `node` and scales by channel."""
    operands: list[ConstantOperand] = []
    total: ChannelAffine | None = None
    anchor: ir.Node | None = None
    current: ir.Node | None = node
    while current is not None:
        operand = constant_operand(facts, current)
        own = None if operand is None else own_map(facts, operand)
        if operand is None or own is None:
            break
        if operands and _origin(current.inputs[operand.data]) is not operands[-1].node.outputs[0]:
            break
        joined = own if total is None else _chain(total, own)
        if joined is None:
            break
        total = joined
        operands.append(operand)
        if anchor is None and own.axis >= 0 and operand.kind in ("x*c", "x/c"):
            anchor = current
        current = _reader(current.outputs[0])
        while current is not None and _identity(current):
            current = _reader(current.outputs[0])
        if current is not None and (current.graph is not node.graph or current.op_type not in BINARY):
            break
    if anchor is None and operands and total is not None:
        total, anchor = _behind_norm(facts, operands[0], total), node
    return None if anchor is None or total is None else Run(operands, anchor, facts, total)


def _behind_norm(facts: Facts, operand: ConstantOperand, total: ChannelAffine) -> ChannelAffine | None:
    """A run that does not scale by channel as a map, if it stands behind a BatchNormalization that can take it."""
    data = operand.node.inputs[operand.data]
    maker = None if data is None else data.producer()
    if data is None or maker is None or maker.op_type != "BatchNormalization" or maker.domain != "":
        return None
    size = facts.size(data, 1)
    return lift(total, 1, size) if isinstance(size, int) else None
