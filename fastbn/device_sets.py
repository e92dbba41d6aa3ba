"""Layer, instance and group norm for arrays on a GPU, in full: check, allocate, launch. The twin of ``family``.

Sets of values that share statistics must be contiguous: an array whose channels are not right behind its samples in
memory is copied there and back by its library (Numba's arrays are refused, since Numba cannot).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastbn import arguments, device, layout
from fastbn import device_arguments as checks
from fastbn.cuda.arrays import DeviceArray, Flat
from fastbn.cuda.plan_sets import Sizes
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments
from fastbn.saved import Gradients, Saved

__all__ = ["DeviceSetsSaved", "group_norm", "instance_norm", "layer_norm", "move"]


class _Ordered:
    """An array's elements in C order with axis 1 where ``axis`` was (None: as they are)."""

    def __init__(self, array: DeviceArray, axis: int | None, fresh: bool = False):
        order = list(range(array.ndim))
        if axis is not None:
            order.insert(1, order.pop(axis))
        moved = array.transpose(order) if array.size else array
        self.copied = not moved.c_contiguous
        self.array = moved.empty(moved.shape) if self.copied and fresh else moved.contiguous()
        self._moved = moved

    @property
    def flat(self) -> Flat:
        """What kernels take."""
        return self.array.flat()

    def give_back(self) -> None:
        """Write the elements to where the caller has them."""
        if self.copied:
            self._moved.library.assign(self._moved.owner, self.array.owner)


def _output(out: Any, x: DeviceArray) -> DeviceArray:
    target, _ = checks.output(out, x, 0)
    checks.apart("x", target, x, exact_allowed=False)
    return target


class DeviceSetsSaved(Saved):
    """What a forward pass over sets saves; mean, invstd and variance have the shape of the sets."""

    __slots__ = ("affine", "axis", "keep", "shape", "sizes", "vectors", "weight", "x")

    x: DeviceArray  # as the caller's
    keep: Flat  # in the order that kernels read
    axis: int | None
    sizes: Sizes
    shape: tuple[int, ...]  # of the statistics
    vectors: Flat  # mean, invstd, variance, rounding remainder of the mean, by set
    weight: Flat | None
    affine: tuple[tuple[int, ...] | None, tuple[int, ...] | None]  # shapes of weight and bias

    def _row(self, i: int) -> Any:
        sets = self.sizes.sets
        return self.x.library.reshape(self.vectors.array_owner[i * sets : (i + 1) * sets], self.shape)

    @property
    def moments(self) -> Moments:
        """The statistics as a mergeable value by set, on the host: waits for the GPU."""
        return device.to_moments(self.vectors, self.count)

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        return self._gradients(grad_output, out)

    def _gradients(self, grad_output: Any, out: Any) -> Gradients:
        x = self.x
        grad = checks.like("grad_output", grad_output, x)
        if out is None:
            target = x.empty(x.shape)
        else:
            target = _output(out, x)
            checks.apart("grad_output", target, grad, exact_allowed=True)
            checks.apart_from_vectors(target, weight=self.weight)
        dweight, dbias = (None if s is None else self.parameter_gradient(s) for s in self.affine)
        if x.size:
            from fastbn.cuda import launch_sets

            into = _Ordered(target, self.axis, fresh=True)
            launch_sets.backward(
                self.keep, _Ordered(grad, self.axis).flat, into.flat, self.weight, self.vectors,
                None if dweight is None else dweight.flat(), None if dbias is None else dbias.flat(), self.sizes,
            )  # fmt: skip
            into.give_back()
        return Gradients(
            target.owner if out is None else out,
            None if dweight is None else dweight.owner,
            None if dbias is None else dbias.owner,
            None,
        )

    def parameter_gradient(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return where the gradient of weight or bias goes; zeros without values."""
        x = self.x
        if x.size:
            return x.empty(shape, x.arithmetic)
        return x.library.wrap(x.library.zeros(shape, x.arithmetic, x.owner))


def _normalise(
    x: DeviceArray, weight: Any, bias: Any, param: tuple[int, ...], d: Sizes, shape: tuple[int, ...], axis: int | None,
    eps: Any, out: Any,
) -> tuple[Any, DeviceSetsSaved]:  # fmt: skip
    """Normalise sets of values; ``param`` is the shape of weight and bias, ``shape`` that of the statistics."""
    eps = arguments.epsilon(eps, positive=True)
    w = None if weight is None else checks.parameter("weight", weight, x, param).contiguous().flat()
    b = None if bias is None else checks.parameter("bias", bias, x, param).contiguous().flat()
    target = x.empty(x.shape) if out is None else _output(out, x)
    if out is not None and x.size:
        checks.apart_from_vectors(target, weight=w, bias=b)
    result = DeviceSetsSaved()
    result.x, result.axis, result.sizes, result.shape, result.count = x, axis, d, shape, d.n
    result.affine, result.weight = (None if w is None else param, None if b is None else param), w
    result.updated = 0
    if x.size == 0:
        result.vectors = x.zeros(4 * d.sets)
        return (target.owner if out is None else out), result
    from fastbn.cuda import launch_sets

    source, into = _Ordered(x, axis), _Ordered(target, axis, fresh=True)
    result.keep = source.flat
    result.vectors = launch_sets.train(source.flat, into.flat, w, b, d, eps)
    into.give_back()
    return (target.owner if out is None else out), result


def _samples(x: Any, axis: Any) -> tuple[DeviceArray, int]:
    array = checks.tensor("x", x)
    axis = layout.normalise_axis(axis, array.ndim)
    if axis == 0:
        raise ArgumentValueError("axis", "a channel axis other than 0, that of the samples", 0)
    return array, axis


def _sizes(x: DeviceArray, axis: int, groups: int) -> Sizes:
    N, C = x.shape[0], x.shape[axis]
    return Sizes(N, groups, C, x.size // (N * C) if x.size else 0)


def instance_norm(x: Any, weight: Any, bias: Any, axis: Any, eps: Any, out: Any) -> tuple[Any, DeviceSetsSaved]:
    """See ``fastbn.instance_norm``."""
    array, axis = _samples(x, axis)
    C = array.shape[axis]
    d = _sizes(array, axis, C)
    if d.n == 1:
        raise ArgumentValueError("x", "more than 1 value per channel and sample", f"shape {array.shape}")
    return _normalise(array, weight, bias, (C,), d, (array.shape[0], C), axis, eps, out)


def group_norm(
    x: Any, weight: Any, bias: Any, num_groups: Any, axis: Any, eps: Any, out: Any
) -> tuple[Any, DeviceSetsSaved]:
    """See ``fastbn.group_norm``."""
    array, axis = _samples(x, axis)
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | np.integer):
        raise ArgumentTypeError("num_groups", "an integer", type(num_groups).__name__)
    C, num_groups = array.shape[axis], int(num_groups)  # NumPy's may be too small for C
    if num_groups < 1 or C % num_groups:
        raise ArgumentValueError("num_groups", f"a divisor of the {C} channels", num_groups)
    d = _sizes(array, axis, num_groups)
    if array.shape[0] * d.n == 1:
        raise ArgumentValueError("x", "more than 1 value per group when training", f"shape {array.shape}")
    return _normalise(array, weight, bias, (C,), d, (array.shape[0], d.G), axis, eps, out)


def layer_norm(x: Any, weight: Any, bias: Any, axis: Any, eps: Any, out: Any) -> tuple[Any, DeviceSetsSaved]:
    """See ``fastbn.layer_norm``."""
    array = checks.tensor("x", x)
    axis = layout.normalise_axis(axis, array.ndim)
    rows, normalised = array.shape[:axis], array.shape[axis:]
    d = Sizes(math.prod(rows), 1, math.prod(normalised), 1)
    return _normalise(array, weight, bias, normalised, d, rows, None, eps, out)


def move(saved: DeviceSetsSaved, running_mean: Any, running_var: Any, momentum: float) -> None:
    """Move the running statistics of an instance norm layer, on the GPU: by the means over samples."""
    if saved.x.size == 0:
        return
    from fastbn.cuda import launch_sets

    C = saved.sizes.C
    named = ("running_mean", running_mean), ("running_var", running_var)
    flats = [checks.running(name, value, saved.x, C) for name, value in named]
    unbias = saved.count / (saved.count - 1)
    launch_sets.move(saved.vectors, flats[0], flats[1], saved.sizes.B, momentum, unbias)
