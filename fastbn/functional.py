"""The public functions of batch norm. Nothing below this file's floor raises on bad input.

Semantics by default are PyTorch's: biased variance to normalise, unbiased variance for the running statistics, momentum
the weight of the new value, ValueError for one value per channel in training.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn import arguments, core, dispatch, layout, masked, quick, running, training, views
from fastbn.errors import ArgumentTypeError
from fastbn.moments import Moments
from fastbn.saved import Gradients, Saved, kept

__all__ = ["Gradients", "Saved", "backward", "batch_norm_infer", "batch_norm_train", "frozen", "update_running"]

Array = npt.NDArray[Any]


@functools.cache  # an import statement costs half a microsecond even where it finds its module
def _on_gpu() -> Any:
    """Return the module for calls that are like an earlier one; only imported where kernels can run."""
    from fastbn.cuda.libraries import ready

    ready("x")
    from fastbn import device_known

    return device_known


def batch_norm_train(
    x: Any, weight: Any = None, bias: Any = None, running_mean: Any = None, running_var: Any = None, *,
    momentum: float = 0.1, eps: float = 1e-5, axis: int = 1, activation: str | None = None, residual: Any = None,
    mask: Any = None, out: Any = None, lengths: Any = None, ghost: int | None = None,
    renorm: tuple[float, float] | None = None, on_single: str = "error", nonfinite: str = "propagate",
    update_stats: bool = True, unbiased: bool = True,
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
        Both or neither; dtype as weight; updated in place, so apart from each other and from weight and bias.
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
    lengths : array of int, shape (N,), optional
        Instead of a mask, for x of shape (N, C, T) or (N, T, C): the first lengths[n] steps of sample n count.
    ghost : int, optional
        Take statistics over N // ghost batches of this many samples (along the first axis), as if each had been
        passed on its own, in order; the last one takes the remainder too. Renormalised ones all go towards the
        running statistics before the call. Hoffer et al. 2017 (arXiv:1705.08741), algorithm 1.
    renorm : (rmax, dmax), optional
        Batch renormalisation towards the running statistics, which must be given: y = weight*(xhat*r + d) + bias,
        r and d constants in backward. Ioffe 2017 (arXiv:1702.03275); ``renorm_bounds`` is its schedule.
    on_single : {"error", "running"}
        One value per channel: ValueError, or normalise by the running statistics (then constants) and leave them.
    nonfinite : {"propagate", "skip_update", "raise"}
        Where a channel's mean or variance is NaN or inf: as PyTorch; leave all running statistics as they are;
        ValueError before anything is written (reads x twice).
    update_stats : bool
        False: do not move the running statistics (a recomputed forward pass, a micro-batch; see ``Saved.moments``).
    unbiased : bool
        False: move running_var by the biased variance, as Keras, Flax and ONNX.

    Returns
    -------
    y : numpy.ndarray
        Shape, dtype and memory order of x.
    saved : Saved
        For ``backward``. Keeps references to x (with both residual and activation to y, or of a large one its signs).

    Raises
    ------
    ValueError
        Shapes that do not fit, eps <= 0, one value per channel, overlapping out.
    TypeError
        Not a NumPy array, other dtypes.

    Notes
    -----
    An empty batch gives an empty y and leaves the running statistics alone, a batch without valid values gives zeros
    and does the same. NaN and inf stay in their channel. On a GPU ``nonfinite="raise"`` waits for it, and so do
    ``on_single="running"`` under a mask that is on the GPU and ``saved.updated`` where the GPU decided.
    """
    if type(x) is not np.ndarray and dispatch.on_device(x):
        if ghost is not None or renorm is not None or on_single != "error" or nonfinite != "propagate":
            from fastbn import device_training

            options = training.Options(
                momentum, eps, activation, ghost, renorm, on_single, nonfinite, update_stats, unbiased
            )
            return device_training.train(
                x, weight, bias, running_mean, running_var, options, axis, residual, mask, lengths, out
            )  # fmt: skip
        if residual is None and mask is None and lengths is None:
            again: tuple[Array, Saved] = _on_gpu().train(
                x, weight, bias, running_mean, running_var, momentum, eps, axis, activation, out, update_stats, unbiased
            )
            return again
        from fastbn import device

        return device.train(
            x, weight, bias, running_mean, running_var, momentum, eps, axis, activation, residual, out,
            update_stats=update_stats, unbiased=unbiased, mask=mask, lengths=lengths,
        )  # fmt: skip
    if (
        mask is not None or lengths is not None or ghost is not None or renorm is not None or update_stats is not True
        or unbiased is not True or on_single != "error" or nonfinite != "propagate"
    ):  # fmt: skip
        options = training.Options(
            momentum, eps, activation, ghost, renorm, on_single, nonfinite, update_stats, unbiased
        )
        return training.train(
            x, weight, bias, running_mean, running_var, options, axis, residual, mask, lengths, out
        )  # fmt: skip
    done = quick.train(x, weight, bias, running_mean, running_var, momentum, eps, axis, activation, residual, out)
    if done is not None:
        return done[0], kept(done, x, False, int(running_mean is not None))
    return core.train(x, weight, bias, running_mean, running_var, momentum, eps, axis, activation, residual, out)


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
    if type(x) is not np.ndarray and dispatch.on_device(x):
        if residual is None:
            known: Array = _on_gpu().infer(x, running_mean, running_var, weight, bias, eps, axis, activation, out)
            return known
        from fastbn import device

        y: Array = device.infer(x, running_mean, running_var, weight, bias, eps, axis, activation, residual, out)
        return y
    done = quick.infer(x, running_mean, running_var, weight, bias, eps, axis, activation, residual, out)
    if done is not None:
        return done[0]
    return core.infer(x, running_mean, running_var, weight, bias, eps, axis, activation, residual, out)


def frozen(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, *,
    eps: float = 1e-5, axis: int = 1, activation: str | None = None, residual: Any = None, out: Any = None,
    mask: Any = None, lengths: Any = None,
) -> tuple[Array, Saved]:  # fmt: skip
    """Normalise as ``batch_norm_infer`` and keep what ``backward`` needs: the statistics are constants there.

    ``mask`` and ``lengths`` as in ``batch_norm_train``: y and the gradient of x are zero where they exclude a value.
    In place (``out`` is x) there are no gradients of weight, and none through the activation.
    """
    if type(x) is not np.ndarray and dispatch.on_device(x):
        from fastbn import device

        return device.frozen(
            x, running_mean, running_var, weight, bias, eps, axis, activation, residual, out, mask, lengths
        )
    if mask is None and lengths is None:
        return core.frozen(x, running_mean, running_var, weight, bias, eps, axis, activation, residual, out)

    f = masked.forward(x, weight, bias, axis, activation, residual, out, mask, lengths)
    stats = core.given(f, running_mean, running_var, eps)
    return f.result(), f.saved(stats, frozen=True)


def backward(grad_output: Any, saved: Saved, *, out: Any = None) -> Gradients:
    """Gradients of a normalisation with respect to its input, weight, bias and residual.

    With u the gradient in front of the activation and xhat = (x - mean)*invstd:
    grad.bias = sum(u), grad.weight = sum(u*xhat),
    grad.input = weight*invstd*(u - grad.bias/n - xhat*grad.weight/n), grad.residual = u.
    With frozen statistics grad.input = weight*invstd*u. Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.
    Layer and group norm take the two means over a set of several channels, of weight*u and weight*u*xhat.

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
        ``residual`` is ``grad_output`` itself. Under a mask, gradients are zero where it is false.

    Raises
    ------
    ValueError
        Shapes that do not fit, overlapping out.
    TypeError
        Other types and dtypes.
    """
    if not isinstance(saved, Saved):
        raise ArgumentTypeError("saved", "what a forward pass returned", type(saved).__name__)
    if not saved.numpy_sums:
        return saved.gradients(grad_output, out)
    with np.errstate(all="ignore"):
        return saved.gradients(grad_output, out)


def update_running(
    running_mean: Any, running_var: Any, moments: Any, *, momentum: float = 0.1, unbiased: bool = True
) -> None:
    """Move running statistics in place by statistics that were gathered elsewhere.

    running = (1 - momentum)*running + momentum*new, as ``batch_norm_train`` does with those of its batch. Merge the
    moments of micro-batches, processes or chunks first (``Moments.merge``) and update once.

    Parameters
    ----------
    running_mean, running_var : numpy.ndarray, shape (C,)
        float32 or float64; updated in place. Or both on a GPU.
    moments : Moments
        C channels; count 0 changes nothing.
    momentum : float
        Weight of the new value.
    unbiased : bool
        Move running_var by m2/(count - 1), as PyTorch; else by m2/count, as Keras, Flax and ONNX.

    Raises
    ------
    ValueError
        Shapes that do not fit; one value per channel with ``unbiased``.
    TypeError
        Other types and dtypes.
    """
    arguments.flag("unbiased", unbiased)
    if not dispatch.on_device(running_mean):
        running.update(running_mean, running_var, moments, momentum, unbiased)
        return
    from fastbn import device_training

    device_training.update(running_mean, running_var, moments, momentum, unbiased)


def _moments_of(x: Any, axis: Any, mask: Any, lengths: Any) -> Moments:
    if dispatch.on_device(x):
        from fastbn import device

        return device.moments_of(x, axis, mask, lengths)
    x = arguments.tensor("x", x)
    axis = layout.normalise_axis(axis, x.ndim)
    channels, dtype = x.shape[axis], arguments.arithmetic(x.dtype)
    if mask is not None or lengths is not None:
        count, stats = masked.statistics(x, masked.valid(mask, lengths, x, axis), axis, 0.0)
    elif x.size == 0:
        count, stats = 0, np.zeros(3 * channels)
    else:
        x, where = layout.settle(x, axis)
        count, kind = x.size // channels, views.constant(1.0, channels, dtype)
        stats = dispatch.kernels().moments(views.flat(x, where), kind, where.dims, 0.0)
    mean, _, var = stats.reshape(3, -1)
    return Moments._of_variance(count, mean, var)


Moments._estimate = staticmethod(_moments_of)
