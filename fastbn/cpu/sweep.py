"""Runs of contiguous elements that share one channel: the innermost loops of the channels-first kernels.

The runs of neighbouring channels lie one behind the other, so what is written is one long stretch, and only its two
ends are not whole 64-byte lines. A line on the seam of two channels is computed with the constants of both, lane by
lane, and streamed like the others. Rejected, both for runs that are no multiple of a line (7*7, 147*147, or any run of
an array that does not begin on a line): ordinary masked stores at the ends of each run, up to 9 copies, since each
throws a line out of the cache that the next run wants back; a 4 KB buffer in L1, 1.2-2x, its stores meet the loads.

Optional arrays and ``relu`` are None at compile time where they are absent: Numba then drops their branches.
"""

from __future__ import annotations

from fastbn.cpu import tuning
from fastbn.cpu._jit import part
from fastbn.cpu.ahead import NEAR, ask_four, ask_two
from fastbn.cpu.simd import (
    ask,
    blend,
    first,
    fma,
    head,
    lanes,
    load,
    load_n,
    splat,
    store,
    stream,
    where_nonzero,
    where_positive,
)


@part
def output(v, r, k, b, relu):
    """activation(v*k + b + r) with v = x - m."""
    z = fma(v, k, b)
    if r is not None:
        z = z + r
    if relu is not None:
        z = where_positive(z, z)
    return z


@part
def through_relu(g, v, y, k, b, relu):
    """Gradient in front of the ReLU: g where its input was positive. Known from y if given, else from v*k + b."""
    if y is not None:
        g = where_positive(y, g)
    elif relu is not None:
        g = where_positive(fma(v, k, b), g)
    return g


@part
def term(g, v, y, k, b, relu):
    """First factor of the sums: the centred value itself (forward) or the gradient (backward)."""
    if g is None:
        return v
    return through_relu(g, v, y, k, b, relu)


@part
def write(y, i, z, streamed):
    """Store one whole vector; a streamed one must lie on a line."""
    if streamed:
        stream(y, i, z)
    else:
        store(y, i, z)


@part
def sum_part(x, g, y, i, n, m, k, b, relu, s, q):
    """Add the terms of n < W elements to the vectors s and q (see ``sum_run``)."""
    v = first(load_n(x, i, n) - m, n)
    u = first(term(load_n(g, i, n), v, load_n(y, i, n), k, b, relu), n)
    return s + u, fma(u, v, q)


@part
def _add_four(x, g, y, dr, i, m, k, b, relu, s, q):
    """Add u and u*v of four vectors from i on to four sums each; u goes to dr."""
    W = lanes(x)
    v0, v1 = load(x, i) - m, load(x, i + W) - m
    v2, v3 = load(x, i + 2 * W) - m, load(x, i + 3 * W) - m
    u0 = term(load(g, i), v0, load(y, i), k, b, relu)
    u1 = term(load(g, i + W), v1, load(y, i + W), k, b, relu)
    u2 = term(load(g, i + 2 * W), v2, load(y, i + 2 * W), k, b, relu)
    u3 = term(load(g, i + 3 * W), v3, load(y, i + 3 * W), k, b, relu)
    stream(dr, i, u0)
    stream(dr, i + W, u1)
    stream(dr, i + 2 * W, u2)
    stream(dr, i + 3 * W, u3)
    s = s[0] + u0, s[1] + u1, s[2] + u2, s[3] + u3
    return s, (fma(u0, v0, q[0]), fma(u1, v1, q[1]), fma(u2, v2, q[2]), fma(u3, v3, q[3]))


@part
def sum_run(x, g, y, dr, at, n, far, m, k, b, relu, s, q, half=None):
    """Add u and u*v of n elements to the vectors s and q. Floor: n reads a tensor.

    v = x - m; u = v without g, else the gradient in front of the ReLU, which goes past the cache to whole lines of dr
    unless that is None. ``normalise_and_sum_run`` must add in the same order, or the result would depend on which
    thread sums a run: four vectors at a time to four sums, which hides the latency of the additions, then one by one to
    the first, the tail to the second. Lines of x and g are asked for ``far`` elements ahead, or from ``half`` on, then
    one for two that are read.

    Rejected: as many sums as the registers of CPUs without AVX-512 hold, one or two. With AVX2 half types took 0.84 to
    0.91 of the time, but 128 numbers in a row added in float32: gradients of layer norm left their bound.
    """
    W = lanes(x)
    m, k, b, zero = splat(x, m), splat(x, k), splat(x, b), splat(x, 0.0)
    sums, squares = (s, zero, zero, zero), (q, zero, zero, zero)
    i, end = at, at + n
    while i + 4 * W <= end:
        if half is not None:
            a = half + (i - at) // 2
            ask_two(x, g, a)
            ask_two(x, g, a + W)
        elif g is not None:
            ask_four(x, i + far)
            ask_four(g, i + far)
        if dr is not None:  # 0.95; elsewhere 0.87-1.06
            ask_four(y, i + far)
        sums, squares = _add_four(x, g, y, dr, i, m, k, b, relu, sums, squares)
        i += 4 * W
    s, s1, s2, s3 = sums
    q, q1, q2, q3 = squares
    while i + W <= end:
        if half is not None:
            ask_two(x, g, half + (i - at) // 2)
        elif g is not None:
            ask_two(x, g, i + far)
        v0 = load(x, i) - m
        u0 = term(load(g, i), v0, load(y, i), k, b, relu)
        stream(dr, i, u0)
        s, q = s + u0, fma(u0, v0, q)
        i += W
    if i < end:
        s1, q1 = sum_part(x, g, y, i, end - i, m, k, b, relu, s1, q1)
    return (s + s1) + (s2 + s3), (q + q1) + (q2 + q3)


@part
def sum_rest(x, g, y, dr, at, stop, m, k, b, relu, s, q):
    """Add the elements from ``at`` to ``stop``, fewer than eight vectors, as ``sum_run``; s and q are its four sums."""
    W = lanes(x)
    if at + 4 * W <= stop:
        s, q = _add_four(x, g, y, dr, at, m, k, b, relu, s, q)
        at += 4 * W
    s0, s1, s2, s3 = s
    q0, q1, q2, q3 = q
    while at + W <= stop:
        v0 = load(x, at) - m
        u0 = term(load(g, at), v0, load(y, at), k, b, relu)
        stream(dr, at, u0)
        s0, q0 = s0 + u0, fma(u0, v0, q0)
        at += W
    if at < stop:
        s1, q1 = sum_part(x, g, y, at, stop - at, m, k, b, relu, s1, q1)
    return (s0 + s1) + (s2 + s3), (q0 + q1) + (q2 + q3)


@part
def value(x, r, i, m, k, b, relu):
    """``output`` of the vector at i."""
    return output(load(x, i) - m, load(r, i), k, b, relu)


@part
def normalise_part(x, r, y, i, n, c, relu):
    """activation((x - m)*k + b + r) of n < W elements, c = (m, k, b)."""
    return output(load_n(x, i, n) - splat(x, c[0]), load_n(r, i, n), splat(x, c[1]), splat(x, c[2]), relu)


@part
def _normalise_few(x, r, y, i, end, m, k, b, relu, streamed):
    """``normalise_run`` for a few vectors; ordinary stores take 1.05x where they come in threes."""
    W = lanes(x)
    if streamed:
        while i + 2 * W <= end:
            z0 = value(x, r, i, m, k, b, relu)
            z1 = value(x, r, i + W, m, k, b, relu)
            if i + 3 * W <= end:
                z2 = value(x, r, i + 2 * W, m, k, b, relu)
                stream(y, i, z0)
                stream(y, i + W, z1)
                stream(y, i + 2 * W, z2)
                i += 3 * W
            else:
                stream(y, i, z0)
                stream(y, i + W, z1)
                i += 2 * W
        if i + W <= end:
            stream(y, i, value(x, r, i, m, k, b, relu))
            i += W
    else:
        while i + W <= end:
            store(y, i, value(x, r, i, m, k, b, relu))
            i += W
    return i


@part
def normalise_run(x, r, y, i, end, c, relu, streamed):
    """Write the whole vectors from i on that end by ``end``; returns where they end. Floor: a read and a write.

    Four are read before one is written: where y begins a line or two further into its page than x does, the CPU takes a
    load of x for one of what was just stored to y. 1.02-1.2x then instead of 1.3-2.6x, elsewhere 0.85-1.0 of the time.
    """
    W = lanes(x)
    m, k, b = splat(x, c[0]), splat(x, c[1]), splat(x, c[2])
    while i + 4 * W <= end:
        z0 = value(x, r, i, m, k, b, relu)
        z1 = value(x, r, i + W, m, k, b, relu)
        z2 = value(x, r, i + 2 * W, m, k, b, relu)
        z3 = value(x, r, i + 3 * W, m, k, b, relu)
        write(y, i, z0, streamed)
        write(y, i + W, z1, streamed)
        write(y, i + 2 * W, z2, streamed)
        write(y, i + 3 * W, z3, streamed)
        i += 4 * W
    return _normalise_few(x, r, y, i, end, m, k, b, relu, streamed)


@part
def normalise_seam(x, r, y, i, n, c, d, relu, streamed):
    """Write the vector whose first n lanes belong to the channel with constants c, the others to the one with d."""
    m = blend(n, splat(x, c[0]), splat(x, d[0]))
    k = blend(n, splat(x, c[1]), splat(x, d[1]))
    b = blend(n, splat(x, c[2]), splat(x, d[2]))
    write(y, i, value(x, r, i, m, k, b, relu), streamed)


@part
def normalise_and_sum_run(x, r, y, i, end, c, relu, streamed, at, n, far, start, s, q):
    """``normalise_run`` from i to end, and ``sum_run`` of n elements from ``at`` about ``start``; both about as long.

    Summing alone leaves the memory's write side idle, normalising from the cache leaves its read side idle: one after
    the other they take 0.80 + 0.80 of a streaming copy (N = 32, S = 3136), together 1.20. Two are read before one is
    written, as in ``normalise_run``: where y lies badly 1.02-1.08x instead of 1.3x; four, 1.02 to 1.05x (float64).
    """
    W, stop = lanes(x), at + n
    m, k, b, start, zero = splat(x, c[0]), splat(x, c[1]), splat(x, c[2]), splat(x, start), splat(x, 0.0)
    s1 = s2 = s3 = q1 = q2 = q3 = zero
    while at + 4 * W <= stop and i + 4 * W <= end:
        ask_four(x, at + far)
        if r is not None:  # 0.93-0.98
            ask_four(r, i + (NEAR if tuning.CORE_CACHE else far))
        z0 = value(x, r, i, m, k, b, relu)
        z1 = value(x, r, i + W, m, k, b, relu)
        v0, v1 = load(x, at) - start, load(x, at + W) - start
        s, s1, q, q1 = s + v0, s1 + v1, fma(v0, v0, q), fma(v1, v1, q1)
        write(y, i, z0, streamed)
        write(y, i + W, z1, streamed)
        i += 2 * W
        z0 = value(x, r, i, m, k, b, relu)
        z1 = value(x, r, i + W, m, k, b, relu)
        v2, v3 = load(x, at + 2 * W) - start, load(x, at + 3 * W) - start
        s2, s3, q2, q3 = s2 + v2, s3 + v3, fma(v2, v2, q2), fma(v3, v3, q3)
        write(y, i, z0, streamed)
        write(y, i + W, z1, streamed)
        i += 2 * W
        at += 4 * W
    i = _normalise_few(x, r, y, i, end, m, k, b, relu, streamed)
    s, q = sum_rest(x, None, None, None, at, stop, start, start, start, None, (s, s1, s2, s3), (q, q1, q2, q3))
    return i, s, q


@part
def gradient_value(v, u, k, c1, c0):
    """Input gradient dx of the gradient u in front of the ReLU; frozen (c1 = c0 = 0) it does not see v, be it NaN."""
    return fma(c1, where_nonzero(c1, v), u + c0) * k


@part
def gradient_at(x, g, y, i, m, k, b, c1, c0, relu):
    """Return dx and u of the vector at i."""
    v = load(x, i) - m
    u = through_relu(load(g, i), v, load(y, i), k, b, relu)
    return gradient_value(v, u, k, c1, c0), u


@part
def gradient_part(x, g, y, i, n, c, relu):
    """Return dx and u of n < W elements, c = (m, k, b, c1, c0): dx = k*(u + c1*(x - m) + c0)."""
    v, k = load_n(x, i, n) - splat(x, c[0]), splat(x, c[1])
    u = through_relu(load_n(g, i, n), v, load_n(y, i, n), k, splat(x, c[2]), relu)
    return gradient_value(v, u, k, splat(x, c[3]), splat(x, c[4])), u


@part
def gradient_run(x, g, y, dx, dr, i, end, c, relu, streamed, other):
    """Write dx and dr = u of the whole vectors from i on that end by ``end``. Floor: two reads and one write.

    Asks for the lines of x that lie ``other`` elements further on, which will be wanted next: writing from the cache
    leaves the memory's read side idle. S = 3136: 1.95 copies instead of 2.15; with g's lines too 2.03, but fused 3.27
    instead of 3.6. Two are read before one is written: where dx lies badly (``normalise_run``) 1.05x instead of 1.3x.
    """
    W = lanes(x)
    m, k, b, c1, c0 = splat(x, c[0]), splat(x, c[1]), splat(x, c[2]), splat(x, c[3]), splat(x, c[4])
    aligned = streamed and head(dr, i) == 0  # dr may lie otherwise than dx
    while i + 2 * W <= end:
        ask(x, i + other)
        ask(x, i + other + W)
        if y is not None:  # more to write: time for both
            ask(g, i + other)
            ask(g, i + other + W)
        z0, u0 = gradient_at(x, g, y, i, m, k, b, c1, c0, relu)
        z1, u1 = gradient_at(x, g, y, i + W, m, k, b, c1, c0, relu)
        write(dr, i, u0, aligned)
        write(dx, i, z0, streamed)
        write(dr, i + W, u1, aligned)
        write(dx, i + W, z1, streamed)
        i += 2 * W
    if i + W <= end:
        ask(x, i + other)
        if y is not None:
            ask(g, i + other)
        z0, u0 = gradient_at(x, g, y, i, m, k, b, c1, c0, relu)
        write(dr, i, u0, aligned)
        write(dx, i, z0, streamed)
        i += W
    return i


@part
def gradient_seam(x, g, y, dx, dr, i, n, c, d, relu, streamed):
    """As ``normalise_seam`` for dx and dr."""
    m, k = blend(n, splat(x, c[0]), splat(x, d[0])), blend(n, splat(x, c[1]), splat(x, d[1]))
    b = blend(n, splat(x, c[2]), splat(x, d[2]))
    c1, c0 = blend(n, splat(x, c[3]), splat(x, d[3])), blend(n, splat(x, c[4]), splat(x, d[4]))
    z, u = gradient_at(x, g, y, i, m, k, b, c1, c0, relu)
    write(dr, i, u, streamed and head(dr, i) == 0)
    write(dx, i, z, streamed)
