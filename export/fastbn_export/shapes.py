"""ONNX's own shape inference, run on a skeleton of the model: no weights, nothing written back.

Requirement: a model that inference cannot digest is not an error; its shapes are then unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

from .affine import Array, Dims, stated_size
from .newer import renew
from .originals import originals
from .protos import graphs_of

__all__ = ["infer"]

_BODIES = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_INT64 = onnx.TensorProto.INT64
_SMALL = 1024
"""Initializers up to this many bytes stay in the skeleton: shapes, axes and repeats are among them."""


def infer(
    model: ir.Model, known: Mapping[ir.Value, Array] | None = None
) -> dict[ir.Value, tuple[Dims | None, ir.DataType | None]]:
    """Infer shapes and types of all values of the main graph and of its subgraphs.

    `known` has the values of integer expressions (of the main graph) that ONNX's own propagation does not see through.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(_skeleton(model, known or {}), data_prop=True)
    except Exception:  # whatever the C++ side throws at an odd model: unknown shapes only mean fewer folds
        return {}
    found: dict[ir.Value, tuple[Dims | None, ir.DataType | None]] = {}
    _collect(model.graph, inferred.graph, found)
    return found


def _skeleton(model: ir.Model, known: Mapping[ir.Value, Array]) -> onnx.ModelProto:
    """The model as a proto in which large tensors are graph inputs without data."""
    proto = onnx.ModelProto(ir_version=max(model.ir_version, 4))
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for function in model.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    _skeleton_graph(model, proto.graph)
    _keep_certain(proto, frozen=model.ir_version < 4)
    _lend(proto.graph, {})
    renew(proto)
    if known:
        _feed(model.graph, proto.graph, known)
    return proto


def _keep_certain(proto: onnx.ModelProto, frozen: bool) -> None:
    """Take out what inference would believe: sizes below zero, and (not `frozen`) defaults that may be overridden."""
    for graph in graphs_of(proto):
        given = {value.name for value in graph.input}
        if not frozen and any(tensor.name in given for tensor in graph.initializer):
            certain = [tensor for tensor in graph.initializer if tensor.name not in given]
            del graph.initializer[:]
            graph.initializer.extend(certain)
        for info in (*graph.input, *graph.output, *graph.value_info):
            _clear_negative(info.type)
    for function in proto.functions:
        for info in function.value_info:
            _clear_negative(info.type)


def _clear_negative(stated: Any) -> None:
    """Make sizes below zero unknown, also of what a sequence or an optional value holds."""
    while (kind := stated.WhichOneof("value")) in ("sequence_type", "optional_type"):
        stated = getattr(stated, kind).elem_type
    for dim in stated.tensor_type.shape.dim if kind == "tensor_type" else ():
        if dim.dim_value < 0:
            dim.ClearField("dim_value")


def _lend(graph: onnx.GraphProto, outer: Mapping[str, onnx.TensorProto]) -> None:
    """Copy small integers of the graphs around a body into it, of which inference sees no values there."""
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain == "":
            held.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    lent = {**outer, **{n: t for n, t in held.items() if t.data_type == _INT64 and len(t.raw_data) <= _SMALL}}
    for body in (g for node in graph.node for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)):
        own = {t.name for t in body.initializer} | {v.name for v in body.input}
        own.update(name for node in body.node for name in node.output)
        read = {name for node in body.node for name in node.input}
        for name in sorted((read & lent.keys()) - own):
            body.initializer.add().CopyFrom(lent[name])
            body.initializer[-1].name = name
        _lend(body, lent)


def _feed(graph: ir.Graph, proto: onnx.GraphProto, known: Mapping[ir.Value, Array]) -> None:
    """Connect the readers of known values to initializers that hold them."""
    names = {v: f"{v.name}/known" for v in known}
    for value, array in known.items():
        proto.initializer.append(onnx.numpy_helper.from_array(array, names[value]))
    for node, node_proto in zip(graph, proto.node, strict=True):
        for i, operand in enumerate(node.inputs):
            if operand is not None and operand in names:
                node_proto.input[i] = names[operand]


def _skeleton_graph(model: ir.Model, proto: onnx.GraphProto) -> None:
    proto.name = model.graph.name or "graph"
    source = originals(model)
    source.graph(model.graph, proto)
    names = {value.name for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes <= _SMALL and not isinstance(tensor, ir.ExternalTensor):
            if isinstance(tensor, ir.TensorProtoTensor):
                proto.initializer.add().CopyFrom(tensor.raw)
            else:
                ir.serde.serialize_tensor_into(proto.initializer.add(), tensor)
            proto.initializer[-1].name = value.name or ""
        elif value.name not in names:
            info = proto.input.add(name=value.name or "")
            info.type.tensor_type.elem_type = int(tensor.dtype)
            for d in tensor.shape.numpy():
                info.type.tensor_type.shape.dim.add(dim_value=int(d))


def _collect(
    graph: ir.Graph, proto: onnx.GraphProto, found: dict[ir.Value, tuple[Dims | None, ir.DataType | None]]
) -> None:
    types = {info.name: info.type for info in (*proto.input, *proto.output, *proto.value_info)}
    values = list(graph.inputs)
    for node, node_proto in zip(graph, proto.node, strict=True):
        values.extend(node.outputs)
        if not any(a.type in _BODIES for a in node.attributes.data.values()):
            continue
        for attribute in node_proto.attribute:
            mine = node.attributes.get(attribute.name)
            if mine is None or mine.is_ref():
                continue
            if mine.type == ir.AttributeType.GRAPH:
                _collect(mine.as_graph(), attribute.g, found)
            elif mine.type == ir.AttributeType.GRAPHS:
                for sub, sub_proto in zip(mine.as_graphs(), attribute.graphs, strict=True):
                    _collect(sub, sub_proto, found)
    for value in values:
        type_proto = types.get(value.name or "")
        if type_proto is not None and type_proto.HasField("tensor_type"):
            found[value] = _read(type_proto.tensor_type)


def _read(tensor: onnx.TypeProto.Tensor) -> tuple[Dims | None, ir.DataType | None]:
    dtype = ir.DataType(tensor.elem_type) if tensor.elem_type else None
    if not tensor.HasField("shape"):
        return None, dtype
    dims = (d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return tuple(stated_size(d) for d in dims), dtype
