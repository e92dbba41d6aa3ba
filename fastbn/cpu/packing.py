"""Valid values of a masked tensor: packed before a kernel takes them, put back behind it.

Of the tensor (N, C, S) the channels lo..hi - 1 are packed to (hi - lo, M). A sample's S positions have the same valid
ones in every channel, given as pieces: those of sample n are first[n] <= i < first[n + 1], piece i begins at the
position start[i], and its values lie from place[i] up to place[i + 1] in the M of a channel. Without ``place`` each
piece is one value, number i: a loop of its own, since a piece costs as much as ten values.

Samples are handed out by ``claim`` (next sample, samples done). Floor: one read and one write of the valid values.
"""

from __future__ import annotations

from fastbn.cpu._jit import jit, part
from fastbn.cpu._raw import move_one, move_run, put_run, put_zeros, wipe
from fastbn.cpu.simd import base, fence, fetch_add

RUN = 10  # values of a piece from which moving pieces beats moving values


@part
def _pack_run(x, at, out, to, S, first, last, start, place):
    """Values of one channel of one sample."""
    if place is None:
        for i in range(first, last):
            move_one(out, to + i, x, at + start[i])
    else:
        for i in range(first, last):
            move_run(out, to + place[i], x, at + start[i], place[i + 1] - place[i], S)


@part
def _unpack_run(x, at, y, to, S, first, last, start, place, streamed):
    """Values of one channel of one sample, and zeros elsewhere."""
    if place is None:
        wipe(y, to, S)
        for i in range(first, last):
            move_one(y, to + start[i], x, at + i)
    else:
        done = 0
        for i in range(first, last):
            n = place[i + 1] - place[i]
            put_zeros(y, to + done, start[i] - done, streamed)
            put_run(y, to + start[i], x, at + place[i], n, streamed)
            done = start[i] + n
        put_zeros(y, to + done, S - done, streamed)


@jit
def pack(x, out, first, start, place, C, S, M, lo, hi, claim):
    """Pack the tensor x into ``out``."""
    x, out, claim, N = base(x), base(out), base(claim), first.size - 1
    n = fetch_add(claim, 0, 1)
    while n < N:
        for c in range(lo, hi):
            _pack_run(x, (n * C + c) * S, out, (c - lo) * M, S, first[n], first[n + 1], start, place)
        fetch_add(claim, 1, 1)
        n = fetch_add(claim, 0, 1)


@jit
def unpack(x, y, first, start, place, C, S, M, lo, hi, streamed, claim):
    """Put packed values x back into y."""
    x, y, claim, N = base(x), base(y), base(claim), first.size - 1
    n = fetch_add(claim, 0, 1)
    while n < N:
        for c in range(lo, hi):
            _unpack_run(x, (c - lo) * M, y, (n * C + c) * S, S, first[n], first[n + 1], start, place, streamed)
        fence()
        fetch_add(claim, 1, 1)
        n = fetch_add(claim, 0, 1)
