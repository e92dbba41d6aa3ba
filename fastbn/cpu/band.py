"""Bands of a matrix (R, V) whose columns belong to different channels: the innermost loops of the rows kernels.

The matrix is a flat array of T elements cut into rows of V; the last row may be short. Column v belongs to channel
(v // S) % C. A band is rows r0 <= r < r1 and columns v0 <= v < v1. Per-column constants (``m``, ``k``, ``b``, ...) are
arrays indexed by v - o, in the arithmetic type of the vectors.

Two rows are added at a time: the sums of a column are then fetched from L1 once for both. Eight at a time, which is
less work, cost Zen 4 1.4-2 times as much: the CPU reads ahead along few streams only, and gives up where eight rows lie
1 KB apart. Lines asked for into the first cache, or in the order they are used, bring nothing.
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, part
from fastbn.cpu.simd import (
    ask,
    clear,
    first,
    fma,
    head,
    lanes,
    least,
    load,
    load_n,
    most,
    store,
    store_n,
    stream,
    widen_add,
)
from fastbn.cpu.sweep import gradient_at, gradient_value, output, term, through_relu, value, write
from fastbn.cpu.tuning import DISTANT

ROWS = 64  # rows that are summed in float32 before they join the float64 sums: 32 additions a lane
NARROW = 512  # columns up to which gradients are added row by row: the CPU itself reads ahead well then (``DISTANT``)
NARROW_TOO = 1280  # the same where y is read and dr written: 0.8-0.87 at 576 to 1024, 1.04 at 1536, 1.1 at 2048
WIDE = 1024  # columns from which lines are asked for where gradients are written: 1.1-1.3x, below 0.95-1
NEAR = 1 << 20  # elements up to which a tensor lies in a cache: asking for its lines is waste, 1.1x at (64, 100)
AHEAD = 4096  # elements ahead whose lines are asked for: what lies two pages on costs no waiting


@part
def _one(x, g, y, at, m, k, b, relu):
    """First factor u and value v of one vector of columns in one row."""
    v = load(x, at) - m
    return term(load(g, at), v, load(y, at), k, b, relu), v


@part
def _one_edge(x, g, y, at, n, m, k, b, relu):
    """As ``_one`` where only n lanes count."""
    v = first(load_n(x, at, n) - m, n)
    return first(term(load_n(g, at, n), v, load_n(y, at, n), k, b, relu), n), v


@helper
def _add_whole(x, g, y, dr, at, V, width, m, k, b, relu, s, q, away):
    """Add two rows of ``width`` columns, whole vectors, to the sums s and q; u goes to dr.

    Asks for lines ahead in the order they lie; in a band of narrower columns for those of the next two rows.
    """
    W = lanes(x)
    far, step, gap = (at + AHEAD, 2, W) if width + W > V else (at + 2 * V, 1, V)
    for i in range(0, width, W):
        if away:
            ask(x, far + step * i)
            ask(x, far + step * i + gap)
            ask(g, far + step * i)
            ask(g, far + step * i + gap)
        mv, kv, bv = load(m, i), load(k, i), load(b, i)
        u0, v0 = _one(x, g, y, at + i, mv, kv, bv, relu)
        u1, v1 = _one(x, g, y, at + i + V, mv, kv, bv, relu)
        stream(dr, at + i, u0)
        stream(dr, at + i + V, u1)
        store(s, i, load(s, i) + (u0 + u1))
        store(q, i, load(q, i) + fma(u0, v0, u1 * v1))


@helper
def _add_narrow(x, g, y, dr, at, width, m, k, b, relu, s, q, distant):
    """Add one row of ``width`` columns, whole vectors, to the sums s and q; u goes to dr."""
    for i in range(0, width, lanes(x)):
        if distant:
            ask(x, at + i + AHEAD)
            ask(g, at + i + AHEAD)
            ask(y, at + i + AHEAD)
        u, v = _one(x, g, y, at + i, load(m, i), load(k, i), load(b, i), relu)
        stream(dr, at + i, u)
        store(s, i, load(s, i) + u)
        store(q, i, fma(u, v, load(q, i)))


@helper
def _add_edge(x, g, y, dr, at, V, end, i, width, m, k, b, relu, s, q):
    """As ``_add_whole`` from column i on, where columns or rows are missing: nothing at or past ``end`` counts.

    No lane of such a vector is read behind the array: the CPU takes a microsecond over a page that is not there.
    """
    W = lanes(x)
    while i < width:
        n, mv, kv, bv = least(W, width - i), load(m, i), load(k, i), load(b, i)
        above, below = at + i, at + i + V
        n0, n1 = least(n, most(0, end - above)), least(n, most(0, end - below))
        u0, v0 = _one_edge(x, g, y, above if n0 > 0 else at, n0, mv, kv, bv, relu)
        u1, v1 = _one_edge(x, g, y, below if n1 > 0 else at, n1, mv, kv, bv, relu)
        store_n(dr, above, u0, n0)
        store_n(dr, below, u1, n1)
        store(s, i, load(s, i) + (u0 + u1))
        store(q, i, load(q, i) + fma(u0, v0, u1 * v1))
        i += W


@part
def _put_away(s, q, total_s, total_q, n):
    """Move the float32 sums of n columns into the float64 sums."""
    for i in range(0, n, lanes(s)):
        widen_add(total_s, i, load(s, i))
        widen_add(total_q, i, load(q, i))
    clear(s, n)
    clear(q, n)


@part
def nothing_yet(x, width, total_s, total_q):
    """Set the sums of ``width`` columns of x to zero; arrays indexed by column are as long as whole vectors."""
    W = lanes(x)
    padded = (width + W - 1) // W * W
    clear(total_s, padded)
    clear(total_q, padded)


@helper
def band_sums(x, g, y, dr, T, away, V, r0, r1, v0, v1, o, m, k, b, relu, s, q, total_s, total_q):
    """Add the sums of u and u*v by column to total_s, total_q, index v - v0 (see ``sweep.sums``). s, q are scratch.

    ``away``: the tensor lies in no cache. Writes u to dr, past it, unless that is None; its rows are whole lines.
    Floor: one read of the band a tensor.
    """
    W, width = lanes(x), v1 - v0
    padded = (width + W - 1) // W * W
    clear(s, padded)
    clear(q, padded)
    m, k, b = m + (v0 - o), k + (v0 - o), b + (v0 - o)
    narrow = g is not None and (NARROW if y is None else NARROW_TOO) >= V and away
    r, end = r0, least(T, (r1 - 1) * V + v1)
    whole, vectors = r0 + most(0, least(r1, T // V) - r0) // 2 * 2, width // W * W
    while r < r1:
        stop = least(r + ROWS, whole)
        while r < stop:
            if narrow:
                _add_narrow(x, g, y, dr, r * V + v0, vectors, m, k, b, relu, s, q, T > DISTANT)
                _add_narrow(x, g, y, dr, (r + 1) * V + v0, vectors, m, k, b, relu, s, q, T > DISTANT)
            else:
                _add_whole(x, g, y, dr, r * V + v0, V, vectors, m, k, b, relu, s, q, away)
            if vectors < width:
                _add_edge(x, g, y, dr, r * V + v0, V, end, vectors, width, m, k, b, relu, s, q)
            r += 2
        if r >= whole and r < r1:
            _add_edge(x, g, y, dr, r * V + v0, V, end, 0, width, m, k, b, relu, s, q)
            r += 2
        _put_away(s, q, total_s, total_q, padded)


@part
def _normalise_n(x, r, y, at, n, m, k, b, i, relu):
    v = load_n(x, at, n) - load_n(m, i, n)
    store_n(y, at, output(v, load_n(r, at, n), load_n(k, i, n), load_n(b, i, n), relu), n)


@part
def _normal(x, r, at, m, k, b, i, relu):
    """Return one vector of the output by the constants of columns from i on."""
    return value(x, r, at, load(m, i), load(k, i), load(b, i), relu)


@helper
def _normalise_two(x, r, y, V, start, stop, m, k, b, relu, away):
    """As ``band_normalise`` for rows of whole vectors, two at a time: constants are fetched once for both.

    (64, 128) takes 0.7 of the time of one row after the other. A row is V elements from ``start`` on, where y begins a
    line. Returns where the last one ends.
    """
    W = lanes(x)
    stop -= (stop - start) % (2 * V)
    for at in range(start, stop, 2 * V):
        for i in range(0, V, W):
            if away:
                ask(x, at + i + AHEAD)
                ask(x, at + i + V + AHEAD)
            z0 = _normal(x, r, at + i, m, k, b, i, relu)
            z1 = _normal(x, r, at + i + V, m, k, b, i, relu)
            store(y, at + i, z0)
            store(y, at + i + V, z1)
    return stop


@helper
def band_normalise(x, r, y, T, away, V, r0, r1, v0, v1, o, m, k, b, relu, streamed):
    """Y = activation((x - m)*k + b + r). Floor: read and write the band.

    Lines are written whole, by ordinary stores too: where y begins inside of one, as most of NumPy's arrays do,
    training of (64, 100) takes 0.75 of the time, (1024, 256) 0.5, inference in the cache 0.4-0.7.

    Whole rows are one stretch: a vector may end in the next row, column constants go on with the first ones again.
    With the lines on the seams written in two parts it was 2.0 copies instead of 1.1, at 256 columns, where y begins 16
    bytes into a line, as NumPy's large arrays do. Rejected: one loop that turns the column back at V, 1.1x.
    """
    W, whole, i = lanes(x), v1 - v0 == V, -1
    stop, far = least(T, (r1 - 1) * V + v1), AHEAD if whole else V
    if not streamed and V % W == 0 and whole:  # not within the loop over rows: inference in the cache took 1.1-1.5x
        at = r0 * V
        h = least(head(y, at), stop - at)
        if h > 0:
            _normalise_n(x, r, y, at, h, m, k, b, v0 - o, relu)
        i, h = at + h, v0 - o + h
        i = _normalise_two(x, r, y, V, i, stop, m + h, k + h, b + h, relu, away)
        r0 = i // V
    for row in range(r0, r1):
        at = row * V + v0
        end, off = least(stop, at + v1 - v0), v0 - o - at  # column constants of the element at i lie at i + off
        if i < 0 or not whole:
            h = least(head(y, at), end - at)
            if h > 0:
                _normalise_n(x, r, y, at, h, m, k, b, at + off, relu)
            i = at + h
        last = least(end - 1, stop - W) if whole else end - W
        while streamed and i + W <= last:  # two are read before one is written, see ``sweep.normalise_run``
            if r is None:  # with r 1.01-1.07; r's lines too 1.02-1.09
                ask(x, i + far)
                ask(x, i + far + W)
            z0 = _normal(x, r, i, m, k, b, i + off, relu)
            z1 = _normal(x, r, i + W, m, k, b, i + off + W, relu)
            stream(y, i, z0)
            stream(y, i + W, z1)
            i += 2 * W
        while i <= last:
            if r is None:
                ask(x, i + far)
            write(y, i, _normal(x, r, i, m, k, b, i + off, relu), streamed)
            i += W
        if i < end and (row == r1 - 1 or not whole):
            _normalise_n(x, r, y, i, end - i, m, k, b, i + off + (V if i < at else 0), relu)


@part
def _gradient_n(x, g, y, dx, dr, at, n, m, k, b, c1, c0, i, relu):
    v = load_n(x, at, n) - load_n(m, i, n)
    u = through_relu(load_n(g, at, n), v, load_n(y, at, n), load_n(k, i, n), load_n(b, i, n), relu)
    store_n(dr, at, u, n)
    store_n(dx, at, gradient_value(v, u, load_n(k, i, n), load_n(c1, i, n), load_n(c0, i, n)), n)


@part
def _gradient_of(x, g, y, at, m, k, b, c1, c0, i, relu):
    """Return one vector of dx and of u by the constants of columns from i on."""
    return gradient_at(x, g, y, at, load(m, i), load(k, i), load(b, i), load(c1, i), load(c0, i), relu)


@helper
def _gradient_two(x, g, y, dx, dr, V, start, stop, m, k, b, c1, c0, relu):
    """As ``band_gradient``, as ``_normalise_two``."""
    W = lanes(x)
    stop -= (stop - start) % (2 * V)
    for at in range(start, stop, 2 * V):
        for i in range(0, V, W):
            z0, u0 = _gradient_of(x, g, y, at + i, m, k, b, c1, c0, i, relu)
            z1, u1 = _gradient_of(x, g, y, at + i + V, m, k, b, c1, c0, i, relu)
            store(dr, at + i, u0)
            store(dx, at + i, z0)
            store(dr, at + i + V, u1)
            store(dx, at + i + V, z1)
    return stop


@helper
def band_gradient(x, g, y, dx, dr, T, away, V, r0, r1, v0, v1, o, m, k, b, c1, c0, relu, streamed, rows=0):
    """Dx = k*u + c1*(x - m) + c0, dr = u (see ``sweep.gradient_part``), in stretches as ``band_normalise``.

    Asks for the lines of x that lie ``rows`` rows further on, if that is not 0. Floor: two reads and one write of the
    band.
    """
    W, whole, i, alike, far_off = lanes(x), v1 - v0 == V, -1, False, V > WIDE or T > DISTANT
    stop, far = least(T, (r1 - 1) * V + v1), AHEAD if whole else V
    if not streamed and V % W == 0 and whole and not away:
        at = r0 * V
        h = least(head(dx, at), stop - at)
        if h > 0:
            _gradient_n(x, g, y, dx, dr, at, h, m, k, b, c1, c0, v0 - o, relu)
        i, h = at + h, v0 - o + h
        i = _gradient_two(x, g, y, dx, dr, V, i, stop, m + h, k + h, b + h, c1 + h, c0 + h, relu)
        r0 = i // V
    for row in range(r0, r1):
        at = row * V + v0
        end, off = least(stop, at + v1 - v0), v0 - o - at
        if i < 0 or not whole:
            h = least(head(dx, at), end - at)
            if h > 0:
                _gradient_n(x, g, y, dx, dr, at, h, m, k, b, c1, c0, at + off, relu)
            i = at + h
            alike = streamed and head(dr, i) == 0  # dr may lie otherwise than dx
        last = least(end - 1, stop - W) if whole else end - W
        while i + W <= last:
            if rows > 0:
                ask(x, i + rows * V)
                ask(x, i + rows * V + W)
            elif far_off:
                ask(x, i + far)
                ask(x, i + far + W)
                ask(g, i + far)
                ask(g, i + far + W)
            z0, u0 = _gradient_of(x, g, y, i, m, k, b, c1, c0, i + off, relu)
            z1, u1 = _gradient_of(x, g, y, i + W, m, k, b, c1, c0, i + W + off, relu)
            write(dr, i, u0, alike)
            write(dx, i, z0, streamed)
            write(dr, i + W, u1, alike)
            write(dx, i + W, z1, streamed)
            i += 2 * W
        if i <= last:
            z0, u0 = _gradient_of(x, g, y, i, m, k, b, c1, c0, i + off, relu)
            write(dr, i, u0, alike)
            write(dx, i, z0, streamed)
            i += W
        if i < end and (row == r1 - 1 or not whole):
            _gradient_n(x, g, y, dx, dr, i, end - i, m, k, b, c1, c0, i + off + (V if i < at else 0), relu)
