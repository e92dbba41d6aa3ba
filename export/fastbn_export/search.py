"""The search: follow one map upstream or downstream until absorbers have swallowed all of it, or say why not.

Requirement: pure and bounded. A rule may offer alternatives, best first; the search is depth-first with
backtracking over an explicit stack, and gives up after a fixed number of steps. All branches absorb, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from .affine import ChannelAffine
from .facts import Facts
from .plan import Edit, Fork, Refused, Step
from .registry import Site, lookup, unaffected

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
        return [step.by or node for node, step in self.trail if step.absorbs]

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
_Choice = tuple[_Todo, int, ir.Node, Iterator[Step]]


def upstream(
    facts: Facts, reader: ir.Node, value: ir.Value, affine: ChannelAffine, growth: int = 1, duplicate: bool = False
) -> Plan:
    """Plan to make `value`, read by `reader`, deliver the map itself, adding at most `growth` operators."""
    return _Search(facts, reader, True, growth, duplicate).run([_Task(value, affine, reader)])


def downstream(facts: Facts, source: ir.Node, value: ir.Value, affine: ChannelAffine, growth: int = 1) -> Plan:
    """Plan for `value`, the output of `source`, to lack the map: its readers take it."""
    return _Search(facts, source, False, growth, False).run(_readers(value, affine))


def _uses(value: ir.Value) -> list[Any]:
    """Who reads the numbers of a value; its shape is not changed by any map."""
    return [u for u in value.uses() if not (u.node.op_type in ("Shape", "Size") and u.node.domain == "")]


def _readers(value: ir.Value, affine: ChannelAffine) -> list[_Task]:
    if value.is_graph_output():
        raise Refused(f"'{value.name}' is a graph output")
    uses = _uses(value)
    if not uses:
        raise Refused(f"'{value.name}' has no readers")
    if len({use.node for use in uses}) != len(uses):
        raise Refused(f"an operator reads '{value.name}' twice")
    return [_Task(value, affine, use.node, use.idx) for use in uses]


class _Search:
    """One search: depth first, with the places to come back to on a stack."""

    def __init__(self, facts: Facts, source: ir.Node, up: bool, growth: int, duplicate: bool):
        self._facts, self._source, self._up, self._growth, self._duplicate = facts, source, up, growth, duplicate
        self._budget = _BUDGET
        self._plan = Plan()
        self._seen: set[ir.Node] = set()

    def run(self, tasks: list[_Task]) -> Plan:
        """Follow all tasks to their ends; raises `Refused` with the reason of the best alternative."""
        todo = _stack(tasks, None)
        choices: list[_Choice] = []
        first: Refused | None = None
        while True:
            try:
                if todo is None:
                    self._must_not_grow()
                    return self._plan
                task, todo = todo
                if task.affine.is_identity:
                    continue
                node = self._owner(task)
                steps = self._steps(task, node)
                todo = self._take(todo, node, steps, choices)
            except Refused as refusal:
                first = first or refusal
                if self._budget < 0:
                    raise
                todo = self._back(choices, first)

    def _take(self, todo: _Todo, node: ir.Node, steps: Iterator[Step], choices: list[_Choice]) -> _Todo:
        """Go on with the next alternative at `node`."""
        step = next(steps, None)
        if step is None:
            raise Refused(f"{node.op_type} has no place for the map")
        choices.append((todo, len(self._plan.trail), node, steps))
        self._plan.trail.append((node, step))
        self._seen.add(node)
        return _stack(self._following(node, step), todo)

    def _back(self, choices: list[_Choice], first: Refused) -> _Todo:
        """Undo up to the last place that has another alternative, and take it."""
        while choices:
            todo, length, node, steps = choices.pop()
            self._seen.difference_update(n for n, _ in self._plan.trail[length:])
            del self._plan.trail[length:]
            with suppress(Refused):
                return self._take(todo, node, steps, choices)
        raise first

    def _following(self, node: ir.Node, step: Step) -> list[_Task]:
        if self._up:
            return [_Task(value, affine, step.reader or node) for value, affine in step.onward]
        return [t for value, affine in step.onward if not affine.is_identity for t in _readers(value, affine)]

    def _owner(self, task: _Task) -> ir.Node:
        if not self._up:
            assert task.node is not None
            return task.node
        node = task.value.producer()
        if node is None:
            what = "a graph input" if task.value.is_graph_input() else "a constant"
            raise Refused(f"'{task.value.name}' is {what}")
        return node

    def _steps(self, task: _Task, node: ir.Node) -> Iterator[Step]:
        """The alternatives of one operator, once the place itself allows any."""
        self._budget -= 1
        if self._budget < 0:
            raise Refused("the search for an absorber was given up: too many operators on the way")
        value = task.value
        if node.graph is not self._source.graph:
            raise Refused(f"'{value.name}' crosses the border of a control-flow body")
        rule = lookup(node)
        if node in self._seen:
            raise Refused(f"two branches of the map meet at {node.op_type}")
        if not self._up:
            return iter(rule.push(Site(self._facts, node, task.index, task.affine)))
        index = value.index()
        steps = rule.pull(Site(self._facts, node, 0 if index is None else index, task.affine))
        shared = None
        if value.is_graph_output():
            shared = f"the output of {node.op_type} '{value.name}' is also a graph output"
        elif not self._alone(value, task):
            shared = f"the output of {node.op_type} '{value.name}' has other readers"
        if shared is None:
            return iter(steps)
        copies = [_copy(node, value, task.node, s) for s in steps if s.absorbs and not s.onward]
        if not self._duplicate or not copies:
            raise Refused(shared)
        return iter(copies)

    def _alone(self, value: ir.Value, task: _Task) -> bool:
        """Whether every other reader sees only channels that do not change."""
        others = [u for u in _uses(value) if u.node is not task.node]
        mine = len(_uses(value)) - len(others)
        return mine == 1 and all(unaffected(self._facts, u.node, u.idx, task.affine) for u in others)

    def _must_not_grow(self) -> None:
        if sum(edit.grows for edit in self._plan.edits) > self._growth:
            raise Refused("folding would add more operators than it removes")


def _copy(node: ir.Node, value: ir.Value, reader: ir.Node | None, step: Step) -> Step:
    """The same step on a copy of the operator that only `reader` reads."""
    assert reader is not None
    return Step.absorbed(Fork(node, value, reader, step.edits))


def _stack(tasks: list[_Task], rest: _Todo) -> _Todo:
    for task in reversed(tasks):
        rest = (task, rest)
    return rest
