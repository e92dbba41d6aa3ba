"""A fold is planned completely before anything is touched: edits that know how to prepare and what they will do.

Requirement: planning and preparing have no side effect on the model; whatever can fail fails there, by `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from .affine import Array, ChannelAffine

__all__ = [
    "AddShift",
    "BecomeGemm",
    "Bypass",
    "Edit",
    "Fork",
    "Refused",
    "SetAttribute",
    "SetConstant",
    "SetInput",
    "Step",
    "scaled",
    "to_dtype",
]

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""The types that a map may live in."""


class Refused(Exception):
    """Why a map cannot pass or be swallowed, as a sentence for the report."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Edit:
    """One change of the model, on one node."""

    node: ir.Node
    grows = 0
    """By how many nodes the model grows."""

    def prepare(self) -> None:
        """Compute what the edit writes; raises `Refused` if it cannot be represented."""


@dataclass(eq=False)
class SetConstant(Edit):
    """Give input `index` of `node` a new constant value.

    `compute` returns the value in float64 or already in `dtype`. `axis` is the axis of the value along which the
    channels lie when precision matters (weights); None for an offset, where only overflow matters.
    """

    node: ir.Node
    index: int
    compute: Callable[[], Array]
    dtype: ir.DataType
    axis: int | tuple[int, ...] | None = None
    hint: str = ""
    exact: bool = False
    value: Array | None = None

    def prepare(self) -> None:
        """Compute the value and cast it once; an `exact` one is stored as it is."""
        self.value = self.compute() if self.exact else to_dtype(self.compute(), self.dtype, self.axis)


@dataclass(eq=False)
class SetInput(Edit):
    """Connect input `index` of `node` to another existing value (None disconnects it)."""

    node: ir.Node
    index: int
    value: ir.Value | None


@dataclass(eq=False)
class SetAttribute(Edit):
    """Set one attribute of `node`."""

    node: ir.Node
    attribute: ir.Attr


@dataclass(eq=False)
class Bypass(Edit):
    """Remove `node`; whoever read its first output reads its input `index` instead.

    `rename` moves the name of the output onto the input (upstream folds: the values that had that name keep it).
    """

    node: ir.Node
    index: int
    rename: bool
    grows = -1


@dataclass(eq=False)
class AddShift(Edit):
    """Insert ``Add(value, shift)`` behind `value`, the output of `node`."""

    node: ir.Node
    value: ir.Value
    affine: ChannelAffine
    rank: int
    dtype: ir.DataType
    opset: int
    grows = 1
    shift: Array | None = None

    @property
    def attributes(self) -> list[ir.Attr]:
        """How a vector broadcasts before opset 7."""
        old = self.opset < 7
        return [ir.AttrInt64("broadcast", 1), ir.AttrInt64("axis", self.affine.axis)] if old else []

    def prepare(self) -> None:
        """Shape the shift for numpy-style broadcasting: as few dimensions as possible."""
        a = self.affine
        behind = 0 if self.opset < 7 else self.rank - 1 - a.axis
        self.shift = to_dtype(a.shift.reshape((a.size,) + (1,) * behind), self.dtype, None)


@dataclass(eq=False)
class BecomeGemm(Edit):
    """Turn a MatMul of two matrices into a Gemm that carries the shift as its bias."""

    node: ir.Node
    shift: Array
    dtype: ir.DataType
    value: Array | None = None

    def prepare(self) -> None:
        """Cast the bias once."""
        self.value = to_dtype(self.shift, self.dtype, None)


@dataclass(eq=False)
class Fork(Edit):
    """Copy `node` for one of the readers of its output `value`, and apply `edits` to the copy."""

    node: ir.Node
    value: ir.Value
    reader: ir.Node
    edits: list[Edit]

    def __post_init__(self) -> None:
        self.grows = sum(edit.grows for edit in self.edits)  # the copy itself is what was asked for

    def prepare(self) -> None:
        """Prepare the edits of the copy."""
        for edit in self.edits:
            edit.prepare()


@dataclass
class Step:
    """What one operator does with a map: the edits on its node, and where the map goes on.

    Attributes
    ----------
    edits : list of Edit
    onward : list of (value, map)
        Upstream, the inputs that must deliver the map; downstream, the outputs that now lack it.
    absorbs : bool
        Whether the operator swallowed (part of) the map: it is named as an absorber in the report.
    by : Node or None
        Another operator that swallowed it instead.
    reader : Node or None
        Upstream, who reads the onward values where it is not the operator itself.
    """

    edits: list[Edit] = field(default_factory=list)
    onward: list[tuple[ir.Value, ChannelAffine]] = field(default_factory=list)
    absorbs: bool = False
    by: ir.Node | None = None
    reader: ir.Node | None = None

    @staticmethod
    def absorbed(*edits: Edit) -> Step:
        """Swallowed whole."""
        return Step(list(edits), [], True)

    @staticmethod
    def carry(*onward: tuple[ir.Value, ChannelAffine], edits: Sequence[Edit] = ()) -> Step:
        """Passed on."""
        return Step(list(edits), list(onward), False)


def scaled(weight: Array, factor: Array) -> Array:
    """``weight * factor`` computed in float64 and rounded once to the weight's type, without a float64 copy."""
    core = _distinct(weight)
    shape = np.broadcast_shapes(weight.shape, factor.shape)
    with np.errstate(all="ignore"):
        if core.dtype in (np.float32, np.float64):
            out = np.empty(np.broadcast_shapes(core.shape, factor.shape), core.dtype)
            np.multiply(core, factor, out=out, dtype=np.float64, casting="same_kind")
        else:
            out = core.astype(np.float64) * factor
    return out if out.shape == shape else np.broadcast_to(out, shape)


def _distinct(array: Array) -> Array:
    """One of each run of entries that share their memory: what an expression like ConstantOfShape really holds."""
    if array.size < 2 or 0 not in array.strides:
        return array
    return array[tuple(slice(0, 1) if step == 0 else slice(None) for step in array.strides)]


def to_dtype(value: Array, dtype: ir.DataType, axis: int | tuple[int, ...] | None) -> Array:
    """Cast a folded constant once, or refuse.

    A channel whose largest weight falls below the smallest normal number of the type has lost its precision; an
    offset may underflow, since an error below the smallest number of the type is below the rounding of the output.
    """
    if dtype not in FLOATS:
        raise Refused(f"weights of type {dtype.name} cannot be rescaled exactly")
    core = _distinct(value)
    with np.errstate(all="ignore"):
        out: Array = core if core.dtype == dtype.numpy() else core.astype(dtype.numpy())
    if out.size:
        _must_keep_range(core, out, dtype, axis)
    return out if out.shape == value.shape else np.broadcast_to(out, value.shape)


def _must_keep_range(value: Array, out: Array, dtype: ir.DataType, axis: int | tuple[int, ...] | None) -> None:
    """Refuse `out`, which is `value` in another type, if it overflows or a channel along `axis` loses its range."""
    name = dtype.name.lower()
    wide: Array = out.astype(np.float32) if out.dtype.itemsize < 4 else out
    keep = () if axis is None else (axis,) if isinstance(axis, int) else axis
    others = tuple(i for i in range(out.ndim) if i not in keep)
    top = np.maximum(wide.max(axis=others), -wide.min(axis=others))
    if not np.isfinite(top).all():
        raise Refused(f"the folded weights overflow or are not finite in {name}")
    if axis is not None:
        smallest = float(ir_smallest_normal(dtype))
        lost = np.asarray(top < smallest)
        if lost.any():
            reference = value if value.dtype.itemsize >= 4 else wide
            exact = np.abs(reference).max(axis=others)
            if np.any(lost & (exact > 0)):
                raise Refused(f"the folded weights lose range in {name}: a channel falls below {smallest:.3g}")


def ir_smallest_normal(dtype: ir.DataType) -> float:
    """Smallest normal positive number of a floating type."""
    if dtype is ir.DataType.BFLOAT16:
        return float(np.finfo(np.float32).tiny)
    return float(np.finfo(dtype.numpy()).tiny)
