"""Signs of an output, which gradients read instead of it: the same bits as from the output itself, wherever it lies."""

from __future__ import annotations

import pickle
import platform

import ml_dtypes
import numba
import numpy as np
import pytest

import fastbn
from fastbn import functional, signs
from fastbn.cpu import _signs, tuning
from tests.oracle import same_bits

if numba.config.DISABLE_JIT:
    pytest.skip("needs the kernels", allow_module_level=True)

# Whole lines and parts of them, runs of less than a line, rows in one block, in several, and in bands.
SHAPES = [
    ((4, 6, 64), 1), ((3, 40, 49), 1), ((2, 5, 331), 1), ((7, 1, 1000), 1), ((1, 9, 1000), 1), ((64, 48), 1),
    ((33, 100), 1), ((9, 3001), 1), ((8, 6000), 1), ((3000, 100), 1), ((2100, 128), 1), ((5, 9, 31), -1),
]  # fmt: skip
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


pytestmark = pytest.mark.usefixtures("large")


def _filled(rng, shape, dtype, at):
    """Return numbers that begin ``at`` elements into memory, some of them zero, NaN or too small for half types."""
    memory = np.empty(np.prod(shape) + at, dtype)
    x = memory[at:].reshape(shape)
    x[...] = rng.standard_normal(shape)
    x.flat[3], x.flat[-2] = 0, np.nan
    return x


def _spread(saved, x):
    """Return an array like x that is 1 where the output was positive or NaN and 0 elsewhere."""
    first, order = int(saved.signs[:8].view(np.int64)[0]), saved.layout.order
    bits = np.unpackbits(saved.signs[signs.HEAD :], bitorder="little")[first : first + x.size]
    return bits.reshape([x.shape[a] for a in order]).transpose(np.argsort(order))


def _by(frozen, x, residual, out, axis, rng):
    C, kind = x.shape[axis], np.float64 if x.dtype == np.float64 else np.float32
    w, b = rng.standard_normal(C).astype(kind), rng.standard_normal(C).astype(kind)
    options = {"axis": axis, "activation": "relu", "residual": residual, "out": out}
    if frozen:
        return functional.frozen(x, np.zeros(C, kind), np.ones(C, kind), w, b, **options)
    return fastbn.batch_norm_train(x, w, b, **options)


def _without_sign_of_nan(a):
    """Return a copy whose NaNs are positive where they need not be alike: ARM's have a sign that x86's have not."""
    a = np.array(a)
    if platform.machine() in ("x86_64", "AMD64"):
        return a
    nan = np.isnan(a)
    a[nan] = np.abs(a[nan])
    return a


def _by_output(saved, y, grad, out=None):
    saved.y, saved.signs = y, None
    return fastbn.backward(grad, saved, out=out)


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_gradients_are_those_by_the_output(shape, axis, dtype, frozen, rng, threads):
    for at, count in ((0, 1), (5, 2), (16, 2), (None, 1), (None, 2)):
        threads(count)
        x, residual, out, grad = (_filled(rng, shape, dtype, k) for k in (0, 1, at or 0, 3))
        out = residual if at is None else out
        y, saved = _by(frozen, x, residual, out, axis, rng)
        assert saved.y is None and saved.signs.nbytes < x.size // 8 + 64
        kept = y.copy()
        positive = _spread(saved, x)
        with np.errstate(invalid="ignore"):
            assert np.array_equal(positive == 1, ~(y.astype(np.float64) <= 0))
        y[...] = -1  # the caller's
        dx = np.empty_like(x)  # one for both: which of two NaNs an element gets depends on where in a line it lies
        found = [a.copy() for a in fastbn.backward(grad, saved, out=dx)]
        others = _by_output(saved, kept, grad, dx)
        assert all(same_bits(*map(_without_sign_of_nan, pair)) for pair in zip(found, others, strict=True))


def test_of_whatever_output_memory_is_the_same():
    assert len({signs.room(at, 1000, 4).size for at in range(0, signs.LINE, 4)}) == 1


def test_in_any_memory_order(rng):
    x = rng.standard_normal((6, 5, 7, 9), dtype=np.float32).transpose(0, 3, 1, 2)
    y, saved = _by(False, x, x, None, 1, rng)
    assert y.strides == x.strides
    assert np.array_equal(_spread(saved, x) == 1, y > 0)


def test_in_a_pickle(rng):
    x, residual, grad = (rng.standard_normal((4, 7, 5), dtype=np.float32).transpose(0, 2, 1) for _ in range(3))
    _, saved = fastbn.batch_norm_train(x, activation="relu", residual=residual)
    found = fastbn.backward(grad, pickle.loads(pickle.dumps(saved)))
    assert all(same_bits(a, b) for a, b in zip(found[::3], fastbn.backward(grad, saved)[::3], strict=True))


def test_what_rounds_to_zero_is_not_positive(rng):
    x = np.full((4, 3, 40), 1e-30, np.float16)
    residual = np.where(rng.random(x.shape) > 0.5, 1e-7, 0).astype(np.float16)
    y, saved = functional.frozen(
        x, np.full(3, 1e-9, np.float32), np.ones(3, np.float32), activation="relu", residual=residual
    )
    assert np.array_equal(_spread(saved, x) == 1, y > 0)


def test_in_place_there_is_nothing_to_keep(rng):
    x = rng.standard_normal((4, 3, 40), dtype=np.float32)
    known = np.zeros(3, np.float32), np.ones(3, np.float32)
    _, saved = functional.frozen(x, *known, activation="relu", residual=x.copy(), out=x)
    assert saved.signs is None
    with pytest.raises(ValueError, match=r"^saved: expected an x that was not overwritten"):
        fastbn.backward(x, saved)


def test_the_residual_may_be_overwritten(rng):
    x, residual = (rng.standard_normal((4, 3, 40), dtype=np.float32) for _ in range(2))
    y, saved = fastbn.batch_norm_train(x, activation="relu", residual=residual.copy())
    found = fastbn.backward(x, saved)
    z, again = fastbn.batch_norm_train(x, activation="relu", residual=residual, out=residual)
    assert same_bits(y, z) and all(
        same_bits(a, b) for a, b in zip(found[::3], fastbn.backward(x, again)[::3], strict=True)
    )


@pytest.mark.parametrize("option", [{"renorm": (3.0, 5.0)}, {"nonfinite": "raise"}, {"unbiased": False}], ids=str)
def test_where_statistics_come_first(option, rng):
    x, residual, grad = (rng.standard_normal((4, 3, 40), dtype=np.float32) for _ in range(3))
    running = np.zeros(3, np.float32), np.ones(3, np.float32)
    y, saved = fastbn.batch_norm_train(x, None, None, *running, activation="relu", residual=residual, **option)
    assert saved.y is None
    found = fastbn.backward(grad, saved)
    assert all(same_bits(a, b) for a, b in zip(found[::3], _by_output(saved, y, grad)[::3], strict=True))


def test_both_sides_mean_the_same_memory():
    assert signs.HEAD == _signs.HEAD
    for address, size, itemsize in ((0, 1, 8), (60, 100, 4), (62, 31, 2), (2048 + 16, 1000, 4)):
        room = signs.room(address, size, itemsize)
        phase = room[:8].view(np.int64)[0]
        assert phase < 64 // itemsize and signs.HEAD + (phase + size - 1) // 8 + signs.TAIL < room.size


def test_one_thread_or_several(rng, threads):
    """Only several threads put parts of lines into place atomically."""
    x = rng.standard_normal((8, 16, 64, 72), dtype=np.float32)
    for count in (1, 2):
        threads(count)
        _, saved = fastbn.batch_norm_train(x, activation="relu", residual=x)
        assert saved.signs[8:16].view(np.int64)[0] == (count > 1)


def test_small_results_are_kept_themselves(rng, monkeypatch):
    monkeypatch.setattr(tuning, "STREAM", 1 << 20)
    x = rng.standard_normal((4, 3, 40), dtype=np.float32)
    y, saved = fastbn.batch_norm_train(x, activation="relu", residual=x)
    assert saved.signs is None and saved.y is y
