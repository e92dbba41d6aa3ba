"""Random operators that a map travels through, or that it meets."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import helper

from .fuzz_layers import linear
from .fuzz_model import Fuzz, Shape, maker


@maker(4)
def _pointwise(f: Fuzz, x: str, s: Shape) -> Any:
    kind = f.pick("Relu", "Sigmoid", "Tanh", "Identity", "LeakyRelu", "Abs", "Neg", "Dropout")
    return f.op(kind, x), s


@maker(2)
def _pool(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) != 4 or min(s[2:]) < 2:
        return None
    kind = f.pick("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool")
    if kind.startswith("Global"):
        return f.op(kind, x), (*s[:2], 1, 1)
    attributes: dict[str, Any] = {"kernel_shape": [2, 2]}
    pad = int(f.rng.integers(2))
    if pad:
        attributes["pads"] = [pad] * 4
    if kind == "AveragePool" and f.chance(0.5):
        attributes["count_include_pad"] = 1
    return f.op(kind, x, **attributes), (*s[:2], *(d + 2 * pad - 1 for d in s[2:]))


@maker(2)
def _reduce(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) < 3:
        return None
    axis, keep = int(f.rng.integers(-len(s), len(s))), int(f.chance(0.5))
    kind = f.pick("ReduceMean", "ReduceSum", "ReduceMax")
    place = axis % len(s)
    new = (*s[:place], *((1,) if keep else ()), *s[place + 1 :])
    axis = axis if f.opset >= 11 else place
    if f.opset >= (13 if kind == "ReduceSum" else 18):
        return f.op(kind, x, f.ints(axis), keepdims=keep), new
    return f.op(kind, x, axes=[axis], keepdims=keep), new


@maker(3)
def _join(f: Fuzz, x: str, s: Shape) -> Any:
    others = [n for n, t in f.pool if t == s and n != x]
    if not others:
        return None
    kind = f.pick("Add", "Sub", "Mul", "Concat", "Sum")
    pair = [x, f.pick(*others)]
    if f.chance(0.5):
        pair.reverse()
    if kind != "Concat":
        return f.op(kind, *pair), s
    axis = int(f.rng.integers(len(s)))
    return f.op("Concat", *pair, axis=axis), (*s[:axis], 2 * s[axis], *s[axis + 1 :])


@maker(2)
def _branches(f: Fuzz, x: str, s: Shape) -> Any:
    """Two linear branches that meet again."""
    made = [linear(f, x, s) for _ in range(2)]
    if made[0] is None or made[1] is None:
        return None
    if made[0][1] == made[1][1] and f.chance(0.6):
        return f.op(f.pick("Add", "Sub", "Sum"), made[0][0], made[1][0]), made[0][1]
    axis = 1 if len(s) == 4 else len(s) - 1
    joined = list(made[0][1])
    joined[axis] += made[1][1][axis]
    return f.op("Concat", made[0][0], made[1][0], axis=axis), tuple(joined)


@maker(2)
def _identity_branch(f: Fuzz, x: str, s: Shape) -> Any:
    """RepVGG: a convolution that keeps the shape, beside a normalization of its input."""
    if len(s) != 4:
        return None
    group = f.pick(*[g for g in (1, 2, s[1]) if s[1] % g == 0])
    size, dilation = f.pick(1, 3), f.pick(1, 2)
    pads = [dilation * (size // 2)] * 4 if f.chance(0.8) else [0, 0, dilation * (size - 1), dilation * (size - 1)]
    attributes = {"group": group, "pads": pads, "dilations": [dilation] * 2}
    y = f.op("Conv", x, f.parameter(s[1], s[1] // group, size, size), **attributes)
    if f.chance(0.3):
        y = f.op("Add", y, f.op("Conv", x, f.parameter(s[1], s[1], 1, 1)))
    z = f.op("BatchNormalization", x, *(f.parameter(s[1]) for _ in range(3)), f.parameter(s[1], positive=True))
    if f.chance(0.2):
        z = f.op("Add", z, f.parameter(s[1], 1, 1) if f.chance(0.5) else f.parameter())
    return f.op(f.pick("Add", "Add", "Sub"), *((y, z) if f.chance(0.5) else (z, y))), s


@maker(2)
def _constant_piece(f: Fuzz, x: str, s: Shape) -> Any:
    """A constant where data could stand: a class token."""
    axis = int(f.rng.integers(len(s)))
    pair = [x, f.parameter(*(2 if i == axis else d for i, d in enumerate(s)))]
    out = tuple(d + 2 if i == axis else d for i, d in enumerate(s))
    return f.op("Concat", *(pair if f.chance(0.5) else pair[::-1]), axis=axis), out


@maker(2)
def _dequantized(f: Fuzz, x: str, s: Shape) -> Any:
    """A linear operator with weights that are dequantized, which both sides rewrite in place."""
    if len(s) not in (2, 3, 4) or f.opset < 13 or f.dtype != np.float32:
        return None
    out = int(f.rng.integers(2, 4))
    shape = (out, s[1], 1, 1) if len(s) == 4 else (s[-1], out)
    whole = f.constant(f.rng.integers(-100, 100, shape).astype(np.int8))
    w = f.op("DequantizeLinear", whole, f.constant(np.float32(0.01)))
    if f.chance(0.3):
        w = f.op("Identity", w)
    return (f.op("Conv", x, w), (s[0], out, *s[2:])) if len(s) == 4 else (f.op("MatMul", x, w), (*s[:-1], out))


@maker(2)
def _pieces(f: Fuzz, x: str, s: Shape) -> Any:
    axis = int(f.rng.integers(len(s)))
    n = s[axis]
    if n < 2:
        return None
    cut = int(f.rng.integers(1, n))
    kind = f.pick("Split", "Slice", "Gather")
    if kind == "Split":
        sizes = (cut, n - cut)
        if f.opset >= 13:
            a, b = f.op("Split", x, f.ints(*sizes), axis=axis, outputs=2)
        else:
            a, b = f.op("Split", x, split=sizes, axis=axis, outputs=2)
        f.pool.append((b, (*s[:axis], n - cut, *s[axis + 1 :])))
        return a, (*s[:axis], cut, *s[axis + 1 :])
    if kind == "Slice":
        start, end, step = f.pick((0, cut, 1), (-cut, n + 5, 1), (0, n, 2), (n - 1, -n - 1, -1))
        length = len(range(n)[slice(start, None if end < -n else end, step)])
        if f.opset < 10:
            if step != 1:
                return None
            y = f.op("Slice", x, starts=[start], ends=[end], axes=[axis])
        else:
            y = f.op("Slice", x, f.ints(start), f.ints(end), f.ints(axis), f.ints(step))
        return y, (*s[:axis], length, *s[axis + 1 :])
    indices = [int(i) for i in f.rng.permutation(n)[:cut]]
    if f.chance(0.2) and f.opset >= 11:
        indices[0] -= n
    return f.op("Gather", x, f.ints(*indices), axis=axis), (*s[:axis], cut, *s[axis + 1 :])


@maker(2)
def _blocks(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) != 4:
        return None
    if s[1] % 4 == 0 and f.chance(0.6):
        mode = {"mode": f.pick("DCR", "CRD")} if f.opset >= 11 else {}
        y = f.op("DepthToSpace", x, blocksize=2, **mode)
        return y, (s[0], s[1] // 4, 2 * s[2], 2 * s[3])
    if s[2] % 2 or s[3] % 2:
        return None
    return f.op("SpaceToDepth", x, blocksize=2), (s[0], 4 * s[1], s[2] // 2, s[3] // 2)


@maker(2)
def _pad(f: Fuzz, x: str, s: Shape) -> Any:
    pads = [0] * (2 * len(s))
    for _ in range(2):
        pads[int(f.rng.integers(len(pads)))] = 1
    new = tuple(d + pads[i] + pads[i + len(s)] for i, d in enumerate(s))
    if f.opset < 11:
        return f.op("Pad", x, pads=pads, value=f.pick(0.0, 1.5)), new
    if min(s) > 1 and f.chance(0.3):
        return f.op("Pad", x, f.ints(*pads), mode=f.pick("reflect", "edge")), new
    extra = [f.constant(np.asarray(f.pick(0.0, 1.5), f.dtype))] if f.chance(0.5) else []
    return f.op("Pad", x, f.ints(*pads), *extra), new


@maker(1)
def _resize(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) != 4 or max(s[2:]) > 8 or f.opset < 9:
        return None
    mode, new = f.pick("nearest", "linear"), (*s[:2], 2 * s[2], 2 * s[3])
    scales = f.constant(np.asarray([1, 1, 2, 2], np.float32))
    if f.opset < 11:
        return f.op("Upsample" if f.opset == 9 else "Resize", x, scales, mode=mode), new
    roi = "" if f.opset >= 13 else f.constant(np.zeros(0, np.float32))
    return f.op("Resize", x, roi, scales, mode=mode), new


@maker(1)
def _norm(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) >= 3 and f.chance(0.5):
        return f.op("InstanceNormalization", x, f.parameter(s[1]), f.parameter(s[1])), s
    if f.opset < 17 or s[-1] < 2:
        return None
    axis = int(f.rng.integers(1, len(s)))
    extra = [f.parameter(*s[axis:])] if f.chance(0.5) else []
    return f.op("LayerNormalization", x, f.parameter(*s[axis:]), *extra, axis=axis), s


@maker(1)
def _cast(f: Fuzz, x: str, s: Shape) -> Any:
    y = f.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(np.float64)))
    return f.op("Cast", y, to=helper.np_dtype_to_tensor_dtype(f.dtype)), s


@maker(2)
def _again(f: Fuzz, x: str, s: Shape) -> Any:
    """One value read several times, or cut up and put together again."""
    axis = int(f.rng.integers(len(s)))
    if f.chance(0.3):
        return f.op("Add", x, x), s
    if f.chance(0.3):
        return f.op("Concat", x, x, axis=axis), (*s[:axis], 2 * s[axis], *s[axis + 1 :])
    if s[axis] % 2 or f.opset < 13:
        return None
    halves = f.op("Split", x, f.ints(s[axis] // 2, s[axis] // 2), axis=axis, outputs=2)
    if f.chance(0.5):
        return f.op("Concat", *(halves if f.chance(0.5) else halves[::-1]), axis=axis), s
    return f.op("Add", *halves), (*s[:axis], s[axis] // 2, *s[axis + 1 :])


@maker(1)
def _choice(f: Fuzz, x: str, s: Shape) -> Any:
    """Branches of which one is chosen, or that are averaged."""
    made = [linear(f, x, s) for _ in range(2)]
    if made[0] is None or made[1] is None:
        return None
    values = [name for name, _ in made] if made[0][1] == made[1][1] else [made[0][0], made[0][0]]
    kind = f.pick("Where", "Max", "Min", "Mean") if f.opset >= 13 else "Mean"
    if kind == "Where":
        mask = f.constant(f.rng.random(made[0][1][-1:]) < 0.5)
        values[1] = f.parameter() if f.chance(0.3) else values[1]
        return f.op("Where", mask, *values), made[0][1]
    if f.chance(0.3) and f.opset >= 8:
        values.append(f.parameter(*f.pick((), (1,))))
    return f.op(kind, *values), made[0][1]


@maker(1)
def _repeat(f: Fuzz, x: str, s: Shape) -> Any:
    axis = int(f.rng.integers(len(s)))
    new = (*s[:axis], 2 * s[axis], *s[axis + 1 :])
    if np.prod(new) < 1000 and f.chance(0.5):
        return f.op("Tile", x, f.ints(*(2 if i == axis else 1 for i in range(len(s))))), new
    return f.op("Expand", x, f.ints(*s)), s
