"""Small layer norm calls take the short way, to the same bits; what is not plain is refused before it is written."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import fastbn
from fastbn import family, quick_layer_norm
from fastbn.arguments import F32
from fastbn.cpu import entries, tuning
from tests.cpu.test_gates import REFUSED
from tests.oracle import same_bits

if numba.config.DISABLE_JIT:
    pytest.skip("needs the kernels", allow_module_level=True)

SHAPES = [(64, 100), (7, 3), (3, 1), (5, 6, 31), (2, 3, 4, 128), (33, 257), (1, 4000), (300, 16)]


@pytest.fixture
def long_way(monkeypatch):
    """Return a function that calls another one without the short way."""

    def call(function, *args, **options):
        with monkeypatch.context() as m:
            for name in ("train", "backward"):
                m.setattr(quick_layer_norm, name, lambda *a: None)
            return function(*args, **options)

    return call


def draw(rng, shape):
    x, g = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    weight, bias = (rng.standard_normal(shape[-1], dtype=np.float32) for _ in range(2))
    for _ in range(2):  # compiles the kernels, then the gates
        fastbn.backward(g, fastbn.layer_norm(x, weight, bias)[1])
    return x, g, weight, bias


def gradients(g, saved, **options):
    return [a for a in fastbn.backward(g, saved, **options) if a is not None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits(rng, shape, long_way):
    x, g, weight, bias = draw(rng, shape)
    assert shape in quick_layer_norm._train and shape in quick_layer_norm._backward
    want, known = long_way(fastbn.layer_norm, x, weight, bias, eps=1e-3)
    wanted = long_way(gradients, g, known)
    for out in (None, np.full(shape, np.nan, np.float32)):
        y, saved = fastbn.layer_norm(x, weight, bias, eps=1e-3, out=out)
        dx = None if out is None else np.full(shape, np.nan, np.float32)
        got = gradients(g, saved, out=dx)
        assert out is None or (y is out and got[0] is dx)
        assert same_bits(y, want) and all(map(same_bits, got, wanted))
        assert [a.dtype for a in got] == [a.dtype for a in wanted]
        for name in ("mean", "invstd", "variance"):
            assert same_bits(getattr(saved, name), getattr(known, name))
        assert saved.count == known.count and saved.updated == 0 and saved.moments.count == known.moments.count
        assert all(map(same_bits, long_way(gradients, g, saved), wanted))
        assert all(map(same_bits, gradients(g, known), wanted))


def test_nan_inf_and_products_beyond_float32(rng, long_way):
    x, g, weight, bias = draw(rng, (64, 100))
    x[3, 5], x[9, 1], g[20, 7] = np.nan, np.inf, np.inf
    g[30:40] *= 1e37
    x[30:40, 50] = 1e4
    y, saved = fastbn.layer_norm(x, weight, bias)
    want, known = long_way(fastbn.layer_norm, x, weight, bias)
    assert same_bits(y, want)
    assert all(map(same_bits, gradients(g, saved), long_way(gradients, g, known)))


@pytest.mark.parametrize("out_of", ["x", "grad", "weight"])
def test_overlaps(rng, out_of, long_way):
    """Over the gradient itself is the long way's; over x and parameters an error, or what it was."""
    x, g, weight, bias = draw(rng, (4, 6))
    saved = fastbn.layer_norm(x, weight, bias)[1]
    if out_of == "grad":
        wanted = long_way(gradients, g, saved)
        into = g.copy()
        got = gradients(into, saved, out=into)
        assert got[0] is into and all(map(same_bits, got, wanted))
    elif out_of == "x":
        with pytest.raises(ValueError, match=r"^out: "):
            fastbn.layer_norm(x, weight, bias, out=x)
        with pytest.raises(ValueError, match=r"^out: "):
            fastbn.backward(g, saved, out=x)
    else:
        room = np.zeros(24 + 6, np.float32)
        room[24:] = weight
        entered = quick_layer_norm.train(x, room[20:26], bias, -1, 1e-5, room[:24].reshape(4, 6))
        assert entered is None and not room[:24].any()


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("which", range(4))
def test_refused(rng, kind, which):
    x, g, weight, bias = draw(rng, (6, 20))
    call, back = quick_layer_norm._train[6, 20], quick_layer_norm._backward[6, 20]
    y, stats, dw, db = np.full((6, 20), 7, F32), np.zeros(18), np.full(20, 7, F32), np.full(20, 7, F32)
    forward, backward = [x, y, weight, bias], [x, g, y, weight]
    given = forward[which]
    forward[which] = REFUSED[kind](given)
    assert call.enter(*forward, stats, np.ndarray, F32, *call.numbers, 1e-5) == 0
    backward[which] = REFUSED[kind](backward[which])
    assert back.enter(*backward, dw, db, stats, np.ndarray, F32, *back.numbers) == 0
    assert (y == 7).all() and (dw == 7).all() and (db == 7).all() and not stats.any()


@pytest.mark.parametrize("eps", [0.0, -1.0, np.nan, np.inf, 1, "1"])
def test_bad_eps_is_the_long_ways(rng, eps):
    x, _, weight, bias = draw(rng, (6, 20))
    if eps == 1:
        assert same_bits(fastbn.layer_norm(x, weight, bias, eps=1)[0], fastbn.layer_norm(x, weight, bias, eps=1.0)[0])
        return
    with pytest.raises((ValueError, TypeError), match=r"^eps: "):
        fastbn.layer_norm(x, weight, bias, eps=eps)


def test_what_is_another_shape_or_affine_goes_the_long_way(rng, long_way):
    x, g, weight, bias = draw(rng, (5, 1, 8))
    for options in ({"axis": 1}, {"axis": 2}, {"axis": -1, "bias": None}, {"weight": None}):
        args = {"weight": weight, "bias": bias, **options}
        if options.get("axis") == 1:
            args |= {"weight": weight[None], "bias": bias[None]}
        y, saved = fastbn.layer_norm(x, **args)
        want, known = long_way(fastbn.layer_norm, x, **args)
        assert same_bits(y, want)
        got, wanted = gradients(g, saved), long_way(gradients, g, known)
        assert all(map(same_bits, got, wanted)) and [a.shape for a in got] == [a.shape for a in wanted]


def test_forgets(rng, monkeypatch):
    monkeypatch.setattr(quick_layer_norm, "REMEMBERED", 3)
    for n in range(2, 9):
        x, g, weight, bias = draw(rng, (n, 5))
        fastbn.backward(g, fastbn.layer_norm(x, weight, bias)[1])
        assert len(quick_layer_norm._train) <= 3 and len(quick_layer_norm._backward) <= 3


def test_without_gates_calls_go_the_long_way(rng, monkeypatch):
    x, _, weight, bias = draw(rng, (6, 20))
    want = fastbn.layer_norm(x, weight, bias)[0]
    monkeypatch.setattr(quick_layer_norm, "_train", {})
    monkeypatch.setattr(entries, "_set_code", lambda *a: None)
    assert same_bits(fastbn.layer_norm(x, weight, bias)[0], want) and not quick_layer_norm._train
    assert entries.find_sets("train", 1 << 12, 1 << 8) is None and tuning.PARALLEL < 1 << 20
    assert isinstance(fastbn.layer_norm(x, weight, bias)[1], family.GroupSaved)
