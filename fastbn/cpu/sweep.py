"""Runs of contiguous elements that share one channel: the innermost loops of the channels-first kernels.

Every function handles the elements at, ..., at + n - 1. The last n % W go through the same instructions in a masked
vector, so they are rounded like the rest. A run that is written starts with the few elements up to the next 64-byte
line, since only whole lines can be streamed.

Optional arrays and ``relu`` are None at compile time where they are absent: Numba then drops their branches.
"""

from __future__ import annotations

from fastbn.cpu._jit import jit
from fastbn.cpu.simd import first, fma, head, lanes, load, load_n, splat, store, store_n, stream, total, where_positive

RUN = 8192  # elements that are summed in float32 before they join a float64 sum: 128 additions a lane


@jit
def output(v, r, k, b, relu):
    """activation(v*k + b + r) with v = x - m."""
    z = fma(v, k, b)
    if r is not None:
        z = z + r
    if relu is not None:
        z = where_positive(z, z)
    return z


@jit
def through_relu(g, v, y, k, b, relu):
    """Gradient in front of the ReLU: g where its input was positive. Known from y if given, else from v*k + b."""
    if y is not None:
        g = where_positive(y, g)
    elif relu is not None:
        g = where_positive(fma(v, k, b), g)
    return g


@jit
def term(g, v, y, k, b, relu):
    """First factor of the sums: the centred value itself (forward) or the gradient (backward)."""
    if g is None:
        return v
    return through_relu(g, v, y, k, b, relu)


@jit
def sums(x, g, y, at, n, m, k, b, relu):
    """Sums of u and of u*v with v = x - m; u is v without g, else the gradient g in front of the ReLU.

    Floor: n reads a tensor. Four sums in flight hide the latency of the additions.
    """
    W = lanes(x)
    m, k, b, zero = splat(x, m), splat(x, k), splat(x, b), splat(x, 0.0)
    s = q = 0.0
    i, end = at, at + n
    while i < end:
        stop = min(i + RUN, end)
        s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
        while i + 4 * W <= stop:
            v0, v1 = load(x, i) - m, load(x, i + W) - m
            v2, v3 = load(x, i + 2 * W) - m, load(x, i + 3 * W) - m
            u0 = term(load(g, i), v0, load(y, i), k, b, relu)
            u1 = term(load(g, i + W), v1, load(y, i + W), k, b, relu)
            u2 = term(load(g, i + 2 * W), v2, load(y, i + 2 * W), k, b, relu)
            u3 = term(load(g, i + 3 * W), v3, load(y, i + 3 * W), k, b, relu)
            s0, s1, s2, s3 = s0 + u0, s1 + u1, s2 + u2, s3 + u3
            q0, q1, q2, q3 = fma(u0, v0, q0), fma(u1, v1, q1), fma(u2, v2, q2), fma(u3, v3, q3)
            i += 4 * W
        while i < stop:
            left = min(W, stop - i)
            v0 = first(load_n(x, i, left) - m, left)
            u0 = first(term(load_n(g, i, left), v0, load_n(y, i, left), k, b, relu), left)
            s0, q0 = s0 + u0, fma(u0, v0, q0)
            i += left
        s += total((s0 + s1) + (s2 + s3))
        q += total((q0 + q1) + (q2 + q3))
    return s, q


@jit
def normalise(x, r, y, at, n, m, k, b, relu, streamed):
    """Y = activation((x - m)*k + b + r). Floor: n reads a tensor and n writes."""
    W = lanes(x)
    m, k, b = splat(x, m), splat(x, k), splat(x, b)
    i, end = at, at + n
    h = min(head(y, at), n)
    if h > 0:
        store_n(y, i, output(load_n(x, i, h) - m, load_n(r, i, h), k, b, relu), h)
        i += h
    if streamed:
        while i + W <= end:  # not unrolled: four streams at once cost 1.5x here
            stream(y, i, output(load(x, i) - m, load(r, i), k, b, relu))
            i += W
    else:
        while i + W <= end:
            store(y, i, output(load(x, i) - m, load(r, i), k, b, relu))
            i += W
    if i < end:
        left = end - i
        store_n(y, i, output(load_n(x, i, left) - m, load_n(r, i, left), k, b, relu), left)


@jit
def _gradient_n(x, g, y, dx, dr, i, n, m, k, b, c1, c0, relu):
    v = load_n(x, i, n) - m
    u = through_relu(load_n(g, i, n), v, load_n(y, i, n), k, b, relu)
    store_n(dr, i, u, n)
    store_n(dx, i, fma(k, u, fma(c1, v, c0)), n)


@jit
def gradient(x, g, y, dx, dr, at, n, m, k, b, c1, c0, relu, streamed):
    """Dx = k*u + c1*(x - m) + c0 and dr = u, with u the gradient in front of the ReLU. Floor: 2n reads, n writes."""
    W = lanes(x)
    m, k, b, c1, c0 = splat(x, m), splat(x, k), splat(x, b), splat(x, c1), splat(x, c0)
    i, end = at, at + n
    h = min(head(dx, at), n)
    if h > 0:
        _gradient_n(x, g, y, dx, dr, i, h, m, k, b, c1, c0, relu)
        i += h
    if streamed:
        while i + W <= end:
            v = load(x, i) - m
            u = through_relu(load(g, i), v, load(y, i), k, b, relu)
            store(dr, i, u)
            stream(dx, i, fma(k, u, fma(c1, v, c0)))
            i += W
    else:
        while i + W <= end:
            v = load(x, i) - m
            u = through_relu(load(g, i), v, load(y, i), k, b, relu)
            store(dr, i, u)
            store(dx, i, fma(k, u, fma(c1, v, c0)))
            i += W
    if i < end:
        _gradient_n(x, g, y, dx, dr, i, end - i, m, k, b, c1, c0, relu)
