"""From a channel's sums to its statistics, its running statistics and its scale: a few float64 operations a channel.

Kernels sum ``d = x - pivot`` and ``d * d`` in short float32 runs put together in float64. That is exact to well
below float32 rounding as long as the pivot lies within a few standard deviations of the mean; where it does not (or
where a square left float32's range), ``resolve`` sums the channel again, slowly, in float64.

Formulas: mean = pivot + s/n, var = (q - s*s/n)/n (Chan, Golub & LeVeque 1983, with one pivot), running statistics as
PyTorch: (1 - momentum)*old + momentum*new with the unbiased variance n/(n-1).
"""

from __future__ import annotations

import math

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.simd import base, get, put, rounded

FAR = 4.0  # squared distance of pivot and mean, in variances, that float32 sums still bear: their error grows with it
TINY = 1e-30  # below this variance float32 squares may have underflowed


@helper
def wide_sums(x, N, C, S, c):
    """Mean and variance of channel c in float64, in two passes and a correction; for the channels that need it."""
    n, start = N * S, get(x, c * S)
    total = 0.0
    for r in range(N):
        for i in range((r * C + c) * S, (r * C + c + 1) * S):
            total += get(x, i) - start
    mean = start + total / n
    if not math.isfinite(mean):
        return wide_sum(x, N, C, S, c) / n, math.nan
    s = q = 0.0
    for r in range(N):
        for i in range((r * C + c) * S, (r * C + c + 1) * S):
            d = get(x, i) - mean
            s += d
            q += d * d
    var = (q - s * s / n) / n
    return mean + s / n, 0.0 if var < 0.0 else var


@helper
def wide_sum(x, N, C, S, c):
    """Plain sum of channel c: inf where its values add up to that."""
    total = 0.0
    for r in range(N):
        for i in range((r * C + c) * S, (r * C + c + 1) * S):
            total += get(x, i)
    return total


@part
def invstds(stats, C, c0, c1, eps):
    """Save the invstd of channels c0..c1 - 1 beside their variances.

    One array a loop, here and in ``keep``: LLVM makes vectors of it, that divide and take roots faster.
    """
    for c in range(c0, c1):
        put(stats, C + c, 1.0 / math.sqrt(get(stats, 2 * C + c) + eps))


@part
def put_given(stats, C, mean, var, eps):
    """Save a mean and a variance of C channels that were not taken here, and the invstd."""
    for c in range(C):
        put(stats, c, get(mean, c))
    for c in range(C):
        put(stats, 2 * C + c, get(var, c))
    invstds(stats, C, 0, C, eps)


@jit
def given(mean, var, stats, eps):
    """Statistics from a mean and a variance that were not taken here; a negative variance gives NaN, as in PyTorch.

    A kernel of its own: inference that does this itself is no faster, unpacking two more arrays takes what a call does.
    """
    put_given(base(stats), mean.size, base(mean), base(var), eps)


@part
def near(start, s, q, n, eps):
    """Mean and biased variance from sums about ``start``, and whether these can be trusted."""
    shift = s / n
    var = (q - s * shift) / n
    var = 0.0 if var < 0.0 else var  # NaN stays
    return start + shift, var, shift * shift <= FAR * var and q < 1e38 and var + eps > TINY


@helper
def resolve(x, N, C, S, c, start, s, q, eps):
    """Mean and biased variance of channel c from its sums about ``start``."""
    mean, var, fine = near(start, s, q, N * S, eps)
    if fine:
        return mean, var
    return wide_sums(x, N, C, S, c)


@helper
def moments_of(x, N, C, S, c0, c1, start, step, s, q, stats, eps, again):
    """Save means and variances of channels c0..c1 - 1 from their sums s and q, each about its number in ``start``.

    Takes those that cannot be trusted again, or, not ``again``, returns False.
    """
    far = 0
    for j in range(c1 - c0):  # no calls in here: LLVM makes vectors of it, 3x over channel by channel
        mean, var, fine = near(get(start, j * step), get(s, j), get(q, j), N * S, eps)
        put(stats, c0 + j, mean)
        put(stats, 2 * C + c0 + j, var)
        far += not fine
    if far > 0:
        if not again:
            return False
        for j in range(c1 - c0):
            mean, var = resolve(x, N, C, S, c0 + j, get(start, j * step), get(s, j), get(q, j), eps)
            put(stats, c0 + j, mean)
            put(stats, 2 * C + c0 + j, var)
    return True


@part
def keep(stats, running_mean, running_var, tracked, C, c0, c1, n, eps, momentum):
    """Save the invstds of channels c0..c1 - 1, whose means and variances are saved; move their running statistics."""
    invstds(stats, C, c0, c1, eps)
    if tracked:
        for c in range(c0, c1):
            put(running_mean, c, (1.0 - momentum) * get(running_mean, c) + momentum * get(stats, c))
        for c in range(c0, c1):
            unbiased = get(stats, 2 * C + c) * (n / (n - 1.0))
            put(running_var, c, (1.0 - momentum) * get(running_var, c) + momentum * unbiased)


@helper
def affine(stats, weight, bias, C, c, like):
    """Split y = (x - mean)*invstd*weight + bias of channel c into (m, k, b): y = (x - m)*k + b.

    m is the mean rounded to the vectors' lanes, its rounding remainder goes into b: with a float32 mean alone the
    output at mean 1e4, std 1 would be off by 5e-4.
    """
    mean = get(stats, c)
    k = get(weight, c) * get(stats, C + c)
    m = rounded(like, mean)
    return m, k, get(bias, c) - (mean - m) * k


@part
def wide_term(x, g, y, i, m, k, b, relu):
    """Both factors at element i, u and v = x - m, in float64."""
    v, u = get(x, i) - m, get(g, i)
    if y is not None:
        u = 0.0 if get(y, i) <= 0.0 else u
    elif relu is not None:
        u = 0.0 if v * k + b <= 0.0 else u
    return u, v


@helper
def wide_gradient_sums(x, g, y, N, C, S, c, m, k, b, relu):
    """Sums of u and u*(x - m) of channel c in float64, for channels whose products left float32's range."""
    s = q = 0.0
    for r in range(N):
        for i in range((r * C + c) * S, (r * C + c + 1) * S):
            u, v = wide_term(x, g, y, i, m, k, b, relu)
            s += u
            q += u * v
    return s, q


@helper
def trusted(s, q, x, g, y, N, C, S, c, m, k, b, relu):
    """Return the sums (s, q) of channel c, taken again in float64 where they are not finite."""
    if math.isfinite(s) and math.isfinite(q):
        return s, q
    wide_s, wide_q = wide_gradient_sums(x, g, y, N, C, S, c, m, k, b, relu)
    return s if math.isfinite(s) else wide_s, q if math.isfinite(q) else wide_q


@helper
def gradients(stats, weight, dweight, dbias, C, c, n, m, s, q, frozen):
    """From s = sum(u), q = sum(u*(x - m)) to (c1, c0) of dx = k*(u + c1*(x - m) + c0); writes dweight and dbias.

    Ioffe & Szegedy 2015, section 3: dbias = sum(u), dweight = sum(u*xhat), and
    dx = weight*invstd * (u - dbias/n - xhat*dweight/n) with xhat = (x - mean)*invstd. Frozen statistics are constants,
    so dx = weight*invstd*u.
    """
    mean, invstd = get(stats, c), get(stats, C + c)
    rest = mean - m
    if math.isfinite(s):  # or 0*inf, where the sum about the mean is infinite as well
        q -= rest * s
    dw = q * invstd
    put(dbias, c, s)
    put(dweight, c, dw)
    if frozen:
        return 0.0, 0.0
    c1 = -invstd * dw / n  # without the factor k = weight*invstd it stays in float32's range as long as x does
    return c1, -s / n - c1 * rest


@helper
def finite_sums(x, g, y, N, C, S, first, count, s, q, stats, weight, bias, relu, again):
    """Take sums of ``count`` channels again where they are not finite, or, not ``again``, return False."""
    unsure = 0
    for j in range(count):
        unsure += not (math.isfinite(get(s, j)) and math.isfinite(get(q, j)))
    if unsure > 0:
        if not again:
            return False
        for j in range(count):
            m, k, b = affine(stats, weight, bias, C, first + j, x)
            total_s, total_q = trusted(get(s, j), get(q, j), x, g, y, N, C, S, first + j, m, k, b, relu)
            put(s, j, total_s)
            put(q, j, total_q)
    return True


@part
def gradients_of(x, stats, dweight, dbias, C, first, count, n, s, q, frozen):
    """``gradients`` of ``count`` channels from their sums s and q; c0 takes the place of s, c1 that of q.

    An array a loop, see ``invstds``: gradients of (64, 100) take 0.95 of the time, of (16, 1048576) 0.82. Multiplied
    by 1/n 0.93; but 49 * (1/49) is not 1, and dx of equal gradients would not be 0.
    """
    for j in range(count):
        mean = get(stats, first + j)
        about = get(q, j) - (mean - rounded(x, mean)) * get(s, j)
        put(q, j, (about if math.isfinite(get(s, j)) else get(q, j)) * get(stats, C + first + j))
    for j in range(count):
        put(dbias, first + j, get(s, j))
    for j in range(count):
        put(dweight, first + j, get(q, j))
    for j in range(count):
        put(q, j, 0.0 if frozen else -get(stats, C + first + j) * get(q, j) / n)
    for j in range(count):
        mean = get(stats, first + j)
        put(s, j, 0.0 if frozen else -get(s, j) / n - get(q, j) * (mean - rounded(x, mean)))
