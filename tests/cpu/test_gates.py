"""Gates: what they let through and what they refuse, and the fields of NumPy's struct that they read."""

from __future__ import annotations

import numba
import numpy as np
import pytest

import fastbn
from fastbn import quick, signs
from fastbn.arguments import F32
from fastbn.cpu import entries, objects
from tests.oracle import same_bits

if numba.config.DISABLE_JIT:
    pytest.skip("needs the kernels", allow_module_level=True)

N, C = 6, 20


class Sub(np.ndarray):
    """Not a plain array."""


def unaligned(a):
    memory = np.zeros(a.nbytes + 1, np.uint8)
    found = memory[1:].view(np.float32).reshape(a.shape)
    found[...] = a
    return found


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


REFUSED = {
    "float64": lambda a: a.astype(np.float64), "endian": lambda a: a.astype(">f4"), "int32": lambda a: a.view(np.int32),
    "subclass": lambda a: a.view(Sub), "unaligned": unaligned, "read-only": read_only, "list": lambda a: a.tolist(),
    "gaps": lambda a: np.repeat(a, 2, axis=-1)[..., ::2], "backwards": lambda a: a[..., ::-1], "none": lambda a: None,
    "short": lambda a: a[:-1].copy(), "empty": lambda a: a[:0], "one more axis": lambda a: a[None],
    "number": lambda a: 1.5, "no axis": lambda a: np.float32(2), "a type": lambda a: np.ndarray,
}  # fmt: skip


class Arguments:
    """What the gates of (N, C) take, by name, with a way to enter each."""

    def __init__(self, rng):
        self.x, self.y, self.grad, self.kept, self.dr = (
            rng.standard_normal((N, C), dtype=np.float32) for _ in range(5)
        )
        vectors = rng.random((6, C), dtype=np.float32) + 0.5
        self.weight, self.bias, self.mean, self.var, self.dweight, self.dbias = (v.copy() for v in vectors)
        self.stats = rng.random(3 * C)
        self.eps, self.momentum = 1e-5, 0.1
        for _ in range(2):
            _, saved = fastbn.batch_norm_train(self.x, self.weight, self.bias)
            fastbn.backward(self.grad, saved)
            _, saved = fastbn.batch_norm_train(self.x, self.weight, self.bias, residual=self.y, activation="relu")
            fastbn.backward(self.grad, saved)
            saved.y, saved.signs = None, signs.room(0, self.x.size, 4)
            fastbn.backward(self.grad, saved)
            fastbn.batch_norm_infer(self.x, self.mean, self.var, self.weight, self.bias)
        self.signs = saved.signs

    def enter(self, op):
        fused = op in ("fused", "by signs")
        signs = self.signs if op == "by signs" else None
        code, numbers = entries.find(
            "backward" if fused else op, (N, C, 1), True if fused else None, fused, signs is not None
        )
        about = np.ndarray, F32, F32, *numbers
        if op == "train":
            vectors = self.weight, self.bias, self.mean, self.var
            return code(self.x, None, self.y, *vectors, self.stats, None, *about, C, self.eps, self.momentum, None)
        if op == "infer":
            vectors = self.mean, self.var, self.weight, self.bias
            return code(self.x, None, self.y, *vectors, self.stats, *about, self.eps, None)
        vectors = self.weight, self.bias, self.dweight, self.dbias
        if fused:
            kept = self.kept if signs is None else None
            return code(self.x, self.grad, kept, self.y, self.dr, *vectors, self.stats, signs, *about, False, True)
        return code(self.x, self.grad, None, self.y, None, *vectors, self.stats, None, *about, False, None)

    def everything(self):
        return [np.array(a) for a in vars(self).values() if isinstance(a, np.ndarray)]


TAKEN = {
    "train": ("x", "y", "weight", "bias", "mean", "var"), "infer": ("x", "y", "mean", "var", "weight", "bias"),
    "backward": ("x", "grad", "y", "weight", "bias"), "fused": ("x", "grad", "kept", "y", "weight", "bias"),
    "by signs": ("x", "grad", "y", "weight", "bias"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("op", TAKEN)
def test_refuse_all_but_plain_arrays(op, kind, rng):
    for name in TAKEN[op]:
        a = Arguments(rng)
        assert a.enter(op) == 1
        setattr(a, name, REFUSED[kind](getattr(a, name)))
        before = a.everything()
        assert a.enter(op) == 0, name
        assert all(same_bits(p, q) for p, q in zip(before, a.everything(), strict=True)), name


@pytest.mark.parametrize(("op", "name", "values"), [
    ("train", "eps", (0.0, -1.0, np.nan, np.inf)), ("train", "momentum", (np.nan, np.inf, -np.inf)),
    ("infer", "eps", (-1e-9, np.nan, np.inf)),
])  # fmt: skip
def test_refuse_numbers(op, name, values, rng):
    a = Arguments(rng)
    for value in values:
        setattr(a, name, value)
        before = a.everything()
        assert a.enter(op) == 0
        assert all(same_bits(p, q) for p, q in zip(before, a.everything(), strict=True))


@pytest.mark.parametrize("shift", range(-3, 4))
def test_overlap(shift, rng):
    """Results may lie behind or before what they are computed from, not in it; inference and gradients in place."""
    a = Arguments(rng)
    size = N * C
    memory = rng.standard_normal(4 * size, dtype=np.float32)

    def at(i):
        return memory[i : i + size].reshape(N, C)

    a.x, a.y, a.grad = at(size), at(size + shift), at(3 * size)
    assert (a.enter("train"), a.enter("infer"), a.enter("backward")) == (0, shift == 0, 0)
    a.x, a.grad, a.y = at(3 * size), at(size), at(size + shift)
    assert (a.enter("backward"), a.enter("fused"), a.enter("by signs")) == (shift == 0, 0, 0)
    a.grad, a.kept = at(0), at(size)
    assert a.enter("fused") == 0
    for start in (0, 2 * size):
        a.x, a.y, a.grad, a.kept = at(size), at(start), at(3 * size), at(size)
        assert (a.enter("train"), a.enter("infer"), a.enter("backward"), a.enter("fused")) == (1, 1, 1, 1)
    a.y = at(1)
    assert (a.enter("train"), a.enter("infer"), a.enter("backward")) == (0, 0, 0)


@pytest.mark.parametrize("moved", ["mean", "var"])
@pytest.mark.parametrize("other", ["weight", "bias", "x", "y", "the other"])
def test_statistics_that_move_lie_apart(moved, other, rng):
    """Views of one memory are told, too; inference moves none, they may not lie where it writes alone."""
    a = Arguments(rng)
    other = {"mean": "var", "var": "mean"}[moved] if other == "the other" else other
    memory = getattr(a, other).reshape(-1)
    memory[:] = np.abs(memory) + 0.5
    setattr(a, moved, memory[-C:])
    before = a.everything()
    assert a.enter("train") == 0
    assert all(same_bits(p, q) for p, q in zip(before, a.everything(), strict=True))
    a.bias = a.weight
    assert a.enter("infer") == (other != "y")


def test_parameters_in_the_output(rng):
    a = Arguments(rng)
    for name in ("weight", "bias"):
        kept = getattr(a, name)
        setattr(a, name, a.y.reshape(-1)[:C])
        assert (a.enter("train"), a.enter("infer")) == (0, 0)
        setattr(a, name, kept)


def test_arrays_that_do_not_lie_as_said(monkeypatch, rng):
    assert objects.readable()
    Arguments(rng)
    monkeypatch.setattr(objects, "RANK", objects.DATA)
    objects.readable.cache_clear()
    try:
        assert not objects.readable()
        assert entries.find("infer", (N, C, 1), None) is None
    finally:
        monkeypatch.undo()
        objects.readable.cache_clear()
    assert entries.find("infer", (N, C, 1), None) is not None


def test_where_a_gate_cannot_be_compiled(monkeypatch, rng):
    a = Arguments(rng)

    def refuse(signature):
        raise AttributeError("Numba's inside has changed")

    entries._code.cache_clear()
    monkeypatch.setattr(quick, "_infer", {})
    monkeypatch.setattr(entries._GATES["infer"][0], "compile", refuse)
    try:
        assert entries.find("infer", (N, C, 1), None) is None
        assert fastbn.batch_norm_infer(a.x, a.mean, a.var).shape == a.x.shape
    finally:
        entries._code.cache_clear()


def test_a_kernel_that_fails_raises_here(rng):
    """Its exception comes through the call by address."""
    a = Arguments(rng)
    code, numbers = entries.find("train", (N, C, 1), None)
    much = (*numbers[:-3], 1 << 58, *numbers[-2:])  # columns that no memory holds
    vectors = a.weight, a.bias, a.mean, a.var
    with pytest.raises(MemoryError):
        code(a.x, None, a.y, *vectors, a.stats, None, np.ndarray, F32, F32, *much, C, a.eps, a.momentum, None)
