"""Real graphs, by hand: ``python -m tests.export.real_graphs [NAME ...]``; needs torch and transformers.

Builds small models from configurations of transformers, with random weights and randomised statistics, exports them
with both exporters of torch in evaluation with the batch normalizations preserved, folds them, checks the numbers, and
prints how many batch normalizations stay and why. Ends with status 1 if a fold is wrong or fails; a model that the
exporter cannot export, or exports invalid, is told and passed over.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import fastbn_export
import onnx

try:
    import torch
    import transformers as tf
except ImportError as missing:  # pragma: no cover
    raise SystemExit(f"{missing.name} is not installed: this script needs torch and transformers") from None

IMAGE = (1, 3, 64, 64)
Entry = tuple[Callable[[], Any], tuple[int, ...]]

WIDTHS = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32]}
AUDIO = {
    "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8), "conv_stride": (5, 4),
    "conv_kernel": (10, 4), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
SERIES = {
    "num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16,
}  # fmt: skip

MODELS: dict[str, Entry] = {
    "ResNet": (lambda: tf.ResNetModel(tf.ResNetConfig(depths=[1, 2, 1, 1], **WIDTHS)), IMAGE),
    "RegNet": (lambda: tf.RegNetModel(tf.RegNetConfig(depths=[1, 1, 2, 1], groups_width=4, **WIDTHS)), IMAGE),
    "MobileNetV1": (
        lambda: tf.MobileNetV1Model(tf.MobileNetV1Config(depth_multiplier=0.25, image_size=64)), IMAGE
    ),
    "MobileNetV2": (
        lambda: tf.MobileNetV2Model(tf.MobileNetV2Config(depth_multiplier=0.35, image_size=64)), IMAGE
    ),
    "EfficientNet": (
        lambda: tf.EfficientNetModel(
            tf.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.3, image_size=64, hidden_dim=320)
        ),
        IMAGE,
    ),
    "LeViT": (
        lambda: tf.LevitModel(
            tf.LevitConfig(
                image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
                key_dim=[4, 4, 4],
            )
        ),
        IMAGE,
    ),
    "MobileViT": (
        lambda: tf.MobileViTModel(
            tf.MobileViTConfig(
                image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 16, 20, 24],
                num_attention_heads=2,
            )
        ),
        IMAGE,
    ),
    "SwiftFormer": (
        lambda: tf.SwiftFormerModel(
            tf.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 24])
        ),
        IMAGE,
    ),
    "CvT": (
        lambda: tf.CvtModel(tf.CvtConfig(embed_dim=[8, 16, 24], num_heads=[1, 2, 2], depth=[1, 2, 3])), IMAGE
    ),
    "SegFormer": (
        lambda: tf.SegformerForSemanticSegmentation(
            tf.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 24], decoder_hidden_size=16)
        ),
        IMAGE,
    ),
    "Wav2Vec2 Conformer": (
        lambda: tf.Wav2Vec2ConformerModel(
            tf.Wav2Vec2ConformerConfig(num_hidden_layers=2, position_embeddings_type="relative", **AUDIO)
        ),
        (1, 2000),
    ),
    "HuBERT": (
        lambda: tf.HubertModel(tf.HubertConfig(num_hidden_layers=1, conv_pos_batch_norm=True, **AUDIO)), (1, 2000)
    ),
    "PatchTST": (
        lambda: tf.PatchTSTModel(
            tf.PatchTSTConfig(
                num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, norm_type="batchnorm", **SERIES
            )
        ),
        (2, 32, 2),
    ),
    "PatchTSMixer": (
        lambda: tf.PatchTSMixerModel(tf.PatchTSMixerConfig(num_layers=2, norm_mlp="BatchNorm", **SERIES)), (2, 32, 2)
    ),
}  # fmt: skip


class Outputs(torch.nn.Module):
    """A model of transformers that returns a tuple of tensors."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(x)
        return tuple(value for value in found.values() if isinstance(value, torch.Tensor))


def built(make: Callable[[], Any]) -> torch.nn.Module:
    """Return the model in evaluation, every statistic and parameter of its normalizations drawn at random."""
    torch.manual_seed(0)
    model = Outputs(make().eval())
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_mean.copy_(torch.randn_like(module.running_mean) * 0.2)
            module.running_var.copy_(torch.rand_like(module.running_var) + 0.5)
            if getattr(module, "weight", None) is not None:
                module.weight.data.copy_(torch.rand_like(module.weight) + 0.5)
                module.bias.data.copy_(torch.randn_like(module.bias) * 0.2)
    return model


def exported(model: torch.nn.Module, x: torch.Tensor, dynamo: bool) -> onnx.ModelProto:
    """Return the ONNX model; the exporters fold a BatchNormalization after a Conv unless told not to."""
    if dynamo:
        program = torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False)
        return program.model_proto
    file = io.BytesIO()
    torch.onnx.export(
        model, (x,), file, dynamo=False, training=torch.onnx.TrainingMode.PRESERVE, opset_version=17,
        input_names=["x"], dynamic_axes={"x": {0: "N"}},
    )  # fmt: skip
    return onnx.load_from_string(file.getvalue())


def folded(proto: onnx.ModelProto) -> tuple[int, Counter[str], str]:
    """Return the batch normalizations of a graph, the reasons of those that stay, and what is wrong, if anything is."""
    result = fastbn_export.fold(proto)
    onnx.checker.check_model(result.model, full_check=True)
    verdict = fastbn_export.verify(proto, result.model, samples=1)
    reasons = Counter(entry.reason or "" for entry in result.report.entries if not entry.folded)
    return len(result.report.entries), reasons, "" if verdict.ok else f"WRONG: {verdict}"


def trial(name: str, dynamo: bool) -> bool:
    """Export, fold and print one; return whether the fold is right."""
    make, shape = MODELS[name]
    label = f"{name} ({'torch.export' if dynamo else 'TorchScript'})"
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            proto = exported(built(make), torch.randn(shape), dynamo)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        print(f"{label:36} no valid export: {type(error).__name__}: {' '.join(str(error).split())[:80]}", flush=True)
        return True
    try:
        count, reasons, wrong = folded(proto)
    except Exception as error:
        count, reasons, wrong = 0, Counter(), f"FAILED: {type(error).__name__}: {error}"
    print(f"{label:36} {count:3} batch normalizations, {reasons.total():2} left  {wrong}".rstrip(), flush=True)
    for reason, times in reasons.most_common():
        print(f"{'':40} {times} x {reason}")
    return not wrong


def main(arguments: list[str]) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if unknown := set(arguments) - set(MODELS):
        print(f"expected names of {', '.join(MODELS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    right = [trial(name, dynamo) for name in arguments or MODELS for dynamo in (False, True)]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
