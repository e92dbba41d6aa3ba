"""Statistics per (sample, group), affine per channel: group norm on (B, C, S), layer norm as one group on (R, D, 1).

A set of values that shares statistics is contiguous, so statistics and input gradients are the kernels' shape
(1, B*G, C/G*S) with an identity affine. The affine runs along another axis than the statistics and comes as a second
call: on long runs by giving the group's statistics to each of its channels, on short ones in place on (B, C, S).
A kernel with one affine per element of the run would save that second pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn import arguments, dispatch, views

Array = npt.NDArray[Any]

PIECE = (
    1 << 19
)  # elements that go through all calls together: 3.0 ms instead of 4.0 for (8192, 768), and small temporaries
LONG = 256  # elements of a channel's run from which the channels-first kernel takes it


class Groups(NamedTuple):
    """Sizes: samples, groups, channels, values behind the channel axis."""

    B: int
    G: int
    C: int
    S: int

    @property
    def sets(self) -> tuple[int, int, int]:
        """The kernels' shape whose channels are the sets that share statistics."""
        return 1, self.B * self.G, self.C // self.G * self.S

    @property
    def runs(self) -> tuple[int, int, int]:
        """The kernels' shape whose channels are (sample, channel)."""
        return 1, self.B * self.C, self.S

    @property
    def channels(self) -> tuple[int, int, int]:
        """The kernels' shape whose channels are the channels."""
        return self.B, self.C, self.S


def _identity(size: int, dtype: np.dtype[Any]) -> tuple[Array, Array]:
    return views.constant(1.0, size, dtype), views.constant(0.0, size, dtype)


def _unit(channels: int) -> Array:
    """Statistics that change nothing: mean 0, invstd 1."""
    stats = np.ones(3 * channels)
    stats[:channels] = 0.0
    return stats


def _spread(stats: Array, d: Groups) -> Array:
    """Give each channel of a group the group's statistics: (3, B*G) -> (3, B*C), flat."""
    return np.repeat(stats, d.C // d.G)


def _pieces(d: Groups) -> list[tuple[slice, Groups]]:
    """Cut many samples into pieces that stay in the cache from call to call; none if one will do."""
    sample = d.C * d.S
    per = max(1, PIECE // max(1, sample))
    if per >= d.B:
        return []
    starts = range(0, d.B, per)
    return [(slice(b * sample, (b + per) * sample), d._replace(B=min(per, d.B - b))) for b in starts]


def forward(x: Array, out: Array, affine: tuple[Array, Array] | None, d: Groups, eps: float) -> Array:
    """Normalise flat x into flat out; ``affine`` is (weight, bias) by channel. Returns statistics by set."""
    if affine is not None and d.S < LONG and (pieces := _pieces(d)):
        parts = [forward(x[part], out[part], affine, piece, eps).reshape(3, -1) for part, piece in pieces]
        return np.concatenate(parts, axis=1).reshape(-1)
    kernels, kind = dispatch.kernels(), arguments.arithmetic(x.dtype)
    raw, y = views.raw(x), views.raw(out)
    one, zero = _identity(d.B * d.G, kind)
    if affine is not None and d.S >= LONG:
        stats: Array = kernels.moments(raw, one, d.sets, eps)
        weights, biases = (np.tile(p, d.B) for p in affine)
        kernels.infer(raw, None, y, weights, biases, _spread(stats, d), d.runs, None)
        return stats
    if affine is not None and x.itemsize == 2:  # or the output would be rounded twice
        wide = x.astype(np.float32)
        stats = forward(wide, wide, affine, d, eps)
        out[:] = wide
        return stats
    stats = kernels.train(raw, None, y, one, zero, zero[:0], zero[:0], d.sets, eps, 0.0, None)
    if affine is not None:
        kernels.infer(y, None, y, *affine, _unit(d.C), d.channels, None)
    return stats


def backward(x: Array, grad: Array, out: Array, weight: Array | None, stats: Array, d: Groups) -> tuple[Array, Array]:
    """Gradient of flat x into flat out, which may be grad; returns dweight and dbias in float64, by channel.

    With v = weight*u: dx = invstd*(v - mean(v) - xhat*mean(v*xhat)) over each set (Wu & He 2018, arXiv:1803.08494).
    ``weight`` None: no affine, no gradients of it.
    """
    if weight is not None and (pieces := _pieces(d)):
        return _backward_in_pieces(x, grad, out, weight, stats, d, pieces)
    kernels, kind = dispatch.kernels(), arguments.arithmetic(x.dtype)
    one, zero = _identity(d.B * d.G, kind)
    dweight = dbias = np.zeros(d.C)
    if weight is not None:
        if x.itemsize == 2:  # or weight*u would be rounded before it is summed
            wide = grad.astype(np.float32)
            sums = backward(x.astype(np.float32), wide, wide, weight, stats, d)
            out[:] = wide
            return sums
        dweight, dbias = _weigh(x, grad, out, weight, stats, d)
        grad = out
    raw = (views.raw(x), views.raw(grad), None, views.raw(out), None)
    kernels.backward(*raw, one, zero, stats, d.sets, False, None)
    return dweight, dbias


def _backward_in_pieces(
    x: Array, grad: Array, out: Array, weight: Array, stats: Array, d: Groups, pieces: list[tuple[slice, Groups]]
) -> tuple[Array, Array]:
    dweight, dbias, done = np.zeros(d.C), np.zeros(d.C), 0
    for part, piece in pieces:
        mine = np.array(stats.reshape(3, d.B, d.G)[:, done : done + piece.B]).reshape(
            -1
        )  # kernels read on, not by stride
        dw, db = backward(x[part], grad[part], out[part], weight, mine, piece)
        dweight, dbias, done = dweight + dw, dbias + db, done + piece.B
    return dweight, dbias


def _weigh(x: Array, grad: Array, out: Array, weight: Array, stats: Array, d: Groups) -> tuple[Array, Array]:
    """Write weight*grad into out; return sum(grad*xhat) and sum(grad) by channel. Frozen batch norm does just that."""
    kernels = dispatch.kernels()
    if d.S >= LONG:
        spread = _spread(stats, d)
        invstd = spread.reshape(3, -1)[1]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            weights = (np.tile(weight, d.B) / invstd).astype(weight.dtype)
        zero = views.constant(0.0, weights.size, weight.dtype)
        sums = kernels.backward(x, views.raw(grad), None, out, None, weights, zero, spread, d.runs, True, None)
        dweight, dbias = (s.reshape(d.B, d.C).sum(0, dtype=np.float64) for s in sums)
        return dweight, dbias
    xhat = np.empty_like(x)
    kernels.infer(views.raw(x), None, xhat, *_identity(d.B * d.G, weight.dtype), stats, d.sets, None)
    zero = views.constant(0.0, d.C, weight.dtype)
    dweight, dbias = kernels.backward(
        xhat, views.raw(grad), None, out, None, weight, zero, _unit(d.C), d.channels, True, None
    )
    return dweight, dbias
