"""Small layer, group and instance norm take the short way, to the same bits; what is not plain is refused first."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import fastbn
from fastbn import family, quick_sets
from fastbn.arguments import F32
from fastbn.cpu import entries_sets, launch_sets, tuning
from fastbn.cpu._vectors import has
from tests.cpu.test_gates import REFUSED
from tests.oracle import same_bits
from tests.tolerances import BF16, arithmetic

if numba.config.DISABLE_JIT:
    pytest.skip("needs the kernels", allow_module_level=True)

# Shapes, and the groups of their channels (0: layer norm): short sets and long ones, affine by element and by run.
LAYER = [((64, 100), 0), ((7, 3), 0), ((3, 1), 0), ((5, 6, 31), 0), ((2, 3, 4, 128), 0), ((33, 257), 0), ((1, 4000), 0)]
GROUP = [((8, 16, 8, 8), 4), ((3, 6, 5), 6), ((3, 6, 5), 1), ((37, 4, 5, 5), 1), ((5, 6, 200), 3), ((70, 2, 130), 2)]
CASES = [*LAYER, ((300, 16), 0), *GROUP, ((1, 2, 1), 1), ((4, 6), 2)]


def norm(x, groups, weight, bias, **options):
    if groups:
        return fastbn.group_norm(x, groups, weight, bias, **options)
    return fastbn.layer_norm(x, weight, bias, **options)


@pytest.fixture
def long_way(monkeypatch):
    """Return a function that calls another one without the short way."""

    def call(function, *args, **options):
        with monkeypatch.context() as m:
            for name in ("train", "backward"):
                m.setattr(quick_sets, name, lambda *a: None)
            return function(*args, **options)

    return call


def draw(rng, shape, groups=0, dtype=np.float32):
    x, g = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(2))
    size, wide = shape[1 if groups else -1], arithmetic(dtype)
    weight, bias = (rng.standard_normal(size, dtype=np.float32).astype(wide) for _ in range(2))
    for _ in range(2):  # compiles the kernels, then the gates
        fastbn.backward(g, norm(x, groups, weight, bias)[1])
    return x, g, weight, bias


def same_numbers(a, b):
    """Tell whether two arrays have the same bits, those of NaN too where vectors are one register.

    Elsewhere it depends on where arrays lie which of two operands a NaN is from.
    """
    if has("avx512f"):
        return same_bits(a, b)
    return same_bits(*(np.where(np.isnan(v), np.float32(np.nan), v) for v in (a, b)))


def gradients(g, saved, **options):
    return [a for a in fastbn.backward(g, saved, **options) if a is not None]


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_the_same_bits(rng, shape, groups, long_way):
    x, g, weight, bias = draw(rng, shape, groups)
    assert (shape, groups, None) in quick_sets._train and (shape, groups, None) in quick_sets._backward
    want, known = long_way(norm, x, groups, weight, bias, eps=1e-3)
    wanted = long_way(gradients, g, known)
    for out in (None, np.full(shape, np.nan, np.float32)):
        y, saved = norm(x, groups, weight, bias, eps=1e-3, out=out)
        dx = None if out is None else np.full(shape, np.nan, np.float32)
        got = gradients(g, saved, out=dx)
        assert out is None or (y is out and got[0] is dx)
        assert same_bits(y, want) and all(map(same_bits, got, wanted))
        assert [a.dtype for a in got] == [a.dtype for a in wanted]
        for name in ("mean", "invstd", "variance"):
            assert same_bits(getattr(saved, name), getattr(known, name))
            assert getattr(saved, name).shape == ((shape[0], groups) if groups else shape[:-1])
        assert saved.count == known.count and saved.updated == 0 and saved.moments.count == known.moments.count
        assert all(map(same_bits, long_way(gradients, g, saved), wanted))
        assert all(map(same_bits, gradients(g, known), wanted))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, BF16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("shape", "groups"), [((64, 100), 0), ((8, 16, 8, 8), 4), ((3, 6, 5), 6), ((5, 6, 200), 3)])
def test_other_dtypes(rng, shape, groups, dtype, long_way):
    x, g, weight, bias = draw(rng, shape, groups, dtype)
    call = quick_sets._train[shape, groups, np.dtype(dtype)]
    assert (
        call.dtype == dtype and call.wide == weight.dtype and (shape, groups, np.dtype(dtype)) in quick_sets._backward
    )
    y, saved = norm(x, groups, weight, bias)
    want, known = long_way(norm, x, groups, weight, bias)
    got, wanted = gradients(g, saved), long_way(gradients, g, known)
    assert same_bits(y, want) and all(map(same_bits, got, wanted))
    assert [a.dtype for a in got] == [x.dtype, weight.dtype, bias.dtype] == [a.dtype for a in wanted]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BF16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("there", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("shape", "groups"), [((64, 100), 0), ((5, 6, 31), 0), ((3, 6, 5), 6), ((5, 6, 200), 3)])
def test_without_weight_or_bias(rng, shape, groups, there, dtype, long_way):
    """As with ones and zeros, by both ways; there is no gradient of what is absent."""
    x, g, *params = draw(rng, shape, groups, dtype)
    x[0] = 1  # its deviations are 0
    given = [p if here else None for p, here in zip(params, there, strict=True)]
    filled = [np.full_like(p, k) if v is None else v for k, p, v in zip((1, 0), params, given, strict=True)]
    y, saved = norm(x, groups, *given)
    want, known = norm(x, groups, *filled)
    other, known_long = long_way(norm, x, groups, *given)
    assert same_bits(y, want) and same_bits(y, other)
    got, wanted = fastbn.backward(g, saved), fastbn.backward(g, known)
    for grads in (got, long_way(fastbn.backward, g, saved), long_way(fastbn.backward, g, known_long)):
        assert [a is None for a in grads[1:3]] == [not here for here in there]
        assert all(a is None or same_bits(a, b) for a, b in zip(grads[:3], wanted[:3], strict=True))
    assert saved.affine == known_long.affine and known.affine != saved.affine


@pytest.mark.parametrize(("shape", "groups"), [((64, 100), 0), ((64, 4, 100), 2), ((64, 2, 200), 2)], ids=str)
def test_nan_inf_and_products_beyond_float32(rng, shape, groups, long_way):
    x, g, weight, bias = draw(rng, shape, groups)
    x[3, ..., 5], x[9, ..., 1], g[20, ..., 7] = np.nan, np.inf, np.inf
    g[30:40] *= 1e37
    x[30:40, ..., 50] = 1e4
    y, saved = norm(x, groups, weight, bias)
    want, known = long_way(norm, x, groups, weight, bias)
    assert same_numbers(y, want)
    assert all(map(same_numbers, gradients(g, saved), long_way(gradients, g, known)))


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
        entered = quick_sets.train(x, 0, room[20:26], bias, 1e-5, room[:24].reshape(4, 6))
        assert entered is None and not room[:24].any()


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("which", range(4))
def test_refused(rng, kind, which):
    x, g, weight, bias = draw(rng, (6, 20))
    call, back = quick_sets._train[(6, 20), 0, None], quick_sets._backward[(6, 20), 0, None]
    y, stats, dw, db = np.full((6, 20), 7, F32), np.zeros(18), np.full(20, 7, F32), np.full(20, 7, F32)
    forward, backward = [x, y, weight, bias], [x, g, y, weight]
    given = forward[which]
    forward[which] = REFUSED[kind](given)
    assert call.enter(*forward, stats, np.ndarray, F32, F32, *call.numbers, 1e-5) == 0
    backward[which] = REFUSED[kind](backward[which])
    assert back.enter(*backward, dw, db, stats, np.ndarray, F32, F32, *back.numbers) == 0
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
    monkeypatch.setattr(quick_sets, "REMEMBERED", 3)
    for n in range(2, 9):
        x, g, weight, bias = draw(rng, (n, 5))
        fastbn.backward(g, fastbn.layer_norm(x, weight, bias)[1])
        assert len(quick_sets._train) <= 3 and len(quick_sets._backward) <= 3


def test_without_gates_calls_go_the_long_way(rng, monkeypatch):
    x, _, weight, bias = draw(rng, (6, 20))
    want = fastbn.layer_norm(x, weight, bias)[0]
    monkeypatch.setattr(quick_sets, "_train", {})
    monkeypatch.setattr(entries_sets, "_code", lambda *a: None)
    assert same_bits(fastbn.layer_norm(x, weight, bias)[0], want) and not quick_sets._train
    assert entries_sets.find("train", (1 << 12, 1, 1 << 8, 1), "float32") is None and tuning.PARALLEL < 1 << 20
    assert not launch_sets.is_small((2, 1, launch_sets.SWEPT_BACK, 1))
    assert isinstance(fastbn.layer_norm(x, weight, bias)[1], family.GroupSaved)


@pytest.mark.parametrize("shape", [(8, 16, 8, 8), (2, 3, 4), (3, 5, 200), (16, 32, 33, 33)], ids=str)
def test_instance_norm_is_group_norm_of_single_channels(rng, shape):
    x, g, weight, bias = draw(rng, shape, shape[1])
    y, saved = fastbn.instance_norm(x, weight, bias)
    want, known = fastbn.group_norm(x, shape[1], weight, bias)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for got, other in zip(gradients(g, saved), gradients(g, known), strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())
    assert saved.mean.shape == shape[:2] and saved.count == known.count
    assert isinstance(saved, family.GroupSaved) == (x.size < tuning.PARALLEL)
    bare = fastbn.instance_norm(x)[1]
    assert fastbn.backward(g, bare).weight is None


@pytest.mark.parametrize(
    ("groups", "axis"), [(True, 1), (2.0, 1), ("2", 1), (3, 1), (-2, 1), (0, 1), (2, True), (2, 1.0)]
)
def test_bad_groups_and_axes_are_the_long_ways(rng, groups, axis, long_way):
    x, _, weight, bias = draw(rng, (8, 16, 8, 8), 2)
    errors = []
    for call in (lambda f, *a, **o: f(*a, **o), long_way):
        with pytest.raises((ValueError, TypeError)) as caught:
            call(fastbn.group_norm, x, groups, weight, bias, axis=axis)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
