"""The search: follow one map upstream or downstream until absorbers have swallowed all of it, or say why not.

Requirement: pure and bounded. A rule may offer alternatives, best first; the search is depth-first with
backtracking over an explicit stack, and gives up after a fixed number of steps. All branches absorb, or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from .affine import ChannelAffine
from .facts import Facts
from .literals import taken
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
# Upstream, what waits at a value until all its readers have said what they want; never changed in place.
_Parked = dict[ir.Value, tuple[_Task, ...]]


@dataclass(frozen=True)
class _Choice:
    """A place to come back to: what was to do there, how long the plan was, and the alternatives not yet tried."""

    todo: _Todo
    parked: _Parked
    length: int
    node: ir.Node
    steps: Iterator[Step]


def upstream(
    facts: Facts, reader: ir.Node, value: ir.Value, affine: ChannelAffine, growth: int = 1, duplicate: bool = False
) -> Plan:
    """Plan to make `value`, read by `reader`, deliver the map itself, adding at most `growth` operators."""
    first = taken(facts, reader, Step.carry((value, affine)))
    if not first.onward:  # a constant
        return Plan([(reader, first)])
    return _Search(facts, reader, True, growth, duplicate).run([_Task(value, affine, reader)])


def downstream(facts: Facts, source: ir.Node, value: ir.Value, affine: ChannelAffine, growth: int = 1) -> Plan:
    """Plan for `value`, the output of `source`, to lack the map: its readers take it."""
    return _Search(facts, source, False, growth, False).run(_readers(value, affine))


def _uses(value: ir.Value) -> list[Any]:
    """Who reads the numbers of a value; its shape and its type are not changed by any map."""
    return [use for use in value.uses() if (use.node.op_type, use.idx) not in _NUMBERLESS or use.node.domain != ""]


_NUMBERLESS = frozenset({("Shape", 0), ("Size", 0), ("CastLike", 1)})
"""Inputs of which the operator reads no numbers."""


def _readers(value: ir.Value, affine: ChannelAffine) -> list[_Task]:
    if value.is_graph_output():
        raise Refused(f"'{value.name}' is a graph output")
    uses = _uses(value)
    if not value.uses():
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
        todo, parked = _stack(tasks, None), _Parked()
        choices: list[_Choice] = []
        first: Refused | None = None
        while True:
            try:
                if todo is None and not parked:
                    self._must_not_grow()
                    return self._plan
                if todo is None:
                    node, steps, parked = self._unpark(parked)
                else:
                    task, todo = todo
                    if task.affine.is_identity:
                        continue
                    node = self._owner(task)
                    if self._up and (wanted := self._wanted(task, node, parked)) is not None:
                        parked = wanted
                        continue
                    parked = _without(parked, task.value)
                    steps = self._steps(task, node, None)
                todo = self._take(todo, parked, node, steps, choices)
            except Refused as refusal:
                first = first or refusal
                if self._budget < 0:
                    raise
                todo, parked = self._back(choices, first)

    def _take(
        self, todo: _Todo, parked: _Parked, node: ir.Node, steps: Iterator[Step], choices: list[_Choice]
    ) -> _Todo:
        """Go on with the next alternative at `node`."""
        step = next(steps, None)
        if step is None:
            raise Refused(f"{node.op_type} has no place for the map")
        if self._up:
            step = taken(self._facts, node, step)
        choices.append(_Choice(todo, parked, len(self._plan.trail), node, steps))
        self._plan.trail.append((node, step))
        self._seen.add(node)
        return _stack(self._following(node, step), todo)

    def _back(self, choices: list[_Choice], first: Refused) -> tuple[_Todo, _Parked]:
        """Undo up to the last place that has another alternative, and take it."""
        while choices:
            choice = choices.pop()
            self._seen.difference_update(n for n, _ in self._plan.trail[choice.length :])
            del self._plan.trail[choice.length :]
            with suppress(Refused):
                return self._take(choice.todo, choice.parked, choice.node, choice.steps, choices), choice.parked
        raise first

    def _wanted(self, task: _Task, node: ir.Node, parked: _Parked) -> _Parked | None:
        """Park a task where other readers, or other outputs of the operator, may have a say; None if none has."""
        rule, value = lookup(node), task.value
        tasks = (*parked.get(value, ()), task)
        if not rule.joins and self._complete(tasks):
            return None
        return {**parked, value: tasks}

    def _complete(self, tasks: tuple[_Task, ...]) -> bool:
        """Whether all readers of a value have asked for its map, or see only channels that do not change."""
        value, affine = tasks[0].value, tasks[0].affine
        if value.is_graph_output():
            return False
        uses = _uses(value)
        if len(uses) > 1 or len(tasks) > 1:
            asked = Counter(task.node for task in tasks)
            for node, count in Counter(use.node for use in uses).items():
                if asked[node] != count:
                    others = [use for use in uses if use.node is node]
                    if asked[node] or not all(unaffected(self._facts, node, use.idx, affine) for use in others):
                        return False
            if any(not task.affine.equals(affine) for task in tasks[1:]):
                raise Refused(f"the readers of '{value.name}' would need different maps")
        return True

    def _unpark(self, parked: _Parked) -> tuple[ir.Node, Iterator[Step], _Parked]:
        """The steps of the last operator that tasks wait for, now that nobody else can ask it for anything."""
        owners = {self._owner(tasks[0]): value for value, tasks in parked.items()}
        node, graph = next(iter(owners)), self._source.graph
        if len(owners) > 1 and graph is not None:
            node = next((n for n in reversed(graph) if n in owners), node)
        rule, value = lookup(node), owners[node]
        if not rule.joins:
            if any(not other.affine.equals(parked[value][0].affine) for other in parked[value]):
                raise Refused(f"the readers of '{value.name}' would need different maps")
            # A copy of the operator is for one reader, and for all that it reads.
            reads = [use for use in _uses(value) if use.node is parked[value][0].node]
            if len({task.node for task in parked[value]}) > 1 or len(reads) != len(parked[value]):
                raise Refused(self._shared(value))
            return node, self._steps(parked[value][0], node, self._shared(value)), _without(parked, value)
        demands = {}
        for output in node.outputs:
            if output in parked:
                if not self._complete(parked[output]):
                    raise Refused(self._shared(output))
                demands[output.index() or 0] = parked[output][0].affine
                parked = _without(parked, output)
        self._may_pass(node, value)
        return node, iter(rule.join(Site(self._facts, node, *next(iter(demands.items()))), demands)), parked

    def _shared(self, value: ir.Value) -> str:
        """Why the output of an operator cannot change."""
        maker = value.producer()
        of = f"the output of {'' if maker is None else maker.op_type} '{value.name}'"
        return f"{of} is also a graph output" if value.is_graph_output() else f"{of} has other readers"

    def _following(self, node: ir.Node, step: Step) -> list[_Task]:
        for value, affine in step.onward:  # what no rule should do; a wrong map would be a wrong number
            if self._facts.contradicts(value, affine.axis, affine.size):
                raise Refused(f"the map does not fit '{value.name}' behind {node.op_type}")
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

    def _may_pass(self, node: ir.Node, value: ir.Value) -> None:
        """Refuse what no rule decides: too long a search, another graph, an operator that has a map already."""
        self._budget -= 1
        if self._budget < 0:
            raise Refused("the search for an absorber was given up: too many operators on the way")
        if node.graph is not self._source.graph:
            raise Refused(f"'{value.name}' crosses the border of a control-flow body")
        if node in self._seen:
            raise Refused(f"two branches of the map meet at {node.op_type}")

    def _steps(self, task: _Task, node: ir.Node, shared: str | None) -> Iterator[Step]:
        """The alternatives of one operator; copies of it only, if its output is `shared`."""
        rule = lookup(node)
        self._may_pass(node, task.value)
        if not self._up:
            return iter(rule.push(Site(self._facts, node, task.index, task.affine)))
        if shared is not None and not self._duplicate:
            raise Refused(shared)
        index = task.value.index()
        steps = rule.pull(Site(self._facts, node, 0 if index is None else index, task.affine))
        if shared is None:
            return iter(steps)
        copies = [_copy(node, task.value, task.node, s) for s in steps if _fits_a_copy(s, node)]
        if not copies:
            raise Refused(shared)
        return iter(copies)

    def _must_not_grow(self) -> None:
        if sum(edit.grows for edit in self._plan.edits) > self._growth:
            raise Refused("folding would add more operators than it removes")


def _fits_a_copy(step: Step, node: ir.Node) -> bool:
    """Whether a step ends at an operator and edits nothing else: what computes its weights is not copied."""
    return step.absorbs and not step.onward and all(edit.node is node for edit in step.edits)


def _copy(node: ir.Node, value: ir.Value, reader: ir.Node | None, step: Step) -> Step:
    """The same step on a copy of the operator that only `reader` reads."""
    assert reader is not None
    return Step.absorbed(Fork(node, value, reader, step.edits))


def _without(parked: _Parked, value: ir.Value) -> _Parked:
    return {v: tasks for v, tasks in parked.items() if v is not value} if value in parked else parked


def _stack(tasks: list[_Task], rest: _Todo) -> _Todo:
    for task in reversed(tasks):
        rest = (task, rest)
    return rest
