"""docs/semantics.md tells the truth: its table is read, and each framework that is installed is asked."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest

import fastbn

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "semantics.md").read_text()
X = np.random.default_rng(3).standard_normal((6, 4)).astype(np.float32) * 2 + 1


def table():
    """Return the table of batch normalization: row -> column -> cell."""
    lines = PAGE.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| | fastbn | PyTorch | Keras 3"))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first:]]
    columns = [name.split(" (")[0] for name in cells[0]]
    rows = cells[2 : cells.index([])]
    return {row[0].strip("`"): dict(zip(columns, row, strict=True)) for row in rows}


class Fastbn:
    """(x, start) -> (y, mean, var) in training and in evaluation, by one framework with its own defaults."""

    def __call__(self, x, mean, var, training=True, mask=None, **options):
        layer = fastbn.BatchNorm(x.shape[1], **options).train(training)
        layer.running_mean[:], layer.running_var[:] = mean, var
        return layer(x, mask=mask), layer.running_mean, layer.running_var

    eps = staticmethod(lambda value: {"eps": value})
    masks = "mask" in inspect.signature(fastbn.BatchNorm.__call__).parameters


class PyTorch:
    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.masks = "mask" in inspect.signature(self.torch.nn.BatchNorm1d.forward).parameters

    def __call__(self, x, mean, var, training=True, mask=None, **options):
        layer = self.torch.nn.BatchNorm1d(x.shape[1], **options).train(training)
        layer.running_mean[:], layer.running_var[:] = self.torch.tensor(mean), self.torch.tensor(var)
        y = layer(self.torch.tensor(x)).detach().numpy()
        return y, layer.running_mean.numpy(), layer.running_var.numpy()

    eps = staticmethod(lambda value: {"eps": value})


class Keras:
    def __init__(self):
        self.keras = import_keras()
        self.masks = "mask" in inspect.signature(self.keras.layers.BatchNormalization.call).parameters

    def __call__(self, x, mean, var, training=True, mask=None, **options):
        layer = self.keras.layers.BatchNormalization(**options)
        layer.build(x.shape)
        layer.set_weights([np.ones_like(mean), np.zeros_like(mean), mean, var, *layer.get_weights()[4:]])
        y = layer(x, training=training, mask=mask)
        return tuple(np.asarray(v) for v in (y, layer.moving_mean, layer.moving_variance))

    eps = staticmethod(lambda value: {"epsilon": value})


class Flax:
    def __init__(self):
        self.linen = pytest.importorskip("flax.linen")
        self.masks = "mask" in inspect.signature(self.linen.BatchNorm.__call__).parameters

    def __call__(self, x, mean, var, training=True, mask=None, **options):
        state = {
            "params": {"scale": np.ones_like(mean), "bias": np.zeros_like(mean)},
            "batch_stats": {"mean": mean, "var": var},
        }
        layer = self.linen.BatchNorm(use_running_average=not training, **options)
        y, moved = layer.apply(state, x, mutable=["batch_stats"], mask=None if mask is None else mask[:, None])
        moved = moved["batch_stats"] if training else state["batch_stats"]
        return tuple(np.asarray(v) for v in (y, moved["mean"], moved["var"]))

    eps = staticmethod(lambda value: {"epsilon": value})


class Onnx:
    masks = False

    def __init__(self):
        self.onnx, self.runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    def __call__(self, x, mean, var, training=True, mask=None, **options):
        h, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        names, results = ["X", "scale", "B", "mean", "var"], ["Y", "new_mean", "new_var"][: 3 if training else 1]
        node = h.make_node("BatchNormalization", names, results, training_mode=int(training), **options)
        infos = [h.make_tensor_value_info(n, kind, None) for n in [*names, *results]]
        graph = h.make_graph([node], "g", infos[:5], infos[5:])
        model = h.make_model(graph, opset_imports=[h.make_opsetid("", 15)], ir_version=8)
        session = self.runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        arrays = (x, np.ones_like(mean), np.zeros_like(mean), mean, var)
        y, *moved = session.run(None, dict(zip(names, arrays, strict=True)))
        return y, *(moved or (mean, var))

    eps = staticmethod(lambda value: {"epsilon": value})


FRAMEWORKS = {"fastbn": Fastbn, "PyTorch": PyTorch, "Keras 3": Keras, "Flax": Flax, "ONNX": Onnx}
MODULES = {"PyTorch": "torch", "Keras 3": "keras", "Flax": "flax", "ONNX": "onnxruntime"}
INSTALLED = [name for name in FRAMEWORKS if name == "fastbn" or importlib.util.find_spec(MODULES[name])]

pytestmark = [  # of the other frameworks and of what they import
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def import_keras():
    """Import Keras on a backend that is installed; its own default is TensorFlow."""
    for backend in ("jax", "torch", "tensorflow"):
        if "KERAS_BACKEND" not in os.environ and importlib.util.find_spec(backend):
            os.environ["KERAS_BACKEND"] = backend
    return pytest.importorskip("keras", exc_type=ImportError)


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.torch] * (n == "PyTorch")) for n in INSTALLED])
def column(request):
    """Return the framework and its cells of the table."""
    framework = FRAMEWORKS[request.param]()
    return framework, {row: cells[request.param] for row, cells in table().items()}


@pytest.mark.parametrize("name", [name for name in FRAMEWORKS if name not in INSTALLED])
def test_not_asked(name):
    pytest.skip(f"{name} is not installed")


def start(C=4, var=1.0):
    return np.zeros(C, np.float32), np.full(C, var, np.float32)


def test_eps(column):
    run, cells = column
    y, *_ = run(np.ones((2, 4), np.float32), *start(var=0.0), training=False)
    stated = next(cell for row, cell in cells.items() if row.startswith("eps`"))
    np.testing.assert_allclose(1 / np.asarray(y, np.float64) ** 2, float(stated), rtol=1e-3)


def test_momentum_and_variance(column):
    run, cells = column
    which, value = re.fullmatch(r"the (new value|old), ([\d.]+)", cells["momentum` is the weight of"]).groups()
    new = float(value) if which == "new value" else 1 - float(value)
    _, mean, var = run(X, *start())
    np.testing.assert_allclose(mean, new * X.mean(0), rtol=1e-4)
    ddof = 1 if cells["running variance over"].startswith("n - 1") else 0
    np.testing.assert_allclose(var, (1 - new) + new * X.var(0, ddof=ddof), rtol=1e-5)


def test_the_batch_is_normalised_by_the_biased_variance(column):
    run, cells = column
    assert cells["normalises by the variance over"] == "n"
    y, *_ = run(X, *start(), **run.eps(1e-5))
    np.testing.assert_allclose(y, (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5), rtol=1e-4, atol=1e-5)


def test_one_value_per_channel(column):
    run, cells = column
    if cells["one value per channel, training"].startswith("ValueError"):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            run(X[:1], *start())
    else:
        assert cells["one value per channel, training"] == "0" and not run(X[:1], *start())[0].any()


def test_empty_batch(column):
    run, cells = column
    y, mean, var = run(X[:0], *start())
    assert y.shape == (0, 4)
    if "NaN" in cells["empty batch"]:
        assert np.isnan(mean).all() and np.isnan(var).all()
    else:
        assert not mean.any() and (var == 1).all()


def test_nan_stays_in_its_channel(column):
    run, _ = column
    x = X.copy()
    x[2, 1] = np.nan
    y, mean, var = run(x, *start())
    bad = np.arange(4) == 1
    assert np.isnan(y[:, bad]).all() and np.isfinite(y[:, ~bad]).all()
    assert np.array_equal(np.isnan(mean), bad) and np.array_equal(np.isnan(var), bad)


def test_eps_of_zero(column):
    run, cells = column
    x = np.full((3, 4), 2.0, np.float32)
    cell = cells["eps <= 0"]
    if "no check" in cell:
        assert np.isnan(run(x, *start(), **run.eps(0.0))[0]).all()
    elif cell:
        with pytest.raises(ValueError, match="eps"):
            run(x, *start(), **run.eps(0.0))
        assert np.isfinite(run(x, *start(), training=False, **run.eps(0.0))[0]).all()


def test_masks(column):
    run, cells = column
    assert run.masks == ("`mask=`" in cells["mask"])
    if run.masks:  # the statistics are those of the valid rows; what becomes of the others is each one's own affair
        mask = np.arange(6) % 3 > 0
        want, got = run(X[mask], *start()), run(X, *start(), mask=mask)
        np.testing.assert_allclose(got[0][mask], want[0], rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(got[1:], want[1:], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif("Keras 3" not in INSTALLED, reason="Keras is not installed")
@pytest.mark.parametrize(("rmax", "dmax"), [(1.0, 0.0), (1.5, 0.4), (3.0, 5.0)])
def test_renormalisation_is_that_of_keras(rmax, dmax):
    if "renorm" not in inspect.signature(import_keras().layers.BatchNormalization).parameters:
        pytest.skip("a Keras without renormalisation")
    clipping = {"rmin": 1 / rmax, "rmax": rmax, "dmax": dmax}
    want, *_ = Keras()(X, *start(), renorm=True, renorm_clipping=clipping)
    moving = start(var=1 - 1e-3)  # Keras renormalises towards a deviation of its own, 1 at the start
    got, _ = fastbn.batch_norm_train(X, None, None, *moving, eps=1e-3, renorm=(rmax, dmax))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_accuracy_of_fastbn():
    cells = {row: cell["fastbn"] for row, cell in table().items()}
    constant = next(row for row in cells if row.startswith("largest output of a constant channel"))
    value = float(re.search(r"at ([\d.]+)", constant).group(1))
    y, *_ = Fastbn()(np.full((4096, 4), value, np.float32), *start())
    assert cells[constant] == "0" and not y.any()
    far = next(row for row in cells if row.startswith("largest error at mean 1e4"))
    x = (np.random.default_rng(0).standard_normal((4096, 4)) + 1e4).astype(np.float32)
    wide = x.astype(np.float64)
    want = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    assert np.abs(Fastbn()(x, *start())[0] - want).max() < float(cells[far].removeprefix("below "))
