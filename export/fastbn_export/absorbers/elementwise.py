"""Add, Sub, Mul, Div (and Sum): by a constant they are maps themselves; of two branches, each takes the scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..affine import Array, ChannelAffine
from ..arithmetic import ConstantOperand, constant_operand, lift, own_map
from ..literals import spread
from ..plan import Bypass, Edit, Refused, SetConstant, Step
from ..registry import Operator, Site, operator
from .reparameterize import beside

__all__ = ["AddSub", "MulDiv"]


def _compose(site: Site, operand: ConstantOperand, up: bool) -> Step | None:
    """Take the operator out and let one map stand for both."""
    a = site.affine
    own = own_map(site.facts, operand)
    if own is None:
        return None
    wide = lift(own, a.axis, a.size)
    if wide is None and a.is_uniform and a.size:  # a uniform map lies along any axis
        a, wide = ChannelAffine.of(a.scale[0], a.shift[0], own.axis, own.size), own
    if wide is None:
        return None
    value, out = site.input(operand.data), site.node.outputs[0]
    edit = Bypass(site.node, operand.data, rename=up)
    if up:
        return Step.carry((value, a.after(wide)), edits=[edit])
    return None if out.is_graph_output() else Step.carry((out, wide.after(a)), edits=[edit])


def _replace(site: Site, operand: ConstantOperand, value: Array) -> Edit:
    """Write a new constant, in as few dimensions as it needs."""
    data = site.input(operand.data)
    if value.size > max(operand.value.size, site.affine.size):
        raise Refused(f"the constant of {site.node.op_type} would grow beyond both of its axes")
    if site.facts.rank(data) != value.ndim:
        raise Refused(f"the rank of '{data.name}' is unknown")
    if site.opset < 7 and operand.value.shape != value.shape:
        raise Refused(f"{site.node.op_type} broadcasts by attributes in opset {site.opset}")
    if not np.all(np.isfinite(value)):
        raise Refused(f"the constant of {site.node.op_type} would not be finite")
    scales = operand.kind[1] in "*/"
    kept = tuple(range(value.ndim)) if scales else None
    shape = value.shape
    if site.opset >= 7:  # leading ones say nothing
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        kept = tuple(range(len(shape))) if scales else None
    dtype = site.dtype(data)
    return SetConstant(site.node, operand.index, lambda: value.reshape(shape), dtype, kept, "constant")


def _operand_axis(site: Site, index: int) -> int:
    """The axis of operand `index` that the map's axis on the output is, in the broadcasting rules of the opset."""
    axis = site.operand_axis(index)
    if site.opset < 7 and axis != site.affine.axis:
        raise Refused(f"{site.node.op_type} broadcasts by attributes in opset {site.opset}")
    return axis


def _output_axis(site: Site) -> int:
    """The axis on the output of the map on the data; it must keep its length."""
    out, mine = site.rank(site.node.outputs[0]), site.rank(site.input(site.index))
    axis = site.affine.axis + out - mine
    if site.facts.size(site.node.outputs[0], axis) != site.affine.size:
        raise Refused(f"{site.node.op_type} broadcasts along the channels")
    return axis


def _vectors(site: Site, operand: ConstantOperand) -> tuple[Array, Array]:
    """Scale and shift, shaped along the axis of the operator's constant."""
    a, rank = site.affine, operand.value.ndim
    if a.axis >= rank:
        raise Refused(f"the rank of the input of {site.node.op_type} is unknown")
    return a.broadcast(a.scale, rank), a.broadcast(a.shift, rank)


@operator("Add", "Sub", "Sum")
class AddSub(Operator):
    """A constant takes the shift, branches take the scale."""

    upstream = (
        "a constant takes the shift, or the operator vanishes into the map; of several branches all take the scale "
        "and one the shift, all or none"
    )
    downstream = (
        "a constant takes the shift, or the operator vanishes into the map; a shift passes a sum of branches; beside a "
        "Conv of the same input the normalization, added or subtracted, becomes one of its taps"
    )

    def pull(self, site: Site) -> Sequence[Step]:
        """``s (x + c) + t``."""
        operand = constant_operand(site.facts, site.node)
        if operand is None:
            return self._branches(site)
        composed, kept = _compose(site, operand, True), self._deposit(site, operand)
        producer = site.input(operand.data).producer()
        keeps = not site.affine.has_scale or (producer is not None and producer.op_type in ("MatMul", "Einsum"))
        steps = [kept, composed] if keeps else [composed, kept]
        found = [s for s in steps if s is not None]
        if not found:
            raise Refused(f"the constant of {site.node.op_type} does not lie along the channels")
        return found

    def _deposit(self, site: Site, operand: ConstantOperand) -> Step | None:
        """``s (x + c) + t = s x + (s c + t)``."""
        a = site.affine
        try:
            axis = _operand_axis(site, operand.data)
            s, t = _vectors(site, operand)
            value = operand.value * s + (-t if operand.kind == "x-c" else t)
            edit = _replace(site, operand, value)
        except Refused:
            return None
        if not a.has_scale:
            return Step.absorbed(edit)
        return Step([edit], [(site.input(operand.data), a.linear().at(axis))], True)

    def _branches(self, site: Site) -> Sequence[Step]:
        a, node = site.affine, site.node
        inputs = [site.input(i) for i in range(len(node.inputs))]
        if len(set(inputs)) == 1 and node.op_type != "Sub":  # x + x = 2 x
            part = ChannelAffine(a.scale, a.shift / len(inputs), _operand_axis(site, 0))
            return [Step.carry(*((value, part) for value in inputs))]
        if len(set(inputs)) != len(inputs):
            raise Refused(f"{node.op_type} reads an operand twice")
        if all(site.facts.is_constant(v) for v in inputs):
            raise Refused(f"all operands of {node.op_type} are constant")
        return [self._shared(site, taker) for taker in range(len(inputs) if a.has_shift else 1)]

    def _shared(self, site: Site, taker: int) -> Step:
        """All operands take the scale, `taker` the shift too."""
        a, node, onward, edits = site.affine, site.node, [], list[Edit]()
        for i in range(len(node.inputs)):
            part = a if i == taker else a.linear()
            if i == 1 and node.op_type == "Sub":
                part = ChannelAffine(part.scale, -part.shift, part.axis)
            literal = spread(site, i, part)
            if literal is None:
                onward.append((site.input(i), part.at(_operand_axis(site, i))))
            else:
                edits += literal
        return Step.carry(*onward, edits=edits)

    def push(self, site: Site) -> Sequence[Step]:
        """``s x + t + c``."""
        a, out = site.affine, site.node.outputs[0]
        operand = constant_operand(site.facts, site.node)
        if operand is None:
            if a.has_scale:
                return [beside(site)]
            t = -a.shift if site.node.op_type == "Sub" and site.index == 1 else a.shift
            return [Step.carry((out, ChannelAffine(a.scale, t, _output_axis(site))))]
        if a.has_scale:
            composed = _compose(site, operand, False)
            steps = [] if composed is None else [composed]
            return [*steps, *self._keep(site, operand)]
        _output_axis(site)
        _, t = _vectors(site, operand)
        return [Step.absorbed(_replace(site, operand, operand.value + (t if operand.kind == "x+c" else -t)))]

    def _keep(self, site: Site, operand: ConstantOperand) -> list[Step]:
        """``s x + t + c = s (x + (t + c) / s)``, ``c - (s x + t) = s ((c - t) / s - x)``: the scale goes on alone."""
        a, out = site.affine, site.node.outputs[0]
        if np.any(a.scale == 0):
            return []
        try:
            axis = _output_axis(site)
            s, t = _vectors(site, operand)
            edit = _replace(site, operand, (operand.value + (t if operand.kind == "x+c" else -t)) / s)
        except Refused:
            return []
        return [Step([edit], [(out, a.linear().at(axis))], True)]


@operator("Mul", "Div")
class MulDiv(Operator):
    """A constant takes the scale, a factor takes the scale."""

    upstream = "a constant takes the scale, or the operator vanishes into the map; without shift a factor carries it"
    downstream = "a constant takes the scale, or the operator vanishes into the map; without shift it is carried"

    def pull(self, site: Site) -> Sequence[Step]:
        """``s (x c) + t``."""
        operand = constant_operand(site.facts, site.node)
        if operand is None:
            return self._factors(site)
        found = [s for s in (_compose(site, operand, True), self._scale_constant(site, operand)) if s is not None]
        if not found:
            raise Refused(f"the constant of {site.node.op_type} does not lie along the channels")
        return found

    def _scale_constant(self, site: Site, operand: ConstantOperand) -> Step | None:
        """``s (x c) = x (s c)``, ``s (x / c) = x / (c / s)``, ``s (c / x) = (s c) / x``."""
        a = site.affine
        if a.has_shift:
            return None
        try:
            s, _ = _vectors(site, operand)
            with np.errstate(all="ignore"):
                value = operand.value / s if operand.kind == "x/c" else operand.value * s
            return Step.absorbed(_replace(site, operand, value))
        except Refused:
            return None

    def _factors(self, site: Site) -> Sequence[Step]:
        if site.affine.has_shift:
            raise Refused(f"a shift does not pass {site.node.op_type} of two branches")
        if site.input(0) is site.input(1):
            raise Refused(f"{site.node.op_type} reads '{site.input(0).name}' twice")
        steps = []
        for index in (0, 1) if site.node.op_type == "Mul" else (0,):
            if site.facts.constant(site.input(index)) is not None:
                continue
            try:
                steps.append(Step.carry((site.input(index), site.affine.at(_operand_axis(site, index)))))
            except Refused:
                continue
        if not steps:
            raise Refused(f"no operand of {site.node.op_type} has all channels")
        return steps

    def push(self, site: Site) -> Sequence[Step]:
        """``(s x + t) c``."""
        a, out = site.affine, site.node.outputs[0]
        operand = constant_operand(site.facts, site.node)
        if operand is None:
            if a.has_shift or (site.node.op_type == "Div" and site.index == 1):
                raise Refused(f"the map does not pass {site.node.op_type} of two branches")
            return [Step.carry((out, a.at(_output_axis(site))))]
        steps = []
        composed = _compose(site, operand, False)
        if composed is not None:
            steps.append(composed)
        if operand.kind != "c/x" and not a.has_shift:
            _output_axis(site)
            s, _ = _vectors(site, operand)
            with np.errstate(all="ignore"):
                value = operand.value / s if operand.kind == "x/c" else operand.value * s
            steps.append(Step.absorbed(_replace(site, operand, value)))
        if not steps:
            raise Refused(f"the map does not pass {site.node.op_type}")
        return steps
