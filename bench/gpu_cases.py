"""What is measured on a GPU: operations, layouts, dtypes and shapes, and the bytes that each must move."""

from __future__ import annotations

import math
from typing import NamedTuple

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
# Tensors that are read and written once at least: x and y; x, dy and dx; with residual and ReLU also the residual,
# and in backward y (for the ReLU's sign) and the residual's gradient.
MOVED = {"infer": 2, "train": 2, "backward": 3, "train_fused": 3, "backward_fused": 5}
RESNET50 = [(64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)]  # channels, height and width
ROWS = [(64, 100), (1024, 1024), (8192, 1024), (65536, 256)]


class Case(NamedTuple):
    """One operation on a tensor of ``shape`` (logical, channels second)."""

    op: str
    layout: str  # NCHW, NHWC (the same logical shape in channels_last memory) or NC
    dtype: str
    shape: tuple[int, ...]

    @property
    def fused(self) -> bool:
        """Tell whether a residual and a ReLU are part of it."""
        return self.op.endswith("_fused")

    @property
    def backward(self) -> bool:
        """Tell whether it takes gradients."""
        return self.op.startswith("backward")

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one tensor."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move."""
        return MOVED[self.op] * self.tensor_bytes


def cases() -> list[Case]:
    """Return all cases, the most telling first: what a budget cuts off comes last."""
    found = []
    for dtype in ("float32", "bfloat16"):
        found += _of(64, dtype)
    for dtype in ("float32", "bfloat16", "float16"):
        found += [Case(op, "NC", dtype, shape) for op in ("train", "backward", "infer") for shape in ROWS]
    for op in ("train_fused", "backward_fused"):
        for layout in ("NCHW", "NHWC"):
            found += [Case(op, layout, d, (64, 256, 56, 56)) for d in ("float32", "bfloat16")]
    return found + _of(64, "float16") + [case for d in ("float32", "bfloat16", "float16") for case in _of(256, d)]


def _of(batch: int, dtype: str) -> list[Case]:
    """Return ResNet-50's shapes."""
    layouts = [(op, layout) for op in ("train", "backward", "infer") for layout in ("NCHW", "NHWC")]
    return [Case(op, layout, dtype, (batch, C, H, H)) for op, layout in layouts for C, H in RESNET50]


# Correctness: odd sizes, tails, one channel, one sample, 7x7, large means; every kernel has some.
CHECKED = [
    (2, 3, 8, 9), (1, 1, 520), (3, 5, 17, 19), (64, 100), (4099, 67), (33, 64, 7, 7), (8, 130, 14, 14), (2, 96, 56, 56),
    (16384, 256), (257, 8), (2, 1, 5), (32, 7, 149, 149), (64, 96, 56, 56),
]  # fmt: skip
