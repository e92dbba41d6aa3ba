"""Layer, group and instance norm, split: sets of n contiguous elements that share statistics, by parts of a set.

Set i = (sample, group) has D channels of S elements; its affine is one number a set (``one``: D = 1, instance norm),
one a channel whose run is whole vectors (``run``: group norm), or one an element (``each``: S = 1, layer norm). Forward
statistics are ``planes``' and ``finalize``'s, of (1, sets, n). Always right, whatever the size of a set; sets that fit
into shared memory are better off in ``sets_kept``. Floor: as ``planes``.

Formulas: y = weight*xhat + bias; with v = weight*u: dx = invstd*(v - mean(v) - xhat*mean(v*xhat)) over each set (Ba,
Kiros & Hinton 2016, arXiv:1607.06450; Wu & He 2018, arXiv:1803.08494).
"""

# mypy: ignore-errors
from __future__ import annotations

import functools
from typing import NamedTuple

from fastbn.cuda.channel import keep_statistics, make_block_sum, make_slopes, make_team_sum
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.finalize import make_again, make_resolve
from fastbn.cuda.simd import access, add, fma, join, mul, sub, total

int32, int64 = types.int32, types.int64


class SetVariant(NamedTuple):
    """What a kernel is compiled for."""

    kind: str  # of the tensors: f32, f64, f16, bf16
    W: int  # lanes of a vector, 1 or as many as fill 128 bits
    threads: int
    affine: str  # "one", "run" or "each" parameter, see above; "run" without parameters, too
    team: int = 0  # threads that have a set to themselves: a warp or the block
    kept: bool = False  # in shared memory; else a team reads its set again, from L2
    held: int = 0  # vectors of a set that each thread of a team has in registers: 1 to 4


def make_parameter(what: SetVariant):
    """(parameters, channel) -> those of a vector: a number, or a vector of one for each lane."""
    kind, W, each = what.kind, what.W, what.affine == "each"
    wide_kind, L = ("f64", 2) if kind == "f64" else ("f32", 4)
    io, one = access(wide_kind, L), access(kind, 1)
    recall, decode, splat = io.recall, io.decode, one.splat

    @device
    def parameter(array, c):
        if not each:
            return array[c]
        elif W == 1:
            return splat(array[c])
        elif W == L:
            return decode(recall(array, c))
        else:
            return join(decode(recall(array, c)), decode(recall(array, c + L)))

    return parameter


def make_affine(what: SetVariant):
    """(weight, bias, channel, flags) -> weight and bias of a vector, 1 and 0 where absent (flags: 1 weight, 2 bias)."""
    A, each, parameter = ARITHMETIC[what.kind], what.affine == "each", make_parameter(what)
    splat = access(what.kind, what.W).splat

    @device
    def affine(weight, bias, c, flags):
        w, b = A(1), A(0)
        if each:
            w, b = splat(A(1)), splat(A(0))
        if flags & 1:
            w = parameter(weight, c)
        if flags & 2:
            b = parameter(bias, c)
        return w, b

    return affine


def make_channel(what: SetVariant):
    """(set, vector, G, D, S) -> the channel of its first element."""
    W, one, each = what.W, what.affine == "one", what.affine == "each"

    @device
    def channel(i, v, G, D, S):
        first = (i % G) * D
        if one:
            return int32(first)
        elif each:
            return int32(first + v * W)
        else:
            return int32(first + (v * W) // S)

    return channel


def make_statistics(what: SetVariant):
    """(mean, its remainder, invstd) of a team's set from its threads' sums about m; the first thread writes them."""
    kind, threads, team, A = what.kind, what.threads, what.team, ARITHMETIC[what.kind]
    team_sum, resolve = make_team_sum(kind, threads, team), make_resolve(kind)
    again, none = make_again(kind, threads, team), A(0)

    @device
    def statistics(x, stats, m, s, q, i, sets, n, eps, lane, scratch):
        sum_d, sum_d2 = team_sum(total(s), total(q), scratch)
        good, mean, rest, var, invstd = resolve(m, sum_d, A(0), sum_d2, A(0), A(n), eps)
        if not good:
            mean, rest, var, invstd = again(x, x, A(n), i, 1, sets, n, eps, scratch)
        if lane == 0:
            found = (mean, rest, var, invstd)
            keep_statistics(stats, stats, stats, i, sets, found, (none, none), none, none, none, False)
        return mean, rest, invstd

    return statistics


def make_pair(what: SetVariant):
    """Factors of the sums of backward: (v, xhat less the mean's rounding remainder), v = weight*u; u itself for one."""
    decode, one = access(what.kind, what.W).decode, what.affine == "one"

    @device
    def pair(x, g, w, m, invstd):
        t = mul(sub(decode(x), m), invstd)
        u = decode(g)
        if one:
            return u, t
        else:
            return mul(u, w), t

    return pair


@functools.cache
def sums(what: SetVariant):
    """Sums of v and v*xhat over one part of one set."""
    kind, W, threads = what.kind, what.W, what.threads
    A, io, sizes = ARITHMETIC[kind], access(kind, W), 2 * (threads // 32)
    load, splat, block_sum = io.load, io.splat, make_block_sum(kind, threads)
    affine, channel, pair = make_affine(what), make_channel(what), make_pair(what)

    @kernel("TTAAAiiiiiii", kind, threads, 3)
    def sets_sums(x, g, stats, weight, partial, sets, G, D, S, P, chunk, flags):
        scratch = cuda.shared.array(sizes, A)
        i, part = cuda.blockIdx.x, cuda.blockIdx.y
        m, invstd = stats[i], stats[sets + i]
        vectors = int32(D * S // W)
        end = int32(min(vectors, (part + 1) * chunk))
        v, first = int32(part * chunk + cuda.threadIdx.x), int64(i) * D * S
        s = q = splat(A(0))
        while v < end:
            at = first + int64(v) * W
            w, _ = affine(weight, weight, channel(i, v, G, D, S), flags & 1)
            u, t = pair(load(x, at), load(g, at), w, m, invstd)
            s, q = add(s, u), fma(u, t, q)
            v = int32(v + threads)
        a, b = block_sum(total(s), total(q), scratch)
        if cuda.threadIdx.x == 0:
            partial[int64(part) * sets + i] = a
            partial[int64(P + part) * sets + i] = b

    return sets_sums


@functools.cache
def normalise(what: SetVariant):
    """Output of one part of one set, last block first."""
    kind, W, threads = what.kind, what.W, what.threads
    io, affine, channel = access(kind, W), make_affine(what), make_channel(what)
    load, decode, store = io.load_last, io.decode, io.store

    @kernel("TTAAAiiiiii", kind, threads, 3)
    def sets_normalise(x, y, stats, weight, bias, sets, G, D, S, chunk, flags):
        i, part = int32(cuda.gridDim.x - 1 - cuda.blockIdx.x), int32(cuda.gridDim.y - 1 - cuda.blockIdx.y)
        m, invstd, rest = stats[i], stats[sets + i], stats[3 * sets + i]
        end = int32(min(int32(D * S // W), (part + 1) * chunk))
        v, first = int32(part * chunk + cuda.threadIdx.x), int64(i) * D * S
        while v < end:
            at = first + int64(v) * W
            w, b = affine(weight, bias, channel(i, v, G, D, S), flags)
            k = mul(w, invstd)
            store(y, at, fma(sub(decode(load(x, at)), m), k, fma(-rest, k, b)))
            v = int32(v + threads)

    return sets_normalise


@functools.cache
def gradient(what: SetVariant):
    """Input gradient of one part of one set, last block first; ``sum_vt`` and ``sum_v`` by set."""
    kind, W, threads, one = what.kind, what.W, what.threads, what.affine == "one"
    io, affine, channel = access(kind, W), make_affine(what), make_channel(what)
    load, store, pair, slopes = io.load_last, io.store, make_pair(what), make_slopes(kind)

    @kernel("TTTAAAAiiiiii", kind, threads, 3)
    def sets_gradient(x, g, dx, stats, weight, sum_vt, sum_v, sets, G, D, S, chunk, flags):
        i, part = int32(cuda.gridDim.x - 1 - cuda.blockIdx.x), int32(cuda.gridDim.y - 1 - cuda.blockIdx.y)
        m, invstd, rest = stats[i], stats[sets + i], stats[3 * sets + i]
        k = invstd
        if one and flags & 1:
            k = weight[i % G] * invstd
        c1, c0 = slopes(sum_vt[i], sum_v[i], invstd, k, rest, int64(D) * S)
        end = int32(min(int32(D * S // W), (part + 1) * chunk))
        v, first = int32(part * chunk + cuda.threadIdx.x), int64(i) * D * S
        while v < end:
            at = first + int64(v) * W
            w, _ = affine(weight, weight, channel(i, v, G, D, S), flags & 1)
            u, t = pair(load(x, at), load(g, at), w, m, invstd)
            store(dx, at, fma(k, u, fma(c1, t, c0)))
            v = int32(v + threads)

    return sets_gradient
