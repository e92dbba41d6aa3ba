"""Masks and lengths for arrays on a GPU: a byte for each place, in the memory order of x, and their number.

What is on the GPU stays there: nothing is checked that the host would have to wait for. A mask or lengths from the host
are checked as on the CPU and copied over.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn import arguments, layout
from fastbn.cuda.arrays import DeviceArray
from fastbn.cuda.launch import ALL, Mask, lengths_to_mask, mask_of
from fastbn.cuda.libraries import on_device, wrap
from fastbn.cuda.plan import small_enough
from fastbn.errors import ArgumentValueError

__all__ = ["ALL", "Mask", "find"]


def find(
    mask: Any, lengths: Any, x: DeviceArray, axis: int, where: layout.Layout, *, train: bool, single: bool = False
) -> Mask:
    """Return the mask in the memory order of x; ALL if it excludes nothing that the host knows of.

    ``train``: count it too, and raise for one value per channel if the host can tell, but for ``single``.
    """
    if mask is None and lengths is None:
        return ALL
    if x.size:
        small_enough(where.dims, x.kind)  # places are counted in 32 bits
    if mask is not None and lengths is not None:
        raise ArgumentValueError("mask, lengths", "one of them", "both")
    given = mask if lengths is None else lengths
    if on_device(given):
        found = _mask(mask, x, axis) if lengths is None else _lengths(lengths, x, axis)
    else:
        seen: Any = x  # shape and rank are all that is looked at
        host = arguments.valid(mask, seen, axis) if lengths is None else arguments.from_lengths(lengths, seen, axis)
        if host.all():
            return ALL
        if train and not single and np.count_nonzero(host) == 1:
            raise ArgumentValueError("x", "more than 1 value per channel when training", "a mask that leaves 1")
        found = x.library.wrap(x.library.put(np.ascontiguousarray(host), x.owner))
    if not x.size:
        return ALL
    order = [a - (a > axis) for a in where.order if a != axis]
    valid = found.transpose(order).contiguous().flat()
    return mask_of(valid, x.stream()) if train else Mask(valid, None)


def _mask(mask: Any, x: DeviceArray, axis: int) -> DeviceArray:
    array = wrap("mask", mask, ("bool",)).ready_for(x)
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    if array.shape == shape:
        return array
    try:
        np.broadcast_shapes(array.shape, shape)
        fits = array.ndim <= len(shape) and np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ArgumentValueError(
            "mask", f"a shape that broadcasts to {shape}, that of x without its channel axis", array.shape
        )
    return array.library.wrap(array.library.expand(array.owner, shape))


def _lengths(lengths: Any, x: DeviceArray, axis: int) -> DeviceArray:
    """The mask (N, T) of lengths on the GPU; beyond 0 and T they count as those, since nobody can look."""
    array = wrap("lengths", lengths, ("int32", "int64")).ready_for(x)
    if x.ndim != 3 or axis == 0:
        raise ArgumentValueError(
            "lengths", "x of shape (N, C, T) with axis=1 or (N, T, C) with axis=2", f"shape {x.shape}, axis {axis}"
        )
    if array.shape != x.shape[:1]:
        raise ArgumentValueError("lengths", f"one length per sample, shape {x.shape[:1]}", f"shape {array.shape}")
    valid = x.empty((x.shape[0], x.shape[3 - axis]), "bool")
    if valid.size:
        lengths_to_mask(array.contiguous().flat(), valid.flat(), x.shape[0], x.shape[3 - axis], x.stream())
    return valid
