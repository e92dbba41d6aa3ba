"""Numbers of one channel: its pivot, its affine map, its share of the gradient; and sums over a block of threads.

``stats`` is an arithmetic array of 4*C: mean, invstd, biased variance, and the rounding remainder of the mean. With
the mean alone in float32 the output at mean 1e4, std 1 would be off by 5e-4.
"""

# mypy: ignore-errors
from __future__ import annotations

from fastbn.cuda.driver import ARITHMETIC, cuda, device, types
from fastbn.cuda.simd import access, fma, invsqrt, mul

int32, int64 = types.int32, types.int64
WARP = 0xFFFFFFFF


@device
def pivot_offsets(N, C, S):
    """Where to look for a pivot: offsets, from a channel's first element, of four elements spread over it."""
    if N >= 4:
        row = int64(C) * S
        eighth = int64(N // 8)
        return eighth * row + S // 2, (3 * N // 8) * row, (5 * N // 8) * row + S // 2, (7 * N // 8) * row
    else:
        return int64(S // 8), int64(3 * S // 8), int64(5 * S // 8), int64(7 * S // 8)


def make_pivot(kind: str):
    """Mean of four elements of a channel, added so that equal ones give exactly themselves."""
    A, one = ARITHMETIC[kind], access(kind, 1)
    load, decode = one.load, one.decode

    @device
    def pivot(x, c, N, C, S):
        start, half = int64(c) * S, A(0.5)
        i0, i1, i2, i3 = pivot_offsets(N, C, S)
        v0, v1 = decode(load(x, start + i0))[0], decode(load(x, start + i1))[0]
        v2, v3 = decode(load(x, start + i2))[0], decode(load(x, start + i3))[0]
        a = half * v0 + half * v1
        b = half * v2 + half * v3
        return half * a + half * b

    return pivot


def make_pivot_at(kind: str):
    """Mean of four elements of a channel at places that a mask leaves: ``tally`` is their number and four of them."""
    A, one = ARITHMETIC[kind], access(kind, 1)
    load, decode = one.load, one.decode

    @device
    def element(x, c, C, S, place):
        n = place // S
        return decode(load(x, (int64(n) * C + c) * S + (place - n * S)))[0]

    @device
    def pivot(x, c, C, S, tally):
        if tally[0] == 0:
            return A(0)
        half = A(0.5)
        a = half * element(x, c, C, S, tally[1]) + half * element(x, c, C, S, tally[2])
        b = half * element(x, c, C, S, tally[3]) + half * element(x, c, C, S, tally[4])
        return half * a + half * b

    return pivot


def make_affine(kind: str, given: bool):
    """Split (x - mean)*invstd*weight + bias into (m, invstd, k, b, rest): y = (x - m)*k + b, mean = m + rest.

    ``given``: stats and more are running mean and running variance instead. ``flags``: 1 weight, 2 bias present.
    """
    A, combine = ARITHMETIC[kind], make_combine(kind)

    @device
    def affine(stats, more, weight, bias, c, C, eps, flags):
        rest = A(0)
        m = stats[c]
        if given:
            invstd = invsqrt(more[c] + eps)
        else:
            invstd, rest = stats[C + c], stats[3 * C + c]
        k, b = combine(invstd, rest, weight, bias, c, flags)
        return m, invstd, k, b, rest

    return affine


def make_slopes(kind: str):
    """(c1, c0) of dx = k*u + c1*t + c0 with t = (x - m)*invstd, from the gradients of weight and bias.

    Ioffe & Szegedy 2015, section 3: dx = k*(u - dbias/n - xhat*dweight/n), and xhat = t - rest*invstd.
    """
    A = ARITHMETIC[kind]

    @device
    def slopes(dweight, dbias, invstd, k, rest, n):
        c1 = -k * (dweight / A(n))
        return c1, -k * (dbias / A(n)) - c1 * rest * invstd

    return slopes


def make_block_sum(kind: str, threads: int):
    """Sum two numbers over the block, in an order fixed by its size; every thread gets the same bits."""
    A, warps = ARITHMETIC[kind], threads // 32

    @device
    def block_sum(s, q, scratch):
        tid = cuda.threadIdx.x
        lane, warp = tid & 31, tid >> 5
        step = 16
        while step > 0:
            s += cuda.shfl_xor_sync(WARP, s, step)
            q += cuda.shfl_xor_sync(WARP, q, step)
            step >>= 1
        cuda.syncthreads()
        if lane == 0:
            scratch[warp] = s
            scratch[warps + warp] = q
        cuda.syncthreads()
        s = q = A(0)
        for w in range(warps):
            s += scratch[w]
            q += scratch[warps + w]
        return s, q

    return block_sum


def make_team_sum(kind: str, threads: int, team: int):
    """Sum two numbers over a team: a whole block, or a warp of a block, which then waits for no other warp."""
    if team == threads:
        return make_block_sum(kind, threads)

    @device
    def warp_sum(s, q, scratch):
        step = 16
        while step > 0:
            s += cuda.shfl_xor_sync(WARP, s, step)
            q += cuda.shfl_xor_sync(WARP, q, step)
            step >>= 1
        return s, q

    return warp_sum


def make_parameters(kind: str):
    """(weight, bias) of a channel, 1 and 0 where there are none.

    Kernels ask for these, and for the running statistics (``make_running``), before threads or blocks wait for each
    other's sums: behind that, one after the other, they would be waited for twice more, most of a microsecond each.
    """
    A = ARITHMETIC[kind]

    @device
    def parameters(weight, bias, c, flags):
        w, b = A(1), A(0)
        if flags & 1:
            w = weight[c]
        if flags & 2:
            b = bias[c]
        return w, b

    return parameters


@device
def fold(invstd, rest, w, b):
    """(k, b) of a channel whose statistics were worked out here; see ``make_affine``."""
    k = mul(w, invstd)
    return k, fma(-rest, k, b)


def make_combine(kind: str):
    """``fold`` of the parameters of channel ``c``."""
    parameters = make_parameters(kind)

    @device
    def combine(invstd, rest, weight, bias, c, flags):
        w, b = parameters(weight, bias, c, flags)
        return fold(invstd, rest, w, b)

    return combine


def make_running(kind: str):
    """Running mean and variance of a channel as they are, if they are to move (``flags`` has 4)."""
    A = ARITHMETIC[kind]

    @device
    def running(running_mean, running_var, c, flags):
        old_mean = old_var = A(0)
        if flags & 4:
            old_mean, old_var = running_mean[c], running_var[c]
        return old_mean, old_var

    return running


@device
def keep_statistics(stats, running_mean, running_var, c, C, found, old, keep, momentum, unbias, moves):
    """Write the statistics of a channel, and move its running statistics from ``old`` on if ``moves``."""
    m, rest, var, invstd = found
    stats[c], stats[C + c], stats[2 * C + c], stats[3 * C + c] = m, invstd, var, rest
    if moves:
        running_mean[c] = keep * old[0] + momentum * m
        running_var[c] = keep * old[1] + momentum * (var * unbias)
