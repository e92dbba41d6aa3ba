"""Gates: compiled code that lets small plain calls through to a kernel, and refuses all others before it writes.

A gate takes the arrays as they come from Python (``objects.Handle``), asks itself whether they are plain ones that
fit, and calls the kernel by the address of its code: a call of (64, 100) in half the time that unpacking, checks
in Python and Numba's dispatcher take. ``kind`` is ``numpy.ndarray``, ``dtype`` that of tensors, ``wide`` of
parameters; (N, C, S) is the shape, V and ``per`` belong to the kernels in ``rows`` and are None for those in
``planes``; ``streamed`` as there.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu._jit import jit, part
from fastbn.cpu.objects import (
    call,
    data,
    float64s,
    nbytes,
    numbers,
    numbers_of,
    or_signs,
    plain,
    same_shape,
    vector,
    with_signs,
    zeros2,
)


@part
def apart(p, n, q, m):
    """Tell whether n bytes at p and m at q share none."""
    return p + n <= q or q + m <= p


@part
def _in_nobodys_way(v, p, q, n, w, b, c):
    """Tell whether running statistics at v, c bytes, share nothing with x, y, weight and bias."""
    return apart(p, n, v, c) and apart(q, n, v, c) and apart(v, c, w, c) and apart(v, c, b, c)


@part
def _fits(residual, x, q, kind, dtype, size):
    """Tell whether a residual, which may be None, is plain, shaped like x, and apart from y at q or y itself."""
    if residual is None:
        return True
    r = plain(residual, kind, dtype, size)
    n = nbytes(dtype, size)
    return r != 0 and same_shape(residual, x) and (r == q or apart(r, n, q, n))


@part
def _over(residual, q, kind, dtype, size):
    """Tell whether y at q is memory of the residual."""
    if residual is None:
        return False
    return plain(residual, kind, dtype, size) == q


@jit
def train(
    x, residual, y, weight, bias, running_mean, running_var, stats, signs, kind, dtype, wide, kernel,
    size, N, C, S, V, per, streamed, moved, eps, momentum, relu,
):  # fmt: skip
    """Training forward of size elements; 1 if done, 0 if refused. ``moved`` is C or, without running statistics, 0.

    ``signs``, ours, are written if there are any.
    """
    p, q = plain(x, kind, dtype, size), plain(y, kind, dtype, size)
    n, c = nbytes(dtype, size), nbytes(wide, C)
    w, b = vector(weight, kind, wide, C), vector(bias, kind, wide, C)
    m, v = vector(running_mean, kind, wide, moved), vector(running_var, kind, wide, moved)
    if p == 0 or q == 0 or w == 0 or b == 0 or m == 0 or v == 0 or not (same_shape(x, y) and apart(p, n, q, n)):
        return 0
    if not _fits(residual, x, q, kind, dtype, size):
        return 0
    if not (apart(q, n, w, c) and apart(q, n, b, c) and 0.0 < eps < np.inf and -np.inf < momentum < np.inf):
        return 0
    if moved > 0 and not (
        apart(m, c, v, c) and _in_nobodys_way(m, p, q, n, w, b, c) and _in_nobodys_way(v, p, q, n, w, b, c)
    ):
        return 0
    if moved > 0 and residual is not None:
        r = plain(residual, kind, dtype, size)
        if not (apart(r, n, m, c) and apart(r, n, v, c)):
            return 0
    xs, ys = numbers(dtype, p, size), with_signs(numbers(dtype, q, size), signs)
    ws, bs = numbers(wide, w, C), numbers(wide, b, C)
    ms, vs, known = numbers(wide, m, moved), numbers(wide, v, moved), float64s(data(stats), 3 * C)
    rs = numbers_of(dtype, residual, size)
    streams = streamed and (signs is not None or not _over(residual, q, kind, dtype, size))  # see ``tuning.streams``
    if V is None:
        call(kernel, xs, rs, ys, ws, bs, ms, vs, known, N, C, S, eps, momentum, relu, streams, zeros2())
    else:
        call(kernel, xs, rs, ys, ws, bs, ms, vs, known, (N, C, S), V, per, eps, momentum, relu, streams, zeros2())
    return 1


@jit
def infer(
    x, residual, y, mean, var, weight, bias, stats, kind, dtype, wide, given, kernel,
    size, N, C, S, V, per, streamed, eps, relu,
):  # fmt: skip
    """Inference by a mean and a variance, which go to ``stats`` through ``given``; y may be x."""
    p, q = plain(x, kind, dtype, size), plain(y, kind, dtype, size)
    n, c = nbytes(dtype, size), nbytes(wide, C)
    m, v = vector(mean, kind, wide, C), vector(var, kind, wide, C)
    w, b = vector(weight, kind, wide, C), vector(bias, kind, wide, C)
    if p == 0 or q == 0 or w == 0 or b == 0 or m == 0 or v == 0 or not same_shape(x, y):
        return 0
    if not (p == q or apart(p, n, q, n)) or not _fits(residual, x, q, kind, dtype, size):
        return 0
    if not (apart(q, n, w, c) and apart(q, n, b, c) and 0.0 <= eps < np.inf):
        return 0
    if not (apart(q, n, m, c) and apart(q, n, v, c)):
        return 0
    xs, ys, ws, bs = numbers(dtype, p, size), numbers(dtype, q, size), numbers(wide, w, C), numbers(wide, b, C)
    known, rs = float64s(data(stats), 3 * C), numbers_of(dtype, residual, size)
    call(given, numbers(wide, m, C), numbers(wide, v, C), known, eps)
    streams = streamed and p != q and not _over(residual, q, kind, dtype, size)
    if V is None:
        call(kernel, xs, rs, ys, ws, bs, known, N, C, S, relu, streams, zeros2())
    else:
        call(kernel, xs, rs, ys, ws, bs, known, (N, C, S), V, per, relu, streams, zeros2())
    return 1


@jit
def backward(
    x, grad, y, dx, dr, weight, bias, dweight, dbias, stats, signs, kind, dtype, wide, kernel,
    size, N, C, S, V, per, streamed, frozen, relu,
):  # fmt: skip
    """Gradients; dx may be grad if dr is None. ``dr``, ``dweight``, ``dbias``, ``stats`` and ``signs`` are ours."""
    p, g, q = plain(x, kind, dtype, size), plain(grad, kind, dtype, size), plain(dx, kind, dtype, size)
    n, c = nbytes(dtype, size), nbytes(wide, C)
    w, b = vector(weight, kind, wide, C), vector(bias, kind, wide, C)
    if p == 0 or g == 0 or q == 0 or w == 0 or b == 0 or not (same_shape(x, grad) and same_shape(x, dx)):
        return 0
    if not apart(p, n, q, n) or not ((g == q and dr is None) or apart(g, n, q, n)):
        return 0
    if not (apart(q, n, w, c) and apart(q, n, b, c)):
        return 0
    if y is not None:
        o = plain(y, kind, dtype, size)
        if o == 0 or not (same_shape(x, y) and apart(o, n, q, n)):
            return 0
    xs, gs, ds = numbers(dtype, p, size), numbers(dtype, g, size), numbers(dtype, q, size)
    ws, bs = numbers(wide, w, C), numbers(wide, b, C)
    dws, dbs, known = numbers(wide, data(dweight), C), numbers(wide, data(dbias), C), float64s(data(stats), 3 * C)
    ys, rs = or_signs(numbers_of(dtype, y, size), signs), numbers_of(dtype, dr, size)
    streams = streamed and g != q
    if V is None:
        call(kernel, xs, gs, ys, ds, rs, None, ws, bs, dws, dbs, known, N, C, S, frozen, relu, streams, zeros2())
    else:
        call(kernel, xs, gs, ys, ds, rs, ws, bs, dws, dbs, known, (N, C, S), V, per, frozen, relu, streams, zeros2())
    return 1
