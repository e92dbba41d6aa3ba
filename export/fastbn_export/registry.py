"""One small place for each operator: how a map passes it or is swallowed, or why not.

Requirement: adding an operator is adding one class in one file of `carriers` or `absorbers`. A rule is pure: it reads
the model through its `Site` and returns what should be done as `Step` values, best first, or raises `Refused`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import onnx_ir as ir

from .affine import Array, ChannelAffine, Dims
from .facts import Facts
from .plan import FLOATS, Refused, Step
from .sparse import is_sparse

__all__ = ["Operator", "Site", "conditions", "lookup", "operator", "registered", "unaffected"]


@dataclass(frozen=True)
class Site:
    """A map that stands at an operator.

    Attributes
    ----------
    facts : Facts
        What is known about the model.
    node : onnx_ir.Node
        The operator.
    index : int
        Upstream, the output on which the map is wanted; downstream, the input from which it was taken away.
    affine : ChannelAffine
        The map.
    """

    facts: Facts
    node: ir.Node
    index: int
    affine: ChannelAffine

    @property
    def opset(self) -> int:
        """Version of the standard operators here."""
        return self.facts.opset(self.node)

    def has(self, index: int) -> bool:
        """Whether input `index` is present."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def input(self, index: int) -> ir.Value:
        """Input `index`, which must be present."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise Refused(f"{self.node.op_type} lacks input {index}")
        return value

    def constant(self, index: int, what: str) -> Array:
        """Input `index` as a constant, or the reason why it is none."""
        value = self.input(index)
        array = self.facts.constant(value)
        if array is None:
            raise Refused(not_constant(self.facts, value, f"the {what} of {self.node.op_type}"))
        return array

    def unknown(self, reason: str) -> Refused:
        """What to raise where sizes are unknown: `reason`, or which operand that decides them may be overridden."""
        for value in self.node.inputs[1:]:
            if value is not None and self.facts.is_overridable(value):
                return Refused(not_constant(self.facts, value, f"'{value.name}' of {self.node.op_type}"))
        return Refused(reason)

    def dims(self, value: ir.Value) -> Dims:
        """Shape of a value whose rank must be known."""
        dims = self.facts.dims(value)
        if dims is None:
            raise self.unknown(f"the rank of '{value.name}' is unknown")
        return dims

    def rank(self, value: ir.Value) -> int:
        """Rank of a value, which must be known."""
        rank = self.facts.rank(value)
        if rank is None:
            raise self.unknown(f"the rank of '{value.name}' is unknown")
        return rank

    def operand_axis(self, index: int) -> int:
        """The axis of operand `index` that the map's axis on the output is; the operand must have all channels."""
        rank = self.rank(self.input(index))
        axis = self.affine.axis - self.rank(self.node.outputs[0]) + rank
        size = self.facts.size(self.input(index), axis) if axis >= 0 else 1
        if not isinstance(size, int):
            raise Refused(f"the number of channels of '{self.input(index).name}' is unknown")
        if size != self.affine.size or axis < 0:
            raise Refused(f"an operand of {self.node.op_type} is broadcast along the channels")
        return axis

    def dtype(self, value: ir.Value) -> ir.DataType:
        """Floating type of a value, which must be known."""
        dtype = self.facts.dtype(value)
        if dtype is None:
            raise Refused(f"the type of '{value.name}' is unknown")
        if dtype not in FLOATS:
            raise Refused(f"'{value.name}' is of type {dtype.name}")
        return dtype

    def ints(self, name: str, index: int | None = None) -> list[int] | None:
        """A list of integers that is an attribute in old opsets and constant input `index` in new ones."""
        if index is not None and self.has(index):
            return [int(i) for i in self.constant(index, name).reshape(-1)]
        attribute = self.node.attributes.get(name)
        return None if attribute is None else [int(i) for i in attribute.as_ints()]

    def int(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.node.attributes.get_int(name, default))

    def float(self, name: str, default: float) -> float:
        """A float attribute."""
        return float(self.node.attributes.get_float(name, default))

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        return str(self.node.attributes.get_string(name, default))


def not_constant(facts: Facts, value: ir.Value, what: str) -> str:
    """Why a value is no constant, in words."""
    if facts.is_overridable(value):
        return f"{what} is an initializer that the caller may override (it is also a graph input)"
    if value.is_graph_input():
        return f"{what} is a graph input"
    if is_sparse(facts.model, value):
        return f"{what} is a sparse tensor, whose numbers are not read"
    return f"{what} is computed at run time"


class Operator:
    """Base of all operators. Override one or both directions; `upstream` and `downstream` say when, for the README."""

    upstream = ""
    downstream = ""
    joins = False
    """Whether maps wanted on several outputs are to be answered together, by `join`."""

    def join(self, site: Site, wanted: Mapping[int, ChannelAffine]) -> Sequence[Step]:
        """Output k must deliver ``wanted[k]`` of what it delivers now; the others must not change."""
        raise NotImplementedError

    def pull(self, site: Site) -> Sequence[Step]:
        """The output must deliver `site.affine` of what it delivers now."""
        raise Refused(f"{site.node.op_type} is not linear: no map passes it upstream")

    def push(self, site: Site) -> Sequence[Step]:
        """The input no longer has `site.affine` applied."""
        raise Refused(f"{site.node.op_type} is not linear: no map passes it downstream")

    def channels(self, site: Site) -> Array | None:
        """Which channels of input `site.index` the operator reads, along the map's axis; None for all."""
        return None


def unaffected(facts: Facts, node: ir.Node, index: int, affine: ChannelAffine) -> bool:
    """Whether a reader of a value sees only channels on which the map is the identity."""
    rule = registered().get(node.op_type) if node.domain == "" else None
    if rule is None or any(a.is_ref() for a in node.attributes.values()):
        return False
    try:
        seen = rule.channels(Site(facts, node, index, affine))
    except Refused:
        return False
    return seen is not None and affine.take(seen).is_identity


_Rule = TypeVar("_Rule", bound=Operator)
_OPERATORS: dict[str, Operator] = {}


def operator(*op_types: str) -> Callable[[type[_Rule]], type[_Rule]]:
    """Class decorator: register one instance of an `Operator` for these op types of the standard domain."""

    def register(cls: type[_Rule]) -> type[_Rule]:
        instance = cls()
        for op_type in op_types:
            if op_type in _OPERATORS:
                raise ValueError(f"op_type: expected one operator class each, got a second one for {op_type}")
            _OPERATORS[op_type] = instance
        return cls

    return register


def _load() -> None:
    for package in ("carriers", "absorbers"):
        module = importlib.import_module(f"{__package__}.{package}")
        for info in pkgutil.iter_modules(module.__path__):
            importlib.import_module(f"{module.__name__}.{info.name}")


def registered() -> dict[str, Operator]:
    """Every operator by its op type."""
    if not _OPERATORS:
        _load()
    return _OPERATORS


def lookup(node: ir.Node) -> Operator:
    """The operator of a node, or the reason why there is none."""
    found = registered().get(node.op_type) if node.domain == "" else None
    if found is None:
        where = f"{node.domain}::" if node.domain else ""
        raise Refused(f"{where}{node.op_type} neither carries nor absorbs a per-channel map")
    if any(a.is_ref() for a in node.attributes.values()):
        raise Refused(f"an attribute of {node.op_type} is a parameter of the enclosing function")
    return found


def conditions() -> list[tuple[str, str, str, str]]:
    """Rows (operators, kind, upstream, downstream) for the table in the README."""
    rows: dict[int, tuple[list[str], Operator]] = {}
    for op_type, instance in registered().items():
        rows.setdefault(id(instance), ([], instance))[0].append(op_type)
    out = []
    for names, instance in rows.values():
        kind = type(instance).__module__.split(".")[-2].rstrip("s")
        out.append((", ".join(sorted(names)), kind, instance.upstream or "no", instance.downstream or "no"))
    return sorted(out, key=lambda row: (row[1], row[0]))
