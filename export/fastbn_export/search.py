"""The search: follow one map upstream or downstream until absorbers have swallowed all of it, or say why not.

Requirement: pure and bounded. A rule may offer alternatives, best first; the search is depth-first with
backtracking over an explicit stack, and gives up after a fixed number of steps. All branches absorb, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from .affine import ChannelAffine
from .facts import Facts
from .plan import Edit, Refused, Step
from .registry import Site, lookup

__all__ = ["Plan", "downstream", "upstream"]

_BUDGET = 4000
"""Most operators that one search may visit, alternatives included."""


@dataclass
class Plan:
    """A complete plan for one map.

    Attributes
    ----------
    trail : list of (node, step)
        What each operator on the way does, in the order of the search.
    """

    trail: list[tuple[ir.Node, Step]] = field(default_factory=list)

    @property
    def edits(self) -> list[Edit]:
        """All edits, in the order of the search."""
        return [edit for _, step in self.trail for edit in step.edits]

    @property
    def absorbers(self) -> list[ir.Node]:
        """The operators that swallowed the map."""
        return [node for node, step in self.trail if step.absorbs]

    @property
    def path(self) -> list[str]:
        """Op types of the carriers on the way."""
        return [node.op_type for node, step in self.trail if not step.absorbs]


@dataclass(frozen=True)
class _Task:
    """One map at one value: upstream it is wanted there, downstream it is missing there."""

    value: ir.Value
    affine: ChannelAffine
    node: ir.Node | None = None  # upstream: the reader on whose behalf; downstream: the reader that must take it
    index: int = 0


# A persistent list of tasks, so that a choice point can be returned to by keeping a reference.
_Todo = tuple[_Task, "_Todo"] | None


def upstream(facts: Facts, source: ir.Node, value: ir.Value, affine: ChannelAffine, budget: int = 0) -> Plan:
    """Plan to make `value`, read by `source`, deliver the map itself."""
    return _search(facts, source, [_Task(value, affine, source)], True, _BUDGET - 1)


def downstream(facts: Facts, source: ir.Node, value: ir.Value, affine: ChannelAffine) -> Plan:
    """Plan for `value`, the output of `source`, to lack the map: its readers take it."""
    return _search(facts, source, _readers(value, affine), False, _BUDGET)


def _readers(value: ir.Value, affine: ChannelAffine) -> list[_Task]:
    if value.is_graph_output():
        raise Refused(f"'{value.name}' is a graph output")
    uses = list(value.uses())
    if not uses:
        raise Refused(f"'{value.name}' has no readers")
    if len({use.node for use in uses}) != len(uses):
        raise Refused(f"an operator reads '{value.name}' twice")
    return [_Task(value, affine, use.node, use.idx) for use in uses]


def _steps_up(facts: Facts, source: ir.Node, task: _Task, seen: set[ir.Node]) -> Iterator[Step]:
    value, node = task.value, task.value.producer()
    if node is None:
        if facts.constant(value) is not None:
            raise Refused(f"'{value.name}' is a constant")
        raise Refused(f"'{value.name}' is a graph input")
    if node.graph is not source.graph:
        raise Refused(f"'{value.name}' comes from an enclosing graph")
    rule = lookup(node)
    index = value.index()
    steps = rule.pull(Site(facts, node, 0 if index is None else index, task.affine))
    if value.is_graph_output():
        raise Refused(f"the output of {node.op_type} '{value.name}' is also a graph output")
    uses = value.uses()
    if len(uses) != 1:
        raise Refused(f"the output of {node.op_type} '{value.name}' has other readers")
    if node in seen:
        raise Refused(f"the map reaches {node.op_type} twice")
    return iter(steps)


def _steps_down(facts: Facts, source: ir.Node, task: _Task, seen: set[ir.Node]) -> Iterator[Step]:
    node = task.node
    assert node is not None
    if node.graph is not source.graph:
        raise Refused(f"'{task.value.name}' is read inside a subgraph")
    rule = lookup(node)
    if node in seen:
        raise Refused(f"two branches of the map meet at {node.op_type}")
    return iter(rule.push(Site(facts, node, task.index, task.affine)))


def _search(facts: Facts, source: ir.Node, tasks: list[_Task], up: bool, budget: int) -> Plan:
    todo: _Todo = None
    for task in reversed(tasks):
        todo = (task, todo)
    plan = Plan()
    choices: list[tuple[_Todo, int, ir.Node, Iterator[Step]]] = []
    first: Refused | None = None
    steps: Iterator[Step] | None = None
    node: ir.Node = source
    while True:
        try:
            if steps is None:
                if todo is None:
                    _must_not_grow(plan)
                    return plan
                task, todo = todo
                if task.affine.is_identity:
                    continue
                budget -= 1
                if budget < 0:
                    raise Refused("the search for an absorber was given up: too many operators on the way")
                seen = {n for n, _ in plan.trail}
                steps = (_steps_up if up else _steps_down)(facts, source, task, seen)
                owner = task.value.producer() if up else task.node
                assert owner is not None
                node = owner
            step = next(steps)
            choices.append((todo, len(plan.trail), node, steps))
            plan.trail.append((node, step))
            onward = step.onward if up else None
            if onward is None:
                following = [t for value, affine in step.onward if not affine.is_identity for t in _readers(value, affine)]
            else:
                following = [_Task(value, affine, node) for value, affine in onward]
            for task in reversed(following):
                todo = (task, todo)
            steps = None
        except (Refused, StopIteration) as error:
            if isinstance(error, Refused):
                first = first or error
                if budget < 0:
                    raise
            if not choices:
                raise first or Refused("no operator takes the map") from None
            todo, length, node, steps = choices.pop()
            del plan.trail[length:]


def _must_not_grow(plan: Plan) -> None:
    """One operator goes (the batch normalization); no more than that may come."""
    if sum(edit.grows for edit in plan.edits) > 1:
        raise Refused("folding would add more operators than it removes")


