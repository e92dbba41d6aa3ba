"""Batch norm forward and backward for arrays on a GPU: check, allocate, launch. The twin of ``core`` and ``saved``.

Same semantics, same messages; results are made by the library that x comes from, on its current stream, and nothing
waits for the GPU except what must become a number on the host (``Saved.moments``).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from fastbn import arguments, layout, running
from fastbn import device_arguments as checks
from fastbn.cuda.arrays import DeviceArray, Flat
from fastbn.cuda.libraries import on_device, wrap
from fastbn.errors import ArgumentValueError
from fastbn.moments import Moments
from fastbn.saved import Gradients, Overwritten, Saved

__all__ = ["Call", "DeviceSaved", "follow", "frozen", "host", "infer", "moments_of", "on_device", "train"]


def follow(layer: Any, x: Any) -> None:
    """Move the arrays of a layer to where x is: to its GPU and library, or back to the host."""
    like = checks.tensor("x", x) if on_device(x) else None
    for name in layer.arrays:
        value = getattr(layer, name)
        if value is None or on_device(value) == (like is not None):
            continue
        setattr(layer, name, host(value) if like is None else like.library.put(value, like.owner))


def host(value: Any) -> Any:
    """Copy an array on a GPU to a NumPy array; waits for the GPU."""
    return np.array(wrap("value", value).host())


class Call:
    """The checked arguments that training and inference share."""

    __slots__ = ("axis", "bias", "layout", "out", "relu", "residual", "result", "weight", "x")

    def __init__(
        self, x: Any, weight: Any, bias: Any, axis: Any, activation: Any, residual: Any, out: Any, in_place: bool
    ):
        given = checks.tensor("x", x)
        self.axis = axis = layout.normalise_axis(axis, given.ndim)
        channels = given.shape[axis]
        self.weight = (
            None if weight is None else checks.parameter("weight", weight, given, (channels,)).contiguous().flat()
        )
        self.bias = None if bias is None else checks.parameter("bias", bias, given, (channels,)).contiguous().flat()
        self.relu = arguments.activation(activation)
        added = None if residual is None else checks.like("residual", residual, given)
        if out is None:
            self.x, self.layout = checks.settle(given, axis)
            self.out = checks.empty_like(self.x, self.layout)
        else:
            self.out, self.layout = checks.output(out, given, axis)
            checks.apart("x", self.out, given, exact_allowed=in_place)
            if added is not None:
                checks.apart("residual", self.out, added, exact_allowed=True)
            checks.apart_from_vectors(self.out, weight=self.weight, bias=self.bias)
            self.x = checks.in_order(given, self.layout)
        self.residual = None if added is None else checks.in_order(added, self.layout).flat()
        self.result = self.out.owner if out is None else out

    def mask(self, mask: Any, lengths: Any, train: bool = False, single: bool = False) -> Any:
        """Return the mask that the arguments mean, None for none; see ``device_mask.find``."""
        if mask is None and lengths is None:
            return None
        from fastbn import device_mask

        found = device_mask.find(mask, lengths, self.x, self.axis, self.layout, train=train, single=single)
        return None if found.valid is None else found

    def saved(
        self, stats: Flat, frozen: bool, updated: int = 0, mask: Any = None, into: DeviceSaved | None = None
    ) -> DeviceSaved:
        """Return what backward needs; ``into``: in an object of this kind."""
        if into is None:
            overwritten = frozen and self.x.size and self.out.address == self.x.address
            saved = (
                MaskedDeviceSaved() if mask is not None else OverwrittenDeviceSaved() if overwritten else DeviceSaved()
            )
        else:
            saved = into
        saved.mask = mask
        saved.x, saved.axis, saved.layout, saved.vectors = self.x, self.axis, self.layout, stats
        saved.weight, saved.bias, saved.relu, saved.frozen = self.weight, self.bias, self.relu, frozen
        saved.residual = self.residual is not None
        saved.y = self.out if self.relu and saved.residual else None
        N, _, S = self.layout.dims
        if into is None:
            saved.updated = updated
            if mask is None:
                saved.count = N * S
        return saved


class DeviceSaved(Saved):
    """What a forward pass on the GPU saves: as ``BatchSaved``, with arrays of the library that x comes from."""

    __slots__ = ("axis", "bias", "frozen", "layout", "mask", "relu", "residual", "vectors", "weight", "x", "y")

    x: DeviceArray
    mask: Any  # launch.Mask, or None
    y: DeviceArray | None
    axis: int
    layout: layout.Layout
    vectors: Flat  # mean, invstd, variance, rounding remainder of the mean; C each
    weight: Flat | None
    bias: Flat | None
    relu: bool | None
    residual: bool
    frozen: bool

    @property
    def affine(self) -> tuple[bool, bool]:
        """Tell whether the caller gave weight and bias."""
        return self.weight is not None, self.bias is not None

    def _row(self, i: int) -> Any:
        channels = self.layout.dims[1]
        return self.vectors.array_owner[i * channels : (i + 1) * channels]

    @property
    def moments(self) -> Moments:
        """The batch's statistics as a mergeable value, on the host: waits for the GPU."""
        if self.frozen:  # the vectors are others'
            return moments_found(self.x, self.layout, self.mask)
        return to_moments(self.vectors, self.count)

    def restored(self, x: Any, y: Any) -> DeviceSaved:
        """Return what this was before ``release``."""
        found = copy.copy(self)
        found.x, found.y = checks.tensor("x", x), None if y is None else checks.tensor("y", y)
        return found

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        return self._gradients(grad_output, out)

    def _run(self, grad: Flat, y: Flat | None, target: Flat, dr: Flat | None) -> tuple[Flat, Flat]:
        """Launch, once all is checked; returns the gradients of weight and bias."""
        from fastbn.cuda import launch

        return launch.backward(
            self.x.flat(), grad, y, target, dr, self.weight, self.bias, self.vectors, self.layout.dims, self.frozen,
            self.relu, self.mask or launch.ALL,
        )  # fmt: skip

    def _gradients(self, grad_output: Any, out: Any) -> Gradients:
        x, where = self.x, self.layout
        grad = checks.like("grad_output", grad_output, x)
        if out is None:
            target = into = checks.empty_like(x, where)
        else:
            target, found = checks.output(out, x, self.axis)
            checks.apart("x", target, x, exact_allowed=False)
            checks.apart("grad_output", target, grad, exact_allowed=not self.residual)
            checks.apart_from_vectors(target, weight=self.weight, bias=self.bias)
            if self.y is not None:
                checks.apart("the output that the forward pass saved", target, self.y, exact_allowed=False)
            fits = not x.size or found == where or target.transpose(where.order).c_contiguous
            into = target if fits else checks.empty_like(x, where)
        gated = checks.empty_like(x, where) if self.residual and self.relu else None
        if x.size:
            y, dr = (None if a is None else a.flat() for a in (self.y, gated))
            dweight, dbias = self._run(checks.in_order(grad, where).flat(), y, into.flat(), dr)
            if into is not target:
                x.library.assign(target.owner, into.owner)
        else:
            dweight, dbias = x.zeros(where.dims[1]), x.zeros(where.dims[1])
        residual = (grad_output if gated is None else gated.owner) if self.residual else None
        if self.mask is not None and self.residual and gated is None:
            residual = self._masked(checks.in_order(grad, where)).owner
        return Gradients(
            target.owner if out is None else out,
            dweight.array_owner if self.affine[0] else None,
            dbias.array_owner if self.affine[1] else None,
            residual,
        )

    def _masked(self, grad: DeviceArray) -> DeviceArray:
        """Return a gradient with zeros where the mask excludes it: normalised by mean 0 and variance 0 + 1."""
        from fastbn.cuda import launch

        result, zero = checks.empty_like(self.x, self.layout), self.x.zeros(self.layout.dims[1])
        given = launch.Given(zero, zero, 1.0)
        launch.infer(grad.flat(), None, result.flat(), None, None, given, self.layout.dims, None, self.mask)
        return result


class OverwrittenDeviceSaved(Overwritten, DeviceSaved):
    """What inference in place saves."""

    __slots__ = ()


class MaskedDeviceSaved(DeviceSaved):
    """As ``DeviceSaved``; how many values counted is known to the GPU alone until somebody asks."""

    __slots__ = ()

    @property
    def count(self) -> int:  # type: ignore[override]
        """Values per channel that the mask leaves: waits for the GPU."""
        return counted(self.mask)


def counted(mask: Any) -> int:
    """Return how many values per channel a mask leaves; waits for the GPU."""
    if mask.tally is None:  # statistics were given, nothing was counted
        return int(np.count_nonzero(mask.valid.owner.host()))
    return int(mask.tally.owner.host()[0])


def to_moments(vectors: Flat, count: int) -> Moments:
    """Bring statistics to the host; waits for the GPU."""
    values = host(vectors.array_owner)[: vectors.size]  # behind them may be scratch
    mean, _, var, rest = np.asarray(values, np.float64).reshape(4, -1)
    return Moments._of_variance(count, mean + np.where(np.isfinite(rest), rest, 0.0), var)


def pair(
    running_mean: Any, running_var: Any, x: DeviceArray, channels: int, f: Call | None = None
) -> tuple[Flat, Flat] | None:
    """Check that both running statistics are given or neither, and apart from the call's arrays; None for neither."""
    running.both_or_neither(running_mean, running_var)
    if running_mean is None:
        return None
    mean = checks.running("running_mean", running_mean, x, channels)
    var = checks.running("running_var", running_var, x, channels)
    others: dict[str, Flat | None] = {}
    if f is not None:
        others = {"weight": f.weight, "bias": f.bias, "residual": f.residual, "x": f.x.flat(), "out": f.out.flat()}
    running.refuse_shared(mean, var, {name: flat for name, flat in others.items() if flat is not None}, Flat.shares)
    return mean, var


def train(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
    momentum: Any, eps: Any, axis: Any, activation: Any, residual: Any, out: Any, *,
    update_stats: bool = True, unbiased: bool = True, mask: Any = None, lengths: Any = None,
) -> tuple[Any, DeviceSaved]:  # fmt: skip
    """Normalise by the batch; see ``fastbn.batch_norm_train``."""
    f = Call(x, weight, bias, axis, activation, residual, out, in_place=False)
    N, C, S = f.layout.dims
    eps, momentum = arguments.epsilon(eps, positive=True), arguments.number("momentum", momentum)
    moved: tuple[Flat | None, Flat | None] = pair(running_mean, running_var, f.x, C, f) or (None, None)
    if not arguments.flag("update_stats", update_stats):
        moved = (None, None)
    unbiased, found = arguments.flag("unbiased", unbiased), f.mask(mask, lengths, train=True)
    if f.x.size == 0:
        return f.result, f.saved(f.x.zeros(4 * C), frozen=False)
    if N * S == 1 and found is None:
        raise ArgumentValueError("x", "more than 1 value per channel when training", f"shape {f.x.shape}")
    from fastbn.cuda import launch

    stats = launch.train(
        f.x.flat(), f.residual, f.out.flat(), f.weight, f.bias, *moved, f.layout.dims, eps, momentum, f.relu, unbiased,
        found or launch.ALL,
    )  # fmt: skip
    return f.result, f.saved(stats, frozen=False, updated=int(moved[0] is not None), mask=found)


def _given(f: Call, mean: Any, var: Any) -> tuple[Flat, Flat]:
    """Check the statistics to normalise by, which kernels read while they write the output."""
    shape = (f.layout.dims[1],)
    found = (
        checks.parameter("running_mean", mean, f.x, shape).contiguous().flat(),
        checks.parameter("running_var", var, f.x, shape).contiguous().flat(),
    )
    checks.apart_from_vectors(f.out, running_mean=found[0], running_var=found[1])
    return found


def infer(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, activation: Any, residual: Any, out: Any
) -> Any:
    """Normalise by given statistics; see ``fastbn.batch_norm_infer``."""
    f = Call(x, weight, bias, axis, activation, residual, out, in_place=True)
    from fastbn.cuda import launch

    eps = arguments.epsilon(eps, positive=False)
    given = launch.Given(*_given(f, mean, var), eps)
    if f.x.size:
        launch.infer(f.x.flat(), f.residual, f.out.flat(), f.weight, f.bias, given, f.layout.dims, f.relu)
    return f.result


def frozen(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, activation: Any, residual: Any, out: Any,
    mask: Any = None, lengths: Any = None,
) -> tuple[Any, DeviceSaved]:  # fmt: skip
    """Normalise by given statistics and keep what ``backward`` needs: they are constants there."""
    f = Call(x, weight, bias, axis, activation, residual, out, in_place=mask is None and lengths is None)
    found = f.mask(mask, lengths)
    from fastbn.cuda import launch

    stats = launch.statistics(*_given(f, mean, var), arguments.epsilon(eps, positive=False))
    if f.x.size:
        launch.infer(
            f.x.flat(), f.residual, f.out.flat(), f.weight, f.bias, stats, f.layout.dims, f.relu, found or launch.ALL
        )
    return f.result, f.saved(stats, frozen=True, mask=found)


def moments_of(x: Any, axis: Any, mask: Any = None, lengths: Any = None) -> Moments:
    """Statistics of the channels, on the host; see ``Moments.of``."""
    array = checks.tensor("x", x)
    axis = layout.normalise_axis(axis, array.ndim)
    array, where = checks.settle(array, axis)
    found = None
    if mask is not None or lengths is not None:
        from fastbn import device_mask

        found = device_mask.find(mask, lengths, array, axis, where, train=True, single=True)
    return moments_found(array, where, found)


def moments_found(x: DeviceArray, where: layout.Layout, mask: Any) -> Moments:
    """Take the statistics of an array in a known order, under a mask if there is one; waits for the GPU."""
    from fastbn.cuda import launch

    if x.size == 0:
        return Moments(0, np.zeros(where.dims[1]), np.zeros(where.dims[1]))
    if mask is None or mask.valid is None:
        return to_moments(launch.moments(x.flat(), where.dims, 0.0), where.dims[0] * where.dims[2])
    if mask.tally is None:
        mask = launch.mask_of(mask.valid, x.stream())
    return to_moments(launch.moments(x.flat(), where.dims, 0.0, mask), counted(mask))
