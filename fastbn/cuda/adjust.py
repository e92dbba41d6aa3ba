"""Between statistics and output: renormalisation, and running statistics that move only where they may.

A few operations a channel each. Whatever they decide is decided on the GPU, so that nothing waits for it: whether all
channels' statistics are finite, how many values a mask left.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import WARP
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.simd import finite, invsqrt

int32, int64 = types.int32, types.int64


def make_any(threads: int):
    """Tell every thread of a block whether any of them has something to report."""
    warps = threads // 32

    @device
    def any_of(report, scratch):
        tid, step = cuda.threadIdx.x, 16
        while step > 0:
            report = report | cuda.shfl_xor_sync(WARP, report, step)
            step >>= 1
        cuda.syncthreads()
        if tid & 31 == 0:
            scratch[tid >> 5] = report
        cuda.syncthreads()
        report = int32(0)
        for w in range(warps):
            report = report | scratch[w]
        return report

    return any_of


@functools.cache
def move(kind: str, threads: int, masked: bool):
    """Move the running statistics by those of batches in turn, by one block; ``moved`` says of each whether it did.

    ``flags``: 1, not at all if the mean or the unbiased variance of any channel is not finite; 8, by the biased
    variance. ``unbias`` is n/(n - 1); under a mask that of ``tally``, and fewer than two values move nothing.
    """
    A, any_of, warps = ARITHMETIC[kind], make_any(threads), threads // 32

    @device
    def factor(unbias, tally):
        if masked:
            unbias = A(0)
            if tally[0] > 1:
                unbias = A(tally[0]) / A(tally[0] - 1)
        return unbias

    @device
    def refused(stats, first, C, unbias, flags, tally):
        bad = int32(0)
        if masked and tally[0] < 2:
            bad = int32(1)
        if flags & 1:
            for c in range(cuda.threadIdx.x, C, threads):
                if not finite(stats[first + c]) or not finite(stats[first + 2 * C + c] * unbias):
                    bad = int32(1)
        return bad

    @kernel("AAAIiaaaiIi", kind, threads)
    def adjust_move(stats, running_mean, running_var, moved, C, keep, momentum, unbias, flags, tally, batches):
        scratch = cuda.shared.array(warps, int32)
        tid, unbias = cuda.threadIdx.x, factor(unbias, tally)
        by = A(1) if flags & 8 else unbias
        for batch in range(batches):
            first = int64(batch) * 4 * C
            bad = any_of(refused(stats, first, C, unbias, flags, tally), scratch)
            if tid == 0:
                moved[batch] = int32(1 - bad)
            if bad == 0:
                for c in range(tid, C, threads):
                    running_mean[c] = keep * running_mean[c] + momentum * stats[first + c]
                    running_var[c] = keep * running_var[c] + momentum * (stats[first + 2 * C + c] * by)

    return adjust_move


@functools.cache
def renorm(kind: str, threads: int):
    """r, d, weight*r and weight*d + bias of each channel; see ``fastbn.renorm``. NaN stays NaN.

    ``flags``: 1 weight, 2 bias present.
    """
    A = ARITHMETIC[kind]

    @device
    def clip(value, low, high):
        if value < low:
            value = low
        if value > high:
            value = high
        return value

    @kernel("AAAAAAAiaaaai", kind, threads)
    def adjust_renorm(stats, running_mean, running_var, weight, bias, factors, params, C, eps, rmin, rmax, dmax, flags):
        c = cuda.blockIdx.x * threads + cuda.threadIdx.x
        if c < C:
            towards = invsqrt(running_var[c] + eps)
            r = clip(towards / stats[C + c], rmin, rmax)
            d = clip(((stats[c] - running_mean[c]) + stats[3 * C + c]) * towards, -dmax, dmax)
            w, b = A(1), A(0)
            if flags & 1:
                w = weight[c]
            if flags & 2:
                b = bias[c]
            factors[c], factors[C + c] = r, d
            params[c], params[C + c] = w * r, w * d + b

    return adjust_renorm


@functools.cache
def renorm_gradient(kind: str, threads: int):
    """The gradient of weight from that of weight*r: y = weight*(xhat*r + d) + bias."""

    @kernel("AAAi", kind, threads)
    def adjust_gradient(factors, dweight, dbias, C):
        c = cuda.blockIdx.x * threads + cuda.threadIdx.x
        if c < C:
            dweight[c] = factors[c] * dweight[c] + factors[C + c] * dbias[c]

    return adjust_gradient
