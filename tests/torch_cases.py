"""Tensors in every memory order, batch norm of them by PyTorch and by ``fastbn.torch``, and how close both must be."""

from __future__ import annotations

import torch

from fastbn.torch import batch_norm

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LOOSE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def name(value):
    """Name a parameter of a test: a function by its name, as its address differs from process to process."""
    return value.__name__ if callable(value) else str(value)


def dense(x):
    return x


def last(x):
    return x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])


def gappy(x):
    return torch.stack([x, x], dim=-1)[..., 0]


def swapped(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(x):
    return x[:1].expand(x.shape)


def unaligned(x):
    memory = bytearray(x.numel() * x.element_size() + 1)
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape).copy_(x)


LAYOUTS = [
    ((37, 5), dense), ((37, 5), swapped), ((37, 5), gappy), ((4, 5, 31), dense), ((4, 5, 31), swapped),
    ((3, 5, 7, 9), dense), ((3, 5, 7, 9), last), ((3, 5, 7, 9), gappy), ((3, 5, 7, 9), expanded),
    ((3, 5, 7, 9), unaligned), ((3, 16, 1, 1), last), ((3, 1, 4, 5), last), ((2, 5, 3, 4, 5), dense),
    ((2, 5, 3, 4, 5), last), ((1, 5, 300), dense),
]  # fmt: skip


def make(shape, dtype, layout=dense, seed=0):
    """Return input, residual, weight, bias, running mean and variance."""
    g = torch.Generator().manual_seed(seed)
    C, kind = shape[1], torch.float64 if dtype is torch.float64 else torch.float32
    x, r = (layout(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)) for _ in range(2))
    w, b, m = (torch.randn(C, generator=g, dtype=torch.float64).to(kind) for _ in range(3))
    return x, r, w, b, m, torch.rand(C, generator=g).to(kind) + 0.5


def theirs(x, r, w, b, m, v, training, activation):
    y = torch.nn.functional.batch_norm(x, m, v, w, b, training, 0.3, 1e-3)
    y = y if r is None else y + r
    return torch.relu(y) if activation else y


def ours(x, r, w, b, m, v, training, activation):
    return batch_norm(x, m, v, w, b, training, 0.3, 1e-3, activation=activation, residual=r)


def close(got, want, dtype, what):
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(
        got.double() / scale, want.double() / scale, rtol=LOOSE[dtype], atol=LOOSE[dtype], msg=lambda m: f"{what}: {m}"
    )
