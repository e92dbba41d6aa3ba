# mypy: ignore-errors
"""Instance norm of short sets, each one channel of one sample: batch norm of (1, sets, L), a batch of sets at a time.

(32, 512, 7, 7) takes 0.5 of the time that the kernels of planes take, its gradients 0.55; from about 200 elements on
``sets`` is faster, which sums the next set while it writes one. Rejected: asking for the next batch's lines while one
is written, forward: nothing gained.
"""

from __future__ import annotations

from fastbn.cpu._jit import jit, part
from fastbn.cpu.batches import BATCH, moments, sums
from fastbn.cpu.finalize import finite_sums, gradients_of
from fastbn.cpu.planes import tabulate, write_runs
from fastbn.cpu.planes_backward import gradient_row
from fastbn.cpu.sets import block_sets
from fastbn.cpu.simd import base, empty, fence, fetch_add, get, least, put

LONG = 128  # elements of a set from which others do it


@part
def _count(t, end, G):
    """Sets of a batch: channels of one sample."""
    return least(least(BATCH, end - t), G - t % G)


@jit
def train(x, y, weight, bias, stats, kind, sets, L, G, each, S, eps, streamed, claim):
    """As ``sets.train`` for sets of one channel, L = each = S. Floor: one read and one write."""
    room, constants = empty(2 * BATCH, stats), empty(3 * BATCH, kind)
    x, y, weight, bias, stats, claim = base(x), base(y), base(weight), base(bias), base(stats), base(claim)
    s, table, per = base(room), base(constants), block_sets(sets, L)
    q, lo = s + BATCH, fetch_add(claim, 0, per)
    while lo < sets:
        t, end = lo, least(lo + per, sets)
        while t < end:
            count, here = _count(t, end, G), t % G - t  # weight of set t: number ``here`` + t
            moments(x, t, L, count, table, s, q, stats, sets, eps)
            tabulate(x, stats, weight + here, bias + here, table, BATCH, sets, t, t + count)
            write_runs(x, None, y, table, BATCH, 0, t, t + count, L, None, streamed)
            t += count
        fence()
        fetch_add(claim, 1, end - lo)
        lo = fetch_add(claim, 0, per)
    return room.size + constants.size  # keeps them alive


@jit
def backward(x, g, dx, weight, stats, parts, kind, sets, L, G, each, S, per, streamed, claim):
    """As ``sets_backward.backward``, with parameter gradients of every set. Floor: two reads and one write."""
    room, constants = empty(2 * BATCH, stats), empty(5 * BATCH, kind)
    x, g, dx, weight, stats, claim = base(x), base(g), base(dx), base(weight), base(stats), base(claim)
    s, table, parts, samples = base(room), base(constants), base(parts), sets // G
    q, lo = s + BATCH, fetch_add(claim, 0, per)
    while lo < samples:
        hi = least(lo + per, samples)
        t, end = lo * G, hi * G
        while t < end:
            count = _count(t, end, G)
            w = weight + (t % G - t)
            tabulate(x, stats, w, w, table, BATCH, sets, t, t + count)
            sums(x, g, t, L, count, table, s, q)
            finite_sums(x, g, None, 1, sets, L, t, count, s, q, stats, w, w, None, True)
            gradients_of(x, stats, parts, parts + sets, sets, t, count, L, s, q, False)
            for j in range(count):
                put(table, 3 * BATCH + j, get(q, j))
            for j in range(count):
                put(table, 4 * BATCH + j, get(s, j))
            gradient_row(x, g, None, dx, None, table, BATCH, 0, sets, L, t, t + count, t + count, None, streamed)
            t += count
        fence()
        fetch_add(claim, 1, hi - lo)
        lo = fetch_add(claim, 0, per)
    return room.size + constants.size
