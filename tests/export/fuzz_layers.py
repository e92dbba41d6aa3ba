"""Random normalizations and what absorbs them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .fuzz_model import Fuzz, Shape, maker


def linear(f: Fuzz, x: str, s: Shape) -> Any:
    """A convolution of 1x1 or a product with a constant; None for other ranks."""
    if len(s) == 4:
        out = int(f.rng.integers(2, 4))
        return f.op("Conv", x, f.parameter(out, s[1], 1, 1)), (s[0], out, *s[2:])
    if len(s) in (2, 3):
        out = int(f.rng.integers(2, 4))
        return f.op("MatMul", x, f.parameter(s[-1], out)), (*s[:-1], out)
    return None


@maker(14)
def _bn(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) < 2:
        return None
    c = s[1]
    kind = f.rng.random()
    if kind < 0.25:
        zero = f.constant(np.zeros(c, f.dtype))
        scale, bias, mean = f.parameter(c, positive=True), zero, zero
    else:
        scale, bias, mean = f.parameter(c, positive=kind < 0.5), f.parameter(c), f.parameter(c)
    attributes = {"epsilon": 1e-3} if f.chance(0.5) else {}
    if kind > 0.9:  # a shift and nothing else
        one, zero = (f.constant(np.full(c, v, f.dtype)) for v in (1, 0))
        return f.op("BatchNormalization", x, one, f.parameter(c), zero, one, epsilon=0.0), s
    return f.op("BatchNormalization", x, scale, bias, mean, f.parameter(c, positive=True), **attributes), s


@maker(3)
def _written_out(f: Fuzz, x: str, s: Shape) -> Any:
    axis = int(f.rng.integers(len(s)))
    shape = (s[axis],) + (1,) * (len(s) - 1 - axis)
    if f.chance(0.2):
        shape = (1,) * (len(s) - len(shape)) + shape
    for _ in range(int(f.rng.integers(1, 4))):
        kind = f.pick("Mul", "Add", "Sub", "Div")
        operand = f.parameter(*(shape if f.chance(0.8) else ()), positive=kind == "Div")
        pair = (x, operand) if kind == "Div" or f.chance(0.7) else (operand, x)
        x = f.op(kind, *pair)
    return x, s


@maker(7)
def _conv(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) not in (3, 4):
        return None
    group = f.pick(*[g for g in (1, 2, s[1]) if s[1] % g == 0])
    out = group * int(f.rng.integers(1, 4))
    kernel = [int(f.rng.integers(1, min(3, d) + 1)) for d in s[2:]]
    attributes: dict[str, Any] = {"group": group}
    pads = [0] * (2 * len(kernel))
    if f.chance(0.3):
        pads = [int(f.rng.integers(2)) for _ in pads]
        attributes["pads"] = pads
    weights = [f.parameter(out, s[1] // group, *kernel)]
    if f.chance(0.5):
        weights.append(f.parameter(out))
    spatial = [d + pads[i] + pads[i + len(kernel)] - k + 1 for i, (d, k) in enumerate(zip(s[2:], kernel, strict=True))]
    return f.op("Conv", x, *weights, **attributes), (s[0], out, *spatial)


@maker(2)
def _conv_transpose(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) != 4 or max(s[2:]) > 8:
        return None
    # The reference evaluator of onnx 1.23 gives every group the whole bias: only onnxruntime judges groups here.
    group = f.pick(*[g for g in (1, 2) if s[1] % g == 0 and (g == 1 or f.dtype == np.float32)])
    per_group, kernel, stride = int(f.rng.integers(1, 4)), int(f.rng.integers(1, 3)), int(f.rng.integers(1, 3))
    weights = [f.parameter(s[1], per_group, kernel, kernel)]
    if f.chance(0.5):
        weights.append(f.parameter(per_group * group))
    spatial = [stride * (d - 1) + kernel for d in s[2:]]
    attributes = {"group": group, "strides": [stride, stride], "kernel_shape": [kernel, kernel]}
    return f.op("ConvTranspose", x, *weights, **attributes), (s[0], per_group * group, *spatial)


@maker(4)
def _gemm(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) != 2:
        return None
    out, ta, tb, left = int(f.rng.integers(1, 6)), f.chance(0.2), f.chance(0.5), f.chance(0.15)
    attributes = {"alpha": f.pick(1.0, 0.5), "beta": f.pick(1.0, 2.0, 0.0), "transA": int(ta), "transB": int(tb)}
    if left:
        k, n = (s[1], s[0]) if tb else s
        a = f.parameter(*((k, out) if ta else (out, k)))
        pair, rows, columns = (a, x), out, n
    else:
        rows, k = (s[1], s[0]) if ta else s
        b = f.parameter(*((out, k) if tb else (k, out)))
        pair, columns = (x, b), out
    inputs = list(pair)
    c = f.pick(*([None] if f.opset >= 11 else []), (), (1,), (columns,), (1, columns), (rows, 1), (rows, columns))
    if c is not None:
        inputs.append(f.parameter(*c))
    return f.op("Gemm", *inputs, **attributes), (rows, columns)


@maker(4)
def _matmul(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) < 2:
        return None
    out = int(f.rng.integers(1, 6))
    if f.chance(0.2):
        return f.op("MatMul", f.parameter(out, s[-2]), x), (*s[:-2], out, s[-1])
    batch = (s[0],) if len(s) == 3 and f.chance(0.2) else ()
    y = f.op("MatMul", x, f.parameter(*batch, s[-1], out))
    if f.chance(0.4):
        bias = f.parameter(out)
        y = f.op("Add", *((y, bias) if f.chance(0.5) else (bias, y)))
    return y, (*s[:-1], out)


@maker(2)
def _product(f: Fuzz, x: str, s: Shape) -> Any:
    """A product of two computed factors."""
    made = [linear(f, x, s) for _ in range(2)] if len(s) in (2, 3, 4) else [None]
    if any(one is None for one in made):
        return None
    (a, left), (b, right) = made
    order = list(range(len(s)))
    turned = f.op("Transpose", b, perm=[*order[:-2], order[-1], order[-2]])
    if len(s) == 2:
        if f.chance(0.5):
            return f.op("Gemm", a, b, f.parameter(right[1]), transA=1, alpha=f.pick(1.0, 0.5)), (left[1], right[1])
        return f.op("MatMul", f.op("Transpose", a), b), (left[1], right[1])
    if left[:-2] == right[:-2] and left[-1] == right[-1]:
        return f.op("MatMul", a, turned), (*left[:-1], right[-2])
    return f.op("MatMul", a, f.parameter(left[-1], 2)), (*left[:-1], 2)


@maker(2)
def _einsum(f: Fuzz, x: str, s: Shape) -> Any:
    if f.opset < 12 or len(s) not in (3, 4):
        return None
    if len(s) == 4:
        if f.chance(0.5):
            return f.op("Einsum", x, f.parameter(s[3], 2), equation="nctv,vw->nctw"), (*s[:3], 2)
        return f.op("Einsum", f.parameter(s[1], s[2], 3), x, equation="ctk,nctv->nkv"), (s[0], 3, s[3])
    if f.chance(0.3):
        return f.op("Einsum", x, f.parameter(3, s[1], s[2]), equation="bij,kij->bk"), (s[0], 3)
    out = int(f.rng.integers(1, 5))
    w = f.parameter(s[2], out)
    if f.chance(0.5):
        return f.op("Einsum", x, w, equation="abk,kc->abc"), (s[0], s[1], out)
    return f.op("Einsum", w, x, equation="kc,abk->acb"), (s[0], out, s[1])
