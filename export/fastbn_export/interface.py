"""What a caller sees of a model, inputs, optional inputs and outputs, and whether a candidate has kept it."""

from __future__ import annotations

from typing import Any

import onnx

from fastbn_export.protos import used_names
from fastbn_export.samples import optional_inputs, required_inputs

__all__ = ["difference", "optional_read"]

_NUMBERLESS = ("Shape", "Size")


def difference(reference: onnx.ModelProto, candidate: onnx.ModelProto) -> str | None:
    """Return how the interface of a candidate differs from the reference's, or None where a caller sees the same.

    An optional input (one with a default) that decides about no output of the reference may be missing, and one that
    does must decide about the candidate's. What is optional in the candidate alone is no difference.
    """
    for what, ours, theirs in (
        ("inputs", _kinds(required_inputs(reference)), _kinds(required_inputs(candidate))),
        ("outputs", _kinds(reference.graph.output), _kinds(candidate.graph.output)),
    ):
        if ours != theirs:
            return f"{what} differ: {_names(ours, theirs)}"
    matter, kept = optional_read(reference), _kinds(optional_inputs(candidate))
    have = {name: kind for name, kind in kept.items() if name in matter}
    if have != matter:
        return f"optional inputs differ: {_names(matter, have)}"
    if frozen := sorted(set(matter) - set(optional_read(candidate))):
        return f"optional inputs differ: the candidate does not depend on {frozen}"
    return None


def optional_read(model: onnx.ModelProto) -> dict[str, Any]:
    """Return the kinds of the optional inputs whose values some output may depend on."""
    fixed = {value.name for value in model.graph.input if _is_fixed(value)}
    needed = {value.name for value in model.graph.output}
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            numberless = node.op_type in _NUMBERLESS and node.domain == ""
            needed |= used_names(node) - (fixed if numberless else set())
    return {name: kind for name, kind in _kinds(optional_inputs(model)).items() if name in needed}


def _is_fixed(value: Any) -> bool:
    """Whether a value's shape is stated in full."""
    kind = value.type.tensor_type
    return kind.HasField("shape") and all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in kind.shape.dim)


def _kinds(values: Any) -> dict[str, Any]:
    return {v.name: (v.type.WhichOneof("value"), v.type.tensor_type.elem_type) for v in values}


def _names(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    if set(ours) != set(theirs):
        return f"{sorted(ours)} became {sorted(theirs)}"
    return "types of " + ", ".join(sorted(name for name in ours if ours[name] != theirs[name]))
