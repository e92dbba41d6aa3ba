"""What no fold has touched is written as it was read: operators and type information are copied, not made anew.

Requirement: a copy is taken only where it says what the editor's object says; making every operator anew costs more
than all the folding (DenseNet-121: 45 of 280 ms; copies cost 3).
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

__all__ = ["Originals", "originals", "remember"]

_KEY = "fastbn.original"
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_FIELDS = ("input", "output", "value_info")


class Originals:
    """The proto that a model was read from, operator by operator of its main graph.

    Parameters
    ----------
    proto : onnx.ModelProto or None
        As it was read; never changed. None for a model that was not read from one.
    model : onnx_ir.Model
        What was read, before any change.
    """

    def __init__(self, proto: onnx.ModelProto | None, model: ir.Model):
        self.proto = proto
        self._nodes: dict[ir.Node, tuple[onnx.NodeProto, tuple[ir.Attr, ...]]] = {}
        self._types: dict[str, tuple[Any, Any]] = {}
        self._infos: dict[tuple[str, str], onnx.ValueInfoProto] = {}
        if proto is None:
            return
        for node, source in zip(model.graph, proto.graph.node, strict=True):
            self._nodes[node] = source, tuple(node.attributes.data.values())
            for out in node.outputs:
                if out.type is not None:
                    self._types[out.name or ""] = out.type, out.shape
        for value in (*model.graph.inputs, *model.graph.outputs):
            self._types[value.name or ""] = value.type, value.shape
        for field in _FIELDS:
            self._infos.update(((field, info.name), info) for info in getattr(proto.graph, field))

    def node(self, node: ir.Node, into: onnx.NodeProto) -> None:
        """Write an operator: a copy with the names that its values have now, or anew if anything else changed."""
        source, attributes = self._nodes.get(node, (None, ()))
        own = node.attributes.data.values()
        if (
            source is None
            or node.op_type != source.op_type
            or len(own) != len(attributes)
            or any(a is not b or a.type in _GRAPHS for a, b in zip(own, attributes, strict=True))
        ):
            ir.serde.serialize_node_into(into, node)
            return
        into.CopyFrom(source)
        inputs = ["" if v is None else v.name or "" for v in node.inputs]
        if inputs != list(source.input):
            del into.input[:]
            into.input.extend(inputs)
        outputs = [v.name or "" for v in node.outputs]
        if outputs != list(source.output):
            del into.output[:]
            into.output.extend(outputs)

    def info(self, value: ir.Value, into: onnx.GraphProto, field: str = "value_info") -> None:
        """Add what is stated about a value to the inputs, outputs or inner values of a graph; nothing if nothing is."""
        name = value.name or ""
        known, source = self._types.get(name), self._infos.get((field, name))
        if known is not None and source is not None and known[0] is value.type and known[1] is value.shape:
            getattr(into, field).add().CopyFrom(source)
        elif value.type is not None or value.shape is not None or field != "value_info":
            ir.serde.serialize_value_into(getattr(into, field).add(), value)

    def graph(self, graph: ir.Graph, into: onnx.GraphProto) -> None:
        """Write the main graph without its initializers; types of these only where they were stated before."""
        for value in graph.inputs:
            self.info(value, into, "input")
        names = {value.name for value in graph.inputs}
        for value in graph.initializers.values():
            if value.name not in names and ("value_info", value.name or "") in self._infos:
                self.info(value, into)
        for node in graph:
            self.node(node, into.node.add())
            for out in node.outputs:
                if out.name and not out.is_graph_output():
                    self.info(out, into)
        for value in graph.outputs:
            self.info(value, into, "output")


def originals(model: ir.Model) -> Originals:
    """What a model was read from."""
    found: Originals | None = model.meta.get(_KEY)
    return Originals(None, model) if found is None else found


def remember(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Note what a model was read from."""
    model.meta[_KEY] = Originals(proto, model)
