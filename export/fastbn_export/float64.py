"""A model lifted to float64: the truth against which a model and its folded form are both judged.

Every float16, bfloat16 and float32 tensor, type and Cast becomes float64; the weights keep their exact values. Two
models that are the same function then agree to about 1e-15, so what is left between an original and its folded form
is the rounding of the changed weights to their own type, which ``lift(candidate, known, rng)`` measures by repeating
it at random.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fastbn_export.protos import graphs_of, nodes_of, tensors_of

__all__ = ["changed", "fingerprints", "lift", "lift_array", "mixed_bits", "narrowest"]

_SMALL_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
"""The element types that are lifted."""

_UNIT = {
    TensorProto.DOUBLE: 2.0**-53,
    TensorProto.FLOAT: 2.0**-24,
    TensorProto.FLOAT16: 2.0**-11,
    TensorProto.BFLOAT16: 2.0**-8,
}
"""Half an ulp, relative: the most that rounding to nearest moves a normal number."""

_SUBNORMAL = {TensorProto.FLOAT16: 2.0**-25, TensorProto.FLOAT: 2.0**-150, TensorProto.BFLOAT16: 2.0**-134}
"""Half the distance of subnormal numbers, absolute."""


def lift(
    model: onnx.ModelProto,
    known: set[bytes] | None = None,
    rng: np.random.Generator | None = None,
    shake: float = 1.0,
) -> onnx.ModelProto:
    """Return a copy of the model in which all float arithmetic is float64.

    Parameters
    ----------
    model : onnx.ModelProto
        The model, its external data loaded. It is not changed.
    known : set of bytes, optional
        The :func:`fingerprints` of another model. Float constants that are not among them are moved by the rounding
        of their own type, half an ulp up or down, equal values alike.
    rng : numpy.random.Generator, optional
        The source of the signs; needed with ``known``.
    shake : float
        Move them this many times as far.

    Returns
    -------
    onnx.ModelProto
        Intermediate shapes and types (value_info) are dropped: they are hints only.
    """
    lifted = onnx.ModelProto()
    lifted.CopyFrom(model)
    for tensor in tensors_of(lifted):
        if tensor.data_type in _UNIT:
            value = numpy_helper.to_array(tensor).astype(np.float64)
            if known is not None and rng is not None and _fingerprint(tensor) not in known:
                step = np.maximum(np.abs(value) * _UNIT[tensor.data_type], _SUBNORMAL.get(tensor.data_type, 0.0))
                step = np.where(np.isfinite(step), shake * step, 0.0)
                value = np.asarray(value + step * _signs(value, rng))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for node in nodes_of(lifted):
        _lift_node(node)
    for graph in graphs_of(lifted):
        del graph.value_info[:]
        for value in (*graph.input, *graph.output):
            _lift_type(value.type)
    for function in lifted.functions:
        del function.value_info[:]
    return lifted


def lift_array(array: Any) -> Any:
    """Return a float array as float64, anything else as it is."""
    if isinstance(array, np.ndarray) and (array.dtype.kind == "f" or array.dtype.name == "bfloat16"):
        return array.astype(np.float64)
    if isinstance(array, list):
        return [lift_array(item) for item in array]
    return array


def _signs(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a random sign for every *distinct* value, by a multiplicative hash of its bits.

    Equal values are rounded the same way. Independent signs would let the errors of a constant weight average out,
    which the real ones do not.
    """
    return np.where(mixed_bits(values, rng) >> np.uint64(63), 1.0, -1.0)


def mixed_bits(values: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint64]:
    """Return 64 bits for every value, the upper ones random: equal ones for equal values."""
    first, second = rng.integers(1, 2**63, size=2, dtype=np.uint64) | np.uint64(1)
    mixed = np.ascontiguousarray(values).view(np.uint64) * first
    mixed = (mixed ^ (mixed >> np.uint64(32))) * second
    return np.asarray(mixed).reshape(values.shape)


def _lift_type(kind: Any) -> None:
    which = kind.WhichOneof("value")
    if which in ("tensor_type", "sparse_tensor_type"):
        held = getattr(kind, which)
        if held.elem_type in _SMALL_FLOATS:
            held.elem_type = TensorProto.DOUBLE
    elif which in ("sequence_type", "optional_type"):
        _lift_type(getattr(kind, which).elem_type)
    elif which == "map_type":
        _lift_type(kind.map_type.value_type)


def _lift_node(node: Any) -> None:
    """Rewrite the attributes that name a float type or hold float32 by definition."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i in _SMALL_FLOATS:
            attribute.i = TensorProto.DOUBLE
    if node.op_type == "Constant":
        for attribute in node.attribute:
            if attribute.name in ("value_float", "value_floats") and not attribute.ref_attr_name:
                value = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                tensor = numpy_helper.from_array(np.array(value, np.float64))
                attribute.CopyFrom(helper.make_attribute("value", tensor))
    elif node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.zeros(1, np.float64))))


def fingerprints(model: onnx.ModelProto) -> set[bytes]:
    """Return a digest of every constant tensor: type, shape and value."""
    return {_fingerprint(tensor) for tensor in tensors_of(model)}


def changed(model: onnx.ModelProto, known: set[bytes]) -> bool:
    """Return whether any float constant of the model is not among the ``known`` ones."""
    return any(t.data_type in _UNIT and _fingerprint(t) not in known for t in tensors_of(model))


def _fingerprint(tensor: Any) -> bytes:
    head = f"{tensor.data_type}:{list(tensor.dims)}:".encode()
    data = tensor.raw_data if tensor.HasField("raw_data") else tensor.SerializeToString()
    return hashlib.blake2b(head + data, digest_size=16).digest()


def narrowest(*models: onnx.ModelProto) -> str:
    """Return the least precise float type used by constants, inputs, outputs or casts: the type of the tolerance."""
    found = {tensor.data_type for model in models for tensor in tensors_of(model)}
    for model in models:
        found |= {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
        found |= {a.i for node in nodes_of(model) if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    for kind, name in (
        (TensorProto.BFLOAT16, "bfloat16"),
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.FLOAT, "float32"),
        (TensorProto.DOUBLE, "float64"),
    ):
        if kind in found:
            return name
    return "float32"
