"""Gates (see ``gates``) of layer, group and instance norm with weight and bias: small plain calls.

``sets`` of L elements with the affine of C channels of ``each`` elements. ``short`` is None for the kernels in
``sets_four``, else G of those in ``sets`` and ``sets_backward``; ``run`` is their S.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu._jit import helper, jit
from fastbn.cpu.gates import apart
from fastbn.cpu.objects import call, data, float64s, nbytes, numbers, plain, same_shape, vector, zeros2
from fastbn.cpu.simd import base, empty, get, put


@jit
def train(x, y, weight, bias, stats, kind, dtype, wide, kernel, sets, L, C, each, short, run, eps):
    """Forward; 1 if done, 0 if refused. ``stats`` is ours."""
    size = sets * L
    p, q = plain(x, kind, dtype, size), plain(y, kind, dtype, size)
    n, c = nbytes(dtype, size), nbytes(wide, C)
    w, b = vector(weight, kind, wide, C), vector(bias, kind, wide, C)
    if p == 0 or q == 0 or w == 0 or b == 0 or not (same_shape(x, y) and apart(p, n, q, n)):
        return 0
    if not (apart(q, n, w, c) and apart(q, n, b, c) and 0.0 < eps < np.inf):
        return 0
    xs, ys, ws, bs = numbers(dtype, p, size), numbers(dtype, q, size), numbers(wide, w, C), numbers(wide, b, C)
    known, kinds = float64s(data(stats), 3 * sets), numbers(wide, p, 0)
    if short is None:
        call(kernel, xs, ys, ws, bs, known, kinds, sets, L, each, eps, False, zeros2())
    else:
        call(kernel, xs, ys, ws, bs, known, kinds, sets, L, short, each, run, eps, False, zeros2())
    return 1


@helper
def _merged(sums, room, C, dweight, dbias):
    """Add up what the kernels leave, as ``launch_sets.backward`` does; tells whether all is finite."""
    half, rest = room // 2, 0.0
    for at in range(C, half, C):
        for j in range(C):
            put(sums, j, get(sums, j) + get(sums, at + j))
            put(sums, half + j, get(sums, half + j) + get(sums, half + at + j))
    for c in range(C):
        dw, db = get(sums, c), get(sums, half + c)
        dweight[c], dbias[c] = dw, db
        rest += (dw - dw) + (db - db)  # NaN where one is not finite
    return rest == 0.0


@jit
def backward(
    x, grad, dx, weight, dweight, dbias, stats, kind, dtype, wide, kernel, sets, L, C, each, short, run, per, room
):
    """Gradients; dx is not grad. ``dweight``, ``dbias`` and ``stats`` are ours; kernels want ``room`` for sums.

    Refused after dx was written where a sum is not finite: the usual way takes it again in float64.
    """
    size = sets * L
    p, g, q = plain(x, kind, dtype, size), plain(grad, kind, dtype, size), plain(dx, kind, dtype, size)
    n, c = nbytes(dtype, size), nbytes(wide, C)
    w = vector(weight, kind, wide, C)
    if p == 0 or g == 0 or q == 0 or w == 0 or not (same_shape(x, grad) and same_shape(x, dx)):
        return 0
    if not (apart(p, n, q, n) and apart(g, n, q, n) and apart(w, c, q, n)):
        return 0
    known, kinds = float64s(data(stats), 3 * sets), numbers(wide, p, 0)
    sums = empty(room, known)
    for j in range(room):
        sums[j] = 0.0
    xs, gs, ds, ws = numbers(dtype, p, size), numbers(dtype, g, size), numbers(dtype, q, size), numbers(wide, w, C)
    if short is None:
        call(kernel, xs, gs, ds, ws, known, sums, kinds, sets, L, each, per, False, zeros2())
    else:
        call(kernel, xs, gs, ds, ws, known, sums, kinds, sets, L, short, each, run, per, False, zeros2())
    dws, dbs = numbers(wide, data(dweight), C), numbers(wide, data(dbias), C)
    fine = _merged(base(sums), room, C, dws, dbs)
    return 1 if fine and sums.size == room else 0  # the size keeps them alive
