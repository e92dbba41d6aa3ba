"""All ghosts of a batch in one launch: of the kernels whose blocks need no other block.

``dims`` are those of one ghost; ghosts lie behind each other, ``stats`` has 4*C numbers for each. Other kernels take
one ghost after another: a ghost that needs several launches, or all of the GPU, is no small one.
"""

from __future__ import annotations

from typing import Any

from fastbn.cuda.arrays import Flat
from fastbn.cuda.choice import One, attempt, one_launch
from fastbn.cuda.driver import check, device_properties
from fastbn.cuda.launch import ALL, aligned, flags_of, meeting_place, moving
from fastbn.cuda.plan import LARGEST, MOST, Dims

Tensors = tuple[Flat | None, ...]


def _find(x: Flat, tensors: Tensors, dims: Dims, ghosts: int, relu: bool, residual: bool, backward: bool) -> One | None:
    """Return the kernel of one ghost, with a grid for all."""
    check()
    if ghosts > MOST or ghosts * dims[0] * dims[1] >= LARGEST:
        return None
    limits = device_properties()
    one = one_launch(x.kind, dims, aligned(*tensors), relu, residual, backward, False, limits, False, ghosts)
    if one is None or one.name == "persistent":
        return None
    return one._replace(grid=(one.grid[0], ghosts))


def train(
    x: Flat, residual: Flat | None, out: Flat, params: tuple[Flat | None, Flat | None], stats: Flat, dims: Dims,
    ghosts: int, eps: float, relu: bool | None,
) -> bool:  # fmt: skip
    """Training forward of all ghosts, which moves no running statistics; False if it takes one call for each."""
    tensors = x, residual, out
    one = _find(x, tensors, dims, ghosts, bool(relu), residual is not None, False)
    if one is None:
        return False
    stream = x.owner.stream()
    room = meeting_place(x, one, stream)
    args: Any = (*tensors, stats, *params, None, None, *room, *one.cut, *moving(dims, eps, 0.0))
    return attempt(one, stream, (*args, flags_of(*params), *ALL))


def backward(
    tensors: Tensors, params: tuple[Flat | None, Flat | None], stats: Flat, grads: tuple[Flat, Flat], dims: Dims,
    ghosts: int, relu: bool | None,
) -> bool:  # fmt: skip
    """Gradients of x, y, ... as ``launch.backward`` takes them; ``grads``: of weight and bias, C for each ghost."""
    x = tensors[0]
    assert x is not None
    one = _find(x, tensors, dims, ghosts, bool(relu), tensors[2] is not None, True)
    if one is None:
        return False
    stream = x.owner.stream()
    room = meeting_place(x, one, stream)
    return attempt(one, stream, (*tensors, stats, *params, *grads, *room, *one.cut, flags_of(*params), *ALL))
