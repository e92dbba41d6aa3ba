"""Statistics as a value: count, mean and centred second moment by channel, merged by Chan's formula.

Threads, micro-batches, data chunks, processes and calibration batches all merge the same value, so that statistics over
any partition of the data agree with those over the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbn.errors import ArgumentTypeError, ArgumentValueError

__all__ = ["Moments"]

Vector = npt.NDArray[np.float64]


def _vector(name: str, value: npt.ArrayLike) -> Vector:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ArgumentTypeError(name, "one number per channel", type(value).__name__) from None


class Moments:
    """Mergeable statistics of the channels of some data.

    Parameters
    ----------
    count : int
        Values seen per channel, >= 0.
    mean : array_like of float, shape (C,)
        Mean by channel.
    m2 : array_like of float, shape (C,)
        Sum of squared deviations from the mean by channel.

    Raises
    ------
    ValueError, TypeError
        A negative or fractional count, vectors of other or different shapes.

    Notes
    -----
    Chan, Golub & LeVeque, "Algorithms for Computing the Sample Variance" (1983): with d = mean_b - mean_a,
    mean = mean_a + d*n_b/n and m2 = m2_a + m2_b + d*d*n_a*n_b/n.
    """

    __slots__ = ("count", "m2", "mean")

    count: int
    mean: Vector
    m2: Vector

    # Set by fastbn.functional, which lies above this file: the floors forbid importing it from here.
    _estimate: Callable[[Any, Any, Any, Any], Moments] | None = None

    def __init__(self, count: int, mean: npt.ArrayLike, m2: npt.ArrayLike):
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            raise ArgumentTypeError("count", "an integer", type(count).__name__)
        self.count = int(count)
        self.mean, self.m2 = _vector("mean", mean), _vector("m2", m2)
        if self.count < 0:
            raise ArgumentValueError("count", "an integer >= 0", count)
        if self.mean.ndim != 1 or self.mean.shape != self.m2.shape:
            got = f"{self.mean.shape} and {self.m2.shape}"
            raise ArgumentValueError("mean, m2", "one number per channel each, shape (C,)", got)

    @classmethod
    def of(cls, x: Any, axis: int = 1, mask: Any = None, *, lengths: Any = None) -> Moments:
        """Return the statistics of an array.

        Parameters
        ----------
        x : array, rank >= 2
            float32, float64, float16 or bfloat16.
        axis : int
            Channel axis.
        mask : array of bool, optional
            Broadcastable to x without its channel axis; only values where it is true count.
        lengths : array of int, shape (N,), optional
            Instead of a mask, for x of shape (N, C, T) or (N, T, C): the first lengths[n] steps of sample n count.

        Returns
        -------
        Moments
            In float64; count 0, mean 0 and m2 0 for an empty array, or where no value counts.

        Raises
        ------
        ValueError
            Shapes that do not fit, both a mask and lengths.
        TypeError
            Not a NumPy array, other dtypes.
        """
        if cls._estimate is None:
            raise RuntimeError("Moments.of needs fastbn.functional; import fastbn")
        return cls._estimate(x, axis, mask, lengths)

    def variance(self, ddof: int = 0) -> Vector:
        """Return m2 / (count - ddof): biased for ddof=0, unbiased for ddof=1; NaN where count <= ddof."""
        if self.count <= ddof:
            return np.full(self.mean.shape, np.nan)
        return self.m2 / (self.count - ddof)

    def merge(self, other: Moments) -> Moments:
        """Return the statistics of both sets of data together (Chan's formula).

        Raises
        ------
        ValueError, TypeError
            Another number of channels, no ``Moments``.
        """
        if not isinstance(other, Moments):
            raise ArgumentTypeError("other", "Moments", type(other).__name__)
        if other.mean.shape != self.mean.shape:
            raise ArgumentValueError("other", f"{self.mean.size} channels", f"{other.mean.size}")
        if other.count == 0 or self.count == 0:
            full = self if other.count == 0 else other
            return Moments(full.count, full.mean.copy(), full.m2.copy())
        count = self.count + other.count
        with np.errstate(all="ignore"):  # NaN and inf stay in their channel
            delta = other.mean - self.mean
            mean = self.mean + delta * (other.count / count)
            apart = self.mean * (self.count / count) + other.mean * (other.count / count)
            mean = np.where(np.isinf(delta), apart, mean)  # inf + -inf is no mean
            m2 = self.m2 + other.m2 + delta * delta * (self.count * (other.count / count))
        return Moments(count, mean, m2)

    @classmethod
    def _of_variance(cls, count: int, mean: Vector, variance: Vector) -> Moments:
        """Return the statistics with this biased variance, which may be inf or NaN."""
        with np.errstate(all="ignore"):
            return cls(count, mean, variance * count)

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, channels={self.mean.size})"
