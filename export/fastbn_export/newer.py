"""An old skeleton in the words of operator set 14, for shape inference alone.

Requirement: inputs keep their places, and each operator has the shapes that it had.

Before version 14 the inference of Reshape knows nothing unless its whole target is constant: with a symbolic batch size
not even the rank behind ``x.flatten(2)``, and so nothing of what follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from .protos import graphs_of

__all__ = ["renew"]

_OLDEST, _NEW = 9, 14
_INPUTS: dict[str, tuple[int, Sequence[str]]] = {
    **dict.fromkeys(("Squeeze", "Unsqueeze", "ReduceSum"), (13, ("axes",))),
    "Split": (13, ("split",)),
    "Pad": (11, ("pads",)),
    "Slice": (10, ("starts", "ends", "axes")),
    "TopK": (10, ("k",)),
}
"""Attributes that became inputs, behind the one that there was: since which version, and in which order."""


def renew(proto: onnx.ModelProto) -> None:
    """Let a model of operator set 9 to 13 be one of 14, in place, if that tells inference more."""
    versions = [entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if len(versions) != 1 or not _OLDEST <= versions[0].version < _NEW or proto.functions:  # these have versions
        return
    graphs = list(graphs_of(proto))
    if not any(node.op_type == "Reshape" for graph in graphs for node in graph.node):
        return
    for graph in graphs:
        for node in graph.node:
            if node.domain in ("", "ai.onnx") and node.output:
                _renew_node(graph, node, versions[0].version)
    versions[0].version = _NEW


def _renew_node(graph: onnx.GraphProto, node: onnx.NodeProto, version: int) -> None:
    if node.op_type == "Resize" and version < 11 and len(node.input) == 2:  # the region of interest came between
        node.input[:] = [node.input[0], "", node.input[1]]
    if node.op_type == "BatchNormalization":  # five outputs in training until then, which the new one refuses
        del node.output[1:]
    since, names = _INPUTS.get(node.op_type, (0, ()))
    if version >= since:
        return
    given = {a.name: list(a.ints) or [a.i] for a in node.attribute if a.name in names}
    for name in names:
        node.input.append(f"{node.output[0]}/{name}/renewed" if name in given else "")
        if name in given:
            tensor = onnx.TensorProto(name=node.input[-1], data_type=onnx.TensorProto.INT64, dims=[len(given[name])])
            tensor.int64_data.extend(given[name])
            graph.initializer.append(tensor)
    kept = [a for a in node.attribute if a.name not in given]
    del node.attribute[:]
    node.attribute.extend(kept)
