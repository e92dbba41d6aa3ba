"""Layer norm and its kin in one launch, a set in the registers of the warp or block that has it to itself.

All of a thread's vectors are on their way at once; the pivot comes from what has arrived, not from loads of its own.
Floor: one read and one write. On an H200, beside sets in shared memory (``sets_kept``): (8192, 1024) in float32 25 us
instead of 34, (4096, 4096) in bfloat16 24 instead of 38; gradients are ``sets_staged``'s.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.channel import WARP
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.plan_sets import together
from fastbn.cuda.sets import SetVariant, make_affine, make_channel, make_statistics
from fastbn.cuda.simd import access, add, fma, mul, sub

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

    elif held == 3:

        @device
        def each(a, b, c, d):
            return f(0, a, b, c, d), f(1, a, b, c, d), f(2, a, b, c, d)

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
