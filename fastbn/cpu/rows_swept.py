"""Batch norm on matrices with too many rows for ``rows``: bands of rows, swept twice.

Bands are summed (``sums``), the sums settled by channel (``settle_*``), then the bands are normalised in reverse order,
so that what the cache still holds is read from there. Floor: two reads and one write of the tensor, and one read less
where it fits in the last-level cache.

Bands are numbered by the shape alone; ``part`` keeps the sums of each and they are added in the order of their numbers,
so any number of threads gives the same bits. A band has ``height`` rows and at most ``width`` columns; ``part`` is
float64 of bands * 2 * stride(V) + PAD. ``columns`` holds m, k, b, c1, c0 at that stride, in the arithmetic type.
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.band import NEAR, ROWS, band_gradient, band_normalise, band_sums, nothing_yet
from fastbn.cpu.columns import phase, settle_gradients, settle_moments, spread_affine, spread_pivots
from fastbn.cpu.rows import column_stride
from fastbn.cpu.simd import aligned, base, empty, fence, fetch_add, get, least, like, put, signs


@helper
def _band(number, T, V, height, width):
    """Rows and columns of a band: (index of its row of bands, r0, r1, v0, v1)."""
    across = (V + width - 1) // width
    row, column = number // across, number % across
    R = (T + V - 1) // V
    return row, row * height, least(R, (row + 1) * height), column * width, least(V, (column + 1) * width)


@helper
def _count(T, V, height, width):
    R = (T + V - 1) // V
    return ((R + height - 1) // height) * ((V + width - 1) // width)


@part
def column_constants(x, out, columns, V):
    """Where m lies of the constants for ``out``, which is None for pivots."""
    return like(x, aligned(columns)) + phase(out, 0, V)


@jit
def pivots(x, columns, dims, V):
    """First step forward: the pivots into m."""
    x = base(x)
    spread_pivots(x, dims, (0, dims[1], V), like(x, aligned(columns)))


@jit
def affines(x, out, stats, weight, bias, columns, dims, V):
    """Column constants m, k, b: for the output, and as the first step backward."""
    x, wide = base(x), column_stride(V)
    m = column_constants(x, base(out), columns, V)
    spread_affine(x, base(stats), base(weight), base(bias), dims, (0, dims[1], V), m, m + wide, m + 2 * wide)


@jit
def sums(x, g, y, dr, out, columns, part, V, height, width, relu, claim):
    """Sums of u and u*v of every band (see ``sweep.sum_run``); ``out``: where gradients will go, else None.

    Writes u to dr unless that is None: ``gradient`` then reads u instead of g and y, and memory has something to write
    while it is read. (32, 56, 56, 256): 19.3 ms instead of 22, (8192, 1024) 6.2 instead of 7.7.
    """
    T, wide = x.size, column_stride(V)
    scratch = empty(2 * column_stride(width), columns)
    x, g, dr, part, claim = base(x), base(g), base(dr), aligned(part), base(claim)
    y = signs(base(y), x)
    m, s = column_constants(x, base(out), columns, V), like(x, base(scratch))
    q, k, b = s + column_stride(width), m + wide, m + 2 * wide
    bands = _count(T, V, height, width)
    number = fetch_add(claim, 0, 1)
    while number < bands:
        row, r0, r1, v0, v1 = _band(number, T, V, height, width)
        ts = part + (2 * row * wide + v0)
        nothing_yet(x, v1 - v0, ts, ts + wide)
        band_sums(x, g, y, dr, T, T > NEAR, V, r0, r1, v0, v1, 0, m, k, b, relu, s, q, ts, ts + wide)
        fence()
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)
    return scratch.size


@helper
def _add_bands(part, V, count):
    """Add the sums of all bands into those of the first, in order."""
    wide = column_stride(V)
    for row in range(1, count):
        for j in range(2 * wide):
            put(part, j, get(part, j) + get(part, 2 * row * wide + j))


@jit
def settle_train(x, columns, part, stats, running_mean, running_var, dims, V, count, eps, momentum, masked):
    """Statistics of all channels from the sums of ``count`` rows of bands; see ``columns`` for what it returns."""
    tracked = running_mean.size > 0
    x, s = base(x), aligned(part)
    _add_bands(s, V, count)
    return settle_moments(
        x, dims, (0, dims[1], V), like(x, aligned(columns)), s, s + column_stride(V),
        base(stats), base(running_mean), base(running_var), tracked, eps, momentum, masked,
    )  # fmt: skip


@jit
def settle_backward(
    x, g, y, out, columns, part, stats, weight, bias, dweight, dbias, dims, V, count, frozen, relu, masked
):
    """Parameter gradients of all channels, and the column constants c1 and c0; returns as ``columns``."""
    x, s, wide = base(x), aligned(part), column_stride(V)
    m = column_constants(x, base(out), columns, V)
    _add_bands(s, V, count)
    return settle_gradients(
        x, base(g), signs(base(y), x), dims, (0, dims[1], V), m, s, s + wide,
        base(stats), base(weight), base(bias), base(dweight), base(dbias), frozen, relu, m + 3 * wide, m + 4 * wide,
        masked,
    )  # fmt: skip


@jit
def normalise(x, residual, y, columns, V, height, width, relu, streamed, claim):
    """Output of every band, last band first."""
    T, wide = x.size, column_stride(V)
    x, residual, y, claim = base(x), base(residual), base(y), base(claim)
    m = column_constants(x, y, columns, V)
    bands = _count(T, V, height, width)
    number = fetch_add(claim, 0, 1)
    while number < bands:
        _, r0, r1, v0, v1 = _band(bands - 1 - number, T, V, height, width)
        band_normalise(x, residual, y, T, T > NEAR, V, r0, r1, v0, v1, 0, m, m + wide, m + 2 * wide, relu, streamed)
        fence()
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)


@jit
def frozen(x, g, y, dr, dx, columns, part, V, height, width, relu, streamed, claim):
    """``sums`` and ``gradient`` in one sweep, ROWS rows at a time: with frozen statistics dx waits for no sum.

    Floor: two reads and one write. (32, 256, 56, 56) takes 1.9 copies instead of 2.8, (8192, 1024) 2.4 instead of 3.2;
    without x's lines of the next ROWS rows asked for 2.0-2.2 and 2.7-3.0 (Intel). Rejected channels-first, where one
    row would be written while the next is summed: nothing gained.

    dx may not be memory of what is read: sums that are not finite are taken again.
    """
    T, wide = x.size, column_stride(V)
    scratch = empty(2 * column_stride(width), columns)
    x, g, dx, dr, part, claim = base(x), base(g), base(dx), base(dr), aligned(part), base(claim)
    y = signs(base(y), x)
    m, s = column_constants(x, dx, columns, V), like(x, base(scratch))
    q, k, b, c1, c0 = s + column_stride(width), m + wide, m + 2 * wide, m + 3 * wide, m + 4 * wide
    bands = _count(T, V, height, width)
    number = fetch_add(claim, 0, 1)
    while number < bands:
        row, r0, r1, v0, v1 = _band(number, T, V, height, width)
        ts = part + (2 * row * wide + v0)
        nothing_yet(x, v1 - v0, ts, ts + wide)
        for r in range(r0, r1, ROWS):
            end = least(r1, r + ROWS)
            band_sums(x, g, y, None, T, T > NEAR, V, r, end, v0, v1, 0, m, k, b, relu, s, q, ts, ts + wide)
            band_gradient(x, g, y, dx, dr, T, T > NEAR, V, r, end, v0, v1, 0, m, k, b, c1, c0, relu, streamed, ROWS)
        fence()
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)
    return scratch.size


@jit
def gradient(x, g, y, dx, dr, columns, V, height, width, relu, streamed, claim):
    """Input gradient of every band, last band first."""
    T, wide = x.size, column_stride(V)
    x, g, dx, dr, claim = base(x), base(g), base(dx), base(dr), base(claim)
    y = signs(base(y), x)
    m = column_constants(x, dx, columns, V)
    k, b, c1, c0 = m + wide, m + 2 * wide, m + 3 * wide, m + 4 * wide
    bands = _count(T, V, height, width)
    number = fetch_add(claim, 0, 1)
    while number < bands:
        _, r0, r1, v0, v1 = _band(bands - 1 - number, T, V, height, width)
        band_gradient(x, g, y, dx, dr, T, T > NEAR, V, r0, r1, v0, v1, 0, m, k, b, c1, c0, relu, streamed)
        fence()
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)
