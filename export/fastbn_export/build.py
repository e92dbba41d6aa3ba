"""Layers and arrays into an ONNX model: what was trained here leaves here, without a framework in between.

Every layer is checked against the shape that reaches it, and an error names the layer: ``layers[3]: expected ...``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn_export import layers as L
from fastbn_export.emit import emitter
from fastbn_export.emit_norms import norm_dtype
from fastbn_export.graph import OLDEST, Dim, Graph, Shape

__all__ = ["build"]

_FLOATS = ("float16", "float32", "float64")


def build(
    layers: Sequence[L.Layer], input_shape: Sequence[int | str | None], *, fold: bool = True, opset: int | None = None
) -> onnx.ModelProto:
    """Build an ONNX model from a sequence of layers.

    Parameters
    ----------
    layers : sequence
        `fastbn.BatchNorm`, exported with its running statistics, `LayerNorm`, `InstanceNorm`, `GroupNorm`, and the
        plain layers of `fastbn_export.layers`. Linear and Conv weights share one dtype: float16, float32 or float64;
        without any, that of the first normalization. BatchNorm parameters stay float32 in a float16 model, where the
        operators of the other normalizations want float16.
    input_shape : sequence of int, str or None
        The shape of the input; a name, None or -1 for a size that is known at run time only.
    fold : bool
        Fold the batch normalizations away (`fastbn_export.fold`); where one has no exact fold it stays.
    opset : int, optional
        Version of the operators to declare, 15 or later. Default: 17, or what the layers need: 21 for GroupNorm, and
        for InstanceNorm in float64.

    Returns
    -------
    onnx.ModelProto
        With one input, ``"input"``, and one output, ``"output"``.

    Raises
    ------
    ArgumentValueError, ArgumentTypeError
        A layer that does not fit its input, needs a later opset, or is of no known kind; the error names it.
    """
    layers = list(layers)
    if not layers:
        raise ArgumentValueError("layers", "at least one layer", "none")
    graph = Graph(_dtype_of(layers), _input_shape(input_shape), _opset(opset))
    for index, layer in enumerate(layers):
        graph.at = f"layers[{index}]"
        emitter(layer, graph.at)(graph, layer)
    model = graph.finish()
    onnx.checker.check_model(model, full_check=True)
    if not fold:
        return model
    from fastbn_export.fold import fold as fold_model

    return fold_model(model).model


def _opset(opset: int | None) -> int | None:
    newest = onnx.defs.onnx_opset_version()
    if opset is None:
        return None
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise ArgumentTypeError("opset", "an integer", type(opset).__name__)
    if not OLDEST <= opset <= newest:
        raise ArgumentValueError("opset", f"{OLDEST} to {newest}, the newest that onnx knows", opset)
    return opset


def _input_shape(shape: Sequence[int | str | None]) -> Shape:
    dims: list[Dim] = []
    for axis, dim in enumerate(shape):
        if dim is None or dim == -1:
            dims.append("batch" if axis == 0 else f"size_{axis}")
        elif isinstance(dim, str) and dim:
            dims.append(dim)
        elif isinstance(dim, (int, np.integer)) and not isinstance(dim, bool) and dim > 0:
            dims.append(int(dim))
        else:
            raise ArgumentValueError("input_shape", "sizes > 0, names, None or -1", tuple(shape))
    if len(dims) < 2:
        raise ArgumentValueError("input_shape", "at least two axes: (N, C, ...)", tuple(shape))
    return tuple(dims)


def _dtype_of(layers: list[L.Layer]) -> np.dtype[Any]:
    """Return the one dtype of all weights; of the first normalization where there are none, or float32."""
    found: dict[str, str] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, (L.Linear, L.Conv)):
            dtype = np.asarray(layer.weight).dtype
            if dtype.name not in _FLOATS:
                raise ArgumentTypeError(f"layers[{index}].weight", " or ".join(_FLOATS), dtype)
            found.setdefault(dtype.name, f"layers[{index}]")
    if len(found) > 1:
        raise ArgumentTypeError("layers", "weights of one dtype", ", ".join(f"{d} in {at}" for d, at in found.items()))
    norms = [own.name for layer in layers if (own := norm_dtype(layer)) is not None]
    name = next(iter([*found, *norms, "float32"]))
    return np.dtype(name if name in _FLOATS else "float32")
