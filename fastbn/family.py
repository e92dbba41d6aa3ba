"""Layer, instance and group norm: batch norm over other sets of values, on the same kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, groups, layout, quick_sets, recycled, saved, views
from fastbn.blocks import BlockForward, Piece
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.groups import Groups
from fastbn.saved import Gradients, Saved, no_statistics

__all__ = ["group_norm", "instance_norm", "layer_norm"]

Array = npt.NDArray[Any]


class InstanceSaved(Saved):
    """What instance norm saves; mean, invstd and variance have shape (N, C)."""

    __slots__ = ("f", "pieces", "shape")

    numpy_sums = True

    f: BlockForward
    pieces: list[Piece]
    shape: tuple[int, int]

    def _row(self, i: int) -> Array:
        row: Array = self.stats.reshape(3, *self.shape)[i]
        return row

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        return self.f.gradients(self.pieces, grad_output, out)


def instance_norm(
    x: Any, weight: Any = None, bias: Any = None, *, axis: int = 1, eps: float = 1e-5, out: Any = None
) -> tuple[Array, Saved]:
    """Normalise every channel of every sample by its own statistics: y = weight*(x - mean)/sqrt(var + eps) + bias.

    mean and var (biased) are taken over all axes but the first and ``axis``.
    Source: Ulyanov, Vedaldi & Lempitsky 2016 (arXiv:1607.08022).

    Parameters
    ----------
    x : numpy.ndarray, rank >= 3
        float32, float64, float16 or bfloat16; samples along the first axis.
    weight, bias : array, shape (C,), optional
        Scale (1) and shift (0); float64 for float64 x, else float32.
    axis : int
        Channel axis; not the first.
    eps : float
        Added to the variance inside the root; > 0.
    out : numpy.ndarray, optional
        Output; shape and dtype of x, no gaps, apart from x.

    Returns
    -------
    y : numpy.ndarray
        Shape, dtype and memory order of x.
    saved : Saved
        For ``backward``; its mean has shape (N, C).

    Raises
    ------
    ValueError
        Shapes that do not fit, one value per channel and sample (as PyTorch), eps <= 0, overlapping out.
    TypeError
        Not a NumPy array, other dtypes.
    """
    if dispatch.on_device(x):
        from fastbn import device_family

        return device_family.instance_norm(x, weight, bias, axis, eps, out)
    if type(x) is np.ndarray and type(axis) is int and axis == 1 and quick_sets.is_small(x):
        return group_norm(x, x.shape[1], weight, bias, eps=eps, out=out)  # the same in 0.3 of the time
    f = BlockForward(x, weight, bias, axis, None, None, out)
    eps = arguments.epsilon(eps, positive=True)
    result = InstanceSaved()
    result.f, result.shape, result.updated = f, (f.x.shape[0], f.weight.size), 0
    result.count = f.blocks.N * f.blocks.S
    if f.x.size == 0:
        result.stats, result.pieces = no_statistics(f.x.shape[0] * f.weight.size, eps), []
        return f.result(), result
    if result.count == 1:
        raise ArgumentValueError("x", "more than 1 value per channel and sample", f"shape {f.x.shape}")
    whole = slice(None)
    result.stats = f.train_piece(whole, f.blocks, eps)
    result.pieces = [(whole, f.blocks, result.stats)]
    return f.result(), result


class _Ordered:
    """An array's elements in C order with axis 1 where ``axis`` was (None: as they are), as one flat axis."""

    def __init__(self, array: Array, axis: int | None):
        self.moved = array if axis is None or axis == 1 else np.moveaxis(array, axis, 1)
        dense = self.moved.flags.c_contiguous and array.flags.aligned
        self.flat: Array = (self.moved if dense else np.array(self.moved, order="C")).reshape(-1)
        self.copied = not dense

    def give_back(self) -> None:
        """Write the elements back where they were copied from."""
        if self.copied:
            self.moved[...] = self.flat.reshape(self.moved.shape)


class GroupSaved(Saved):
    """What group and layer norm save; mean, invstd and variance have the shape of the sets."""

    __slots__ = ("affine", "axis", "groups", "shape", "sizes", "weight", "x")

    x: Array
    axis: int | None
    groups: int | None  # as ``quick_sets`` takes them; None where it would not
    sizes: Groups
    shape: tuple[int, ...]  # of the statistics
    weight: Array | None
    affine: tuple[tuple[int, ...] | None, tuple[int, ...] | None]  # shapes of weight and bias

    def _row(self, i: int) -> Array:
        row: Array = self.stats.reshape(3, *self.shape)[i]
        return row

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        if self.groups is not None:
            done = quick_sets.backward(self.x, self.groups, self.weight, self.stats, grad_output, out)
            if done is not None:
                weight, bias = self.affine
                return Gradients(done[0], None if weight is None else done[1], None if bias is None else done[2], None)
        with np.errstate(all="ignore"):
            return self._gradients(grad_output, out)

    def _gradients(self, grad_output: Any, out: Any) -> Gradients:
        grad = arguments.same_kind("grad_output", grad_output, self.x)
        if out is None:
            out = recycled.empty_like(self.x)
        else:
            saved.output(out, self.x, 0)
            arguments.apart("x", out, self.x, exact_allowed=False)
            arguments.apart("grad_output", out, grad, exact_allowed=True)
            arguments.apart_from_parameters(out, self.weight, None)
        shapes, kind = self.affine, arguments.arithmetic(self.x.dtype)
        dweight = dbias = np.zeros(self.sizes.C)
        if self.x.size:
            x, target = _Ordered(self.x, self.axis), _Ordered(out, self.axis)
            g = _Ordered(grad, self.axis).flat
            dweight, dbias = groups.backward(x.flat, g, target.flat, self.weight, self.stats, self.sizes)
            target.give_back()
        return Gradients(
            out,
            None if shapes[0] is None else dweight.astype(kind, copy=False).reshape(shapes[0]),
            None if shapes[1] is None else dbias.astype(kind, copy=False).reshape(shapes[1]),
            None,
        )


def _quick(
    x: Any, groups: Any, weight: Any, bias: Any, axis: Any, eps: Any, out: Any
) -> tuple[Array, GroupSaved] | None:
    """Normalise a small plain array in a few steps; None where that is none, or groups lie along another axis."""
    if type(axis) is not int or axis != (1 if groups else -1):
        return None
    done = quick_sets.train(x, groups, weight, bias, eps, out)
    if done is None:
        return None
    y, stats, call = done
    result = GroupSaved()
    result.axis, result.groups, result.updated = 1 if groups else None, groups, 0
    result.x, result.weight, result.stats = x, weight, stats
    result.sizes, result.shape, result.affine, result.count = call.sizes, call.rows, call.affine, call.sizes.length
    if weight is None or bias is None:
        param = call.affine[0]
        result.affine = None if weight is None else param, None if bias is None else param
        if weight is None:
            result.weight = views.constant(1.0, call.sizes.C, call.wide)
    return y, result


def _parameter(name: str, value: Any, shape: tuple[int, ...], x: Array) -> Array | None:
    """Check a parameter of any shape; return it flat."""
    if value is None:
        return None
    array = value if type(value) is np.ndarray else arguments.sequence(name, value, f"an array of shape {shape}")
    if array.shape != shape:
        raise ArgumentValueError(name, f"shape {shape}", f"shape {array.shape}")
    return arguments.parameter(name, array.reshape(-1), array.size, arguments.arithmetic(x.dtype))


def _normalise(
    x: Array, weight: Any, bias: Any, param: tuple[int, ...], d: Groups, shape: tuple[int, ...], axis: int | None,
    eps: Any, out: Any,
) -> tuple[Array, GroupSaved]:  # fmt: skip
    """Normalise sets of values; ``param`` is the shape of weight and bias, ``shape`` that of the statistics."""
    eps = arguments.epsilon(eps, positive=True)
    w, b = _parameter("weight", weight, param, x), _parameter("bias", bias, param, x)
    if out is None:
        y = recycled.empty_like(x)
    else:
        saved.output(out, x, 0)
        arguments.apart("x", out, x, exact_allowed=False)
        arguments.apart_from_parameters(out, w, b)
        y = out
    result = GroupSaved()
    result.axis, result.sizes, result.shape, result.count = axis, d, shape, d.length
    result.affine = (None if w is None else param, None if b is None else param)
    result.groups = None
    if len(param) == 1 and axis in (None, 1):
        result.groups = quick_sets.LAST if axis is None else d.G
    result.x, result.weight, result.updated = x, w, 0
    if x.size == 0:
        result.stats = no_statistics(d.B * d.G, eps)
        return y, result
    affine = None
    if w is not None or b is not None or quick_sets.without_affine(x):
        kind = arguments.arithmetic(x.dtype)
        result.weight = views.constant(1.0, d.C, kind) if w is None else w
        affine = (result.weight, views.constant(0.0, d.C, kind) if b is None else b)
    source, target = _Ordered(x, axis), _Ordered(y, axis)
    if source.copied:  # keep the copy: backward reads x in this order too
        copy = source.flat.reshape(source.moved.shape)
        result.x = copy if axis is None else np.moveaxis(copy, 1, axis)
    result.stats = groups.forward(source.flat, target.flat, affine, d, eps)
    target.give_back()
    return y, result


def group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, *, axis: int = 1, eps: float = 1e-5, out: Any = None
) -> tuple[Array, Saved]:
    """Normalise groups of channels of every sample: y = weight*(x - mean)/sqrt(var + eps) + bias.

    mean and var (biased) are taken over the C/num_groups channels of a group and all axes but the first.
    Source: Wu & He 2018 (arXiv:1803.08494).

    Parameters
    ----------
    x : numpy.ndarray, rank >= 2
        float32, float64, float16 or bfloat16; samples along the first axis. Channels right behind the samples in
        memory, else it is copied.
    num_groups : int
        Divides C.
    weight, bias : array, shape (C,), optional
        Scale (1) and shift (0) by channel; float64 for float64 x, else float32.
    axis : int
        Channel axis; not the first.
    eps : float
        Added to the variance inside the root; > 0.
    out : numpy.ndarray, optional
        Output; shape and dtype of x, no gaps, apart from x.

    Returns
    -------
    y : numpy.ndarray
        Shape, dtype and memory order of x.
    saved : Saved
        For ``backward``; its mean has shape (N, num_groups).

    Raises
    ------
    ValueError
        Shapes that do not fit, groups that do not divide C, one value in all per group (as PyTorch), eps <= 0,
        overlapping out.
    TypeError
        Not a NumPy array, other dtypes.
    """
    if dispatch.on_device(x):
        from fastbn import device_family

        return device_family.group_norm(x, num_groups, weight, bias, axis, eps, out)
    if type(num_groups) is int and num_groups > 0:
        done = _quick(x, num_groups, weight, bias, axis, eps, out)
        if done is not None:
            return done
    x = arguments.tensor("x", x)
    axis = layout.normalise_axis(axis, x.ndim)
    if axis == 0:
        raise ArgumentValueError("axis", "a channel axis other than 0, that of the samples", 0)
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | np.integer):
        raise ArgumentTypeError("num_groups", "an integer", type(num_groups).__name__)
    N, C, num_groups = x.shape[0], x.shape[axis], int(num_groups)  # NumPy's may be too small for C
    if num_groups < 1 or C % num_groups:
        raise ArgumentValueError("num_groups", f"a divisor of the {C} channels", num_groups)
    d = Groups(N, num_groups, C, x.size // (N * C) if x.size else 0)
    if N * d.length == 1:
        raise ArgumentValueError("x", "more than 1 value per group when training", f"shape {x.shape}")
    return _normalise(x, weight, bias, (C,), d, (N, d.G), axis, eps, out)


def layer_norm(
    x: Any, weight: Any = None, bias: Any = None, *, axis: int = -1, eps: float = 1e-5, out: Any = None
) -> tuple[Array, Saved]:
    """Normalise the last axes, from ``axis`` on: y = weight*(x - mean)/sqrt(var + eps) + bias.

    mean and var (biased) are taken over those axes for every position of the others.
    Source: Ba, Kiros & Hinton 2016 (arXiv:1607.06450).

    Parameters
    ----------
    x : numpy.ndarray, rank >= 2
        float32, float64, float16 or bfloat16; C-contiguous, else it is copied.
    weight, bias : array, shape x.shape[axis:], optional
        Scale (1) and shift (0) by element; float64 for float64 x, else float32.
    axis : int
        First normalised axis.
    eps : float
        Added to the variance inside the root; > 0.
    out : numpy.ndarray, optional
        Output; shape and dtype of x, no gaps, apart from x.

    Returns
    -------
    y : numpy.ndarray
        Shape, dtype and memory order of x.
    saved : Saved
        For ``backward``; its mean has shape x.shape[:axis].

    Raises
    ------
    ValueError
        Shapes that do not fit, eps <= 0, overlapping out.
    TypeError
        Not a NumPy array, other dtypes.
    """
    if dispatch.on_device(x):
        from fastbn import device_family

        return device_family.layer_norm(x, weight, bias, axis, eps, out)
    if (done := _quick(x, quick_sets.LAST, weight, bias, axis, eps, out)) is not None:
        return done
    x = arguments.tensor("x", x)
    axis = layout.normalise_axis(axis, x.ndim)
    rows, normalised = x.shape[:axis], x.shape[axis:]
    d = Groups(math.prod(rows), 1, math.prod(normalised), 1)
    return _normalise(x, weight, bias, normalised, d, rows, None, eps, out)
