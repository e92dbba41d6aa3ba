"""From the parts' sums to statistics, running statistics and parameter gradients: a few operations a channel.

Sums lie in ``partial`` as (2, P, columns), a channel having ``cols`` neighbouring columns of C*cols. They are added in
an order fixed by the shape, with the rounding error of every addition kept (two-sum), so that no float64 is needed.

Formulas: mean = pivot + s/n, var = (q - s*s/n)/n (Chan, Golub & LeVeque 1983, with one pivot), running statistics as
PyTorch: (1 - momentum)*old + momentum*new with the unbiased variance n/(n-1). Where the pivot lies too far from the
mean, or squares left float32's range, the block sums the channel again about the mean itself, scaled: slow and right.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda import tuning
from fastbn.cuda.channel import WARP, keep_statistics, make_running, make_team_sum
from fastbn.cuda.counted import make_counted
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.simd import access, finite, invsqrt, sqrt

int32, int64 = types.int32, types.int64


@device
def two_sum(a, b):
    """A + b as the rounded sum and its error (Knuth)."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)


@device
def add_pair(hi, lo, value, rest):
    """Add value + rest to hi + lo."""
    hi, error = two_sum(hi, value)
    return hi, lo + (error + rest)


@device
def gradients(s, se, q, qe, slope):
    """Return dbias and dweight from sums in pairs, of u and of u*(xhat + slope), slope from the mean's remainder.

    The error of an infinite sum is NaN, and so is 0*inf: an infinite gradient stays infinite, as on the CPU.
    """
    q = q + qe if finite(q) else q
    if finite(s):
        s = s + se
        q = q - slope * s
    return s, q


def make_gather(kind: str, threads: int):
    """Add up a channel's parts: G channels a block, threads // G slots each; the totals end in slot 0."""
    A = ARITHMETIC[kind]

    @device
    def gather(partial, c, C, P, cols, slot, slots, G, scratch):
        s = se = q = qe = A(0)
        if c < C:
            second = int64(P) * C * cols
            index = slot
            while index < P * cols:
                row = index // cols
                at = int64(row) * C * cols + int64(c) * cols + (index - row * cols)
                s, se = add_pair(s, se, partial[at], A(0))
                q, qe = add_pair(q, qe, partial[second + at], A(0))
                index += slots
        tid = cuda.threadIdx.x
        scratch[tid], scratch[threads + tid] = s, se
        scratch[2 * threads + tid], scratch[3 * threads + tid] = q, qe
        half = slots >> 1
        while half > 0:
            cuda.syncthreads()
            if slot < half:
                other = tid + half * G
                s, se = add_pair(s, se, scratch[other], scratch[threads + other])
                q, qe = add_pair(q, qe, scratch[2 * threads + other], scratch[3 * threads + other])
                scratch[tid], scratch[threads + tid] = s, se
                scratch[2 * threads + tid], scratch[3 * threads + tid] = q, qe
            half >>= 1
        cuda.syncthreads()
        return s, se, q, qe

    return gather


def make_resolve(kind: str, masked: bool = False):
    """Mean, its remainder, variance and invstd from sums about a pivot; False where they cannot be trusted.

    Of no values at all, which a mask may leave, mean and variance are 0.
    """
    A = ARITHMETIC[kind]
    far, tiny = tuning.FAR, tuning.TINY if kind != "f64" else 1e-290

    @device
    def resolve(pivot, s, se, q, qe, n, eps):
        if masked and n == A(0):
            return True, A(0), A(0), A(0), invsqrt(eps)
        shift = s / n + se / n
        var = max((q - s * shift + qe) / n, A(0))
        mean, rest = two_sum(pivot, shift)
        good = shift * shift <= A(far) * var and finite(q) and (var + eps > A(tiny) or q == A(0))
        return good, mean, rest, var, invsqrt(var + eps)

    return resolve


def make_team_max(kind: str, threads: int, team: int):
    """Largest number of a team (a block or a warp), in every thread."""
    A, warps, alone = ARITHMETIC[kind], threads // 32, team < threads

    @device
    def team_max(a, scratch):
        tid = cuda.threadIdx.x
        step = 16
        while step > 0:
            a = max(a, cuda.shfl_xor_sync(WARP, a, step))
            step >>= 1
        if alone:
            return a
        cuda.syncthreads()
        if tid & 31 == 0:
            scratch[tid >> 5] = a
        cuda.syncthreads()
        a = A(0)
        for w in range(warps):
            a = max(a, scratch[w])
        return a

    return team_max


def make_again(kind: str, threads: int, team: int = 0, masked: bool = False):
    """Sum a channel again, by a block or a warp: about its mean, scaled by its largest deviation, errors kept."""
    team = team or threads
    alone = team < threads
    A, one = ARITHMETIC[kind], access(kind, 1)
    load, decode = one.load, one.decode
    team_sum, team_max = make_team_sum(kind, threads, team), make_team_max(kind, threads, team)
    smallest = 1e-37 if kind != "f64" else 1e-300

    @device
    def sums_about(x, mask, c, N, C, S, m, scale, inverse):
        s = se = q = qe = A(0)
        top = A(0)
        e = int64(cuda.threadIdx.x & 31) if alone else int64(cuda.threadIdx.x)
        while e < int64(N) * S:
            n = e // S
            d = (decode(load(x, (n * C + c) * S + (e - n * S)))[0] - m) / scale * inverse
            if masked and mask[e] == 0:
                d = A(0)
            s, se = add_pair(s, se, d, A(0))
            q, qe = add_pair(q, qe, d * d, A(0))
            top = max(top, abs(d))
            e += team
        if finite(s):  # the error of an infinite sum is NaN
            s += se
        return s, q + qe, top

    @device
    def again(x, mask, n, c, N, C, S, eps, scratch):
        s, _, _ = sums_about(x, mask, c, N, C, S, A(0), A(1), A(1) / n)
        mean, _ = team_sum(s, s, scratch)
        rest = A(0)
        if not finite(mean):
            nan = mean - mean
            return mean, rest, nan, nan
        _, _, top = sums_about(x, mask, c, N, C, S, mean, A(1), A(1))
        scale = max(team_max(top, scratch), A(smallest))
        s, q, _ = sums_about(x, mask, c, N, C, S, mean, scale, A(1))
        s, q = team_sum(s, q, scratch)
        shift = s / n
        unit = max((q - s * shift) / n, A(0))  # variance over scale squared
        mean, rest = two_sum(mean, shift * scale)
        ratio = eps / scale / scale
        invstd = A(1) / scale * invsqrt(unit + ratio)
        if not finite(ratio):
            invstd = invsqrt(eps)
        std = sqrt(unit) * scale
        return mean, rest, std * std, invstd

    return again


@functools.cache
def settle_train(kind: str, threads: int, masked: bool = False):
    """Statistics of G channels a block; moves the running statistics if ``flags`` has 4.

    Under a mask, by the unbiased variance unless ``flags`` has 8, and not at all with fewer than two values.
    """
    A = ARITHMETIC[kind]
    gather, resolve = make_gather(kind, threads), make_resolve(kind, masked)
    again, running = make_again(kind, threads, 0, masked), make_running(kind)
    (pivot, values, moving), size = make_counted(kind, masked), 4 * threads

    @kernel("TAAAAiiiiiiaaaaiMI", kind, threads)
    def finalize_train(
        x, partial, stats, running_mean, running_var, N, C, S, P, cols, G, eps, keep, momentum, unbias, flags, mask,
        tally,
    ):  # fmt: skip
        scratch = cuda.shared.array(size, A)
        found = cuda.shared.array(128, A)
        bad = cuda.shared.array(32, int32)
        slots = threads // G
        slot = cuda.threadIdx.x // G
        j = cuda.threadIdx.x - slot * G
        first = cuda.blockIdx.x * G
        c = first + j
        middle, old = A(0), (A(0), A(0))
        if slot == 0 and c < C:
            middle, old = pivot(x, c, N, C, S, tally), running(running_mean, running_var, c, flags)
        s, se, q, qe = gather(partial, c, C, P, cols, slot, slots, G, scratch)
        if slot == 0:
            bad[j] = 0
            if c < C:
                good, m, rest, var, invstd = resolve(middle, s, se, q, qe, A(values(N, S, tally)), eps)
                found[j], found[32 + j], found[64 + j], found[96 + j] = m, invstd, var, rest
                if not good:
                    bad[j] = 1
        cuda.syncthreads()
        for i in range(G):
            if bad[i] != 0:
                m, rest, var, invstd = again(x, mask, A(values(N, S, tally)), first + i, N, C, S, eps, scratch)
                if slot == 0 and j == i:
                    found[j], found[32 + j], found[64 + j], found[96 + j] = m, invstd, var, rest
        if slot == 0 and c < C:
            four = (found[j], found[96 + j], found[64 + j], found[32 + j])
            moves, unbias = moving(unbias, flags, tally)
            keep_statistics(stats, running_mean, running_var, c, C, four, old, keep, momentum, unbias, moves)

    return finalize_train


@functools.cache
def settle_backward(kind: str, threads: int):
    """Gradients of weight and bias of G channels a block: dbias = sum(u), dweight = sum(u*xhat)."""
    A = ARITHMETIC[kind]
    gather, four = make_gather(kind, threads), 4 * threads

    @kernel("AAAAiiii", kind, threads)
    def finalize_backward(partial, stats, dweight, dbias, C, P, cols, G):
        scratch = cuda.shared.array(four, A)
        slots = threads // G
        slot = cuda.threadIdx.x // G
        c = cuda.blockIdx.x * G + (cuda.threadIdx.x - slot * G)
        s, se, q, qe = gather(partial, c, C, P, cols, slot, slots, G, scratch)
        if slot == 0 and c < C:
            dbias[c], dweight[c] = gradients(s, se, q, qe, stats[3 * C + c] * stats[C + c])

    return finalize_backward


@functools.cache
def settle_given(kind: str, threads: int):
    """``stats`` of given running statistics, for a backward pass through them."""
    A = ARITHMETIC[kind]

    @kernel("AAAia", kind, threads)
    def finalize_given(mean, var, stats, C, eps):
        c = cuda.blockIdx.x * threads + cuda.threadIdx.x
        if c < C:
            stats[c], stats[C + c] = mean[c], invsqrt(var[c] + eps)
            stats[2 * C + c], stats[3 * C + c] = var[c], A(0)

    return finalize_given
