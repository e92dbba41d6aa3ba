"""Re-estimate the running statistics of a model's batch normalizations from data, exactly, without its framework.

The usual recipe (run in training mode, average what each batch says) weighs a short last batch like a full one and
averages variances without the spread of the means: on batches sorted by class it is off by as much as 98 %. Here all
batches are pooled by Chan's formula (`fastbn.Moments`), as if they were one. A batch normalization sees data that went
through the ones before it, so these must have their new statistics first: layers are done in order of depth, with one
pass over the data for each depth, and every pass runs only the part of the model it needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from fastbn import Moments
from fastbn.errors import ArgumentValueError
from fastbn_export import samples as sampling
from fastbn_export.protos import graphs_of, nodes_of, used_names
from fastbn_export.verify import as_model
from fastbn_export.worker import Worker

__all__ = ["recalibrate"]


def recalibrate(
    model: onnx.ModelProto | str | os.PathLike[str],
    batches: Iterable[Any],
    *,
    unbiased: bool = True,
    timeout: float = 600.0,
) -> onnx.ModelProto:
    """Return the model with its batch normalization statistics re-estimated from data.

    Parameters
    ----------
    model : onnx.ModelProto or path
        A model with BatchNormalization nodes in inference form in its main graph. It is not changed.
    batches : iterable of mapping of str to array_like, or of array_like
        The data: the model's inputs, batch by batch, or the array alone where there is one input. Gone through once
        for each depth of batch normalizations; an iterator is kept in memory.
    unbiased : bool
        Divide the variance by n - 1 (PyTorch's running_var; Ioffe & Szegedy 2015, algorithm 2), not by n.
    timeout : float
        Seconds that one batch may take.

    Returns
    -------
    onnx.ModelProto
        Nodes that shared a statistic get one of their own. Inputs stay as they are, also where a statistic is one that
        the caller may override. Nodes in nested graphs and functions stay as they are.

    Raises
    ------
    ArgumentValueError, ArgumentTypeError
        No batch normalization in inference form, no data, or data that does not fit the model's inputs.
    RunError
        onnxruntime cannot run the model.
    """
    result = onnx.ModelProto()
    result.CopyFrom(as_model(model))
    levels = _levels(result.graph)
    if not levels:
        raise ArgumentValueError("model", "BatchNormalization nodes in inference form", "none in the main graph")
    data = batches if not isinstance(batches, Iterator) else list(batches)
    with Worker(timeout) as worker:
        for level in levels:
            for node, (moments, dtype) in zip(level, _measure(worker, result, level, data), strict=True):
                _set_statistics(result, node, moments, dtype, unbiased)
    return result


def _is_inference_norm(node: Any) -> bool:
    if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx") or len(node.input) < 5:
        return False
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    one_output = sum(bool(name) for name in node.output) == 1
    return one_output and not flags.get("training_mode", 0) and flags.get("spatial", 1) == 1


def _levels(graph: Any) -> list[list[Any]]:
    """Group the batch normalizations by how many of them lie before each, at most."""
    depth: dict[str, int] = {}
    levels: list[list[Any]] = []
    for node in graph.node:
        below = max((depth.get(name, 0) for name in used_names(node)), default=0)
        if _is_inference_norm(node):
            if below == len(levels):
                levels.append([])
            levels[below].append(node)
            below += 1
        for name in node.output:
            depth[name] = below
    return levels


def _measure(
    worker: Worker, model: onnx.ModelProto, level: list[Any], data: Iterable[Any]
) -> list[tuple[Moments, np.dtype[Any]]]:
    """Return the pooled moments of the inputs of the given nodes, all batches together, and the types of these."""
    names = list(dict.fromkeys(node.input[0] for node in level))
    prefix = _prefix(model, names)
    worker.put("prefix", prefix)
    worker.load("prefix", "prefix")
    reads = {value.name for value in prefix.graph.input}
    pooled: dict[str, Moments] = {}
    dtypes: dict[str, np.dtype[Any]] = {}
    for batch in data:
        feeds = {k: v for k, v in sampling.given(model, _named(model, batch))[0].items() if k in reads}
        for name, array in zip(names, worker.run("prefix", feeds), strict=True):
            moments = Moments.of(array, axis=1)
            pooled[name] = pooled[name].merge(moments) if name in pooled else moments
            dtypes[name] = array.dtype
    if not pooled:
        raise ArgumentValueError("batches", "at least one batch", "none")
    return [(pooled[node.input[0]], dtypes[node.input[0]]) for node in level]


def _named(model: onnx.ModelProto, batch: Any) -> Mapping[str, Any]:
    if isinstance(batch, Mapping):
        return batch
    names = [value.name for value in sampling.required_inputs(model)]
    if len(names) != 1:
        raise ArgumentValueError("batches", f"mappings with {names}", type(batch).__name__)
    return {names[0]: np.asarray(batch)}


def _prefix(model: onnx.ModelProto, outputs: list[str]) -> onnx.ModelProto:
    """Return the part of a model that its inner values ``outputs`` need, with these for its outputs."""
    prefix = onnx.ModelProto()
    prefix.CopyFrom(model)
    needed = set(outputs)
    wanted = []
    for node in reversed(prefix.graph.node):
        wanted.append(bool(needed & set(node.output)))
        if wanted[-1]:
            needed |= used_names(node)
    for index, keep in enumerate(wanted):
        if not keep:
            del prefix.graph.node[len(wanted) - 1 - index]
    for values in (prefix.graph.initializer, prefix.graph.input):
        _keep(values, needed)
    del prefix.graph.output[:]
    for name in outputs:
        prefix.graph.output.add().name = name
    return prefix


def _set_statistics(model: onnx.ModelProto, node: Any, moments: Moments, dtype: np.dtype[Any], unbiased: bool) -> None:
    """Give a node its own mean and variance: in the initialisers it has where nobody else reads these, or in new ones.

    They keep the type of the constants they replace; where these are computed, that of the data, which any opset takes.
    """
    graph = model.graph
    if unbiased and np.any(np.asarray(moments.count) < 2):
        raise ArgumentValueError("batches", f"at least 2 values per channel for {node.name or node.output[0]!r}", 1)
    statistics = (moments.mean, moments.variance(ddof=1 if unbiased else 0))
    types = _constant_types(graph)
    for index, values in zip((3, 4), statistics, strict=True):
        old = node.input[index]
        own = onnx.helper.tensor_dtype_to_np_dtype(types[old]) if old in types else dtype
        array = np.ascontiguousarray(values, dtype=own)
        if _is_own(graph, node, old):  # under its name the caller may override it, if that is allowed
            tensor = next(tensor for tensor in graph.initializer if tensor.name == old)
            tensor.CopyFrom(numpy_helper.from_array(array, old))
            continue
        name = _fresh(model, f"{node.output[0]}.{'running_mean' if index == 3 else 'running_var'}")
        tensor = numpy_helper.from_array(array, name)
        graph.initializer.append(tensor)
        if model.ir_version < 4:  # initialisers are inputs with a default there
            graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        node.input[index] = name


def _is_own(graph: Any, node: Any, name: str) -> bool:
    """Whether a value is an initialiser that this node alone reads, in one place."""
    if name not in {tensor.name for tensor in graph.initializer} or name in {v.name for v in graph.output}:
        return False
    others = (other for other in graph.node if other.output != node.output)
    return list(node.input).count(name) == 1 and not any(name in used_names(other) for other in others)


def _constant_types(graph: Any) -> dict[str, int]:
    """Return name -> element type of initialisers and of Constant nodes that hold a tensor."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            types.update((node.output[0], a.t.data_type) for a in node.attribute if a.name == "value")
    return types


def _fresh(model: onnx.ModelProto, name: str) -> str:
    """Return the name, made longer until nothing has it: no value of any graph, read or not."""
    taken = {value for node in nodes_of(model) for value in (*node.input, *node.output)}
    for graph in graphs_of(model):
        named = (graph.input, graph.output, graph.value_info, graph.initializer)
        taken |= {value.name for values in named for value in values}
        taken |= {sparse.values.name for sparse in graph.sparse_initializer}
    while name in taken:
        name += "_"
    return name


def _keep(values: Any, names: set[str]) -> None:
    """Delete the others by index: ``remove`` would compare whole tensors."""
    for index in reversed(range(len(values))):
        if values[index].name not in names:
            del values[index]
