"""What is measured: operations, layouts, dtypes and the shapes of real networks.

Bytes are counted in copies of the tensor (one read and one write): the floor of inference and of channels-first
training is 1 copy, of training on rows 1.5 (two reads, one write), of backward 1.5 (two reads, one write), on rows 2.5.
"""

from __future__ import annotations

from typing import NamedTuple

ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


class Case(NamedTuple):
    """One thing to time: ``op`` in OPS on an array of ``shape``; channels_last means NHWC memory, (N, C) is rows."""

    op: str
    shape: tuple[int, ...]
    layout: str = "channels_first"
    dtype: str = "float32"
    name: str = ""

    @property
    def rows(self) -> bool:
        """Tell whether the channel is the contiguous axis."""
        return self.layout == "channels_last" or len(self.shape) == 2

    @property
    def elements(self) -> int:
        """Count the elements of the tensor."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.elements * ITEMSIZE[self.dtype]

    @property
    def floor(self) -> float:
        """Bytes that must move, in copies of the tensor."""
        reads, writes = (READS_WRITES | NORMS | MASKS)[self.op]
        if self.rows and self.op.startswith(("train", "backward")) and self.nbytes > 1 << 20:
            reads *= 1.5 if self.op == "train_fused" else 2  # the residual is read once
        return (reads + writes) / 2

    @property
    def id(self) -> str:
        """Name for tables and tests."""
        return f"{self.op}-{'x'.join(map(str, self.shape))}-{self.layout}-{self.dtype}"


# Tensors read and written once at least. "_fused" is batch norm + residual + ReLU: the residual is one more read
# forward, its gradient one more write backward, and the ReLU's signs a thirty-second of one and of a read.
READS_WRITES = {"infer": (1, 1), "train": (1, 1), "backward": (2, 1), "train_fused": (2, 1), "backward_fused": (2, 2)}

NORMS = {
    name + back: (2 if back else 1, 1)
    for name in ("layer_norm", "group_norm", "instance_norm")
    for back in ("", "_backward")
}
MASKS = {"masked": (1, 1), "masked_backward": (2, 1)}  # see ``masks``
NORM_SHAPES = [
    ("layer_norm", (64, 100)), ("layer_norm", (2, 1 << 20)), ("layer_norm", (8192, 768)), ("layer_norm", (2048, 4096)),
    ("layer_norm", (32, 200704)), ("group_norm", (8, 16, 8, 8)),
    ("group_norm", (32, 64, 56, 56)), ("group_norm", (64, 256, 14, 14)), ("instance_norm", (32, 64, 56, 56)),
    ("instance_norm", (8, 16, 8, 8)), ("instance_norm", (32, 512, 7, 7)),
]  # fmt: skip

RESNET50 = [(32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)]
DENSENET = [(32, 64, 56, 56), (32, 128, 28, 28), (32, 32, 14, 14), (32, 1000, 7, 7)]
MOBILENET = [(32, 32, 112, 112), (32, 144, 56, 56), (32, 192, 28, 28), (32, 576, 14, 14), (32, 1280, 7, 7)]
BN_INCEPTION = [(32, 192, 56, 56), (32, 320, 28, 28), (32, 576, 14, 14), (32, 1056, 7, 7)]
BATCHES = [(64, 256, 28, 28), (256, 256, 14, 14)]  # many samples: short stretches, or blocks too large
ROWS = [(60, 100), (64, 100), (1024, 256), (8192, 1024), (65536, 128)]
SEQUENCES = [(32, 512, 768), (64, 1000, 80)]  # (batch, time, channels)


def quick() -> list[Case]:
    """Return the README's cases: a few minutes."""
    cases = [Case(op, shape) for op in ("train", "backward", "infer") for shape in RESNET50]
    cases += [Case(op, RESNET50[i], "channels_last") for op in ("train", "backward", "infer") for i in (1, 3)]
    cases += [Case(op, shape) for op in ("train", "backward") for shape in ((64, 100), (8192, 1024))]
    cases += [Case(op, RESNET50[1]) for op in ("train_fused", "backward_fused")]
    cases += [Case(op, RESNET50[1], dtype=dtype) for op in ("train", "infer") for dtype in ("float16", "bfloat16")]
    cases += [Case(name + back, shape) for name, shape in NORM_SHAPES for back in ("", "_backward")]
    cases += [Case(op, (32, 256, 1000)) for op in MASKS] + [Case(op, (32, 1000, 256), "channels_last") for op in MASKS]
    return cases


def growth() -> list[Case]:
    """Return tensors from 8 KB to 1 GB in both layouts, and the extremes: one channel, one sample, one million."""
    cases = []
    for power in (11, 13, 15, 17, 18, 20, 22, 24, 26, 28):
        side = (power - 7) // 2
        planes, rows = (8, 16, 1 << side, 1 << (power - 7 - side)), (1 << (power - 6), 64)
        cases += [Case(op, shape) for op in ("train", "infer") for shape in (planes, rows)]
    for shape in ((256, 1, 256, 256), (1, 256, 256, 256), (1 << 24, 1), (16, 1 << 20)):
        cases += [Case(op, shape) for op in ("train", "backward", "infer")]
    return cases


def full() -> list[Case]:
    """Return everything; tens of minutes."""
    cases = quick()
    for shapes in (RESNET50, DENSENET, MOBILENET, BN_INCEPTION):
        for shape in shapes:
            for layout in ("channels_first", "channels_last"):
                cases += [Case(op, shape, layout) for op in READS_WRITES]
    cases += [Case(op, shape) for op in ("train", "backward") for shape in BATCHES]
    for shape in ROWS:
        cases += [Case(op, shape) for op in READS_WRITES]
    for shape in SEQUENCES:
        cases += [Case(op, shape, "channels_last") for op in READS_WRITES]
    for dtype in ("float16", "bfloat16", "float64"):
        cases += [Case(op, RESNET50[i], dtype=dtype) for op in ("train", "backward", "infer") for i in (1, 2, 3, 4)]
    cases += [Case(op, (256, 512, 4, 4)) for op in ("train", "backward", "infer")]  # runs of one vector
    return list(dict.fromkeys(cases + growth()))
