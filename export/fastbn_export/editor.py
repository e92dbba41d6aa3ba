"""Carry a plan out: the only place that changes the model.

Requirement: shared constants are copied, never changed; what no one reads any more goes away; names stay unique, and
the names that readers and graph outputs know survive.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .affine import Array
from .facts import Facts
from .originals import originals
from .plan import AddShift, BecomeGemm, Bypass, Edit, Fork, SetAttribute, SetConstant, SetInput
from .protos import unedited_names

__all__ = ["Editor"]

_SHAPES = frozenset(("Expand", "Shape", "Size", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Reshape", "Cast"))
"""What shapes are computed with at run time."""


class Editor:
    """Applies prepared edits to one model.

    Parameters
    ----------
    facts : Facts
        Knows the model; told about new values.
    """

    def __init__(self, facts: Facts):
        self._facts = facts
        self._model = facts.model
        self._names: set[str] | None = None
        self._lists_initializers_as_inputs = facts.model.ir_version < 4

    def commit(self, edits: Sequence[Edit]) -> None:
        """Apply edits in order. They are prepared, so nothing can fail half-way."""
        for edit in edits:
            if isinstance(edit, SetConstant):
                self._set_constant(edit.node, edit.index, edit.value, edit.hint)
            elif isinstance(edit, SetInput):
                self._connect(edit.node, edit.index, edit.value)
            elif isinstance(edit, SetAttribute):
                edit.node.attributes.add(edit.attribute)
            elif isinstance(edit, AddShift):
                self._add_shift(edit)
            elif isinstance(edit, BecomeGemm):
                edit.node.op_type = "Gemm"
                self._set_constant(edit.node, 2, edit.value, "bias")
            elif isinstance(edit, Fork):
                self._fork(edit)
            elif isinstance(edit, Bypass):
                self._bypass(edit)
            else:
                raise TypeError(f"edit: expected a known edit, got {type(edit).__name__}")

    def _set_constant(self, node: ir.Node, index: int, array: Array | None, hint: str) -> None:
        assert array is not None
        for out in node.outputs:
            self._facts.forget(out)
        old = node.inputs[index] if index < len(node.inputs) else None
        alone = old is not None and len(old.uses()) == 1 and not old.is_graph_output()
        if alone and old is not None and old.is_initializer() and (not old.is_graph_input() or self._ir3_input(old)):
            old.const_value = ir.Tensor(array, name=old.name, doc_string=_doc(old))
            old.shape = ir.Shape(array.shape)
            self._facts.forget_shape(old)
            self._restate_input(old)
            return
        if old is not None and (filler := self._refill(old, array)) is not None:
            node.replace_input_with(index, filler)
            self._drop_if_dead(old)
            return
        fresh = f"{node.name or node.outputs[0].name}.{hint or 'constant'}"
        name = old.name if old is not None and old.name else fresh
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, None)
        if old is not None:
            self._drop_if_dead(old)
        node.replace_input_with(index, self._new_constant(node, array, name))

    def _refill(self, old: ir.Value, array: Array) -> ir.Value | None:
        """A ConstantOfShape that was uniform and still is stays one: its file size was nothing."""
        maker = old.producer()
        if maker is None or maker.op_type != "ConstantOfShape" or array.size < 2:
            return None
        if any(array.strides) and (array != array.flat[0]).any():
            return None
        before = self._facts.constant(old)
        if before is None or array.shape != before.shape or maker.graph is None:
            return None
        value = ir.AttrTensor("value", ir.Tensor(array.flat[:1]))
        if len(old.uses()) == 1 and not old.is_graph_output():
            maker.attributes.add(value)
            self._facts.forget(old)
            return old
        new = ir.Node(
            "", "ConstantOfShape", maker.inputs, [value], name=self._unique(f"{maker.name or old.name}_folded")
        )
        out = new.outputs[0]
        out.name, out.type, out.shape = self._unique(f"{old.name}_folded"), old.type, old.shape
        maker.graph.insert_after(maker, new)
        self._facts.learn(out, old)
        return out

    def _new_constant(self, node: ir.Node, array: Array, name: str) -> ir.Value:
        """A constant visible at `node`: an initializer of its graph, or a Constant node inside a function."""
        graph = node.graph
        assert graph is not None
        name = self._unique(name)
        tensor = ir.Tensor(array, name=name)
        if graph in self._function_graphs():
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=self._unique(f"{name}_const"))
            value = constant.outputs[0]
            value.name, value.type, value.shape = name, ir.TensorType(tensor.dtype), ir.Shape(array.shape)
            graph.insert_before(node, constant)
            return value
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.register_initializer(value)
        if self._lists_initializers_as_inputs and graph is self._model.graph:
            graph.inputs.append(value)
        return value

    def _function_graphs(self) -> set[ir.Graph]:
        if not self._model.functions:
            return set()
        graphs: set[ir.Graph] = set()
        for function in self._model.functions.values():
            graphs.add(function.graph)
            graphs.update(function.subgraphs())
        return graphs

    def _ir3_input(self, value: ir.Value) -> bool:
        return self._lists_initializers_as_inputs and value.graph is self._model.graph

    def _restate_input(self, value: ir.Value) -> None:
        assert value.const_value is not None
        value.type = ir.TensorType(value.const_value.dtype)

    def _connect(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        old = node.inputs[index]
        node.replace_input_with(index, value)
        if old is not None:
            self._drop_if_dead(old)

    def _add_shift(self, edit: AddShift) -> None:
        assert edit.shift is not None
        value, graph = edit.value, edit.node.graph
        assert graph is not None
        name = self._unique(f"{edit.node.name or value.name}.bias_add")
        add = ir.Node("", "Add", [None, None], edit.attributes, name=name)
        out = add.outputs[0]
        graph.insert_after(edit.node, add)
        self._take_over(value, out)
        value.name = self._unique(f"{out.name}.linear")
        add.replace_input_with(0, value)
        shift = self._new_constant(add, edit.shift, f"{edit.node.name or out.name}.bias")
        add.replace_input_with(1, shift)
        self._facts.learn(out, value)

    def _take_over(self, old: ir.Value, new: ir.Value) -> None:
        """`new` takes the place, the name and the description of `old`."""
        graph = old.graph
        name = old.name
        if old.is_graph_output() and graph is not None:
            for i, output in enumerate(graph.outputs):
                if output is old:
                    graph.outputs[i] = new
        for user, index in tuple(old.uses()):
            user.replace_input_with(index, new)
        old.name = None if old.producer() is None else self._unique(f"{name}.removed")
        new.name = name
        new.type, new.shape, new.doc_string = old.type, old.shape, old.doc_string
        new.metadata_props.clear()
        new.metadata_props.update(old.metadata_props)

    def _fork(self, edit: Fork) -> None:
        node, graph = edit.node, edit.node.graph
        assert graph is not None
        copy = ir.Node(
            node.domain,
            node.op_type,
            node.inputs,
            tuple(node.attributes.values()),
            num_outputs=1,
            name=self._unique(f"{node.name or node.op_type}_folded"),
            doc_string=node.doc_string,
            metadata_props=dict(node.metadata_props),
        )
        out = copy.outputs[0]
        out.name = self._unique(f"{edit.value.name}_folded")
        out.type, out.shape = edit.value.type, edit.value.shape
        graph.insert_after(node, copy)
        self._facts.learn(out, edit.value)
        for user, index in tuple(edit.value.uses()):
            if user is edit.reader:
                user.replace_input_with(index, out)
        for inner in edit.edits:
            if isinstance(inner, SetConstant | SetAttribute | BecomeGemm | AddShift):
                inner.node = copy
            if isinstance(inner, AddShift):
                inner.value = out
        self.commit(edit.edits)

    def _bypass(self, edit: Bypass) -> None:
        node = edit.node
        value, out = node.inputs[edit.index], node.outputs[0]
        assert value is not None and node.graph is not None
        if edit.rename:
            self._take_over(out, value)
        else:
            for user, index in tuple(out.uses()):
                user.replace_input_with(index, value)
        self._remove(node)

    def _remove(self, node: ir.Node) -> None:
        inputs = {v for v in node.inputs if v is not None}
        for sub in node.attributes.values():
            assert sub.is_ref() or sub.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        for value in sorted(inputs, key=lambda v: v.name or ""):
            self._drop_if_dead(value)

    def _drop_if_dead(self, value: ir.Value) -> None:
        """Remove a constant, and the expression that computed it, once nothing reads it."""
        stack = [value]
        while stack:
            current = stack.pop()
            if current.uses() or current.is_graph_output():
                continue
            if current.is_initializer():
                self._drop_initializer(current)
                continue
            node = current.producer()
            if node is None or node.graph is None or not self._expression(node):
                continue
            inputs = [v for v in node.inputs if v is not None]
            node.graph.remove(node, safe=True)
            if self._names is not None:
                self._names.discard(current.name or "")
            stack.extend(inputs)

    def _expression(self, node: ir.Node) -> bool:
        """Whether a node only computed a constant, or the shape that one was expanded to, that is now unused."""
        if any(o.uses() or o.is_graph_output() for o in node.outputs):
            return False
        if node.domain == "" and node.op_type in _SHAPES:
            return True
        return self._facts.constant(node.outputs[0]) is not None

    def _drop_initializer(self, value: ir.Value) -> None:
        graph = value.graph
        if graph is None or value.name is None:
            return
        if value.is_graph_input():
            if not self._ir3_input(value):
                return
            graph.inputs.remove(value)
        del graph.initializers[value.name]
        if self._names is not None:
            self._names.discard(value.name)

    def _unique(self, name: str) -> str:
        """A name that no value or node of the model has, `name` itself if possible."""
        if self._names is None:
            self._names = _all_names(self._facts)
        candidate, count = name, 0
        while candidate in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add(candidate)
        return candidate


def _all_names(facts: Facts) -> set[str]:
    proto = originals(facts.model).proto
    names = set() if proto is None else set(unedited_names(proto))
    for _, graph in facts.graphs:
        names.update(v.name for v in graph.inputs if v.name)
        names.update(n for n in graph.initializers if n)
        for node in graph:
            names.add(node.name or "")
            names.update(o.name for o in node.outputs if o.name)
    return names


def _doc(value: ir.Value) -> str | None:
    return None if value.const_value is None else value.const_value.doc_string
