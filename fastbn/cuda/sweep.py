"""What happens to one vector of elements: the innermost arithmetic of every kernel, for planes and rows alike.

Per-channel constants are numbers in the channels-first kernels and vectors in the rows kernels. Factories take the
variant (a ``Variant``) as Python constants, so that the branches that are not taken do not exist in the machine code.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

from fastbn.cuda.driver import device, types
from fastbn.cuda.simd import access, add, fma, gate, mul, pick, sub


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    kind: str  # of the tensors: f32, f64, f16, bf16
    W: int  # lanes of a vector, 1 or as many as fill 128 bits
    threads: int
    backward: bool = False
    relu: bool = False
    residual: bool = False  # forward: added; backward: its gradient is written and ReLU's sign comes from y
    frozen: bool = False  # statistics are constants
    given: bool = False  # forward: mean and variance as arguments instead of ``stats``
    kept: bool = True  # one launch: in shared memory; else x is read again, from L2
    alone: bool = False  # one launch for rows: a tile is one block's, which meets nobody
    layers: int = 1  # gangs: blocks of theirs on a multiprocessor
    masked: bool = False  # values count, and outputs are not zero, only where a byte for each (sample, place) says so


def make_terms(what: Variant):
    """First and second factor of the sums. Forward u = t = x - m; backward u = gradient in front of the ReLU, t = xhat.

    In backward t leaves out the rounding remainder of the mean, which ``finalize`` puts back.
    """
    decode = access(what.kind, what.W).decode
    backward, relu, by_output = what.backward, what.relu, what.residual

    @device
    def terms(x, g, y, m, invstd, k, b):
        v = sub(decode(x), m)
        if backward:
            u = decode(g)
            if relu:
                u = gate(decode(y), u) if by_output else gate(fma(v, k, b), u)
            return u, mul(v, invstd)
        else:
            return v, v

    return terms


def make_output(what: Variant):
    """Y = activation((x - m)*k + b + r)."""
    decode = access(what.kind, what.W).decode
    relu, residual = what.relu, what.residual

    @device
    def output(x, r, m, k, b):
        z = fma(sub(decode(x), m), k, b)
        if residual:
            z = add(z, decode(r))
        if relu:
            z = gate(z, z)
        return z

    return output


def make_gradient(what: Variant):
    """Dx = k*u + c1*xhat + c0, or k*u with frozen statistics."""
    frozen = what.frozen

    @device
    def gradient(u, t, k, c1, c0):
        if frozen:
            return mul(k, u)
        else:
            return fma(k, u, fma(c1, t, c0))

    return gradient


def make_only(what: Variant):
    """(mask, v, a) -> a, the v-th vector of its channel, with zeros where a mask excludes it."""
    masked, valid, W = what.masked, access(what.kind, what.W).valid, what.W

    @device
    def only(mask, v, a):
        if masked:
            return pick(valid(mask, types.int64(v) * W), a)
        else:
            return a

    return only
