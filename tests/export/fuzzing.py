"""Random valid models over the operators that the fold engine knows, with random attributes, sharing and names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .folding import Model

Shape = tuple[int, ...]
_MAKERS: list[tuple[float, Callable[[Fuzz, str, Shape], tuple[str, Shape] | None]]] = []


def maker(weight: float) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        _MAKERS.append((weight, function))
        return function

    return register


class Fuzz(Model):
    """A model that grows by random operators; every value has a static shape."""

    def __init__(self, seed: int, dtype: Any, opset: int):
        super().__init__(opset=opset, dtype=dtype, seed=seed)
        self.pool: list[tuple[str, Shape]] = []
        self.shared: dict[tuple[Shape, bool], str] = {}
        self.plain_names = bool(self.rng.random() < 0.7)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def name(self, prefix: str) -> str:
        self.count += 1
        if self.plain_names:
            return f"{prefix}{self.count}"
        return f"{self.pick('a', 'conv.bias', 'bn', 'x/y:0', 'ä')}_{self.count}"

    def parameter(self, *shape: int, positive: bool = False) -> str:
        """A constant: shared, a Constant node, or behind an Identity, by chance."""
        key = (shape, positive)
        if key in self.shared and self.chance(0.2):
            return self.shared[key]
        fan = max(1, int(np.prod(shape[1:])))
        array = self.rng.standard_normal(shape) / np.sqrt(fan)
        array = (np.abs(array) + 0.5 if positive else array).astype(self.dtype)
        way = self.rng.random()
        if way < 0.15 and self.opset >= 9:
            name = str(self.op("Constant", value=numpy_helper.from_array(array)))
        else:
            name = self.constant(array)
            if way > 0.9:
                name = str(self.op("Identity", name))
        self.shared[key] = name
        return name

    def with_axes(self, op_type: str, x: str, axis: int) -> Any:
        """Axes are an input since opset 13."""
        return self.op(op_type, x, self.ints(axis)) if self.opset >= 13 else self.op(op_type, x, axes=[axis])

    def step(self) -> None:
        """Add one operator behind one of the latest values."""
        index = len(self.pool) - 1 - int(self.rng.geometric(0.7) - 1)
        name, shape = self.pool[max(index, 0)]
        weights = np.asarray([w for w, _ in _MAKERS])
        for _ in range(20):
            _, make = _MAKERS[int(self.rng.choice(len(_MAKERS), p=weights / weights.sum()))]
            mark = len(self.nodes), len(self.initializers)
            made = make(self, name, shape)
            if made is not None:
                self.pool.append(made)
                return
            assert mark == (len(self.nodes), len(self.initializers)), f"{make} left something behind"


def random_model(seed: int, dtype: Any = np.float64, opset: int | None = None) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    modern = dtype == np.float64  # the reference evaluator trains BatchNormalization before opset 14
    opset = opset or int(rng.choice([14, 15, 17, 18, 20, 21] if modern else [8, 9, 10, 11, 12, 13, 15, 17, 18, 21]))
    fuzz = Fuzz(seed, dtype, opset)
    shape = fuzz.pick((2, 4, 6, 6), (1, 6, 4, 4), (2, 5, 4), (3, 4), (2, 3, 8, 8), (2, 4, 1, 1))
    fuzz.pool.append((fuzz.input(*shape), shape))
    for _ in range(int(rng.integers(4, 16))):
        fuzz.step()
    read = {i for n in fuzz.nodes for i in n.input}
    outputs = [(n, s) for n, s in fuzz.pool[1:] if n not in read or fuzz.chance(0.05)]
    for n, s in outputs:
        fuzz.output(n, shape=s)
    if fuzz.chance(0.2):
        for node in fuzz.nodes:
            node.name = fuzz.pick("", node.name)
    return fuzz.build()


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
    made = [_linear(f, x, s) for _ in range(2)] if len(s) in (2, 3, 4) else [None]
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


@maker(4)
def _transpose(f: Fuzz, x: str, s: Shape) -> Any:
    if f.chance(0.2):
        return f.op("Transpose", x), s[::-1]
    perm = [int(i) for i in f.rng.permutation(len(s))]
    return f.op("Transpose", x, perm=perm), tuple(s[i] for i in perm)


@maker(4)
def _reshape(f: Fuzz, x: str, s: Shape) -> Any:
    i = int(f.rng.integers(len(s)))
    if f.chance(0.5) and len(s) > 2:
        i = min(i, len(s) - 2)
        new = (*s[:i], s[i] * s[i + 1], *s[i + 2 :])
    else:
        factors = [k for k in (2, 3) if s[i] % k == 0]
        if not factors or len(s) > 4:
            return None
        k = f.pick(*factors)
        new = (*s[:i], *f.pick((k, s[i] // k), (s[i] // k, k)), *s[i + 1 :])
    target = [0 if j < len(s) and j < i and f.chance(0.3) else d for j, d in enumerate(new)]
    if f.chance(0.3):
        target[int(f.rng.integers(len(target)))] = -1
    return f.op("Reshape", x, f.ints(*target)), new


@maker(2)
def _shuffle(f: Fuzz, x: str, s: Shape) -> Any:
    """Split an axis, transpose, merge: behind a linear operator by chance."""
    if len(s) not in (3, 4):
        return None
    i = int(f.rng.integers(1, len(s)))
    factors = [k for k in (2, 3) if s[i] % k == 0]
    if not factors:
        return None
    if f.chance(0.7):
        x = f.op("Conv", x, f.parameter(s[1], s[1], *[1] * (len(s) - 2)))
    k = f.pick(*factors)
    split = (*s[:i], k, s[i] // k, *s[i + 1 :])
    perm = list(range(len(split)))
    if f.chance(0.7):
        perm[i], perm[i + 1] = i + 1, i
    else:
        perm = [int(j) for j in f.rng.permutation(len(split))]
    y = f.op("Transpose", f.op("Reshape", x, f.ints(*split)), perm=perm)
    return f.op("Reshape", y, f.ints(*s)), s


@maker(1)
def _flatten(f: Fuzz, x: str, s: Shape) -> Any:
    axis = int(f.rng.integers(0, len(s) + 1))
    axis = min(axis, len(s) - 1)
    return f.op("Flatten", x, axis=axis), (int(np.prod(s[:axis])), int(np.prod(s[axis:])))


@maker(2)
def _squeeze(f: Fuzz, x: str, s: Shape) -> Any:
    ones = [i for i, d in enumerate(s) if d == 1]
    if ones and len(s) > 2:
        return f.with_axes("Squeeze", x, ones[0]), tuple(d for i, d in enumerate(s) if i != ones[0])
    if len(s) > 3:
        return None
    axis = int(f.rng.integers(-1, len(s) + 1))
    place = axis % (len(s) + 1)
    return f.with_axes("Unsqueeze", x, axis if f.opset >= 11 else place), (*s[:place], 1, *s[place:])


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
    made = [_linear(f, x, s) for _ in range(2)]
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


def _linear(f: Fuzz, x: str, s: Shape) -> Any:
    if len(s) == 4:
        out = int(f.rng.integers(2, 4))
        return f.op("Conv", x, f.parameter(out, s[1], 1, 1)), (s[0], out, *s[2:])
    if len(s) in (2, 3):
        out = int(f.rng.integers(2, 4))
        return f.op("MatMul", x, f.parameter(s[-1], out)), (*s[:-1], out)
    return None


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
    made = [_linear(f, x, s) for _ in range(2)]
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
