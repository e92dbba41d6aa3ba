"""Layer, group and instance norm in one launch: a warp or a block has a set to itself and keeps it in shared memory.

Training forward moves 2 bytes a byte of tensor, the input's gradient 3: the floor. Warps of a block have a set each
where sets are short (LayerNorm over 768 channels), and wait for each other nowhere. Each thread reads back only what it
kept itself. Where vectors of 128 bits do not fit, a team reads its set again instead, from the caches.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import make_pivot, make_slopes, make_team_sum
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.sets import SetVariant, make_affine, make_channel, make_pair, make_statistics
from fastbn.cuda.simd import access, add, fma, mul, sub, total

int32, int64 = types.int32, types.int64


def make_absorb(what: SetVariant):
    """Sums of a thread's deviations from the pivot, its vectors kept."""
    A, io, team, kept = ARITHMETIC[what.kind], access(what.kind, what.W), what.team, what.kept
    W, load, decode, splat, keep_raw = what.W, io.load, io.decode, io.splat, io.keep

    @device
    def absorb(x, slab, first, own, m, v, vectors):
        s = q = splat(A(0))
        while v + 3 * team < vectors:
            at = first + int64(v) * W
            x0, x1 = load(x, at), load(x, at + team * W)
            x2, x3 = load(x, at + 2 * team * W), load(x, at + 3 * team * W)
            if kept:
                keep_raw(slab, own + 4 * v, x0)
                keep_raw(slab, own + 4 * (v + team), x1)
                keep_raw(slab, own + 4 * (v + 2 * team), x2)
                keep_raw(slab, own + 4 * (v + 3 * team), x3)
            for raw in (x0, x1, x2, x3):
                d = sub(decode(raw), m)
                s, q = add(s, d), fma(d, d, q)
            v = int32(v + 4 * team)
        while v < vectors:
            x0 = load(x, first + int64(v) * W)
            if kept:
                keep_raw(slab, own + 4 * v, x0)
            d = sub(decode(x0), m)
            s, q = add(s, d), fma(d, d, q)
            v = int32(v + team)
        return s, q

    return absorb


@functools.cache
def train(what: SetVariant):
    """Forward. Floor: one read and one write."""
    kind, W, threads, team, kept = what.kind, what.W, what.threads, what.team, what.kept
    A, io, teams, sizes = ARITHMETIC[kind], access(kind, W), threads // team, 2 * (threads // 32)
    load_last, decode, store, recall = io.load_last, io.decode, io.store, io.recall
    pivot, absorb, statistics = make_pivot(kind), make_absorb(what), make_statistics(what)
    affine, channel = make_affine(what), make_channel(what)

    @kernel("TTAAAiiiiai", kind, threads, 1)
    def sets_train(x, y, stats, weight, bias, sets, G, D, S, eps, flags):
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        which = int32(cuda.threadIdx.x // team)
        lane = int32(cuda.threadIdx.x - which * team)
        i = int32(cuda.blockIdx.x * teams + which)
        if i >= sets:
            return  # a warp of the last block; a block that is one team always has a set
        n = int32(D * S)
        vectors, first = int32(n // W), int64(i) * n
        own = int32(4 * which * vectors)
        m = pivot(x, i, 1, sets, n)
        s, q = absorb(x, slab, first, own, m, lane, vectors)
        mean, rest, invstd = statistics(x, stats, m, s, q, i, sets, n, eps, lane, scratch)
        v = lane
        while v < vectors:
            at = first + int64(v) * W
            w, b = affine(weight, bias, channel(i, v, G, D, S), flags)
            k = mul(w, invstd)
            if kept:  # noqa: SIM108  (the two have different types where vectors are scalars)
                x0 = recall(slab, own + 4 * v)
            else:
                x0 = load_last(x, at)
            store(y, at, fma(sub(decode(x0), mean), k, fma(-rest, k, b)))
            v = int32(v + team)

    return sets_train


@functools.cache
def backward(what: SetVariant):
    """Input gradient, and for ``one`` the sums by set (dbias, then dweight). Floor: two reads and one write."""
    kind, W, threads, team, kept = what.kind, what.W, what.threads, what.team, what.kept
    A, io, teams, sizes = ARITHMETIC[kind], access(kind, W), threads // team, 2 * (threads // 32)
    load, load_last, store, splat, keep_raw, recall = io.load, io.load_last, io.store, io.splat, io.keep, io.recall
    team_sum, slopes, pair = make_team_sum(kind, threads, team), make_slopes(kind), make_pair(what)
    affine, channel, one = make_affine(what), make_channel(what), what.affine == "one"

    @kernel("TTTAAAiiiii", kind, threads, 1)
    def sets_backward(x, g, dx, stats, weight, by_set, sets, G, D, S, flags):
        slab = cuda.shared.array(0, int32)
        scratch = cuda.shared.array(sizes, A)
        which = int32(cuda.threadIdx.x // team)
        lane = int32(cuda.threadIdx.x - which * team)
        i = int32(cuda.blockIdx.x * teams + which)
        if i >= sets:
            return
        n = int32(D * S)
        vectors, first = int32(n // W), int64(i) * n
        own = int32(8 * which * vectors)
        second = int32(own + 4 * vectors)
        m, invstd, rest = stats[i], stats[sets + i], stats[3 * sets + i]
        s = q = splat(A(0))
        v = lane
        while v < vectors:
            at = first + int64(v) * W
            x0, g0 = load(x, at), load_last(g, at)
            if kept:
                keep_raw(slab, own + 4 * v, x0)
                keep_raw(slab, second + 4 * v, g0)
            w, _ = affine(weight, weight, channel(i, v, G, D, S), flags & 1)
            u, t = pair(x0, g0, w, m, invstd)
            s, q = add(s, u), fma(u, t, q)
            v = int32(v + team)
        sum_v, sum_vt = team_sum(total(s), total(q), scratch)
        sum_vt -= rest * invstd * sum_v
        k = invstd
        if one:
            if flags & 1:
                k = weight[i % G] * invstd
            if lane == 0:
                by_set[i], by_set[int64(sets) + i] = sum_v, sum_vt
        c1, c0 = slopes(sum_vt, sum_v, invstd, k, rest, int64(n))
        v = lane
        while v < vectors:
            at = first + int64(v) * W
            if kept:
                x0, g0 = recall(slab, own + 4 * v), recall(slab, second + 4 * v)
            else:
                x0, g0 = load_last(x, at), load_last(g, at)
            w, _ = affine(weight, weight, channel(i, v, G, D, S), flags & 1)
            u, t = pair(x0, g0, w, m, invstd)
            store(dx, at, fma(k, u, fma(c1, t, c0)))
            v = int32(v + team)

    return sets_backward
