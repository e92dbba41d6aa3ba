"""The public functions: check, allocate, dispatch. Nothing below this file raises on bad input.

Semantics by default are PyTorch's: biased variance to normalise, unbiased variance for the running statistics, momentum
the weight of the new value, ValueError for one value per channel in training.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, layout
from fastbn.errors import ArgumentTypeError, ArgumentValueError
from fastbn.moments import Moments

__all__ = ["Gradients", "Saved", "backward", "batch_norm_infer", "batch_norm_train"]

Array = npt.NDArray[Any]


class Gradients(NamedTuple):
    """What ``backward`` returns; None where the forward pass had no such thing."""

    input: Array
    weight: Array | None
    bias: Array | None
    residual: Array | None


class Saved:
    """What a forward pass leaves for ``backward``: x and its statistics. x must not change in between.

    Attributes
    ----------
    mean, invstd : numpy.ndarray, shape (C,), float64
        Statistics that x was normalised with; invstd = 1/sqrt(var + eps).
    variance : numpy.ndarray, shape (C,), float64
        The biased variance.
    count : int
        Values per channel.
    """

    __slots__ = ("affine", "axis", "bias", "frozen", "layout", "mask", "relu", "residual", "stats", "weight", "x", "y")

    x: Array
    y: Array | None
    axis: int
    layout: layout.Layout
    stats: Array
    weight: Array
    bias: Array
    affine: tuple[bool, bool]
    relu: bool | None
    residual: bool
    frozen: bool
    mask: Array | None

    def _row(self, i: int) -> Array:
        channels = self.stats.size // 3
        row: Array = self.stats[i * channels : (i + 1) * channels]
        return row

    @property
    def mean(self) -> Array:  # noqa: D102
        return self._row(0)

    @property
    def invstd(self) -> Array:  # noqa: D102
        return self._row(1)

    @property
    def variance(self) -> Array:  # noqa: D102
        return self._row(2)

    @property
    def count(self) -> int:  # noqa: D102
        N, _, S = self.layout.dims
        return N * S


@functools.lru_cache(maxsize=256)
def _constant(value: float, channels: int, dtype: np.dtype[Any]) -> Array:
    """Stand in for an absent weight or bias. Never handed out, never written."""
    return np.full(channels, value, dtype)


class _Forward:
    """The checked arguments that training and inference share, in the form the kernels take."""

    __slots__ = ("affine", "axis", "bias", "dtype", "layout", "out", "relu", "residual", "weight", "x")

    x: Array
    out: Array
    residual: Array | None

    def __init__(
        self, x: Any, weight: Any, bias: Any, axis: Any, activation: Any, residual: Any, out: Any, in_place: bool
    ):
        x = arguments.tensor("x", x)
        self.axis = axis = layout.normalise_axis(axis, x.ndim)
        self.dtype = arguments.arithmetic(x.dtype)
        channels = x.shape[axis]
        self.affine = (weight is not None, bias is not None)
        self.weight = self._parameter("weight", weight, channels, 1.0)
        self.bias = self._parameter("bias", bias, channels, 0.0)
        self.relu = arguments.activation(activation)
        if residual is not None:
            residual = arguments.same_kind("residual", residual, x)
        if out is None:
            self.x, self.layout = layout.settle(x, axis) if x.size else (x, layout.contiguous(x.shape, axis))
            self.out = layout.empty_like(self.x, self.layout)
        else:
            self.layout = arguments.output(out, x, axis) if x.size else layout.contiguous(x.shape, axis)
            self.x, self.out = layout.like(x, self.layout), out
            arguments.apart("x", out, self.x, exact_allowed=in_place)
        self.residual = None if residual is None else layout.like(residual, self.layout)
        if out is not None and self.residual is not None:
            arguments.apart("residual", out, self.residual, exact_allowed=True)

    def _parameter(self, name: str, value: Any, channels: int, default: float) -> Array:
        if value is None:
            return _constant(default, channels, self.dtype)
        return arguments.parameter(name, value, channels, self.dtype)

    def flat(self, x: Array | None) -> Array | None:
        return None if x is None else _flat(x, self.layout)

    def saved(self, stats: Array, frozen: bool) -> Saved:
        saved = Saved()
        saved.x, saved.axis, saved.layout, saved.stats = self.x, self.axis, self.layout, stats
        saved.weight, saved.bias, saved.affine = self.weight, self.bias, self.affine
        saved.relu, saved.residual, saved.frozen = self.relu, self.residual is not None, frozen
        saved.mask = None
        saved.y = self.out if self.relu and saved.residual else None  # else the sign is found again from x
        return saved


def _flat(x: Array, where: layout.Layout) -> Array:
    """View as the kernels take it: one axis, half types as 16-bit integers, writeable in Numba's eyes."""
    flat = layout.flat(x, where)
    if flat.itemsize == 2:
        flat = flat.view(np.int16 if arguments.is_bfloat16(flat.dtype) else np.uint16)
    if not flat.flags.writeable:
        flat = _unlock(flat)
    return flat


class _Memory:
    """Carry an array interface that says writeable: a read-only input would compile every kernel a second time."""

    def __init__(self, array: Array):
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self.keep = array


def _unlock(array: Array) -> Array:
    return np.asarray(_Memory(array))


def batch_norm_train(
    x: Any, weight: Any = None, bias: Any = None, running_mean: Any = None, running_var: Any = None, *,
    momentum: float = 0.1, eps: float = 1e-5, axis: int = 1, activation: str | None = None, residual: Any = None,
    mask: Any = None, out: Any = None,
) -> tuple[Array, Saved]:  # fmt: skip
    """Normalise by the statistics of the batch: y = activation(weight*(x - mean)/sqrt(var + eps) + bias + residual).

    mean and var (biased) are taken over all axes but ``axis``. Given ``running_mean`` and ``running_var``, both are
    moved in place: running = (1 - momentum)*running + momentum*new, with the unbiased variance, as PyTorch does.
    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1.

    Parameters
    ----------
    x : numpy.ndarray, rank >= 2
        float32, float64, float16 or bfloat16 (ml_dtypes). Any strides; without gaps in memory no copy is made.
    weight, bias : array, shape (C,), optional
        Scale (1) and shift (0); float64 for float64 x, else float32.
    running_mean, running_var : numpy.ndarray, shape (C,), optional
        Both or neither; dtype as weight; updated in place.
    momentum : float
        Weight of the new value in the running statistics.
    eps : float
        Added to the variance inside the root; > 0.
    axis : int
        Channel axis.
    activation : {None, "relu"}
        Applied last.
    residual : numpy.ndarray, optional
        Added before the activation; shape and dtype of x.
    mask : array of bool, optional
        Broadcastable to x without its channel axis. Only values where it is true count, as if they had been packed;
        the output is zero elsewhere.
    out : numpy.ndarray, optional
        Output; shape and dtype of x, no gaps, apart from x (backward needs x).

    Returns
    -------
    y : numpy.ndarray
        Shape, dtype and memory order of x.
    saved : Saved
        For ``backward``. Keeps references to x (and to y with both residual and activation).

    Raises
    ------
    ValueError
        Shapes that do not fit, eps <= 0, one value per channel, overlapping out.
    TypeError
        Not a NumPy array, other dtypes.

    Notes
    -----
    An empty batch gives an empty y and leaves the running statistics alone. NaN and inf stay in their channel.
    """
    if mask is not None:
        return _train_masked(
            x, weight, bias, running_mean, running_var, momentum=momentum, eps=eps, axis=axis,
            activation=activation, residual=residual, mask=mask, out=out,
        )  # fmt: skip
    f = _Forward(x, weight, bias, axis, activation, residual, out, in_place=False)
    N, C, S = dims = f.layout.dims
    eps, momentum = arguments.epsilon(eps, positive=True), arguments.number("momentum", momentum)
    rm, rv = _running(running_mean, running_var, C, f.dtype)
    if f.x.size == 0:
        return f.out, f.saved(_no_statistics(C, eps), frozen=False)
    if N * S == 1:
        raise ArgumentValueError("x", "more than 1 value per channel when training", f"shape {f.x.shape}")
    moved = (np.ascontiguousarray(rm), np.ascontiguousarray(rv))  # the arrays themselves, but for odd strides
    stats = dispatch.kernels().train(
        f.flat(f.x), f.flat(f.residual), f.flat(f.out), f.weight, f.bias, *moved, dims, eps, momentum, f.relu
    )
    if moved[0] is not rm:
        rm[:] = moved[0]
    if moved[1] is not rv:
        rv[:] = moved[1]
    return f.out, f.saved(stats, frozen=False)


def _running(mean: Any, var: Any, channels: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    if (mean is None) != (var is None):
        absent = "running_mean" if mean is None else "running_var"
        raise ArgumentValueError(absent, "both running statistics or neither", "None for one")
    if mean is None:
        none = _constant(0.0, 0, dtype)
        return none, none
    return (
        arguments.running("running_mean", mean, channels, dtype),
        arguments.running("running_var", var, channels, dtype),
    )


def _no_statistics(channels: int, eps: float) -> Array:
    stats = np.zeros(3 * channels)
    stats[channels : 2 * channels] = eps**-0.5 if eps else np.inf
    return stats


def batch_norm_infer(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, *,
    eps: float = 1e-5, axis: int = 1, activation: str | None = None, residual: Any = None, out: Any = None,
) -> Array:  # fmt: skip
    """Normalise by given statistics.

    y = activation(weight*(x - running_mean)/sqrt(running_var + eps) + bias + residual).
    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 2.

    Parameters
    ----------
    x : numpy.ndarray, rank >= 2
        float32, float64, float16 or bfloat16 (ml_dtypes).
    running_mean, running_var : array, shape (C,)
        float64 for float64 x, else float32.
    weight, bias : array, shape (C,), optional
        Scale (1) and shift (0); dtype as the statistics.
    eps : float
        Added to the variance inside the root; >= 0.
    axis : int
        Channel axis.
    activation : {None, "relu"}
        Applied last.
    residual : numpy.ndarray, optional
        Added before the activation; shape and dtype of x.
    out : numpy.ndarray, optional
        Output; shape and dtype of x, no gaps. May be x itself (in place), may not overlap it otherwise.

    Returns
    -------
    numpy.ndarray
        Shape, dtype and memory order of x.

    Raises
    ------
    ValueError
        Shapes that do not fit, eps < 0, overlapping out.
    TypeError
        Not a NumPy array, other dtypes.
    """
    return _infer(x, running_mean, running_var, weight, bias, eps, axis, activation, residual, out)[0]


def frozen(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, *,
    eps: float = 1e-5, axis: int = 1, activation: str | None = None, residual: Any = None, out: Any = None,
) -> tuple[Array, Saved]:  # fmt: skip
    """Normalise as ``batch_norm_infer`` and keep what ``backward`` needs: the statistics are constants there."""
    y, forward, stats = _infer(x, running_mean, running_var, weight, bias, eps, axis, activation, residual, out)
    return y, forward.saved(stats, frozen=True)


def _infer(
    x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, activation: Any, residual: Any, out: Any
) -> tuple[Array, _Forward, Array]:
    f = _Forward(x, weight, bias, axis, activation, residual, out, in_place=True)
    dims = f.layout.dims
    eps = arguments.epsilon(eps, positive=False)
    mean = arguments.parameter("running_mean", mean, dims[1], f.dtype)
    var = arguments.parameter("running_var", var, dims[1], f.dtype).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # a negative variance gives NaN, as in PyTorch
        stats = np.concatenate([mean, 1.0 / np.sqrt(var + eps), var])
    if f.x.size:
        dispatch.kernels().infer(f.flat(f.x), f.flat(f.residual), f.flat(f.out), f.weight, f.bias, stats, dims, f.relu)
    return f.out, f, stats


def backward(grad_output: Any, saved: Saved, *, out: Any = None) -> Gradients:
    """Gradients of a normalisation with respect to its input, weight, bias and residual.

    With u the gradient in front of the activation and xhat = (x - mean)*invstd:
    grad.bias = sum(u), grad.weight = sum(u*xhat),
    grad.input = weight*invstd*(u - grad.bias/n - xhat*grad.weight/n), grad.residual = u.
    With frozen statistics grad.input = weight*invstd*u. Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.

    Parameters
    ----------
    grad_output : numpy.ndarray
        Gradient of y; shape and dtype of x.
    saved : Saved
        From the forward pass; may be used more than once.
    out : numpy.ndarray, optional
        Gradient of the input; may be ``grad_output`` itself if there is no residual.

    Returns
    -------
    Gradients
        Named tuple (input, weight, bias, residual); None for what the forward pass did not have. Without activation
        ``residual`` is ``grad_output`` itself.

    Raises
    ------
    ValueError
        Shapes that do not fit, overlapping out.
    TypeError
        Other types and dtypes.
    """
    if not isinstance(saved, Saved):
        raise ArgumentTypeError("saved", "what a forward pass returned", type(saved).__name__)
    if saved.mask is not None:
        return _backward_masked(grad_output, saved, out)
    x, where, (N, C, S) = saved.x, saved.layout, saved.layout.dims
    grad = arguments.same_kind("grad_output", grad_output, x)
    if out is not None and x.size:
        found = arguments.output(out, x, saved.axis)
        if not layout.matches(out, where, saved.axis):
            raise ArgumentValueError("out", f"the memory order of x, {where.order}", f"{found.order}")
    grad = layout.like(grad, where)
    if out is None:
        out = layout.empty_like(x, where)
    else:
        arguments.apart("x", out, x, exact_allowed=False)
        arguments.apart("grad_output", out, grad, exact_allowed=not saved.residual)
    gated = layout.empty_like(x, where) if saved.residual and saved.relu else None
    if x.size:
        tensors = [None if a is None else _flat(a, where) for a in (x, grad, saved.y, out, gated)]
        dweight, dbias = dispatch.kernels().backward(
            *tensors, saved.weight, saved.bias, saved.stats, (N, C, S), saved.frozen, saved.relu
        )
    else:
        dweight, dbias = np.zeros_like(saved.weight), np.zeros_like(saved.bias)
    residual = (grad_output if gated is None else gated) if saved.residual else None
    return Gradients(out, dweight if saved.affine[0] else None, dbias if saved.affine[1] else None, residual)


# -- masks: the valid values are packed into rows, which costs a copy ---------------------------------------------


def _pack(x: Array, axis: int, mask: Array) -> Array:
    packed: Array = np.moveaxis(x, axis, -1)[mask]
    return packed


def _unpack(packed: Array, like: Array, axis: int, mask: Array, out: Array | None) -> Array:
    result: Array = np.empty_like(like) if out is None else out
    result[...] = 0
    np.moveaxis(result, axis, -1)[mask] = packed
    return result


def _train_masked(
    x: Any, *params: Any, axis: Any, activation: Any, residual: Any, mask: Any, out: Any, **options: Any
) -> tuple[Array, Saved]:
    x = arguments.tensor("x", x)
    axis = layout.normalise_axis(axis, x.ndim)
    mask = arguments.valid(mask, x, axis)
    if residual is not None:
        residual = _pack(arguments.same_kind("residual", residual, x), axis, mask)
    if out is not None:
        arguments.output(out, x, axis)
        arguments.apart("x", out, x, exact_allowed=False)
    y, saved = batch_norm_train(
        _pack(x, axis, mask), *params, axis=1, activation=activation, residual=residual, **options
    )
    saved.mask = mask
    saved.axis = axis
    return _unpack(y, x, axis, mask, out), saved


def _backward_masked(grad_output: Any, saved: Saved, out: Any) -> Gradients:
    mask, axis = saved.mask, saved.axis
    assert mask is not None
    grad = arguments.tensor("grad_output", grad_output)
    shape = (*mask.shape[:axis], saved.x.shape[1], *mask.shape[axis:])
    if grad.shape != shape:
        raise ArgumentValueError("grad_output", f"the shape of x, {shape}", grad.shape)
    if out is not None:
        arguments.output(out, grad, axis)
    packed = Saved()
    for name in Saved.__slots__:
        setattr(packed, name, getattr(saved, name))
    packed.mask, packed.axis = None, 1
    grads = backward(_pack(grad, axis, mask), packed)
    residual = None if grads.residual is None else _unpack(grads.residual, grad, axis, mask, None)
    return Gradients(_unpack(grads.input, grad, axis, mask, out), grads.weight, grads.bias, residual)


def _moments_of(x: Any, axis: Any, mask: Any) -> Moments:
    x = arguments.tensor("x", x)
    axis = layout.normalise_axis(axis, x.ndim)
    if mask is not None:
        x, axis = _pack(x, axis, arguments.valid(mask, x, axis)), 1
    channels, dtype = x.shape[axis], arguments.arithmetic(x.dtype)
    if x.size == 0:
        return Moments(0, np.zeros(channels), np.zeros(channels))
    x, where = layout.settle(x, axis)
    kind = _constant(1.0, channels, dtype)
    mean, _, var = dispatch.kernels().moments(_flat(x, where), kind, where.dims, 0.0).reshape(3, -1)
    count = where.dims[0] * where.dims[2]
    return Moments(count, mean, var * count)


Moments._estimate = staticmethod(_moments_of)
