"""Batch norm forward, plain: check, allocate, dispatch. Everything else normalises by these two calls.

``train`` takes the statistics of the batch and moves running ones with the kernel; ``apply`` normalises by given ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, layout, quick, recycled, running, signs, views
from fastbn.cpu import tuning
from fastbn.errors import ArgumentValueError
from fastbn.saved import BatchSaved, OverwrittenSaved, delivered, kept, no_statistics, output

Array = npt.NDArray[Any]


class Forward:
    """The checked arguments that training and inference share, in the form the kernels take."""

    __slots__ = (
        "affine", "axis", "bias", "dtype", "in_place", "layout", "out", "relu", "residual", "signs", "weight", "x",
    )  # fmt: skip

    x: Array
    out: Array
    residual: Array | None
    signs: npt.NDArray[np.uint8] | None

    def __init__(
        self, x: Any, weight: Any, bias: Any, axis: Any, activation: Any, residual: Any, out: Any, in_place: bool
    ):
        x = arguments.tensor("x", x)
        self.axis = axis = layout.normalise_axis(axis, x.ndim)
        self.dtype = dtype = arguments.arithmetic(x.dtype)
        channels = x.shape[axis]
        self.affine = (weight is not None, bias is not None)
        if weight is None:
            self.weight = views.constant(1.0, channels, dtype)
        else:
            self.weight = arguments.parameter("weight", weight, channels, dtype)
        if bias is None:
            self.bias = views.constant(0.0, channels, dtype)
        else:
            self.bias = arguments.parameter("bias", bias, channels, dtype)
        self.relu = arguments.activation(activation)
        if residual is not None:
            residual = arguments.same_kind("residual", residual, x)
        if out is None:
            self.x, self.layout = layout.settle(x, axis) if x.size else (x, layout.contiguous(x.shape, axis))
            self.out = layout.empty_like(self.x, self.layout)
        else:
            self.layout = output(out, x, axis)
            arguments.apart("x", out, x, exact_allowed=in_place)
            if residual is not None:
                arguments.apart("residual", out, residual, exact_allowed=True)
            arguments.apart_from_parameters(out, self.weight, self.bias)
            self.out = out
            self.x = x if x.strides == out.strides and x.flags.aligned else layout.like(x, self.layout)
        self.in_place = in_place and out is not None and np.may_share_memory(self.out, self.x)
        self.residual = None if residual is None else layout.like(residual, self.layout)
        self.signs = None

    def __setstate__(self, state: Any) -> None:
        layout.restore(self, state, "x", "out", "residual")

    @property
    def count(self) -> int:
        """Values per channel."""
        N, _, S = self.layout.dims
        return N * S

    def result(self) -> Array:
        """Return y where the caller wants it."""
        return self.out

    def nothing(self) -> Array:
        """Return y of a batch without values."""
        self.out[...] = 0
        return self.result()

    def train(self, running_mean: Array, running_var: Array, momentum: float, eps: float) -> Array:
        """Normalise by the batch; returns its statistics. Running ones are moved if they have elements."""
        x, residual, out = map(self.flat, (self.x, self.residual, self.out))
        self.signs = self._room_for_signs(x, residual, out, once=False)
        stats: Array = dispatch.kernels().train(
            x, residual, out, self.weight, self.bias, running_mean, running_var, self.layout.dims, eps, momentum,
            self.relu, self.signs,
        )  # fmt: skip
        return stats

    def _room_for_signs(self, x: Any, residual: Any, out: Any, once: bool) -> npt.NDArray[np.uint8] | None:
        keeps = dispatch.kernels().keeps_signs(x, residual, out, self.layout.dims, self.relu, once)
        return signs.room(out.ctypes.data, out.size, out.itemsize) if keeps and not self.in_place else None

    def statistics(self, eps: float) -> Array:
        """Return the statistics of the batch."""
        stats: Array = dispatch.kernels().moments(self.flat(self.x), self.weight, self.layout.dims, eps)
        return stats

    def normalise(self, stats: Array) -> None:
        """Normalise by given statistics."""
        x, residual, out = map(self.flat, (self.x, self.residual, self.out))
        self.signs = self._room_for_signs(x, residual, out, once=True)
        dispatch.kernels().infer(
            x, residual, out, self.weight, self.bias, stats, self.layout.dims, self.relu, self.signs
        )

    def by(self, mean: Any, var: Any, eps: Any) -> tuple[Array, Array, float]:
        """Check the statistics to normalise by."""
        eps, channels = arguments.epsilon(eps, positive=False), self.weight.size
        mean = arguments.parameter("running_mean", mean, channels, self.dtype)
        var = arguments.parameter("running_var", var, channels, self.dtype)
        arguments.apart_from_vectors(self.out, running_mean=mean, running_var=var)
        return mean, var, eps

    def running(self, mean: Any, var: Any) -> tuple[Array, Array]:
        """Check running statistics that are given, or not; see ``running.pair``."""
        mean, var = running.pair(mean, var, self.layout.dims[1], self.dtype)
        if mean.size:
            running.check_apart(mean, var, (self.weight, self.bias), (self.x, self.out, self.residual))
        return mean, var

    def flat(self, x: Array | None) -> Array | None:
        """View x, residual or out as the kernels take it."""
        return None if x is None else views.flat(x, self.layout)

    def saved(self, stats: Array, frozen: bool, updated: int = 0) -> BatchSaved:
        """Return what backward needs."""
        saved = OverwrittenSaved() if self.in_place else BatchSaved()
        saved.x, saved.axis, saved.layout, saved.stats = self.x, self.axis, self.layout, stats
        saved.count, saved.updated = self.layout.dims[0] * self.layout.dims[2], updated
        saved.weight, saved.bias, saved.affine = self.weight, self.bias, self.affine
        saved.relu, saved.residual, saved.frozen = self.relu, self.residual is not None, frozen
        saved.signs = self.signs
        behind = self.relu and saved.residual  # else the sign is found again from x
        saved.y = self.out if behind and self.signs is None else None
        saved.places = None
        return saved


class Reordered(Forward):
    """Checked arguments of which x may have been copied to another memory order, in which y then comes too."""

    __slots__ = ("target",)

    target: Array | None

    def copied(self, x: Array, axis: int, out: Any) -> Array:
        """Return x in C order; the array that y goes to in the end is checked, or allocated like x."""
        if out is not None:
            output(out, x, axis)
            arguments.apart("x", out, x, exact_allowed=False)
        self.target = recycled.empty_like(x) if out is None else out
        return np.array(x, order="C")

    def result(self) -> Array:
        """Return y where the caller wants it."""
        return delivered(self.out, self.target)


def train(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
    momentum: Any, eps: Any, axis: Any, activation: Any, residual: Any, out: Any,
) -> tuple[Array, BatchSaved]:  # fmt: skip
    """Normalise by the batch; see ``fastbn.batch_norm_train``."""
    f = Forward(x, weight, bias, axis, activation, residual, out, in_place=False)
    N, C, S = f.layout.dims
    eps, momentum = arguments.epsilon(eps, positive=True), arguments.number("momentum", momentum)
    rm, rv = f.running(running_mean, running_var)
    if f.x.size == 0:
        return f.out, f.saved(no_statistics(C, eps), frozen=False)
    if N * S == 1:
        raise ArgumentValueError("x", "more than 1 value per channel when training", f"shape {f.x.shape}")
    return f.out, run(f, rm, rv, momentum, eps)


def run(f: Forward, rm: Array, rv: Array, momentum: float, eps: float) -> BatchSaved:
    """Normalise checked arguments by the batch and move checked running statistics, if they have elements."""
    mean = rm if rm.flags.carray else np.array(rm, order="C")
    var = rv if rv.flags.carray else np.array(rv, order="C")
    stats = f.train(mean, var, momentum, eps)
    if mean is not rm:
        rm[:] = mean
    if var is not rv:
        rv[:] = var
    return f.saved(stats, frozen=False, updated=int(rm.size > 0))


def frozen(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any,
    eps: Any, axis: Any, activation: Any, residual: Any, out: Any,
) -> tuple[Array, BatchSaved]:  # fmt: skip
    """Normalise as ``batch_norm_infer`` and keep what ``backward`` needs: the statistics are constants there."""
    done = None
    if residual is None or activation is None or getattr(x, "nbytes", 0) < tuning.STREAM // 3:  # else signs are kept
        done = quick.infer(x, running_mean, running_var, weight, bias, eps, axis, activation, residual, out)
    if done is not None:
        return done[0], kept(done, x, True, 0)
    f = Forward(x, weight, bias, axis, activation, residual, out, in_place=True)
    return f.out, f.saved(given(f, running_mean, running_var, eps), frozen=True)


def infer(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, activation: Any, residual: Any, out: Any
) -> Array:
    """Normalise by given statistics that nobody asks for afterwards."""
    f = Forward(x, weight, bias, axis, activation, residual, out, in_place=True)
    by = f.by(mean, var, eps)
    if f.x.size:
        dispatch.kernels().infer_by(
            *map(f.flat, (f.x, f.residual, f.out)), f.weight, f.bias, *by, f.layout.dims, f.relu
        )  # fmt: skip
    return f.out


def given(f: Forward, mean: Any, var: Any, eps: Any) -> Array:
    """Normalise checked arguments by given statistics; returns these as kernels take them."""
    stats: Array = dispatch.kernels().given(*f.by(mean, var, eps))
    if f.x.size:
        f.normalise(stats)
    return stats
