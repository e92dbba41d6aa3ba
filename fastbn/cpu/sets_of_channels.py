# mypy: ignore-errors
"""Instance norm of short sets, each one channel of one sample: batch norm of (1, sets, L), a batch of sets at a time.

(32, 512, 7, 7) takes 0.55 of the time that the kernels of planes take, its gradients 0.45; from about 200 elements on
``sets`` is faster, which sums the next set while it writes one. Rejected: asking for the next batch's lines while one
is written, forward: nothing gained.
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.band import band_gradient, band_normalise
from fastbn.cpu.batches import BATCH, moments, sums
from fastbn.cpu.columns import repeat
from fastbn.cpu.finalize import finite_sums, gradients_of
from fastbn.cpu.planes import tabulate, write_runs
from fastbn.cpu.planes_backward import gradient_row
from fastbn.cpu.sets import block_sets
from fastbn.cpu.simd import base, empty, fence, fetch_add, get, lanes, least, like, put, splat, store_n

LONG = 128  # elements of a set from which others do it
SPARE = 16  # numbers that ``repeat`` may write behind the last one


@part
def _repeated(values, G, to):
    """The G values and the first ones again, so that those of any batch lie side by side."""
    for i in range(G):
        put(to, i, get(values, i))
    repeat(to, G, G + BATCH)
    return to


@part
def _by_element(x, table, number, count, L, to):
    """Give ``number`` constants of each set to its L elements; by whole vectors, most on two lines, it was 1.2-1.7x."""
    width = BATCH * L + lanes(x)
    for k in range(number):
        for j in range(count):
            store_n(to + k * width, j * L, splat(to, get(table, k * BATCH + j)), L)
    return width


@part
def _add(found, count, c, G, to):
    """Add numbers of ``count`` sets, the first of which is channel c, to those of their channels."""
    j = 0
    while j < count:
        n = least(count - j, G - c)
        for i in range(n):
            put(to, c + i, get(to, c + i) + get(found, j + i))
        j, c = j + n, 0


@helper
def _write(x, y, table, short, t, count, L, streamed):
    """Write the sets t..t + count - 1; those of less than a vector with constants by element in ``short``."""
    if lanes(x) <= L:
        write_runs(x, None, y, table, BATCH, 0, t, t + count, L, None, streamed)
    else:
        at, n, w = t * L, count * L, _by_element(x, table, 3, count, L, short)
        m, k, b = short, short + w, short + 2 * w
        band_normalise(x + at, None, y + at, n, False, n, 0, 1, 0, n, 0, m, k, b, None, streamed)


@helper
def _write_gradients(x, g, dx, table, short, t, count, L, streamed):
    """The same for gradients."""
    if lanes(x) <= L:
        gradient_row(x, g, None, dx, None, table, BATCH, 0, t, L, t, t + count, t + count, None, streamed)
    else:
        at, n, w = t * L, count * L, _by_element(x, table, 5, count, L, short)
        m, k, b, c1, c0 = short, short + w, short + 2 * w, short + 3 * w, short + 4 * w
        band_gradient(x + at, g + at, None, dx + at, None, n, False, n, 0, 1, 0, n, 0, m, k, b, c1, c0, None, streamed)


@jit
def train(x, y, weight, bias, stats, kind, sets, L, G, each, S, eps, streamed, claim):
    """As ``sets.train`` for sets of one channel, L = each = S. Floor: one read and one write."""
    room, constants, repeated = empty(2 * BATCH, stats), empty(3 * BATCH, kind), empty(2 * (G + BATCH + SPARE), kind)
    short = empty(3 * (BATCH * L + 64) if L < 32 else 0, kind)
    x, y, weight, bias, stats, claim = base(x), base(y), base(weight), base(bias), base(stats), base(claim)
    s, table, per, columns = base(room), base(constants), block_sets(sets, L), like(x, base(short))
    weight, bias = _repeated(weight, G, base(repeated)), _repeated(bias, G, base(repeated) + (G + BATCH + SPARE))
    q, lo = s + BATCH, fetch_add(claim, 0, per)
    while lo < sets:
        t, end = lo, least(lo + per, sets)
        while t < end:
            count, here = least(BATCH, end - t), t % G - t  # weight of set t: number ``here`` + t
            moments(x, t, L, count, table, s, q, stats, sets, eps)
            tabulate(x, stats, weight + here, bias + here, table, BATCH, sets, t, t + count)
            _write(x, y, table, columns, t, count, L, streamed)
            t += count
        fence()
        fetch_add(claim, 1, end - lo)
        lo = fetch_add(claim, 0, per)
    return room.size + constants.size + repeated.size + short.size  # keeps them alive


@jit
def backward(x, g, dx, weight, stats, parts, kind, sets, L, G, each, S, per, streamed, claim):
    """As ``sets_backward.backward``; ``parts`` are of blocks of ``per`` samples. Floor: two reads and one write."""
    half, found = parts.size // 2, empty(2 * BATCH, stats)
    room, constants, repeated = empty(2 * BATCH, stats), empty(5 * BATCH, kind), empty(G + BATCH + SPARE, kind)
    short = empty(5 * (BATCH * L + 64) if L < 32 else 0, kind)
    x, g, dx, weight, stats, claim = base(x), base(g), base(dx), base(weight), base(stats), base(claim)
    s, table, parts, samples, dw = base(room), base(constants), base(parts), sets // G, base(found)
    weight, columns = _repeated(weight, G, base(repeated)), like(x, base(short))
    q, lo = s + BATCH, fetch_add(claim, 0, per)
    while lo < samples:
        hi = least(lo + per, samples)
        t, end = lo * G, hi * G
        while t < end:
            count, w = least(BATCH, end - t), weight + (t % G - t)
            tabulate(x, stats, w, w, table, BATCH, sets, t, t + count)
            sums(x, g, t, L, count, table, s, q)
            finite_sums(x, g, None, 1, sets, L, t, count, s, q, stats, w, w, None, True)
            gradients_of(x, stats, dw + (0 - t), dw + (BATCH - t), sets, t, count, L, s, q, False)
            _add(dw, count, t % G, G, parts + lo // per * G)
            _add(dw + BATCH, count, t % G, G, parts + (half + lo // per * G))
            for j in range(count):
                put(table, 3 * BATCH + j, get(q, j))
            for j in range(count):
                put(table, 4 * BATCH + j, get(s, j))
            _write_gradients(x, g, dx, table, columns, t, count, L, streamed)
            t += count
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return room.size + constants.size + repeated.size + short.size + found.size
