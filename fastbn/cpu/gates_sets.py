"""Gates (see ``gates``) of layer norm over the last axis with weight and bias: small plain float32 calls.

``sets`` of L elements each. G is None for the kernels in ``sets_short``, 1 for those in ``sets`` and ``sets_backward``.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu._jit import jit
from fastbn.cpu.gates import apart
from fastbn.cpu.objects import call, data, float32s, float64s, plain, same_shape, vector, zeros2
from fastbn.cpu.simd import base, empty, get, put


@jit
def train(x, y, weight, bias, stats, kind, dtype, kernel, sets, L, G, eps):
    """Forward; 1 if done, 0 if refused. ``stats`` is ours."""
    size = sets * L
    p, q = plain(x, kind, dtype, size), plain(y, kind, dtype, size)
    w, b = vector(weight, kind, dtype, L), vector(bias, kind, dtype, L)
    if p == 0 or q == 0 or w == 0 or b == 0 or not (same_shape(x, y) and apart(p, size, q, size)):
        return 0
    if not (apart(q, size, w, L) and apart(q, size, b, L) and 0.0 < eps < np.inf):
        return 0
    xs, ys, ws, bs = float32s(p, size), float32s(q, size), float32s(w, L), float32s(b, L)
    known, kinds = float64s(data(stats), 3 * sets), float32s(p, 0)
    if G is None:
        call(kernel, xs, ys, ws, bs, known, kinds, sets, L, 1, eps, False, zeros2())
    else:
        call(kernel, xs, ys, ws, bs, known, kinds, sets, L, G, 1, None, eps, False, zeros2())
    return 1


@jit
def backward(x, grad, dx, weight, dweight, dbias, stats, kind, dtype, kernel, sets, L, G, per):
    """Gradients; dx is not grad. ``dweight``, ``dbias`` and ``stats`` are ours; sums are kept for ``per`` sets each.

    Refused after dx was written where a sum is not finite: the usual way takes it again in float64.
    """
    size = sets * L
    p, g, q = plain(x, kind, dtype, size), plain(grad, kind, dtype, size), plain(dx, kind, dtype, size)
    w = vector(weight, kind, dtype, L)
    if p == 0 or g == 0 or q == 0 or w == 0 or not (same_shape(x, grad) and same_shape(x, dx)):
        return 0
    if not (apart(p, size, q, size) and apart(g, size, q, size) and apart(w, L, q, size)):
        return 0
    known = float64s(data(stats), 3 * sets)
    room = (sets + per - 1) // per * 2 * L
    scratch = empty(room, known)
    sums = base(scratch)
    for j in range(room):
        put(sums, j, 0.0)
    xs, gs, ds, ws = float32s(p, size), float32s(g, size), float32s(q, size), float32s(w, L)
    kinds = float32s(p, 0)
    if G is None:
        call(kernel, xs, gs, ds, ws, known, scratch, kinds, sets, L, 1, per, False, zeros2())
    else:
        call(kernel, xs, gs, ds, ws, known, scratch, kinds, sets, L, G, 1, None, per, False, zeros2())
    dws, dbs, rest = float32s(data(dweight), L), float32s(data(dbias), L), 0.0
    for at in range(2 * L, room, 2 * L):
        for j in range(2 * L):
            put(sums, j, get(sums, j) + get(sums, at + j))
    for j in range(L):
        dw, db = get(sums, j), get(sums, L + j)
        dws[j], dbs[j] = dw, db
        rest += (dw - dw) + (db - db)  # NaN where one is not finite
    return 1 if scratch.size == room and rest == 0.0 else 0
