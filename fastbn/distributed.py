"""Batch norm over a batch that several processes share: statistics and gradients are those of all of it together.

For mpi4py, or whatever has ``allgather``. Each process (rank) holds some samples, any number of them, none included.
Statistics travel as ``Moments``, 2*C + 1 numbers a rank, and are merged by every rank in the order of the ranks: all
have the same bits and move their running statistics alike, so nothing has to be broadcast.

>>> from mpi4py import MPI                                             # doctest: +SKIP
>>> from fastbn import distributed                                     # doctest: +SKIP
>>> y, saved = distributed.batch_norm_train(x, comm=MPI.COMM_WORLD)    # doctest: +SKIP
>>> grads = fastbn.backward(dy, saved)                                 # doctest: +SKIP
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, masked, running
from fastbn.core import Forward
from fastbn.errors import ArgumentTypeError, ArgumentValueError, FastbnError
from fastbn.moments import Moments
from fastbn.saved import BatchSaved, Gradients, Saved, no_statistics

__all__ = ["Communicator", "batch_norm_train", "merge"]

Array = npt.NDArray[Any]
Kept = TypeVar("Kept")
Sent = TypeVar("Sent")


class Communicator(Protocol):
    """What is asked of ``mpi4py.MPI.Comm``: every rank gives an object and gets those of all, in order."""

    def allgather(self, sendobj: Any, /) -> list[Any]:
        """Return the objects of all ranks."""


class _Failure(NamedTuple):
    """What a rank sends that could not do its part: the others would wait for it for ever."""

    what: str


def _gather(comm: Communicator, work: Callable[[], tuple[Kept, Sent]]) -> tuple[Kept, list[Sent]]:
    """Do this rank's part, (what it keeps, what it sends); return what it keeps and what all sent.

    Raises on every rank if one could not do its part.
    """
    if not hasattr(comm, "allgather"):
        raise ArgumentTypeError("comm", "a communicator with allgather, such as mpi4py's", type(comm).__name__)
    try:
        kept, sent = work()
    except Exception as error:
        comm.allgather(_Failure(f"{type(error).__name__}: {error}"))
        raise
    found = comm.allgather(sent)
    for rank, other in enumerate(found):
        if isinstance(other, _Failure):
            raise FastbnError(f"rank {rank} could not do its part: {other.what}")
    return kept, found


def merge(moments: Moments, comm: Communicator) -> Moments:
    """Return the statistics of all ranks' data together.

    Parameters
    ----------
    moments : Moments
        Of this rank's data; count 0 where it has none.
    comm : Communicator
        All its ranks must call.

    Returns
    -------
    Moments
        The same bits on every rank: merged by Chan's formula in the order of the ranks.

    Raises
    ------
    ValueError, TypeError
        No moments, no communicator, other numbers of channels.
    FastbnError
        Another rank raised.
    """

    def mine() -> tuple[None, Moments]:
        if not isinstance(moments, Moments):
            raise ArgumentTypeError("moments", "fastbn.Moments", type(moments).__name__)
        return None, moments

    return _merged("moments", _gather(comm, mine)[1])


def _merged(name: str, parts: list[Moments]) -> Moments:
    channels = [part.mean.size for part in parts]
    if len(set(channels)) > 1:
        raise ArgumentValueError(name, "as many channels on every rank", f"{channels}")
    return functools.reduce(Moments.merge, parts)


class SyncSaved(Saved):
    """What this rank's part of a shared batch saves; statistics and ``moments`` are those of the whole batch."""

    __slots__ = ("comm", "lengths", "mask", "part")

    numpy_sums = True

    comm: Communicator
    mask: Any  # it and lengths as they were given
    lengths: Any
    part: BatchSaved  # with the statistics as constants

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``; on all ranks. Those of weight and bias are this rank's share of the sum.

        With constant statistics dx = weight*invstd*u; the rest, -weight*invstd*(sum(u) + xhat*sum(u*xhat))/n with the
        sums of all ranks, is inference with other parameters and dx as its residual.
        """

        def mine() -> tuple[tuple[Array, Array, Array, Array | None], tuple[Array, Array]]:
            local = self.part.all_gradients(grad_output, out)
            return local, (local[1].astype(np.float64), local[2].astype(np.float64))

        (dx, dweight, dbias, residual), found = _gather(self.comm, mine)
        if dx.size and self.part.count:
            scale = self.part.weight * self.invstd / -self.count
            weight, bias = (scale * sum(sums) for sums in zip(*found, strict=True))
            dx = self._with_sums(dx, weight, bias)
        affine = self.part.affine
        return Gradients(dx, dweight if affine[0] else None, dbias if affine[1] else None, residual)

    def _with_sums(self, dx: Array, weight: Array, bias: Array) -> Array:
        """Return dx + weight*xhat + bias, where values count."""
        x, axis, dtype = self.part.x, self.part.axis, self.part.weight.dtype
        scale = np.abs(weight * self.invstd)
        if not ((scale > 0) & (scale < np.finfo(dtype).tiny)).any():
            w, b = weight.astype(dtype), bias.astype(dtype)
            f = masked.forward(x, w, b, axis, None, dx, dx, self.mask, self.lengths)
            f.normalise(self.stats)
            return f.result()
        # A standard deviation of 1e20 and more: weight*invstd, which the kernel multiplies x by, is not a float32.
        shape = [1] * x.ndim
        shape[axis] = -1
        mean, invstd, w, b = (v.reshape(shape) for v in (self.mean, self.invstd, weight, bias))
        whole: Array = (dx + (w * ((x - mean) * invstd) + b)).astype(dx.dtype)
        if self.mask is None and self.lengths is None:
            return whole
        valid = np.expand_dims(masked.valid(self.mask, self.lengths, x, axis), axis)
        found: Array = np.where(valid, whole, dx)
        return found


def batch_norm_train(
    x: Any, weight: Any = None, bias: Any = None, running_mean: Any = None, running_var: Any = None, *,
    comm: Communicator, momentum: float = 0.1, eps: float = 1e-5, axis: int = 1, activation: str | None = None,
    residual: Any = None, mask: Any = None, lengths: Any = None, out: Any = None, unbiased: bool = True,
) -> tuple[Array, Saved]:  # fmt: skip
    """Normalise this rank's part of a batch by the statistics of all ranks' parts; see ``fastbn.batch_norm_train``.

    As PyTorch's SyncBatchNorm, for parts of any size. x is read twice: what it is normalised by is known only when all
    ranks have summed theirs.

    Parameters
    ----------
    x : numpy.ndarray, rank >= 2
        This rank's samples; none (an empty array) is fine. The same number of channels on every rank.
    comm : Communicator
        All its ranks must call, here and in ``fastbn.backward`` on the ``saved`` of each.
    weight, bias, running_mean, running_var, momentum, eps, axis, activation, residual, mask, lengths, out, unbiased
        As there, each rank its own; the same parameters and running statistics on every rank give the same again.

    Returns
    -------
    y : numpy.ndarray
        Shape, dtype and memory order of x.
    saved : Saved
        For ``fastbn.backward``, which all ranks must call; its statistics are those of the whole batch. Gradients of
        weight and bias are this rank's share, to be added over the ranks as those of all other parameters are.

    Raises
    ------
    ValueError, TypeError
        As there; one value per channel in all ranks together.
    FastbnError
        Another rank raised, before anything was written here.
    """

    def mine() -> tuple[tuple[Forward, Array, Array, float, float], Moments]:
        e, m = arguments.epsilon(eps, positive=True), arguments.number("momentum", momentum)
        arguments.flag("unbiased", unbiased)
        f = masked.forward(x, weight, bias, axis, activation, residual, out, mask, lengths)
        return (f, *f.running(running_mean, running_var), e, m), _moments(f, e)

    (f, rm, rv, eps, momentum), parts = _gather(comm, mine)
    merged = _merged("x", parts)
    if merged.count == 1:
        raise ArgumentValueError("x", "more than 1 value per channel when training", "1 in all ranks together")
    stats = no_statistics(f.weight.size, eps)
    if merged.count:
        with np.errstate(all="ignore"):  # NaN and inf stay in their channel
            stats = dispatch.kernels().given(merged.mean, merged.variance(), eps)
    if f.x.size:
        f.normalise(stats)
    saved = SyncSaved()
    saved.stats, saved.count, saved.comm = stats, merged.count, comm
    saved.updated = int(rm.size > 0 and merged.count > 0)
    saved.part, saved.mask, saved.lengths = f.saved(stats, frozen=True), mask, lengths
    if saved.updated:
        running.move(rm, rv, merged, momentum, bool(unbiased))
    return f.result(), saved


def _moments(f: Forward, eps: float) -> Moments:
    """Statistics of this rank's values."""
    C = f.weight.size
    if f.count * f.x.size == 0:
        return Moments(0, np.zeros(C), np.zeros(C))
    mean, _, variance = f.statistics(eps).reshape(3, C)
    return Moments._of_variance(f.count, mean, variance)
