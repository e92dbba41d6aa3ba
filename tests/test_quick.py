"""Small plain calls take the short way, with the bits of the long one; all else goes the long way or raises there."""

from __future__ import annotations

import threading

import numba
import numpy as np
import pytest

import fastbn
from fastbn import core, quick, saved
from fastbn.cpu import tuning
from tests.oracle import same_bits
from tests.tolerances import BF16, arithmetic

if numba.config.DISABLE_JIT:
    pytest.skip("needs the kernels", allow_module_level=True)

LARGE_RUNS = (8, 16, 32, 96)
SHAPES = [
    ((64, 100), 1), ((2, 3), 1), ((8, 16, 5, 5), 1), ((4, 6, 40), 1), ((3, 7, 20), -1), ((5, 4, 6), 0), ((1, 9, 2), 1),
    ((64, 1), 1), ((6, 1, 9), 1), ((6, 1, 30), 1), ((1, 1, 50), 0), ((300, 1024), 1), (LARGE_RUNS, 1),
    ((7, 40000), 1), ((1000, 300), 1),
]  # fmt: skip


class Case:
    """Arguments of a small plain call."""

    def __init__(self, rng, shape=(64, 100), axis=1, dtype=np.float32):
        C, wide = shape[axis], arithmetic(dtype)
        self.axis, self.x = axis, rng.standard_normal(shape, dtype=np.float32).astype(dtype)
        self.weight, self.bias, self.mean = (rng.standard_normal(C, dtype=np.float32).astype(wide) for _ in range(3))
        self.var = rng.random(C, dtype=np.float32).astype(wide) + wide.type(0.5)
        self.grad, self.out = rng.standard_normal(shape, dtype=np.float32).astype(dtype), np.empty(shape, dtype)

    def train(self, **options):
        mean, var = self.mean.copy(), self.var.copy()
        given = {"axis": self.axis, "out": self.out} | options
        y, kept = fastbn.batch_norm_train(self.x, self.weight, self.bias, mean, var, **given)
        return y, kept, mean, var

    def infer(self, **options):
        given = {"axis": self.axis, "out": self.out} | options
        return fastbn.batch_norm_infer(self.x, self.mean, self.var, self.weight, self.bias, **given)


@pytest.fixture
def c(rng):
    found = Case(rng)
    for _ in range(2):  # the first call compiles, the second one is known
        fastbn.backward(found.grad, found.train()[1])
        found.infer()
    return found


@pytest.fixture
def long_way(monkeypatch):
    """Count the calls that go the long way."""
    calls = []
    begin, check = core.Forward.__init__, saved.check_gradient
    monkeypatch.setattr(core.Forward, "__init__", lambda *a, **k: calls.append(0) or begin(*a, **k))
    monkeypatch.setattr(saved, "check_gradient", lambda *a, **k: calls.append(1) or check(*a, **k))
    return calls


def results(c, activation, residual=None):
    options = {"activation": activation, "residual": residual}
    y, kept, mean, var = c.train(out=None, **options)
    z = c.infer(out=None, **options)
    w, frozen = fastbn.functional.frozen(c.x, c.mean, c.var, c.weight, c.bias, axis=c.axis, **options)
    both = fastbn.backward(c.grad, kept), fastbn.backward(c.grad, frozen)
    grads = [*both[0][:3], *both[1][:3], *(g.residual for g in both if residual is not None)]
    about = [kept.mean, kept.variance, kept.moments.m2, frozen.mean, frozen.invstd]
    assert (kept.count, kept.updated, frozen.updated) == (c.x.size // c.weight.size, 1, 0)
    assert all(g.shape == c.weight.shape for g in (grads[1], grads[2], grads[4], grads[5]))
    return [y, mean, var, z, w, *grads, *about]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_same_bits_as_the_long_way(shape, axis, activation, rng, long_way, monkeypatch):
    c = Case(rng, shape, axis)
    results(c, activation)
    long_way.clear()
    short = results(c, activation)
    assert not long_way
    for name in ("train", "infer", "backward"):
        monkeypatch.setattr(quick, name, lambda *a: None)
    full = results(c, activation)
    assert long_way
    assert all(same_bits(a, b) for a, b in zip(short, full, strict=True))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, BF16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(("shape", "axis"), [((64, 100), 1), ((3, 7, 20), -1), ((8, 16, 5, 5), 1), ((4, 6, 40), 1)])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_other_dtypes(shape, axis, dtype, activation, rng, long_way, monkeypatch):
    c = Case(rng, shape, axis, dtype)
    residual = c.grad[::-1].copy() if activation else None
    results(c, activation, residual)
    long_way.clear()
    short = results(c, activation, residual)
    assert not long_way
    assert short[0].dtype == c.x.dtype and short[1].dtype == short[6].dtype == c.weight.dtype
    for name in ("train", "infer", "backward"):
        monkeypatch.setattr(quick, name, lambda *a: None)
    assert all(same_bits(a, b) for a, b in zip(short, results(c, activation, residual), strict=True))
    assert long_way


@pytest.mark.parametrize("dtype", [np.float64, np.float16, BF16], ids=lambda d: np.dtype(d).name)
def test_parameters_of_another_dtype_go_the_long_way(dtype, rng, long_way):
    c = Case(rng, dtype=dtype)
    for _ in range(2):
        c.infer()
    long_way.clear()
    c.infer()
    assert not long_way
    c.weight = c.weight.astype(np.float32 if dtype == np.float64 else np.float64)
    with pytest.raises(TypeError, match="weight"):
        c.infer()


ONE_KERNEL = [((8, 16, 64, 72), 1), ((16, 24, 100, 100), 1), ((600, 3000), 1)]
SWEPT = [((9000, 64), 1), ((40000, 130), 1)]  # sums, then values: only inference is one call


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("shape", "axis"), ONE_KERNEL + SWEPT, ids=str)
def test_large_calls_of_one_thread(shape, axis, fused, rng, long_way, threads):
    c, activation = Case(rng, shape, axis), "relu" if fused else None
    residual = rng.standard_normal(shape, dtype=np.float32) if fused else None
    threads(2)
    full = results(c, activation, residual)
    assert set(long_way) == {0, 1}
    threads(1)
    c.infer(out=None, activation=activation, residual=residual)
    long_way.clear()
    c.infer(out=None, activation=activation, residual=residual)
    assert not long_way
    assert all(same_bits(a, b) for a, b in zip(results(c, activation, residual), full, strict=True))
    fastbn.backward(c.grad, c.train(out=None)[1])
    long_way.clear()
    fastbn.backward(c.grad, c.train(out=None)[1])
    assert set(long_way) == ({0, 1} if (shape, axis) in SWEPT else set())


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_with_a_residual(shape, axis, activation, rng, long_way, monkeypatch):
    c = Case(rng, shape, axis)
    residual = rng.standard_normal(shape, dtype=np.float32)
    results(c, activation, residual)
    long_way.clear()
    short = results(c, activation, residual)
    # A residual's gradient that is streamed must begin where dx does.
    signs = activation is not None and 3 * residual.nbytes >= tuning.STREAM
    some_way = activation is not None and shape == LARGE_RUNS and 5 * residual.nbytes >= tuning.STREAM
    assert set(long_way) == ({1} if some_way else set()) | (
        {0} if signs else set()
    )  # frozen they are kept the long way
    over = residual.copy()
    assert same_bits(c.train(activation=activation, residual=over, out=over)[0], short[0])
    for name in ("train", "infer", "backward"):
        monkeypatch.setattr(quick, name, lambda *a: None)
    assert all(same_bits(a, b) for a, b in zip(short, results(c, activation, residual), strict=True))
    assert set(long_way) == {0, 1}
    for _ in range(2):
        _, kept, _, _ = c.train(activation=activation, residual=residual)
        with pytest.raises(ValueError, match=r"^out: expected memory apart from"):
            fastbn.backward(c.grad, kept, out=c.grad)
        if activation is not None and not signs:
            with pytest.raises(ValueError, match=r"^out: expected memory apart from"):
                fastbn.backward(c.grad, kept, out=c.out)
        monkeypatch.undo()


@pytest.mark.parametrize("shape", [(64, 100), (8, 16, 5, 5), (3, 5, 1000)], ids=str)
def test_signs_instead_of_the_output(shape, rng, long_way, monkeypatch):
    monkeypatch.setattr(tuning, "STREAM", 0)
    for known in ("_train", "_backward", "_others"):
        monkeypatch.setattr(quick, known, {})
    c = Case(rng, shape)
    options = {"activation": "relu", "residual": rng.standard_normal(shape, dtype=np.float32)}
    for _ in range(2):
        fastbn.backward(c.grad, c.train(**options)[1])
        long_way.clear()
    y, kept, _, _ = c.train(**options)
    assert not long_way and kept.y is None
    short, again = fastbn.backward(c.grad, kept), y.copy()
    runs = len(shape) > 2  # whose gradients depend on where the residual's lies
    assert set(long_way) == ({1} if runs else set())
    for wrong in (y.tolist(), y.astype(np.float64), y[:-1], y.view("i4"), y.view([("f", "f4")])):
        with pytest.raises((TypeError, ValueError), match=r"^out: expected"):
            c.train(**options, out=wrong)
    for name in ("train", "backward"):
        monkeypatch.setattr(quick, name, lambda *a: None)
    z, other, _, _ = c.train(**options)
    assert same_bits(again, z)
    assert all(same_bits(a, b) for a, b in zip(short, fastbn.backward(c.grad, other), strict=True))


@pytest.mark.parametrize("change", [
    lambda r: r.astype(np.float64), lambda r: r[:-1], lambda r: r.T, lambda r: r.tolist(), lambda r: 1.0,
], ids=["float64", "short", "transposed", "list", "number"])  # fmt: skip
def test_residuals_that_do_not_fit(change, c):
    before = c.out.copy()
    c.train(residual=c.grad, out=None)
    c.infer(residual=c.grad, out=None)
    for call in (c.train, c.infer):
        with pytest.raises((TypeError, ValueError), match=r"^residual: expected"):
            call(residual=change(c.grad))
    memory = np.zeros(2 * c.x.size, np.float32)
    for call in (c.train, c.infer):
        with pytest.raises(ValueError, match=r"^out: expected"):
            call(residual=memory[: c.x.size].reshape(c.x.shape), out=memory[9 : 9 + c.x.size].reshape(c.x.shape))
    assert same_bits(before, c.out)


def test_without_parameters_and_statistics(c, long_way):
    y, kept = fastbn.batch_norm_train(c.x)
    assert not long_way
    assert kept.updated == 0
    assert same_bits(y, fastbn.batch_norm_train(c.x, np.ones_like(c.weight), np.zeros_like(c.bias))[0])
    grads = fastbn.backward(c.grad, kept)
    assert not long_way
    assert (grads.weight, grads.bias, grads.residual) == (None, None, None)
    assert fastbn.batch_norm_infer(c.x, c.mean, c.var) is not None
    assert not long_way


@pytest.mark.parametrize("change", [
    {"eps": np.float64(1e-5)}, {"eps": 1}, {"momentum": np.float32(0.1)}, {"axis": np.int64(1)},
    {"unbiased": False},
], ids=lambda change: next(iter(change)))  # fmt: skip
def test_other_arguments_go_the_long_way(change, c, long_way):
    c.train(**change)
    assert long_way


@pytest.mark.parametrize("make", [
    lambda a: a.astype(np.float64), lambda a: np.repeat(a, 2, axis=-1)[..., ::2], lambda a: a.tolist(),
    lambda a: a[:-1].copy(), lambda a: a.reshape(-1, 2), lambda a: a.view(type("Mine", (np.ndarray,), {})),
    lambda a: np.frombuffer(a.tobytes(), np.float32), lambda a: a.astype(">f4"),
], ids=["float64", "strides", "list", "short", "matrix", "subclass", "read-only", "endian"])  # fmt: skip
@pytest.mark.parametrize("name", ["weight", "bias", "mean", "var"])
def test_other_vectors_as_the_long_way(name, make, c, monkeypatch):
    setattr(c, name, make(getattr(c, name)))

    def outcome(call):
        try:
            return np.array(call())
        except (TypeError, ValueError) as e:
            return f"{type(e).__name__}: {e}"

    calls = [lambda: c.infer(out=None)]
    if name in ("weight", "bias"):
        calls.append(lambda: c.train(out=None)[0])
    short = [outcome(call) for call in calls]
    monkeypatch.setattr(quick, "train", lambda *a: None)
    monkeypatch.setattr(quick, "infer", lambda *a: None)
    for a, b in zip(short, [outcome(call) for call in calls], strict=True):
        assert a == b if isinstance(b, str) else same_bits(a, b)


@pytest.mark.parametrize(("name", "value"), [
    ("axis", True), ("axis", 2), ("axis", "1"), ("axis", [1]), ("activation", "gelu"), ("activation", np.ones(2)),
    ("activation", True), ("eps", 0.0), ("eps", float("nan")), ("eps", -1.0), ("momentum", float("inf")),
    ("momentum", "0.1"), ("out", np.empty((64, 100))), ("out", np.empty((100, 64), np.float32)), ("out", 3),
])  # fmt: skip
def test_bad_arguments_raise_and_write_nothing(name, value, c):
    before = c.out.copy()
    with pytest.raises((TypeError, ValueError), match=name):
        c.train(**{name: value})
    if name != "momentum" and not (name == "eps" and value == 0.0):
        with pytest.raises((TypeError, ValueError), match=name):
            c.infer(**{name: value})
    assert same_bits(before, c.out)


def test_overlap(c):
    memory = np.zeros(2 * c.x.size, np.float32)
    c.x = memory[: c.x.size].reshape(c.x.shape)
    moved = memory[100 : 100 + c.x.size].reshape(c.x.shape)
    _, kept, *_ = c.train()
    for out in (c.x, moved):
        with pytest.raises(ValueError, match="out"):
            c.train(out=out)
        with pytest.raises(ValueError, match="out"):
            fastbn.backward(c.grad, kept, out=out)
    with pytest.raises(ValueError, match="out"):
        c.infer(out=moved)
    gradient = memory[-c.x.size :].reshape(c.x.shape)
    with pytest.raises(ValueError, match="out"):
        fastbn.backward(gradient, kept, out=memory[-c.x.size - 9 : -9].reshape(c.x.shape))
    expected = c.infer().copy()
    assert same_bits(c.infer(out=c.x), expected)


def test_gradient_in_place(c, long_way):
    _, kept, *_ = c.train()
    expected = fastbn.backward(c.grad, kept).input
    assert fastbn.backward(c.grad, kept, out=c.grad).input is c.grad
    assert not long_way
    assert same_bits(c.grad, expected)


def test_one_value_per_channel_and_nothing(c):
    with pytest.raises(ValueError, match="more than 1 value"):
        fastbn.batch_norm_train(c.x[:1])
    assert fastbn.batch_norm_infer(c.x[:1], c.mean, c.var).shape == (1, 100)
    assert fastbn.batch_norm_train(c.x[:0])[0].shape == (0, 100)


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")  # NumPy 2.5; it still works
def test_x_reshaped_behind_our_back(c):
    """Its layout is that of the forward pass; what is known of the new shape is not used."""
    _, kept, *_ = c.train(out=None)
    other = Case(np.random.default_rng(0), (100, 64))
    for _ in range(2):
        fastbn.backward(other.grad, other.train(out=None)[1])
    expected = fastbn.backward(c.grad, kept)
    c.x.shape = (100, 64)
    got = fastbn.backward(c.grad.reshape(100, 64), kept)
    assert same_bits(got.input.reshape(64, 100), expected.input)
    assert same_bits(got.weight, expected.weight)


def test_forgets_before_it_grows_without_end(c, monkeypatch):
    monkeypatch.setattr(quick, "REMEMBERED", 3)
    for rows in range(2, 12):
        fastbn.batch_norm_train(c.x[:rows])
        assert len(quick._train) <= 3


def test_many_threads(c):
    wrong = []

    def work(scale):
        x = c.x * scale
        expected = core.train(x, c.weight, c.bias, None, None, 0.1, 1e-5, 1, None, np.zeros_like(x), None)[0]
        wrong.extend(i for i in range(200) if not same_bits(fastbn.batch_norm_train(x, c.weight, c.bias)[0], expected))

    threads = [threading.Thread(target=work, args=(np.float32(s),)) for s in (1, 2, 3, 4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_without_gates_calls_go_the_long_way(c, long_way, monkeypatch):
    from fastbn.cpu import entries

    monkeypatch.setattr(quick, "_train", {})
    monkeypatch.setattr(entries, "address_of", lambda kernel, args: None)
    c.train()
    assert long_way


def test_the_gradient_of_a_residual_alone_is_the_gradient(c, long_way):
    _, kept, *_ = c.train(residual=c.grad.copy())
    long_way.clear()
    grads = fastbn.backward(c.grad, kept)
    assert grads.residual is c.grad and not long_way
    assert all(map(same_bits, grads[:3], fastbn.backward(c.grad, c.train()[1])[:3]))
    with pytest.raises(ValueError, match="grad_output"):
        fastbn.backward(c.grad, kept, out=c.grad)


@pytest.mark.parametrize("op", ["train", "infer"])
def test_channels_last_is_looked_up_once(rng, op, monkeypatch):
    """Its kernels are rows', and not those that a shape alone would ask for in every call."""
    x = np.moveaxis(rng.standard_normal((3, 7, 6, 5), dtype=np.float32), -1, 1)
    ones, zeros = np.ones(5, np.float32), np.zeros(5, np.float32)
    asked, genuine = [], quick._learn
    monkeypatch.setattr(quick, "_learn", lambda *a: asked.append(a) or genuine(*a))
    for _ in range(4):
        if op == "infer":
            fastbn.batch_norm_infer(x, zeros, ones, ones, zeros)
        else:
            _, saved = fastbn.batch_norm_train(x, ones, zeros)
            fastbn.backward(x.copy(order="K"), saved)
    assert not asked
