"""From PyTorch: train a small network, export it with its batch normalizations, fold them, check against PyTorch.

torch.onnx.export folds a BatchNorm behind a convolution by itself, but not behind a Linear, nor one in front of a
convolution. ``training=PRESERVE`` (of a network in eval mode) leaves all of them to us.

Run: ``python export/recipes/torch_to_onnx.py [OUT.onnx]``; needs torch.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import fastbn_export
import numpy as np
from fastbn_export.files import save_model


def network(torch: Any) -> Any:
    """Return convolutions and a head, each with batch normalization, whose statistics have seen some data."""
    nn = torch.nn
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 24),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(20):
        x = torch.randn(32, 3, 16, 16)
        loss = nn.functional.cross_entropy(net(x), x.mean((1, 2, 3)).mul(50).clamp(0, 9).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def export(torch: Any, net: Any, path: Path) -> None:
    """Write the network as ONNX, batch normalizations and all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the TorchScript exporter is deprecated, and needs nothing installed
        torch.onnx.export(
            *(net, torch.zeros(2, 3, 16, 16), str(path)),
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )


def main(out: str) -> int:
    """Train, export, fold, check, and return the exit status."""
    try:
        import torch
    except ImportError:
        print("skipped: this recipe needs torch (pip install torch==2.13.0)")
        return 0
    net = network(torch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export(torch, net, path)
        result = fastbn_export.fold(path)
        report = fastbn_export.verify(path, result.model)
    print(report)
    if not report.ok:
        return 1
    save_model(result.model, out)

    import onnxruntime

    x = torch.randn(8, 3, 16, 16)
    (logits,) = onnxruntime.InferenceSession(out).run(None, {"image": x.numpy()})
    with torch.no_grad():
        difference = np.abs(logits - net(x).numpy()).max()
    print(f"operators: {dict(result.report.ops_before)} -> {dict(result.report.ops_after)}")
    print(f"largest difference between {out} and PyTorch: {difference:.1e}")
    return 0 if difference < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["torch.onnx"])))
