# mypy: ignore-errors
"""Layer norm of long sets with an affine by element (see ``sets`` and ``sets_backward`` for the formulas).

Sets are swept twice, in chunks of CHUNK columns that are taken of all sets: summed, the sums settled, and written, the
last chunk and the last set first, so that what the cache still holds is read from there. A chunk's affine and the sums
of its gradients stay in the core's own caches meanwhile, and several threads can work at one set. Floors: forward two
reads and one write, backward four and one, and what the affine and its gradients take, once.

One set after the other, affine and sums come from as far away as the set itself, set by set. Gradients of (32, 200704)
took 8.2 copies (Intel), here 3.5; of (190, 131072) 5.4 and 3.1; forward (23, 262144) takes 1.8 instead of 2.9.

Chunks are numbered by the shape alone, their sums (``part``, float64) added in order, and parameter gradients of
``sets_parameters.ROWS`` sets at a time in the lanes' type, then in float64: any number of threads gives the same bits.
"""

from __future__ import annotations

from fastbn.cpu._jit import helper, jit, part
from fastbn.cpu.sets import output, pivot, settle, sum_set, value
from fastbn.cpu.sets_four import known, spread3
from fastbn.cpu.simd import (
    ask,
    base,
    fence,
    fetch_add,
    get,
    head,
    lanes,
    least,
    like,
    load_n,
    put,
    store_n,
)
from fastbn.cpu.sweep import write

CHUNK = 1 << 12  # elements


def chunks_of(L: int) -> int:
    """Chunks of a set."""
    return (L + CHUNK - 1) // CHUNK


chunks = helper(chunks_of)


@helper
def cut(y, at, k, L):
    """Where chunk k of the set at ``at`` begins to be written: on a line of y, but for the first one."""
    if k == 0:
        return at
    i = at + least(L, k * CHUNK)
    return least(at + L, i + head(y, i))


@helper
def before(t, sets, L):
    """How far from a chunk of set t the one lies that is written after it."""
    return -L if t > 0 else (sets - 1) * L - CHUNK


@jit
def moments(x, part, sets, L, claim):
    """Sums of d = x - pivot and d*d of every chunk."""
    x, part, claim, across = base(x), base(part), base(claim), chunks(L)
    k = fetch_add(claim, 0, 1)
    while k < across:
        n = least(CHUNK, L - k * CHUNK)
        for t in range(sets):
            s, q = sum_set(x, t * L + k * CHUNK, n, n, pivot(x, t * L, L))
            put(part, 2 * (t * across + k), s)
            put(part, 2 * (t * across + k) + 1, q)
        fetch_add(claim, 1, 1)
        k = fetch_add(claim, 0, 1)


@part
def sums_of(part, t, across):
    """Sums of set t from those of its chunks."""
    s = q = 0.0
    for number in range(t * across, (t + 1) * across):
        s += get(part, 2 * number)
        q += get(part, 2 * number + 1)
    return s, q


@jit
def settle_moments(x, part, stats, sets, L, eps):
    """Statistics of all sets."""
    x, part, stats = base(x), base(part), base(stats)
    for t in range(sets):
        s, q = sums_of(part, t, chunks(L))
        settle(x, stats, sets, L, L, t, pivot(x, t * L, L), s, q, eps)


@part
def _write_part(x, y, weight, bias, i, n, at, c):
    """Write n < W elements from i on."""
    store_n(y, i, output(load_n(x, i, n), c[0], c[1], c[2], load_n(weight, i - at, n), load_n(bias, i - at, n)), n)


@part
def _normalise(x, y, weight, bias, i, end, at, c, other, streamed):
    """Write the elements i..end of the set at ``at``; ask for the lines that lie ``other`` elements further on."""
    W, n = lanes(x), least(head(y, i), end - i)
    if n > 0:
        _write_part(x, y, weight, bias, i, n, at, c)
        i += n
    while i + 2 * W <= end:
        ask(x, i + other)
        ask(x, i + other + W)
        z0 = value(x, weight, bias, i, i - at, *c)
        z1 = value(x, weight, bias, i + W, i + W - at, *c)
        write(y, i, z0, streamed)
        write(y, i + W, z1, streamed)
        i += 2 * W
    if i + W <= end:
        write(y, i, value(x, weight, bias, i, i - at, *c), streamed)
        i += W
    if i < end:
        _write_part(x, y, weight, bias, i, end - i, at, c)


@jit
def normalise(x, y, weight, bias, stats, sets, L, streamed, claim):
    """Outputs of every chunk, last one first."""
    x, y, stats, claim, across = base(x), base(y), base(stats), base(claim), chunks(L)
    weight, bias = like(x, base(weight)), like(x, base(bias))
    number = fetch_add(claim, 0, 1)
    while number < across:
        k = across - 1 - number
        for back in range(sets):
            t = sets - 1 - back
            at, c, other = t * L, spread3(x, known(x, stats, sets, t)), before(t, sets, L)
            _normalise(x, y, weight, bias, cut(y, at, k, L), cut(y, at, k + 1, L), at, c, other, streamed)
        fence()
        fetch_add(claim, 1, 1)
        number = fetch_add(claim, 0, 1)
