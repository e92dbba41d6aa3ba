"""Channel shuffles: a run of reshapes and transpositions that, as a whole, only permutes channels (ShuffleNet).

Between the reshapes the channels lie on two axes, which no map along one axis can say; so the run is followed at once,
by moving the channel number of every element.

A batch of unknown size is taken to be 2. That proves the same for any other while it is the outermost axis, because
every step then repeats from block to block; of the batch itself, and of where it is moved inside, it proves nothing.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from ..affine import Array, ChannelAffine, Dims
from ..registry import Site

__all__ = ["through_run"]

_LIMIT = 1 << 22
"""Largest tensor, in elements, whose channel numbers are moved."""
_LONGEST = 8
"""Most operators in one run; a shuffle has three."""
_LAYOUT = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"))


def through_run(site: Site) -> tuple[ir.Value, ChannelAffine, ir.Node] | None:
    """The first value up the run on which the map at the run's end is one along a single axis, and who reads it."""
    labels, whole = _numbers(site), _static(site.dims(site.node.outputs[0]))
    node: ir.Node | None = site.node
    for _ in range(_LONGEST):
        if labels is None or node is None or node.op_type not in _LAYOUT or node.domain != "":
            return None
        value = node.inputs[0]
        if value is None:
            return None
        dims = site.facts.dims(value)
        whole = whole or _static(dims)
        labels = _undo(node, dims, labels, whole)
        if labels is None:
            return None
        for axis in range(0 if whole else 1, labels.ndim):
            size = labels.shape[axis]
            rows = np.moveaxis(labels, axis, 0).reshape(size, -1)
            if size >= site.affine.size and np.all(rows == rows[:, :1]):
                return value, site.affine.take(rows[:, 0]).at(axis), node
        if value.is_graph_output() or len(value.uses()) != 1:
            return None
        node = value.producer()
        if node is not None and node.graph is not site.node.graph:
            return None
    return None


def _numbers(site: Site) -> Array | None:
    """The channel number of every element of the output; a batch of unknown size is taken to be 2."""
    dims = site.dims(site.node.outputs[0])
    shape = [d if isinstance(d, int) else 2 if i == 0 else 0 for i, d in enumerate(dims)]
    axis = site.affine.axis
    if not 0 < prod(shape) <= _LIMIT or axis >= len(shape) or shape[axis] != site.affine.size:
        return None
    along = [1] * len(shape)
    along[axis] = -1
    return np.broadcast_to(np.arange(shape[axis], dtype=np.int32).reshape(along), shape)


def _static(dims: Dims | None) -> bool:
    return dims is not None and all(isinstance(d, int) for d in dims)


def _undo(node: ir.Node, dims: Dims | None, labels: Array, whole: bool) -> Array | None:
    """The numbers on the input, of shape `dims`; `whole` says whether no size on the way was made up."""
    if _static(dims) and prod(d for d in dims or () if isinstance(d, int)) != labels.size:
        return None
    if any(a.is_ref() for a in node.attributes.values()):
        return None
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", tuple(range(labels.ndim))[::-1])
        stays = len(perm) == labels.ndim and (whole or perm[0] == 0)
        return labels.transpose(np.argsort(np.asarray(perm))) if stays else None
    if dims is None or any(not isinstance(d, int) for d in dims[1:]):
        return None
    rest = prod(d for d in dims[1:] if isinstance(d, int))
    if not dims or not rest or labels.size % rest or dims[0] not in (None, labels.size // rest, *_names(dims[0])):
        return None
    return labels.reshape(labels.size // rest, *(d for d in dims[1:] if isinstance(d, int)))


def _names(dim: int | str | None) -> tuple[str, ...]:
    return (dim,) if isinstance(dim, str) else ()
