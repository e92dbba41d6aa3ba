"""Is a model well formed: onnx's own checker, without handing it the weights.

The checker takes a serialised model, a second and a third copy of everything, and none at all beyond 2 GiB. It looks
at the weights' names and shapes only; so large ones are replaced by graph inputs of the same name, type and shape.
"""

from __future__ import annotations

import onnx

from fastbn_export.files import ModelFileError

__all__ = ["check_structure"]

_SMALL = 1024
"""Tensors of no more bytes go to the checker as they are."""


def check_structure(model: onnx.ModelProto, name: str) -> None:
    """Refuse a model that onnx's checker refuses: cycles, undefined values, wrong attributes.

    Parameters
    ----------
    model : onnx.ModelProto
        The model, with or without its external data.
    name : str
        What to call it in the error.

    Raises
    ------
    ModelFileError
        With the checker's first line.
    """
    try:
        onnx.checker.check_model(_skeleton(model))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(f"{name}: expected a valid ONNX model: {reason}") from None


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph, own = light.graph, model.graph
    graph.name = own.name
    graph.node.extend(own.node)
    graph.input.extend(own.input)
    graph.output.extend(own.output)
    for value in graph.output:  # exporters leave out a shape of which they know nothing, and onnxruntime needs none
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    graph.value_info.extend(own.value_info)
    graph.sparse_initializer.extend(own.sparse_initializer)
    inputs = {value.name for value in own.input}
    for tensor in own.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and len(tensor.raw_data) <= _SMALL:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light
