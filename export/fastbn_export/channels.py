"""Ranks and channel counts without shape inference: what a convolution's weights and the operators behind it fix.

Requirement: certain or None, by the operators' specifications alone. Most folds ask for no more than this, inference on
a copy of the model costs as much as a third of all folding, and inside functions there is nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from .affine import Dims, stated_size

if TYPE_CHECKING:
    from .facts import Facts

__all__ = ["declared", "known_dims", "merge"]

Memo = dict[ir.Value, "Dims | None"]
Rule = Callable[["Facts", ir.Node, list["Dims | None"]], "Dims | None"]


def declared(facts: Facts, value: ir.Value) -> Dims | None:
    """The shape that the model states for a value; that of a default says nothing of what the caller may give."""
    if value.const_value is not None and not facts.is_overridable(value):
        return tuple(int(d) for d in value.const_value.shape.numpy())
    shape = value.shape
    if shape is None:
        return None
    return tuple(stated_size(d if isinstance(d, int) else d.value) for d in shape.dims)


def merge(first: Dims | None, second: Dims | None) -> Dims | None:
    """The more precise of two statements about one shape; numbers beat symbols, symbols beat nothing."""
    if first is None or second is None:
        return second if first is None else first
    if len(first) != len(second):
        return first
    pairs = zip(first, second, strict=True)
    return tuple(b if a is None or (isinstance(a, str) and isinstance(b, int)) else a for a, b in pairs)


def known_dims(facts: Facts, value: ir.Value, memo: Memo) -> Dims | None:
    """The shape of `value` as far as its producers fix it: unknown sizes are None, an unknown rank is None.

    `memo` keeps what was found for the values on the way.
    """
    stack, waited = [value], set[ir.Value]()
    while stack:
        current = stack[-1]
        if current in memo:
            stack.pop()
            continue
        stated, node = declared(facts, current), current.producer()
        rule = None if node is None or node.domain != "" or current.index() != 0 else _RULES.get(node.op_type)
        if node is None or rule is None or (stated is not None and None not in stated):
            memo[current] = stated
            continue
        needed = [v for v in node.inputs[: _READS.get(node.op_type, 1)] if v is not None]
        waiting = [v for v in needed if v not in memo]
        if waiting and current not in waited:  # waited for already: a cycle, or an unknown input
            waited.add(current)
            stack += waiting
            continue
        inputs = [None if v is None else memo.get(v) for v in node.inputs]
        memo[current] = merge(stated, rule(facts, node, inputs))
    return memo[value]


def _like_input(facts: Facts, node: ir.Node, inputs: list[Dims | None]) -> Dims | None:
    return inputs[0] if inputs else None


def _conv(facts: Facts, node: ir.Node, inputs: list[Dims | None]) -> Dims | None:
    if len(inputs) < 2 or inputs[1] is None or len(inputs[1]) < 3:
        return None
    weight = inputs[1]
    if node.op_type == "Conv":
        channels = weight[0]
    else:
        per_group = weight[1]
        group = node.attributes.get("group")
        count = 1 if group is None else 0 if group.is_ref() else group.as_int()
        channels = per_group * count if isinstance(per_group, int) and count else None
    return (inputs[0][0] if inputs[0] else None, channels, *[None] * (len(weight) - 2))


def _pool(facts: Facts, node: ir.Node, inputs: list[Dims | None]) -> Dims | None:
    if not inputs or inputs[0] is None or len(inputs[0]) < 3:
        return None
    size = 1 if node.op_type.startswith("Global") else None
    return (*inputs[0][:2], *[size] * (len(inputs[0]) - 2))


def _concat(facts: Facts, node: ir.Node, inputs: list[Dims | None]) -> Dims | None:
    given = [dims for dims in inputs if dims is not None]
    if not given or any(len(dims) != len(given[0]) for dims in given):
        return None
    rank = len(given[0])
    attribute = node.attributes.get("axis")
    axis = 1 if attribute is None else rank if attribute.is_ref() else attribute.as_int()
    if not -rank <= axis < rank:
        return None
    found = given[0]
    for dims in given[1:]:
        found = merge(found, dims) or found
    pieces = [None if dims is None else dims[axis] for dims in inputs]
    total = sum(d for d in pieces if isinstance(d, int)) if all(isinstance(d, int) for d in pieces) else None
    return tuple(total if i == axis % rank else d for i, d in enumerate(found))


def _broadcast(facts: Facts, node: ir.Node, inputs: list[Dims | None]) -> Dims | None:
    if facts.opset(node) < 7 or len(inputs) != 2 or inputs[0] is None or inputs[1] is None:
        return inputs[0] if facts.opset(node) < 7 and inputs else None
    rank = max(len(inputs[0]), len(inputs[1]))
    first, second = ((1,) * (rank - len(dims)) + dims for dims in (inputs[0], inputs[1]))
    return tuple(_join(a, b) for a, b in zip(first, second, strict=True))


def _join(a: int | str | None, b: int | str | None) -> int | str | None:
    """The size that two sizes broadcast to: one of them unless it is 1, or unknown."""
    if a == 1 or a == b:
        return b
    if b == 1:
        return a
    sizes = [d for d in (a, b) if isinstance(d, int)]
    return sizes[0] if sizes else None


def _constant(facts: Facts, node: ir.Node, inputs: list[Dims | None]) -> Dims | None:
    if node.op_type == "Constant":
        value = node.attributes.get("value")
        return None if value is None or value.is_ref() else tuple(int(d) for d in value.value.shape.numpy())
    shape = _stored(facts, node, 0)
    return None if shape is None else tuple(shape)


def _stored(facts: Facts, node: ir.Node, index: int) -> list[int] | None:
    """The integers that an initializer holds; expressions may ask for shapes themselves, and are left to inference."""
    value = node.inputs[index] if index < len(node.inputs) else None
    array = facts.constant(value) if value is not None and value.is_initializer() else None
    return None if array is None else [int(i) for i in array.reshape(-1)]


def _unsqueeze(facts: Facts, node: ir.Node, inputs: list[Dims | None]) -> Dims | None:
    attribute = node.attributes.get("axes")
    axes = _stored(facts, node, 1) if attribute is None else None if attribute.is_ref() else attribute.as_ints()
    if axes is None or inputs[0] is None:
        return None
    rank = len(inputs[0]) + len(axes)
    added, rest = {axis % rank for axis in axes}, iter(inputs[0])
    return tuple(1 if i in added else next(rest) for i in range(rank)) if len(added) == len(axes) else None


def _transpose(facts: Facts, node: ir.Node, inputs: list[Dims | None]) -> Dims | None:
    dims, perm = inputs[0], node.attributes.get("perm")
    if dims is None or perm is None or perm.is_ref():
        return None if dims is None or perm is not None else dims[::-1]
    axes = list(perm.as_ints())
    return tuple(dims[axis] for axis in axes) if sorted(axes) == list(range(len(dims))) else None


_LIKE_INPUT = (
    *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"),
    *("LRN", "LpNormalization", "MeanVarianceNormalization", "Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu"),
    *("Celu", "Selu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Mish", "Gelu", "Softplus", "Softsign", "Clip"),
    *("Softmax", "LogSoftmax", "Hardmax", "Tanh", "Abs", "Neg", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Floor"),
    *("Ceil", "Round", "Identity", "Dropout", "Cast", "QuantizeLinear", "DequantizeLinear"),
)
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_LIKE_INPUT, _like_input),
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"), _pool),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _broadcast),
    **dict.fromkeys(("Constant", "ConstantOfShape"), _constant),
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
}
_READS = {"Conv": 2, "ConvTranspose": 2, "Add": 2, "Sub": 2, "Mul": 2, "Div": 2, "Concat": None, "ConstantOfShape": 0}
"""How many of its inputs' shapes a rule needs, where it is not one; None for all."""
