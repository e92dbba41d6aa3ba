"""Fold every batch normalization that has an exact fold, and say why the rest stay.

Requirement: the input is never modified; each fold is all or nothing; folding twice changes nothing.

Rounds over all sources, upstream before downstream, until a round folds nothing: one fold can open the way for
another (a reader disappears, an Add becomes a bias), and only a fixed point is idempotent.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import inliner

from . import search
from .editor import Editor
from .facts import Facts, holding
from .files import ModelFileError, save_model
from .keep import Keep, keeper
from .plan import AddShift, Bypass, Edit, Refused
from .report import BnEntry, FoldReport
from .sources import BatchNorm, Source, find
from .sparse import MARK
from .store import inline_proto, load, save

__all__ = ["FoldResult", "Keep", "fold"]


class FoldResult:
    """The folded model and what was done.

    Attributes
    ----------
    report : FoldReport
        What was folded where, and why the rest stays.
    """

    def __init__(self, model: onnx.ModelProto | None, report: FoldReport, *, edited: ir.Model | None = None):
        self.report = report
        self._proto, self._edited = model, edited

    @property
    def model(self) -> onnx.ModelProto:
        """A new, self-contained model; equal to the input where nothing could be folded. Made on first use."""
        if self._proto is None:
            assert self._edited is not None
            with _uncollected():
                self._proto = inline_proto(self._edited)
        return self._proto

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file, whole or not at all, without a second copy of its weights.

        Weights beyond 2 GB go to ``<name>.data`` beside it.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        if self._edited is None:
            try:
                save_model(self.model, path)
            except ModelFileError as error:
                raise OSError(str(error)) from None
            return
        with _uncollected():
            save(self._edited, path)


def fold(
    model: onnx.ModelProto | str | os.PathLike[str],
    *,
    keep: Keep = None,
    duplicate: bool = False,
    skip: str | Iterable[str] = (),
) -> FoldResult:
    """Fold batch normalization into its neighbours, exactly.

    In inference, ``y = (x - mean) / sqrt(var + eps) * weight + bias`` is one scale and one shift per channel. It is
    carried to operators whose constants can take it (Ioffe & Szegedy 2015, algorithm 2), computed in float64 and
    rounded once to the type of those constants.

    Parameters
    ----------
    model : onnx.ModelProto or path
        The model; never modified. A path is loaded with its external data.
    keep : str, sequence of str, callable or None
        Batch normalizations to leave alone: names or glob patterns, or a function of the name.
    duplicate : bool
        Fold also behind a linear operator that has other readers, by folding a copy of that operator.
    skip : str or iterable of str
        Names whose fold is to be left out, taken literally.

    Returns
    -------
    FoldResult
        ``result.model`` and ``result.report``.

    Raises
    ------
    TypeError
        `model` is neither a model nor a path, or `keep` or `skip` is none of the above.
    ValueError
        The file is missing or no (binary) ONNX model, or its external data is not as it says.
    """
    kept = keeper(keep, skip)
    with _uncollected():
        proto, edited = load(model)
        engine = _Engine(edited, kept, duplicate)
        report = engine.run()
        if proto.functions and report.left:
            engine, report = _inlined(model, kept, duplicate, engine, report)
    external = any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    if engine.changed or external:
        return FoldResult(None, report, edited=engine.model)
    unchanged = onnx.ModelProto()
    unchanged.CopyFrom(proto)
    return FoldResult(unchanged, report)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the cyclic garbage collector.

    Nodes and values refer to each other; walking them all again and again while they are made costs half as much as
    the fold itself (10,000 batch normalizations) and more than linear time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():  # straight to the oldest generation: the next allocation walks over nothing
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def _inlined(
    source: Any, kept: Callable[[str], bool], duplicate: bool, engine: _Engine, report: FoldReport
) -> tuple[_Engine, FoldReport]:
    """Fold again with functions inlined: those that hold a batch normalization, then all; the first that folds most."""
    best, before = (engine, report), report
    for everything in (False, True):
        proto, model = load(source)
        holders = set(model.functions) if everything else holding(model)
        try:
            inliner.InlinePass(lambda function, chosen=holders: function.identifier() in chosen)(model)  # type: ignore[misc]
        except (
            ValueError,
            ir.passes.PassError,
        ):  # other opsets, graph parameters, recursion: leave the functions alone
            continue
        if [v.name for v in model.graph.outputs] != [o.name for o in proto.graph.output]:
            continue
        other = _Engine(model, kept, duplicate)
        after = other.run()
        if after.folded > best[1].folded:
            after.ops_before, after.parameters_before = before.ops_before, before.parameters_before
            best = other, after
        if not best[1].left:
            break
    return best


class _Engine:
    """One fold of one model, in place on its own copy."""

    def __init__(self, model: ir.Model, kept: Callable[[str], bool], duplicate: bool):
        self.model = model
        self.changed = False
        self._kept = kept
        self._duplicate = duplicate
        self._facts = Facts(model)
        self._editor = Editor(self._facts)
        self._entries: dict[ir.Node, BnEntry] = {}
        self._minor: set[ir.Node] = set()
        self._original = {node for _, graph in self._facts.graphs for node in graph}
        self._known: dict[ir.Node, BatchNorm] = {}

    def run(self) -> FoldReport:
        report = FoldReport()
        report.ops_before, report.parameters_before = self._count()
        sources = self._sources()
        while self._round(sources):
            self.changed = True
            sources = self._sources()
        report.entries = [e for node, e in self._entries.items() if self._reported(node, e)]
        report.ops_after, report.parameters_after = self._count()
        return report

    def _reported(self, node: ir.Node, entry: BnEntry) -> bool:
        """Whether the original model had it; folds make copies of normalizations, and runs of their own."""
        return node in self._original and (entry.folded or node not in self._minor)

    def _sources(self) -> list[Source]:
        found: list[Source] = []
        for scope, graph in self._facts.graphs:
            for source in find(self._facts, graph):
                if isinstance(source, BatchNorm):  # the one of the round before knows its map already
                    source = self._known.setdefault(source.anchor, source)
                found.append(source)
                if source.anchor not in self._entries:
                    self._entries[source.anchor] = BnEntry(source.name, source.kind, scope=scope)
                    if not source.complete:
                        self._minor.add(source.anchor)
        return found

    def _round(self, sources: list[Source]) -> int:
        done = 0
        for upstream in (True, False):
            for source in sources:
                if source.alive:
                    done += self._try(source, upstream)
        return done

    def _try(self, source: Source, upstream: bool) -> bool:
        entry = self._entries[source.anchor]
        try:
            if self._kept(source.name):
                raise Refused("kept by request")
            plan, edits = self._prepared(source, upstream)
            if upstream and _adds(edits):
                with suppress(Refused):  # downstream, if that leaves nothing behind
                    other = self._prepared(source, False)
                    if not _adds(other[1]):
                        (plan, edits), upstream = other, False
        except Refused as refusal:
            _note(entry, upstream, refusal.reason)
            return False
        self._editor.commit(edits)
        entry.folded, entry.reason = True, None
        entry.direction = ("upstream" if upstream else "downstream") if plan.trail else None
        entry.absorber = [f"{n.name or n.outputs[0].name} ({n.op_type})" for n in plan.absorbers]
        entry.path = plan.path
        return True

    def _prepared(self, source: Source, upstream: bool) -> tuple[search.Plan, list[Edit]]:
        """A plan and its edits, ready to be committed."""
        plan = self._plan(source, upstream)
        edits = _in_order(plan, source, upstream)
        for edit in edits:
            edit.prepare()
        return plan, edits

    def _plan(self, source: Source, upstream: bool) -> search.Plan:
        affine = source.affine(self._facts)
        if affine.is_identity:
            return search.Plan()
        growth = len(source.nodes) if source.complete else len(source.nodes) - 1
        if upstream:
            first, index = source.data()[0]
            value = first.inputs[index]
            if value is None:
                raise Refused("it has no input")
            return search.upstream(self._facts, first, value, affine, growth, self._duplicate)
        last = source.nodes[-1]
        return search.downstream(self._facts, last, last.outputs[0], affine, growth)

    def _count(self) -> tuple[dict[str, int], int]:
        ops: Counter[str] = Counter()
        parameters = 0
        for _, graph in self._facts.graphs:
            parameters += sum(_elements(v.const_value) for v in graph.initializers.values())
            for node in graph:
                if MARK in node.attributes:
                    continue
                ops[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
                value = node.attributes.get("value") if node.op_type == "Constant" and node.domain == "" else None
                if value is not None and not value.is_ref():
                    parameters += _elements(value.value)
        return dict(sorted(ops.items())), parameters


def _elements(tensor: ir.TensorProtocol | None) -> int:
    if isinstance(tensor, ir.TensorProtoTensor):
        return prod(tensor.raw.dims)  # without making a Shape
    return 0 if tensor is None else int(tensor.size)


def _note(entry: BnEntry, upstream: bool, reason: str) -> None:
    """Keep both reasons when they differ."""
    if upstream or entry.reason is None or entry.reason == reason:
        entry.reason = reason
    else:
        entry.reason = f"upstream: {entry.reason}; downstream: {reason}"


def _in_order(plan: search.Plan, source: Source, upstream: bool) -> list[Edit]:
    """All edits of a fold, producers first where names move down, and the source itself last."""
    steps = reversed(plan.trail) if upstream else iter(plan.trail)
    edits = [edit for _, step in steps for edit in step.edits]
    rename = upstream and not _is_constant(plan, source) if plan.trail else _identity_renames(source)
    return edits + [Bypass(node, index, rename) for node, index in source.data()]


def _adds(edits: list[Edit]) -> bool:
    """Whether an Add is left in the place of the normalization."""
    return any(isinstance(edit, AddShift) for edit in edits)


def _is_constant(plan: search.Plan, source: Source) -> bool:
    """Whether the source reads a constant, which took the map where it is read and keeps its name."""
    out = source.nodes[-1].outputs[0]
    if not any(node is source.nodes[0] for node, _ in plan.trail):
        return False
    if out.is_graph_output():
        raise Refused("it stands between a constant and a graph output")
    return True


def _identity_renames(source: Source) -> bool:
    """Whether the input of an identity can take over the name of its output; refuses where neither can vanish."""
    (first, index), out = source.data()[0], source.nodes[-1].outputs[0]
    value = first.inputs[index]
    if value is None:
        raise Refused("it has no input")
    if not out.is_graph_output():
        return False
    producer = value.producer()
    if producer is None or producer.graph is not first.graph or value.is_graph_output():
        raise Refused("it is the identity, but it stands between two names that must both stay")
    return True
