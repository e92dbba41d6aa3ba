"""Walks over an ONNX model: every graph, node and tensor, wherever it is nested, visited once.

Graphs nest (If, Loop, Scan bodies are attributes of nodes) and local functions hold nodes of their own; whoever
looks at the top-level graph alone misses weights. These generators are the one place that knows where things hide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

import onnx

__all__ = [
    "graphs_of",
    "holders_of",
    "nodes_of",
    "operator_counts",
    "parameter_count",
    "tensors_of",
    "unedited_names",
    "used_names",
]

_KIND = onnx.AttributeProto
_PLAIN = frozenset((_KIND.INT, _KIND.INTS, _KIND.FLOAT, _KIND.FLOATS, _KIND.STRING, _KIND.STRINGS))
_GRAPH = frozenset((_KIND.GRAPH, _KIND.GRAPHS, _KIND.UNDEFINED))


def _holders(nodes: Any) -> Iterator[Any]:
    """Yield the attributes that may hold tensors or graphs, of these nodes and of all below them, in one pass."""
    stack = [nodes]
    while stack:
        for node in stack.pop():
            for attribute in node.attribute:
                if attribute.type not in _PLAIN:
                    yield attribute
                    stack.extend(graph.node for graph in _graphs_in(attribute))


def _graphs_in(attribute: Any) -> Any:
    if attribute.type not in _GRAPH:  # files of IR version 1 do not say the type
        return ()
    return [attribute.g] if attribute.HasField("g") else attribute.graphs


def holders_of(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield every attribute that may hold tensors or graphs, wherever its node is."""
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from _holders(nodes)


def _graphs_below(nodes: Any) -> Iterator[Any]:
    for attribute in _holders(nodes):
        yield from _graphs_in(attribute)


def graphs_of(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield the main graph, all nested graphs, and the graphs nested in local functions."""
    yield model.graph
    yield from _graphs_below(model.graph.node)
    for function in model.functions:
        yield from _graphs_below(function.node)


def nodes_of(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield every node of the model, of nested graphs and of local functions."""
    for graph in graphs_of(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _initializers(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices


def tensors_of(model: onnx.ModelProto) -> Iterator[Any]:
    """Yield every constant tensor, the initialisers of the main graph first; sparse ones' parts and attributes too."""
    yield from _initializers(model.graph)
    for attribute in holders_of(model):
        for graph in _graphs_in(attribute):
            yield from _initializers(graph)
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        single = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for sparse in (*single, *attribute.sparse_tensors):
            yield sparse.values
            yield sparse.indices


def operator_counts(model: onnx.ModelProto) -> Counter[str]:
    """Count the operators of the model by type, Constant nodes (data, not work) left out."""
    return Counter(node.op_type for node in nodes_of(model) if node.op_type != "Constant")


def parameter_count(model: onnx.ModelProto) -> int:
    """Count the elements of all constant tensors of the model."""
    return sum(prod(tensor.dims) for tensor in tensors_of(model))


def unedited_names(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the names that the editor does not see: of sparse initializers, and of what only training computes."""
    yield from (sparse.values.name for sparse in model.graph.sparse_initializer)
    for info in model.training_info:
        for graph in (info.initialization, info.algorithm):
            yield from (value.name for value in (*graph.input, *graph.initializer))
            yield from (sparse.values.name for sparse in graph.sparse_initializer)
            yield from (name for node in graph.node for name in node.output)


def used_names(node: Any) -> set[str]:
    """Return the values that a node reads, those that its nested graphs take from outside included."""
    names = set(node.input) - {""}
    for graph in _graphs_below([node]):
        names |= {name for inner in graph.node for name in inner.input if name}
        names |= {value.name for value in graph.output}
    return names
