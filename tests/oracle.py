"""The checks that most tests share: one call of a public function against reference.py in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn import reference
from fastbn.functional import frozen
from tests.tolerances import BF16, TINY, arithmetic, assert_within, bound

# By kernel: shapes with odd sizes, so that every vector has a tail. test_launch holds them to their kernels.
SHAPES = {
    "planes": [(3, 5, 17, 19), (2, 3, 31), (1, 7, 1031), (5, 1, 8209)],
    "rows": [(37, 13), (29, 7, 3), (2, 1, 5), (5, 3, 5, 3), (263, 1009), (101, 521, 5)],
    "swept": [(4099, 67), (20011, 3, 5)],
}
ALL_SHAPES = [(kind, shape) for kind, shapes in SHAPES.items() for shape in shapes]


class Case(NamedTuple):
    """Arguments of one call."""

    x: Any
    weight: Any
    bias: Any
    residual: Any
    activation: str | None
    axis: int = 1
    eps: float = 1e-5

    def options(self):
        return {"activation": self.activation, "residual": self.residual, "axis": self.axis, "eps": self.eps}

    def wide(self):
        """Return the float64 values of what the kernels see."""
        return [None if a is None else np.asarray(a).astype(np.float64) for a in self[:4]]


def column(v, ndim, axis):
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(v, np.float64).reshape(shape)


def normal(rng, shape, dtype, axis=1):
    """Return values whose mean and deviation differ by channel."""
    C = shape[axis]
    mean, std = column(rng.normal(size=C), len(shape), axis), column(rng.uniform(0.5, 2.0, C), len(shape), axis)
    return (rng.standard_normal(shape) * std + mean).astype(dtype)


def case(rng, shape, dtype, *, axis=1, activation=None, residual=False, affine=(True, True), **options):
    """Draw arguments for a call."""
    C, kind = shape[axis], arithmetic(dtype)
    weight = rng.uniform(-2.0, 2.0, C).astype(kind) if affine[0] else None
    bias = rng.normal(size=C).astype(kind) if affine[1] else None
    added = rng.standard_normal(shape).astype(dtype) if residual else None
    return Case(normal(rng, shape, dtype, axis), weight, bias, added, activation, axis, **options)


def expected(c, mean, var):
    """Return y, the bound of its error and the input of the activation with its bound."""
    x, weight, bias, residual = c.wide()
    z = reference.apply(x, mean, var, weight, bias, eps=c.eps, axis=c.axis, residual=residual)
    scale = np.abs(column(np.ones(len(mean)) if weight is None else weight, x.ndim, c.axis))
    parts = [scale * (1.0 + np.abs(reference.apply(x, mean, var, eps=c.eps, axis=c.axis)))]
    parts += [np.abs(column(bias, x.ndim, c.axis))] if bias is not None else []
    parts += [np.abs(residual)] if residual is not None else []
    limit = bound(z, sum(parts), c.x.dtype)
    y = np.where(z <= 0.0, 0.0, z) if c.activation else z
    return y, limit, z


def check_infer(c, mean, var, **options):
    """Check ``batch_norm_infer``; return y."""
    y = fastbn.batch_norm_infer(c.x, mean, var, c.weight, c.bias, **c.options(), **options)
    want, limit, _ = expected(c, np.asarray(mean, np.float64), np.asarray(var, np.float64))
    assert y.dtype == c.x.dtype and y.shape == c.x.shape
    assert_within(y, want, limit, "y")
    return y


def check_train(c, *, momentum=0.1, **options):
    """Check ``batch_norm_train`` with its running statistics; return (y, saved)."""
    kind, C = arithmetic(c.x.dtype), c.x.shape[c.axis]
    rm, rv = np.full(C, 0.5, kind), np.full(C, 2.0, kind)
    y, saved = fastbn.batch_norm_train(c.x, c.weight, c.bias, rm, rv, momentum=momentum, **c.options(), **options)
    x, n = c.wide()[0], c.x.size // C
    mean, var = reference.statistics(x, c.axis)
    want, limit, _ = expected(c, mean, var)
    assert y.dtype == c.x.dtype and y.shape == c.x.shape
    assert_within(y, want, limit, "y")
    assert_within(saved.mean, mean, bound(0.0, np.abs(mean) + np.sqrt(var), kind), "mean")
    assert_within(saved.variance, var, bound(0.0, var, kind), "variance")
    assert_within(saved.invstd, 1 / np.sqrt(var + c.eps), bound(0.0, 1 / np.sqrt(var + c.eps), kind), "invstd")
    assert saved.count == n
    new = reference.running(np.full(C, 0.5), mean, momentum)
    assert_within(rm, new, bound(new, 0.5 + np.abs(mean) + np.sqrt(var), kind), "running_mean")
    new = reference.running(np.full(C, 2.0), var * n / (n - 1), momentum)
    with np.errstate(over="ignore"):
        new = new.astype(kind).astype(np.float64)  # inf where a variance is no float32
    assert_within(rv, new, bound(new, 2.0 + var * n / (n - 1), kind), "running_var")
    return y, saved


def check_frozen(c, mean, var):
    """Check the forward pass that keeps running statistics constant; return (y, saved)."""
    y, saved = frozen(c.x, mean, var, c.weight, c.bias, **c.options())
    want, limit, _ = expected(c, mean, var)
    assert_within(y, want, limit, "y")
    return y, saved


def check_backward(c, saved, grad, is_frozen=False, **options):
    """Check ``backward`` after ``saved``; return the gradients.

    Where the input of a ReLU is within rounding of zero, either side is right; its effect on the sums is allowed for.
    """
    grads = fastbn.backward(grad, saved, **options)
    x, weight, bias, _ = c.wide()
    mean, var, axis = np.asarray(saved.mean), np.asarray(saved.variance), c.axis
    _, limit, z = expected(c, mean, var)
    g = np.asarray(grad).astype(np.float64)
    unsure = np.where(np.abs(z) <= limit + TINY[c.x.dtype.name], np.abs(g), 0.0) if c.activation else np.zeros_like(g)
    u = np.where(z <= 0.0, 0.0, g) if c.activation else g
    dx, dweight, dbias, _ = reference.backward(u, x, mean, var, weight, bias, eps=c.eps, axis=axis, frozen=is_frozen)
    others, n = tuple(a for a in range(x.ndim) if a != axis), x.size // x.shape[axis]
    xhat = np.abs(reference.apply(x, mean, var, eps=c.eps, axis=axis))
    kind = arithmetic(c.x.dtype)
    size = np.abs(u) + unsure
    terms, weighed = size.sum(others), (size * xhat).sum(others)
    slack, weighed_slack = unsure.sum(others), (unsure * xhat).sum(others)
    k = np.abs(column(1.0 if weight is None else weight, x.ndim, axis)) / np.sqrt(column(var, x.ndim, axis) + c.eps)
    sums = 0.0 if is_frozen else (column(terms, x.ndim, axis) + xhat * column(weighed, x.ndim, axis)) / n
    loose = 0.0 if is_frozen else (column(slack, x.ndim, axis) + xhat * column(weighed_slack, x.ndim, axis)) / n
    assert_within(grads.input, dx, bound(dx, k * (size + sums), c.x.dtype) + k * (unsure + loose), "grad.input")
    assert (grads.weight is None) == (c.weight is None) and (grads.bias is None) == (c.bias is None)
    if c.weight is not None:
        assert grads.weight.dtype == kind
        assert_within(grads.weight, dweight, bound(dweight, 2 * weighed, kind) + weighed_slack, "grad.weight")
    if c.bias is not None:
        assert_within(grads.bias, dbias, bound(dbias, 2 * terms, kind) + slack, "grad.bias")
    if c.residual is None:
        assert grads.residual is None
    else:
        assert_within(grads.residual, u, unsure, "grad.residual")
    return grads


def same_bits(a, b):
    """Tell whether two arrays have the same shape, dtype and bytes."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


__all__ = [
    "ALL_SHAPES", "BF16", "SHAPES", "Case", "case", "check_backward", "check_frozen", "check_infer", "check_train",
    "column", "expected", "normal", "same_bits",
]  # fmt: skip
