"""The experiment runs, learns, and leaves a picture and two models that agree; on MNIST files as well."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from fastbn_export import demo
from fastbn_export.cli import main
from fastbn_export.files import load_model
from fastbn_export.paper_net import Net, mini_batches
from fastbn_export.pictures import digits, mnist

import fastbn

from .test_idx import idx


def write_mnist(folder, count=120, zipped=True):
    """Write the bundled digits as if they were MNIST."""
    data = digits()
    for name, x, y in (("train", data.train_x, data.train_y), ("t10k", data.test_x, data.test_y)):
        files = {
            f"{name}-images-idx3-ubyte": (x[:count].reshape(-1, 8, 8) * 255).astype("u1"),
            f"{name}-labels-idx1-ubyte": y[:count].astype("u1"),
        }
        for file, array in files.items():
            path = folder / (file + ".gz" * zipped)
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


def test_batch_norm_learns_faster_and_is_fastbn():
    data = digits()
    curves, nets = demo.train(data, 200)
    plain, normalised = (dict(curve)[200] for curve in curves.values())
    assert normalised > 0.85 > 0.5 > plain
    assert all(isinstance(norm, fastbn.BatchNorm) for norm in nets[demo.NORMALISED].norms)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_step_is_the_gradient(normalised):
    """Against finite differences of the loss along each parameter array."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 6)).astype(np.float32), rng.integers(0, 3, 60)

    def loss(net):
        logits = net.forward(x)[0].astype(np.float64)
        shifted = logits - logits.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(60), y]))

    def parameters(net):
        found = [*net.weights, *([] if normalised else net.biases)]
        return found + [p for norm in net.norms for p in (norm.weight, norm.bias)]

    net, stepped = Net(6, 3, normalised), Net(6, 3, normalised)
    for array in net.weights + stepped.weights:
        array *= 5
    stepped.step(x, y)
    for array, after in zip(parameters(net), parameters(stepped), strict=True):
        gradient = (array - after).astype(np.float64) / 0.5
        direction = gradient / max(np.linalg.norm(gradient), 1e-12)
        old, small = array.copy(), 2e-2
        array[...] = old + small * direction
        high = loss(net)
        array[...] = old - small * direction
        slope = (high - loss(net)) / (2 * small)
        array[...] = old
        assert slope == pytest.approx(np.linalg.norm(gradient), rel=0.05, abs=1e-3)


def test_mini_batches_show_every_example_before_any_again():
    batches = list(mini_batches(180, 6))
    assert all(sorted(np.concatenate(batches[i : i + 3])) == list(range(180)) for i in (0, 3))
    assert not np.array_equal(batches[0], batches[3])


@pytest.mark.parametrize("own_data", [False, True])
def test_the_command(tmp_path, monkeypatch, capsys, own_data):
    monkeypatch.setattr(demo, "SHOWN", (25, 50))
    out, folder = tmp_path / "new" / "out", tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder)
    assert main(["demo", "--out", str(out), *(["--data", str(folder)] if own_data else [])]) == 0
    printed = capsys.readouterr().out
    for text in ("our choice", "after 25 steps", "after 50 steps", "in onnxruntime", "float64", "operators", "latency"):
        assert text in printed
    assert sorted(p.name for p in out.iterdir()) == ["accuracy.png", "bn.onnx", "bn_folded.onnx"]
    assert (out / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    kinds = [[n.op_type for n in load_model(out / name).graph.node] for name in ("bn.onnx", "bn_folded.onnx")]
    assert kinds[0].count("BatchNormalization") == 3 and "BatchNormalization" not in kinds[1]


def test_mnist_files_plain_or_zipped_are_the_same(tmp_path):
    write_mnist(tmp_path, zipped=False)
    plain = mnist(str(tmp_path))
    for path in list(tmp_path.iterdir()):
        path.unlink()
    write_mnist(tmp_path, zipped=True)
    assert np.array_equal(plain.train_x, mnist(str(tmp_path)).train_x)
    assert set(np.unique(plain.train_x)) == {0.0, 1.0}


def test_files_that_do_not_belong_together(tmp_path, capsys):
    write_mnist(tmp_path, zipped=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(119, "u1")))
    assert main(["demo", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]) == 2
    assert "expected images (n, rows, columns) and labels (n,)" in capsys.readouterr().err
