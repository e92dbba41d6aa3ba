"""Batch norm on channels-first arrays (N, C, S): a channel is N runs of S contiguous elements.

A channel is read from memory once, stays in the cache while its mean, its centred second moment and its output are
computed, and is written once with streaming stores. Blocks of channels are numbered by the shape alone and handed out
by an atomic counter (``claim``: next channel, channels done), so any number of threads gives the same bits.

All arrays are flat; N*C*S elements for tensors, C for parameters, ``stats`` is float64 of 3*C: the means, then the
invstds, then the biased variances. Absent optional tensors and ``relu`` are None.
"""

from __future__ import annotations

import math

from fastbn.cpu._jit import jit
from fastbn.cpu.finalize import affine, gradients, keep, pivot, pivot_offsets, resolve, wide_gradient_sums
from fastbn.cpu.simd import base, fence, fetch_add, rounded
from fastbn.cpu.sweep import gradient, normalise, sums

BLOCK = 1 << 16  # a block has at least this many elements, so that claiming it costs nothing


@jit
def channel_sums(x, g, y, N, C, S, c, m, k, b, relu):
    """Sums of u and u*v over one channel, run by run (see ``sweep.sums``)."""
    s = q = 0.0
    for r in range(N):
        a, e = sums(x, g, y, (r * C + c) * S, S, m, k, b, relu)
        s += a
        q += e
    return s, q


@jit
def channel_moments(x, N, C, S, c, offsets, eps):
    """Mean and biased variance of one channel."""
    start = rounded(x, pivot(x, c * S, offsets))
    s, q = channel_sums(x, None, None, N, C, S, c, start, 0.0, 0.0, None)
    return resolve(x, N, C, S, c, start, s, q, eps)


@jit
def moments(x, stats, N, C, S, eps, claim):
    """Statistics alone. Floor: one read."""
    x, stats, claim = base(x), base(stats), base(claim)
    per = max(1, BLOCK // (N * S))
    offsets = pivot_offsets(N, C, S)
    lo = fetch_add(claim, 0, per)
    while lo < C:
        hi = min(lo + per, C)
        for c in range(lo, hi):
            mean, var = channel_moments(x, N, C, S, c, offsets, eps)
            keep(stats, stats, stats, False, C, c, mean, var, N * S, eps, 0.0)
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)


@jit
def train(
    x, residual, y, weight, bias, running_mean, running_var, stats, N, C, S, eps, momentum, relu, streamed, claim
):
    """Training forward; running_mean and running_var have C or 0 elements. Floor: one read and one write."""
    tracked = running_mean.size > 0
    x, y, residual = base(x), base(y), base(residual)
    weight, bias, stats = base(weight), base(bias), base(stats)
    running_mean, running_var, claim = base(running_mean), base(running_var), base(claim)
    per = max(1, BLOCK // (N * S))
    offsets = pivot_offsets(N, C, S)
    lo = fetch_add(claim, 0, per)
    while lo < C:
        hi = min(lo + per, C)
        for c in range(lo, hi):
            mean, var = channel_moments(x, N, C, S, c, offsets, eps)
            keep(stats, running_mean, running_var, tracked, C, c, mean, var, N * S, eps, momentum)
            m, k, b = affine(stats, weight, bias, C, c, x)
            for r in range(N - 1, -1, -1):
                normalise(x, residual, y, (r * C + c) * S, S, m, k, b, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)


@jit
def infer(x, residual, y, weight, bias, stats, N, C, S, relu, streamed, claim):
    """Inference with the statistics in ``stats``. Floor: one read and one write. Blocks are runs of rows (n, c)."""
    x, y, residual = base(x), base(y), base(residual)
    weight, bias, stats, claim = base(weight), base(bias), base(stats), base(claim)
    per = max(1, BLOCK // S)
    lo = fetch_add(claim, 0, per)
    while lo < N * C:
        hi = min(lo + per, N * C)
        for r in range(lo, hi):
            m, k, b = affine(stats, weight, bias, C, r % C, x)
            normalise(x, residual, y, r * S, S, m, k, b, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)


@jit
def backward(x, g, y, dx, dr, weight, bias, dweight, dbias, stats, N, C, S, frozen, relu, streamed, claim):
    """Gradients. Floor: two reads and one write (and y, dr where they exist)."""
    x, g, y, dx, dr = base(x), base(g), base(y), base(dx), base(dr)
    weight, bias, dweight, dbias = base(weight), base(bias), base(dweight), base(dbias)
    stats, claim = base(stats), base(claim)
    per = max(1, BLOCK // (N * S))
    lo = fetch_add(claim, 0, per)
    while lo < C:
        hi = min(lo + per, C)
        for c in range(lo, hi):
            m, k, b = affine(stats, weight, bias, C, c, x)
            s, q = channel_sums(x, g, y, N, C, S, c, m, k, b, relu)
            if not math.isfinite(s + q):
                s, q = wide_gradient_sums(x, g, y, N, C, S, c, m, k, b, relu)
            c1, c0 = gradients(stats, weight, dweight, dbias, C, c, N * S, m, s, q, frozen)
            for r in range(N - 1, -1, -1):
                gradient(x, g, y, dx, dr, (r * C + c) * S, S, m, k, b, c1, c0, relu, streamed)
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
