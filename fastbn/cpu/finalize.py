"""From a channel's sums to its statistics, its running statistics and its scale: a few float64 operations a channel.

Kernels sum ``d = x - pivot`` and ``d * d`` in short float32 runs put together in float64. That is exact to well
below float32 rounding as long as the pivot lies within a few standard deviations of the mean; where it does not (or
where a square left float32's range), ``resolve`` sums the channel again, slowly, in float64.

Formulas: mean = pivot + s/n, var = (q - s*s/n)/n (Chan, Golub & LeVeque 1983, with one pivot), running statistics as
PyTorch: (1 - momentum)*old + momentum*new with the unbiased variance n/(n-1).
"""

from __future__ import annotations

import math

from fastbn.cpu._jit import jit
from fastbn.cpu.simd import get, put, rounded

FAR = 16.0  # squared distance of pivot and mean, in variances, that float32 sums still bear
TINY = 1e-30  # below this variance float32 squares may have underflowed


@jit
def pivot_offsets(N, C, S):
    """Where to look for a pivot: the offsets, from a channel's first element, of four elements spread over it."""
    if N >= 4:
        return (N // 8 * C * S + S // 2, 3 * N // 8 * C * S, 5 * N // 8 * C * S + S // 2, 7 * N // 8 * C * S)
    if S >= 4:
        return (S // 8, 3 * S // 8, 5 * S // 8, 7 * S // 8)
    return (0, 0, 0, 0)


@jit
def pivot(x, at, offsets):
    """Mean of four elements, added so that equal ones give exactly themselves."""
    a = 0.5 * get(x, at + offsets[0]) + 0.5 * get(x, at + offsets[1])
    b = 0.5 * get(x, at + offsets[2]) + 0.5 * get(x, at + offsets[3])
    return 0.5 * a + 0.5 * b


@jit
def wide_sums(x, N, C, S, c):
    """Mean and variance of channel c in float64, in two passes and a correction; for the channels that need it."""
    n = N * S
    mean = 0.0
    for r in range(N):
        for i in range((r * C + c) * S, (r * C + c + 1) * S):
            mean += get(x, i) / n
    if not math.isfinite(mean):
        return mean, math.nan
    s = q = 0.0
    for r in range(N):
        for i in range((r * C + c) * S, (r * C + c + 1) * S):
            d = get(x, i) - mean
            s += d
            q += d * d
    return mean + s / n, max((q - s * s / n) / n, 0.0)


@jit
def resolve(x, N, C, S, c, start, s, q, eps):
    """Mean and biased variance of channel c from its sums about ``start``."""
    n = N * S
    shift = s / n
    var = max((q - s * shift) / n, 0.0)
    if shift * shift <= FAR * var and q < 1e38 and (var + eps > TINY or q == 0.0):
        return start + shift, var
    return wide_sums(x, N, C, S, c)


@jit
def keep(stats, running_mean, running_var, tracked, C, c, mean, var, n, eps, momentum):
    """Save mean, invstd and variance of channel c, at [c], [C + c] and [2*C + c]; move its running statistics."""
    put(stats, c, mean)
    put(stats, C + c, 1.0 / math.sqrt(var + eps))
    put(stats, 2 * C + c, var)
    if tracked:
        put(running_mean, c, (1.0 - momentum) * get(running_mean, c) + momentum * mean)
        put(running_var, c, (1.0 - momentum) * get(running_var, c) + momentum * (var * (n / (n - 1.0))))


@jit
def affine(stats, weight, bias, C, c, like):
    """Split y = (x - mean)*invstd*weight + bias of channel c into (m, k, b): y = (x - m)*k + b.

    m is the mean rounded to the vectors' lanes, its rounding remainder goes into b: with a float32 mean alone the
    output at mean 1e4, std 1 would be off by 5e-4.
    """
    mean = get(stats, c)
    k = get(weight, c) * get(stats, C + c)
    m = rounded(like, mean)
    return m, k, get(bias, c) - (mean - m) * k


@jit
def wide_gradient_sums(x, g, y, N, C, S, c, m, k, b, relu):
    """Sums of u and u*(x - m) of channel c in float64, for channels whose products left float32's range."""
    s = q = 0.0
    for r in range(N):
        for i in range((r * C + c) * S, (r * C + c + 1) * S):
            v, u = get(x, i) - m, get(g, i)
            if y is not None:
                u = 0.0 if get(y, i) <= 0.0 else u
            elif relu is not None:
                u = 0.0 if v * k + b <= 0.0 else u
            s += u
            q += u * v
    return s, q


@jit
def gradients(stats, weight, dweight, dbias, C, c, n, m, s, q, frozen):
    """From s = sum(u), q = sum(u*(x - m)) to (c1, c0) of dx = k*u + c1*(x - m) + c0; writes dweight and dbias.

    Ioffe & Szegedy 2015, section 3: dbias = sum(u), dweight = sum(u*xhat), and
    dx = weight*invstd * (u - dbias/n - xhat*dweight/n) with xhat = (x - mean)*invstd. Frozen statistics are constants,
    so dx = weight*invstd*u.
    """
    mean, invstd = get(stats, c), get(stats, C + c)
    rest = mean - m
    dw = (q - rest * s) * invstd
    put(dbias, c, s)
    put(dweight, c, dw)
    if frozen:
        return 0.0, 0.0
    scale = get(weight, c) * invstd
    c1 = -scale * invstd * dw / n
    return c1, -scale * s / n - c1 * rest
