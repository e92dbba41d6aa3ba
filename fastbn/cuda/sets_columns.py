"""Layer and group norm: gradients of weight and bias, sums over the samples; running statistics of instance norm.

The tensor is rows of all C*S elements of a sample, as in ``rows``, but statistics belong to a row and a group. Floor:
two reads, beside those of the input's gradient. Both in one pass: ``sets_held``, for one group of values side by side.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.driver import ARITHMETIC, cuda, kernel, types
from fastbn.cuda.finalize import gradients, make_gather
from fastbn.cuda.rows import make_reduce, place
from fastbn.cuda.simd import access, add, fma, mul, sub

int32, int64 = types.int32, types.int64


@functools.cache
def sums(kind: str, W: int, threads: int):
    """Sums of u and u*xhat by column over one part of the samples; ``per`` columns share statistics."""
    A, io, reduce = ARITHMETIC[kind], access(kind, W), make_reduce(kind, W, threads)
    load, decode, splat = io.load, io.decode, io.splat
    both = 2 * threads * W

    @kernel("TTAAiiiiiii", kind, threads, 3 if W < 8 else 2)
    def sets_columns(x, g, stats, partial, B, G, V, per, P, chunk, tx_count):
        red = cuda.shared.array(both, A)
        tile, part, width = cuda.blockIdx.x, cuda.blockIdx.y, tx_count * W
        tx, ty, height, column, active = place(tx_count, threads, tile, V, W)
        sets = int64(B) * G
        s = q = splat(A(0))
        if active:
            end = int32(min(B, (part + 1) * chunk))
            r, group = int32(part * chunk + ty), int32(column // per)
            at, step = int64(r) * V + column, int64(height) * V
            while r < end:
                i = int64(r) * G + group
                m, invstd, rest = stats[i], stats[sets + i], stats[3 * sets + i]
                x0, u = load(x, at), decode(load(g, at))
                xhat = fma(sub(decode(x0), m), invstd, mul(-rest, invstd))
                s, q = add(s, u), fma(u, xhat, q)
                at += step
                r = int32(r + height)
        reduce(s, q, red, partial, part, P, V, tile, width, tx, ty, height)

    return sets_columns


@functools.cache
def settle(kind: str, threads: int):
    """Gradients of weight and bias of C channels with ``cols`` columns each, from P rows of sums."""
    A = ARITHMETIC[kind]
    gather, four = make_gather(kind, threads), 4 * threads

    @kernel("AAAiiii", kind, threads)
    def sets_settle(partial, dweight, dbias, C, P, cols, many):
        scratch = cuda.shared.array(four, A)
        slots = threads // many
        slot = cuda.threadIdx.x // many
        c = cuda.blockIdx.x * many + (cuda.threadIdx.x - slot * many)
        s, se, q, qe = gather(partial, c, C, P, cols, slot, slots, many, scratch)
        if slot == 0 and c < C:
            dbias[c], dweight[c] = gradients(s, se, q, qe, A(0))

    return sets_settle


@functools.cache
def move(kind: str, threads: int):
    """Running statistics of instance norm, moved by the mean over B samples of mean and (unbiased) variance."""
    A = ARITHMETIC[kind]

    @kernel("AAAiiaaa", kind, threads)
    def sets_move(stats, running_mean, running_var, B, C, keep, momentum, unbias):
        c = cuda.blockIdx.x * threads + cuda.threadIdx.x
        sets = int64(B) * C
        if c < C:
            mean = var = A(0)
            for b in range(B):
                mean += stats[int64(b) * C + c]
                var += stats[2 * sets + int64(b) * C + c]
            running_mean[c] = keep * running_mean[c] + momentum * (mean / A(B))
            running_var[c] = keep * running_var[c] + momentum * (var / A(B) * unbias)

    return sets_move
