"""Sparse tensors, which the editor does not know: hidden in text before it reads a model, found again afterwards.

Requirement: what is written has every sparse tensor where it was, bit for bit. Those of the main graph's initializers
stay in the proto and are not seen by the editor at all; here are the rest: attributes of nodes, initializers of bodies.
"""

from __future__ import annotations

import base64
from typing import Any

import onnx
import onnx_ir as ir

from .originals import originals
from .protos import graphs_of, holders_of, nodes_of

__all__ = ["MARK", "found", "hidden", "is_sparse"]

MARK = "fastbn.sparse_initializer"
"""Attribute of a Constant that stands for a sparse initializer of its graph; the output has its name."""
_PREFIX = b"fastbn.sparse:"
_TENSOR = onnx.AttributeProto.TENSOR
_KINDS = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)


def hidden(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself, or a copy without sparse tensors in attributes and bodies if it has any."""
    if not any(a.type != _TENSOR and _holds_sparse(a) for a in holders_of(proto)):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in nodes_of(copy):
        for attribute in node.attribute:
            if attribute.type in _KINDS:
                _hide(attribute)
    for graph in list(graphs_of(copy))[1:]:
        for sparse in graph.sparse_initializer:
            node = graph.node.add(op_type="Constant", output=[sparse.values.name])
            node.attribute.add(name=MARK, type=onnx.AttributeProto.STRING, s=base64.b64encode(_bytes(sparse)))
            graph.node.insert(0, graph.node.pop())  # before its readers
        del graph.sparse_initializer[:]
    return copy


def found(proto: onnx.ModelProto) -> None:
    """Undo `hidden` in a model that came from it, in place."""
    for node in nodes_of(proto):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.STRING and attribute.s.startswith(_PREFIX):
                name, kept = attribute.name, base64.b64decode(attribute.s[len(_PREFIX) :])
                attribute.ParseFromString(kept)
                attribute.name = name
    for graph in graphs_of(proto):
        for index, node in reversed(list(enumerate(graph.node))):
            if any(a.name == MARK for a in node.attribute):
                graph.sparse_initializer.add().ParseFromString(base64.b64decode(node.attribute[0].s))
                del graph.node[index]


def is_sparse(model: ir.Model, value: ir.Value) -> bool:
    """Whether a value of the model is a sparse tensor, of whose numbers the editor knows nothing."""
    maker, proto = value.producer(), originals(model).proto
    if maker is not None:
        return maker.op_type == "Constant" and (MARK in maker.attributes or "sparse_value" in maker.attributes)
    stored = () if proto is None or value.is_initializer() else proto.graph.sparse_initializer
    return any(tensor.values.name == value.name for tensor in stored)


def _holds_sparse(attribute: Any) -> bool:
    if attribute.type in _KINDS or attribute.g.sparse_initializer:
        return True
    return any(graph.sparse_initializer for graph in attribute.graphs)


def _hide(attribute: Any) -> None:
    text = _PREFIX + base64.b64encode(_bytes(attribute))
    name = attribute.name
    attribute.Clear()
    attribute.name, attribute.type, attribute.s = name, onnx.AttributeProto.STRING, text


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
