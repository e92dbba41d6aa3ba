"""Gates: compiled code that lets small plain calls through to a kernel, and refuses all others before it writes.

A gate takes the arrays as they come from Python (``objects.Handle``), asks itself whether they are plain float32 ones
that fit, and calls the kernel by the address of its code: a call of (64, 100) in half the time that unpacking, checks
in Python and Numba's dispatcher take. ``kind`` and ``dtype`` are ``numpy.ndarray`` and its float32; (N, C, S) is the
shape, V and ``per`` belong to the kernels in ``rows`` and are None for those in ``planes``; ``streamed`` as there.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu._jit import jit, part
from fastbn.cpu.objects import (
    call,
    data,
    float32s,
    float32s_of,
    float64s,
    or_signs,
    plain,
    same_shape,
    vector,
    with_signs,
    zeros2,
)


@part
def apart(p, n, q, m):
    """Tell whether n float32 numbers at p and m at q share none."""
    return p + 4 * n <= q or q + 4 * m <= p


@part
def _in_nobodys_way(v, p, q, size, w, b, C):
    """Tell whether C running statistics at v share nothing with x, y, weight and bias."""
    return apart(p, size, v, C) and apart(q, size, v, C) and apart(v, C, w, C) and apart(v, C, b, C)


@part
def _fits(residual, x, q, kind, dtype, size):
    """Tell whether a residual, which may be None, is plain, shaped like x, and apart from y at q or y itself."""
    if residual is None:
        return True
    r = plain(residual, kind, dtype, size)
    return r != 0 and same_shape(residual, x) and (r == q or apart(r, size, q, size))


@part
def _over(residual, q, kind, dtype, size):
    """Tell whether y at q is memory of the residual."""
    if residual is None:
        return False
    return plain(residual, kind, dtype, size) == q


@jit
def train(
    x, residual, y, weight, bias, running_mean, running_var, stats, signs, kind, dtype, kernel,
    size, N, C, S, V, per, streamed, moved, eps, momentum, relu,
):  # fmt: skip
    """Training forward of size elements; 1 if done, 0 if refused. ``moved`` is C or, without running statistics, 0.

    ``signs``, ours, are written if there are any.
    """
    p, q = plain(x, kind, dtype, size), plain(y, kind, dtype, size)
    w, b = vector(weight, kind, dtype, C), vector(bias, kind, dtype, C)
    m, v = vector(running_mean, kind, dtype, moved), vector(running_var, kind, dtype, moved)
    if p == 0 or q == 0 or w == 0 or b == 0 or m == 0 or v == 0 or not (same_shape(x, y) and apart(p, size, q, size)):
        return 0
    if not _fits(residual, x, q, kind, dtype, size):
        return 0
    if not (apart(q, size, w, C) and apart(q, size, b, C) and 0.0 < eps < np.inf and -np.inf < momentum < np.inf):
        return 0
    if moved > 0 and not (
        apart(m, C, v, C) and _in_nobodys_way(m, p, q, size, w, b, C) and _in_nobodys_way(v, p, q, size, w, b, C)
    ):
        return 0
    if moved > 0 and residual is not None:
        r = plain(residual, kind, dtype, size)
        if not (apart(r, size, m, C) and apart(r, size, v, C)):
            return 0
    xs, ys, ws, bs = float32s(p, size), with_signs(float32s(q, size), signs), float32s(w, C), float32s(b, C)
    ms, vs, known = float32s(m, moved), float32s(v, moved), float64s(data(stats), 3 * C)
    rs = float32s_of(residual, size)
    streams = streamed and (signs is not None or not _over(residual, q, kind, dtype, size))  # see ``tuning.streams``
    if V is None:
        call(kernel, xs, rs, ys, ws, bs, ms, vs, known, N, C, S, eps, momentum, relu, streams, zeros2())
    else:
        call(kernel, xs, rs, ys, ws, bs, ms, vs, known, (N, C, S), V, per, eps, momentum, relu, streams, zeros2())
    return 1


@jit
def infer(
    x, residual, y, mean, var, weight, bias, stats, kind, dtype, given, kernel,
    size, N, C, S, V, per, streamed, eps, relu,
):  # fmt: skip
    """Inference by a mean and a variance, which go to ``stats`` through ``given``; y may be x."""
    p, q = plain(x, kind, dtype, size), plain(y, kind, dtype, size)
    m, v = vector(mean, kind, dtype, C), vector(var, kind, dtype, C)
    w, b = vector(weight, kind, dtype, C), vector(bias, kind, dtype, C)
    if p == 0 or q == 0 or w == 0 or b == 0 or m == 0 or v == 0 or not same_shape(x, y):
        return 0
    if not (p == q or apart(p, size, q, size)) or not _fits(residual, x, q, kind, dtype, size):
        return 0
    if not (apart(q, size, w, C) and apart(q, size, b, C) and 0.0 <= eps < np.inf):
        return 0
    if not (apart(q, size, m, C) and apart(q, size, v, C)):
        return 0
    xs, ys, ws, bs = float32s(p, size), float32s(q, size), float32s(w, C), float32s(b, C)
    known, rs = float64s(data(stats), 3 * C), float32s_of(residual, size)
    call(given, float32s(m, C), float32s(v, C), known, eps)
    streams = streamed and p != q and not _over(residual, q, kind, dtype, size)
    if V is None:
        call(kernel, xs, rs, ys, ws, bs, known, N, C, S, relu, streams, zeros2())
    else:
        call(kernel, xs, rs, ys, ws, bs, known, (N, C, S), V, per, relu, streams, zeros2())
    return 1


@jit
def backward(
    x, grad, y, dx, dr, weight, bias, dweight, dbias, stats, signs, kind, dtype, kernel,
    size, N, C, S, V, per, streamed, frozen, relu,
):  # fmt: skip
    """Gradients; dx may be grad if dr is None. ``dr``, ``dweight``, ``dbias``, ``stats`` and ``signs`` are ours."""
    p, g, q = plain(x, kind, dtype, size), plain(grad, kind, dtype, size), plain(dx, kind, dtype, size)
    w, b = vector(weight, kind, dtype, C), vector(bias, kind, dtype, C)
    if p == 0 or g == 0 or q == 0 or w == 0 or b == 0 or not (same_shape(x, grad) and same_shape(x, dx)):
        return 0
    if not apart(p, size, q, size) or not ((g == q and dr is None) or apart(g, size, q, size)):
        return 0
    if not (apart(q, size, w, C) and apart(q, size, b, C)):
        return 0
    if y is not None:
        o = plain(y, kind, dtype, size)
        if o == 0 or not (same_shape(x, y) and apart(o, size, q, size)):
            return 0
    xs, gs, ds, ws, bs = float32s(p, size), float32s(g, size), float32s(q, size), float32s(w, C), float32s(b, C)
    dws, dbs, known = float32s(data(dweight), C), float32s(data(dbias), C), float64s(data(stats), 3 * C)
    ys, rs = or_signs(float32s_of(y, size), signs), float32s_of(dr, size)
    streams = streamed and g != q
    if V is None:
        call(kernel, xs, gs, ys, ds, rs, None, ws, bs, dws, dbs, known, N, C, S, frozen, relu, streams, zeros2())
    else:
        call(kernel, xs, gs, ys, ds, rs, ws, bs, dws, dbs, known, (N, C, S), V, per, frozen, relu, streams, zeros2())
    return 1
