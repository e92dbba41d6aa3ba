"""What the GPU's lowering computes, run on the CPU: the same LLVM code, where it contains no PTX.

The simulator replaces ``_lowered`` by NumPy; this compares the two, lane by lane. Loads and stores of tensors and the
conversion to half types are PTX: those only a GPU can run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import numpy as np, numba
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from fastbn.cuda import _lowered, _lowered_signals, _simulated
from fastbn.cuda import _lowered_lanes as arithmetic

def on_cpu(of):
    return intrinsic(of._defn)

rng = np.random.default_rng(0)
ARITHMETIC = ("add", "sub", "mul", "fma", "gate", "total")
add, sub, mul, fma, gate, total = (on_cpu(getattr(arithmetic, n)) for n in ARITHMETIC)
sqrt, invsqrt, finite = (on_cpu(getattr(arithmetic, n)) for n in ("sqrt", "invsqrt", "finite"))

# -- arithmetic, lane by lane, tuples and numbers mixed
a, b, c = (tuple(np.float32(v) for v in rng.standard_normal(4)) for _ in range(3))
k = np.float32(1.7)
run = njit(lambda a, b, c, k: (add(a, b), sub(a, k), mul(k, b), fma(a, k, c), gate(a, b), total(a), fma(k, k, k)))
got = run(a, b, c, k)
A, B, C = (np.array(t) for t in (a, b, c))
assert np.array_equal(got[0], A + B) and np.array_equal(got[1], A - k) and np.array_equal(got[2], k * B)
assert np.array_equal(got[3], (A.astype(np.float64) * k + C).astype(np.float32))
assert np.array_equal(got[4], np.where(A <= 0, 0, B)) and got[5] == (A[0] + A[1]) + (A[2] + A[3])
nan = np.float32(np.nan)
assert np.isnan(njit(lambda z: gate(z, z))((nan,))[0])
assert njit(lambda x: invsqrt(x))(np.float32(4)) == np.float32(0.5)
check = njit(lambda x: finite(x))
assert check(k) and not check(nan) and not check(np.float32(np.inf)) and not check(np.float32(-np.inf))

# -- raw words of every kind to lanes and, without PTX, back; memory to lanes and back
dtypes = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": None}
for kind in ("f32", "f64", "f16", "bf16"):
    W = 16 // {"f32": 4, "f64": 8}.get(kind, 2)
    io = _lowered.access(kind, W)
    decode, recall, keep = on_cpu(io.decode), on_cpu(io.recall), on_cpu(io.keep)
    gather, scatter, splat = on_cpu(io.gather), on_cpu(io.scatter), on_cpu(io.splat)
    words = rng.integers(0, 2**31 - 1, 64).astype(np.int32)
    if kind == "bf16":
        want = (words.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        want = words.view(dtypes[kind]).astype(np.float64 if kind == "f64" else np.float32)
    lanes = np.array([njit(lambda m, i: decode(recall(m, i)))(words, 4 * i) for i in range(16)]).reshape(-1)
    assert np.array_equal(lanes, want, equal_nan=True), kind
    copied = np.zeros_like(words)
    copy = njit(lambda m, n, i: keep(n, i, recall(m, i)))
    for i in range(16):
        copy(words, copied, 4 * i)
    assert np.array_equal(copied, words)
    if kind in ("f32", "f64"):
        encode = on_cpu(io.encode)
        back = njit(lambda m, n, i: keep(n, i, encode(decode(recall(m, i)))))
        copied[:] = 0
        for i in range(16):
            back(words, copied, 4 * i)
        assert np.array_equal(copied, words)
    one = _lowered.access(kind, 1)
    decode_one = on_cpu(one.decode)
    element = {"f32": np.int32, "f64": np.int64}.get(kind, np.int16)
    raw = words.view(element)
    take = njit(lambda v: decode_one((v,))[0])
    assert all(np.array_equal(take(raw[i]), want[i], equal_nan=True) for i in range(raw.size))
    values = rng.standard_normal(32).astype(want.dtype)
    moved = np.zeros_like(values)
    njit(lambda m, n: scatter(n, 8, gather(m, 16)))(values, moved)
    assert np.array_equal(moved[8 : 8 + W], values[16 : 16 + W]) and np.count_nonzero(moved) == W
    assert np.array_equal(njit(lambda v: splat(v))(values[0]), np.full(W, values[0]))

# -- numbers and tags in words, as the simulator lays them out; the accesses themselves are PTX
def put(builder, at, words):
    for k, word in enumerate(words):
        builder.store(word, builder.gep(at, [ir.IntType(32)(k)]))

_lowered_signals._put = put
_lowered_signals._get = lambda builder, at: [builder.load(builder.gep(at, [ir.IntType(32)(k)])) for k in (0, 1)]
said, heard = on_cpu(_lowered_signals.say), on_cpu(_lowered_signals.hear)
say = njit(lambda memory, i, a, b, tag: said(memory, i, a, b, numba.int32(tag)))
hear = njit(lambda memory, i, tag: heard(memory, i, numba.int32(tag)))
for number in (np.float32, np.float64):
    for a, b in ((1.5, -2.25), (np.nan, np.inf), (-0.0, 1e-40), (np.pi, -1 / 3)):
        memory, want = np.zeros(12, number), np.zeros(12, number)
        assert not hear(memory, 4, 7)[0]
        say(memory, 4, number(a), number(b), 7)
        _simulated.say(want, 4, number(a), number(b), 7)
        assert memory.tobytes() == want.tobytes()
        there, *values = hear(memory, 4, 7)
        assert there and np.array(values, number).tobytes() == np.array([a, b], number).tobytes()
        assert not hear(memory, 4, 8)[0] and hear(memory, 4, 7)[0] == _simulated.hear(want, 4, 7)[0]
        for k in range(1, memory.itemsize, 2):  # no tag may be missing
            torn = memory.copy()
            torn.view(np.int32)[memory.itemsize + k] = 6
            assert not hear(torn, 4, 7)[0] and not _simulated.hear(torn, 4, 7)[0]
print("right")
"""


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="needs numba-cuda")
def test_llvm_code_computes_what_the_simulator_computes():
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "right", done.stderr[-3000:]
