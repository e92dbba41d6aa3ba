"""Gradients on bundles of channels whose runs are short or odd, by gangs of blocks that keep them: see ``bundle``.

Two reads and one write a tensor, and y and the residual's gradient where they are. A block keeps x and the gradient
in front of the ReLU. Sums and slopes go without a vector of invstd: dx = k*(u + c1*(x - m)) + c0 with c1 =
-invstd*dweight/n. Times k, c1 would leave float32's range where a channel's deviations reach 1e19.
"""

# mypy: ignore-errors
from __future__ import annotations

import functools

from fastbn.cuda.bundle import make_spread, place
from fastbn.cuda.bundle_copies import make_begin, make_steps, make_sums_gradients
from fastbn.cuda.bundle_sums import make_bundle_sums
from fastbn.cuda.channel import make_affine, make_slopes
from fastbn.cuda.driver import ARITHMETIC, cuda, device, kernel, types
from fastbn.cuda.fetch import PARTS, close, fetch
from fastbn.cuda.finalize import gradients
from fastbn.cuda.plan_bundle import MOST
from fastbn.cuda.simd import access, anew, fma, mul
from fastbn.cuda.sweep import Variant, make_terms

int32, int64 = types.int32, types.int64


def make_write_gradients(what: Variant):
    """Write a thread's rows of the input's gradient, and begin to copy the next bundle's if there are ``more``."""
    kind, W, threads, slope = what.kind, what.W, what.threads, make_slope(what)
    A, io, terms = ARITHMETIC[kind], access(kind, W), make_terms(what._replace(relu=False, residual=False))
    store, recall, together = io.store, io.recall, rows_together(what)

    @device
    def write(x, g, dx, slab, second, constants, r, end, height, at, step, ahead, more, steps):
        m, k, c1, c0 = constants
        kept = int32(4 * cuda.threadIdx.x)
        for _ in range(PARTS):
            for _ in range(steps * together):
                if r < end:
                    x0 = recall(slab, kept)
                    u, t = terms(x0, recall(slab, second + kept), x0, m, A(1), k, k)
                    store(dx, at, slope(u, t, k, c1, c0))
                    if more:
                        fetch(slab, kept, x, at + ahead)
                        fetch(slab, second + kept, g, at + ahead)
                r, kept = int32(r + height), int32(kept + 4 * threads)
                at += step
            close()

    return write


def rows_together(what: Variant) -> int:
    """Rows of the output that a thread asks for at once, where it decides about a ReLU."""
    return 2 if what.relu and what.residual else 1


def make_settle_gradients(what: Variant):
    """From a gang's sums to the slopes (c1, c0) of a bundle's channels; the first part writes their gradients."""
    kind, warps, A, slopes = what.kind, what.threads // 32, ARITHMETIC[what.kind], make_slopes(what.kind)
    collect = make_bundle_sums(kind, what.W, what.threads).collect

    @device
    def settle(table, here, own, partial, place, first, n, dweight, dbias, K):
        gang, G, part, turn = place
        for j in range(anew(int32(cuda.threadIdx.x)) >> 5, K, warps):
            s, se, q, qe = collect(own, partial, gang, G, turn, j, K)
            if cuda.threadIdx.x & 31 == 0:
                invstd, k, rest = table[here + MOST + j], table[here + 2 * MOST + j], table[here + 4 * MOST + j]
                db, dw = gradients(s, se, q, qe, rest)
                dw *= invstd
                if part == 0:
                    dweight[first + j], dbias[first + j] = dw, db
                _, c0 = slopes(dw, db, invstd, k, rest, n)
                table[10 * MOST + j], table[11 * MOST + j] = -invstd * (dw / A(n)), c0

    return settle


def make_slope(what: Variant):
    """Dx of a vector, see above; k*u with frozen statistics."""
    frozen = what.frozen

    @device
    def slope(u, t, k, c1, c0):
        if frozen:
            return mul(k, u)
        else:
            return fma(k, fma(c1, t, u), c0)

    return slope


def make_known(kind: str):
    """Put the constants (m, invstd, k, b, rest) of one channel into a table."""
    A, affine = ARITHMETIC[kind], make_affine(kind, False)

    @device
    def known(table, at, stats, weight, bias, c, C, flags):
        m, invstd, k, b, rest = affine(stats, stats, weight, bias, c, C, A(0), flags)
        table[at], table[at + MOST], table[at + 2 * MOST] = m, invstd, k
        table[at + 3 * MOST], table[at + 4 * MOST] = b, rest

    return known


@functools.cache
def backward(what: Variant):
    """Gradients of input, weight, bias (and residual). Floor: two reads and one write, and y and dr where they are."""
    kind, W, threads, A = what.kind, what.W, what.threads, ARITHMETIC[what.kind]
    write, spread, together = make_write_gradients(what), make_spread(what), rows_together(what)
    begin, steps_of = make_begin(threads, together, 2), make_steps(together)
    sums_of = make_sums_gradients(what, together)
    settle, known, sums = make_settle_gradients(what), make_known(kind), make_bundle_sums(kind, W, threads)
    (ready, publish, _), both, pair, size = sums, 4 * threads, 2 * MOST, 12 * MOST

    @kernel("TTTTTAAAAAAiiiiiiiiii", kind, threads, what.layers)
    def bundle_backward(
        x, g, y, dx, dr, stats, weight, bias, dweight, dbias, partial, N, C, S, K, V, height, G, gangs, chunk, flags
    ):
        slab = cuda.shared.array(0, int32)
        red = cuda.shared.array(both, A)
        own = cuda.shared.array(pair, A)
        table = cuda.shared.array(size, A)  # m, invstd, k, b, rest of two turns, then c1, c0
        gang, last = int32(cuda.blockIdx.x // G), int32(threads - 1 - cuda.threadIdx.x)
        part, n = int32(cuda.blockIdx.x - gang * G), int64(N) * S
        step, second = int64(height) * C * S, int32((chunk + height - 1) // height * 4 * threads)
        ahead, steps = int64(gangs) * K * S, steps_of(chunk, height)
        ready(partial, gang, G, part, K)
        r, end, at, _, _ = place(part, chunk, gang, N, C, S, K, V, height, W)
        begin(x, g, slab, second, r, end, height, at, step, steps)
        if last < K:
            known(table, last, stats, weight, bias, int32(gang * K + last), C, flags)
        cuda.syncthreads()
        bundle, turn = gang, int32(0)
        while bundle * K < C:
            r, end, at, first, count = place(part, chunk, bundle, N, C, S, K, V, height, W)
            here, others = (turn & 1) * 5 * MOST, (turn + 1 & 1) * 5 * MOST
            m, b = spread(table, here, first, count), spread(table, here + 3 * MOST, first, count)
            k = spread(table, here + 2 * MOST, first, count)
            s, q = sums_of(y, dr, slab, second, (m, k, b), r, end, height, at, step, steps)
            publish(red, own, partial, gang, G, part, turn, s, q, count, S, V, height, K)
            c = int32((bundle + gangs) * K + last)
            if last < K and c < C:
                known(table, others + last, stats, weight, bias, c, C, flags)
            settle(table, here, own, partial, (gang, G, part, turn), bundle * K, n, dweight, dbias, K)
            cuda.syncthreads()
            r, end, at, first, count = place(part, chunk, bundle, N, C, S, K, V, height, W)
            m = spread(table, here, first, count)
            k, c1 = spread(table, here + 2 * MOST, first, count), spread(table, 10 * MOST, first, count)
            c0 = spread(table, 11 * MOST, first, count)
            more = (bundle + gangs) * K < C
            write(x, g, dx, slab, second, (m, k, c1, c0), r, end, height, at, step, ahead, more, steps)
            bundle, turn = int32(bundle + gangs), int32(turn + 1)

    return bundle_backward
