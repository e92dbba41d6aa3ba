"""Layer norm and its kin in one launch, a set in the registers of the warp or block that has it to itself.

Forward: all of a thread's vectors are on their way at once; the pivot comes from what has arrived, not from loads of
its own. Floor: one read and one write.

Backward, of layer norm with parameters: a team walks down the samples, the next one's vectors on their way while it
adds up those in hand. A thread's columns stay the same, so it keeps their sums, the gradients of weight and bias, in
registers until the end; ``sets_columns.settle`` adds up the blocks'. Floor: two reads and one write; a kernel for the
columns and one for the sets (``sets_columns``, ``sets_kept``) move 5 bytes where this moves 3.

Not timed on a GPU yet; ``tuning.HELD`` turns it off, and ``bench.gpu`` times both.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import WARP, make_slopes, make_team_sum
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.plan_sets import together, words
from fastbn.cuda.sets import SetVariant, make_affine, make_channel, make_pair, make_parameter, make_statistics
from fastbn.cuda.simd import access, add, anew, fma, mul, sub, total

int32, int64 = types.int32, types.int64


def make_each(held: int, f):
    """(a, b, c, d) -> the results of f(k, a, b, c, d) for each k of a thread's vectors."""
    if held == 1:

        @device
        def each(a, b, c, d):
            return (f(0, a, b, c, d),)

    elif held == 2:

        @device
        def each(a, b, c, d):
            return f(0, a, b, c, d), f(1, a, b, c, d)

    else:

        @device
        def each(a, b, c, d):
            return f(0, a, b, c, d), f(1, a, b, c, d), f(2, a, b, c, d), f(3, a, b, c, d)

    return each


def make_take(what: SetVariant, load):
    """(tensor, first, lane, vectors) -> a thread's vectors of the set that begins at ``first``.

    Who has fewer than others gets the set's last vector again, which costs no memory traffic.
    """
    W, team = what.W, what.team

    @device
    def take(k, tensor, first, lane, vectors):
        return load(tensor, first + int64(min(int32(lane + k * team), int32(vectors - 1))) * W)

    return make_each(what.held, take)


def make_team_pivot(kind: str, threads: int, team: int):
    """Mean of a team's numbers, of four warps' if it is a block, added so that equal ones give exactly themselves."""
    A, warps, alone = ARITHMETIC[kind], threads // 32, team < threads

    @device
    def team_pivot(a, scratch):
        half, step = A(0.5), 16
        while step > 0:
            a = half * a + half * cuda.shfl_xor_sync(WARP, a, step)
            step >>= 1
        if alone:
            return a
        if cuda.threadIdx.x & 31 == 0:
            scratch[cuda.threadIdx.x >> 5] = a
        cuda.syncthreads()
        b = half * scratch[0] + half * scratch[warps // 4]
        return half * b + half * (half * scratch[warps // 2] + half * scratch[3 * warps // 4])

    return team_pivot


@functools.cache
def train(what: SetVariant):
    """Forward."""
    kind, W, threads, team = what.kind, what.W, what.threads, what.team
    A, io, teams, sizes = ARITHMETIC[kind], access(kind, W), threads // team, 2 * (threads // 32)
    take, decode, store, splat = make_take(what, io.load), io.decode, io.store, io.splat
    pivot, statistics = make_team_pivot(kind, threads, team), make_statistics(what)
    affine, channel = make_affine(what), make_channel(what)

    @kernel("TTAAAiiiiai", kind, threads, together(threads, what.held, W, False))
    def held_train(x, y, stats, weight, bias, sets, G, D, S, eps, flags):
        scratch = cuda.shared.array(sizes, A)
        which = int32(cuda.threadIdx.x // team)
        lane = int32(cuda.threadIdx.x - which * team)
        i = int32(cuda.blockIdx.x * teams + which)
        if i >= sets:
            return  # a warp of the last block; a block that is one team always has a set
        n = int32(D * S)
        vectors, first = int32(n // W), int64(i) * n
        held = take(x, first, lane, vectors)
        m = pivot(decode(held[0])[0], scratch)
        s = q = splat(A(0))
        v = lane
        for raw in held:
            if v < vectors:
                d = sub(decode(raw), m)
                s, q = add(s, d), fma(d, d, q)
            v = int32(v + team)
        mean, rest, invstd = statistics(x, stats, m, s, q, i, sets, n, eps, lane, scratch)
        v = lane
        for raw in held:
            if v < vectors:
                w, b = affine(weight, bias, channel(i, v, G, D, S), flags)
                k = mul(w, invstd)
                store(y, first + int64(v) * W, fma(sub(decode(raw), mean), k, fma(-rest, k, b)))
            v = int32(v + team)

    return held_train


def make_columns(what: SetVariant):
    """Add a sample's vectors to a thread's sums by column, and write a block's sums: row ``blockIdx`` of partial."""
    kind, W, threads, team, held = what.kind, what.W, what.threads, what.team, what.held
    A, io, teams = ARITHMETIC[kind], access(kind, W), threads // team
    scatter, decode, alone, width = io.scatter, io.decode, team == threads, team * held * W

    @device
    def add_bias(k, sums, g, x, by):
        return add(sums[k], decode(g[k]))

    @device
    def add_weight(k, sums, g, x, by):
        m, invstd, shift = by
        return fma(decode(g[k]), fma(sub(decode(x[k]), m), invstd, shift), sums[k])

    @device
    def write(sums, red, partial, at, D, lane, vectors):
        which = cuda.threadIdx.x // team
        v = lane
        for vector in sums:
            if v < vectors:
                if alone:
                    scatter(partial, at + int64(v) * W, vector)
                else:
                    scatter(red, which * width + v * W, vector)
            v = int32(v + team)
        if not alone:
            cuda.syncthreads()
            for c in range(cuda.threadIdx.x, D, threads):
                a = A(0)
                for t in range(teams):
                    a += red[t * width + c]
                partial[at + c] = a
            cuda.syncthreads()

    return make_each(held, add_bias), make_each(held, add_weight), write


def make_start(what: SetVariant):
    """A thread's part of the weight, and zeros for its sums by column."""
    W, team, parameter, splat = what.W, what.team, make_parameter(what), access(what.kind, what.W).splat
    zero = ARITHMETIC[what.kind](0)

    @device
    def weights(k, weight, lane, vectors, unused):
        return parameter(weight, min(int32(lane + k * team), int32(vectors - 1)) * W)

    @device
    def zeros(k, a, b, c, d):
        return splat(zero)

    return make_each(what.held, weights), make_each(what.held, zeros)


def make_gradient(what: SetVariant):
    """Input gradient of a sample in hand; returns nothing."""
    kind, W, threads, team = what.kind, what.W, what.threads, what.team
    A, io, team_sum, slopes = ARITHMETIC[kind], access(kind, W), make_team_sum(kind, threads, team), make_slopes(kind)
    store, splat, pair = io.store, io.splat, make_pair(what)

    @device
    def gradient(dx, first, xs, gs, ws, by, scratch, D, lane, vectors):
        m, invstd, rest = by
        s = q = splat(A(0))
        v = lane
        for x, g, w in zip(xs, gs, ws):  # noqa: B905  (Numba's has no strict)
            if v < vectors:
                u, t = pair(x, g, w, m, invstd)
                s, q = add(s, u), fma(u, t, q)
            v = int32(v + team)
        sum_v, sum_vt = team_sum(total(s), total(q), scratch)
        c1, c0 = slopes(sum_vt - rest * invstd * sum_v, sum_v, invstd, invstd, rest, int64(D))
        v = lane
        for x, g, w in zip(xs, gs, ws):  # noqa: B905  (Numba's has no strict)
            if v < vectors:
                u, t = pair(anew(x), anew(g), w, m, invstd)
                store(dx, first + int64(v) * W, fma(invstd, u, fma(c1, t, c0)))
            v = int32(v + team)

    return gradient


@functools.cache
def backward(what: SetVariant):
    """Gradients of samples of one group of D channels, one value each; blocks' sums by column go to ``partial``."""
    kind, W, threads, team, held = what.kind, what.W, what.threads, what.team, what.held
    A, io, teams, sizes = ARITHMETIC[kind], access(kind, W), threads // team, 2 * (threads // 32)
    take_x, take_g, ahead = make_take(what, io.load), make_take(what, io.load_last), words(held, W) <= 8
    (weights, zeros), (add_bias, add_weight, write) = make_start(what), make_columns(what)
    gradient, room = make_gradient(what), threads * held * W if team < threads else 1
    hold = ahead and W < 8  # else registers would spill, as they would with another sample on its way

    @kernel("TTTAAAii", kind, threads, together(threads, held, W, True))
    def held_backward(x, g, dx, stats, weight, partial, sets, D):
        scratch = cuda.shared.array(sizes, A)
        red = cuda.shared.array(room, A)
        which = int32(cuda.threadIdx.x // team)
        lane, vectors = int32(cuda.threadIdx.x - which * team), int32(D // W)
        i, step = int32(cuda.blockIdx.x * teams + which), int32(cuda.gridDim.x * teams)
        first = int64(min(i, int32(sets - 1))) * D  # who has no sample takes one and does nothing with it
        xs, gs = take_x(x, first, lane, vectors), take_g(g, first, lane, vectors)
        bs, qs = zeros(0, 0, 0, 0), zeros(0, 0, 0, 0)
        if hold:
            ws = weights(weight, lane, vectors, 0)
        while i < sets:
            by, at, following = (stats[i], stats[sets + i], stats[3 * sets + i]), first, int32(i + step)
            xn, gn, first = xs, gs, int64(following) * D
            if ahead and following < sets:
                xn, gn = take_x(x, first, lane, vectors), take_g(g, first, lane, vectors)
            bs = add_bias(bs, gs, xs, by)
            qs = add_weight(qs, gs, xs, (by[0], by[1], -by[2] * by[1]))
            if not hold:
                ws = weights(weight, anew(lane), vectors, 0)
            gradient(dx, at, xs, gs, ws, by, scratch, D, lane, vectors)
            if not ahead and following < sets:
                xn, gn = take_x(x, first, lane, vectors), take_g(g, first, lane, vectors)
            xs, gs, i = xn, gn, following
        write(bs, red, partial, int64(cuda.blockIdx.x) * D, D, lane, vectors)
        write(qs, red, partial, int64(cuda.gridDim.x + cuda.blockIdx.x) * D, D, lane, vectors)

    return held_backward
