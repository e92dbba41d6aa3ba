"""Which CPU kernel a shape takes, in which blocks or bands, and room for what it needs."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastbn.cpu import planes, rows, tuning

Array = npt.NDArray[Any]
Dims = tuple[int, int, int]


class Plan(NamedTuple):
    """How a shape is worked off; ``kind`` is "planes", "rows" or "swept"."""

    kind: str
    parallel: bool
    V: int = 0  # columns of the matrix
    per: int = 0  # channels of a block (rows)
    height: int = 0  # rows of a band (swept)
    width: int = 0  # columns of a band (swept)

    def bands(self, size: int) -> tuple[int, int]:
        """Return how many bands lie below each other and side by side."""
        matrix_rows = -(-size // self.V)
        return -(-matrix_rows // self.height), -(-self.V // self.width)


def side_by_side(V: int, N: int, most: int, lanes: int) -> int:
    """Rows of V columns to lay side by side: ``most`` columns, or up to four times that for whole vectors."""
    count = max(1, min(N, most // V))
    step = lanes // math.gcd(V, lanes)
    if count >= step:
        return count - count % step
    return step if step <= N and step * V <= 4 * most else count


def _columns(N: int, V: int, lanes: int, once: bool) -> int:
    """Columns of the matrix that N rows of V elements are laid out as."""
    slim = V * side_by_side(V, N, tuning.SLIM, lanes)
    least, most = tuning.SLIM_SIZES
    if once and lanes == 16 and slim % lanes == 0 and least < N * V < most:
        return slim
    return V * side_by_side(V, N, tuning.MATRIX, lanes)


def _as_planes(N: int, C: int, S: int, lanes: int) -> bool:
    """Tell whether gradients and training of (N, C, S) read a block of channels at a time.

    They do so run by run, S elements, and stretch by stretch, the runs of a block that lie side by side; N of these are
    C*S apart. Short ones are slow: (49152, 16, 16) took 25 times as long as its rows do, (7864, 16, 100) 4 times. The
    border lies where both take as long: S - lanes = 3*sqrt(N), 4*sqrt(N) for half types whose runs end inside of
    vectors, or stretches of 8 KB, less where the cache helps.
    """
    stretch = max(S, min(C * S // 8, planes.SHARED * lanes // N))
    dear = 18 if lanes == 32 and S % lanes else 9
    return (S - lanes) ** 2 > dear * N and stretch >= min(128 * lanes, N * C * S // 4096)


def _run_by_run(N: int, S: int, itemsize: int) -> bool:
    """Tell whether inference of N samples reads them run by run of S elements.

    As rows, runs of up to two vectors and a half take 0.4-0.7 of the time, 0.33-0.45 (7 x 7 of half types 0.4-0.65)
    where they stream; but few samples do not repay one number an element: 1.1-1.5 below a sample for 8 bytes of a run.
    """
    size = S * itemsize
    return size >= 160 or size > 8 * N


@functools.lru_cache(maxsize=1024)
def plan(dims: Dims, lanes: int = 16, once: int = 0) -> Plan:
    """Choose the kernel for a shape and vectors of so many lanes.

    ``once``: for inference, which reads x once, the bytes of an element; else 0.
    """
    N, C, S = dims
    size = N * C * S
    parallel = size >= tuning.PARALLEL
    if lanes <= S and (_run_by_run(N, S, once) if once else _as_planes(N, C, S, lanes)):
        return Plan("planes", parallel)
    V = _columns(N, C * S, lanes, once > 0)
    if size <= tuning.WHOLE:
        return Plan("rows", False, V, C)
    if V == C * S and N <= tuning.TALL:
        per = max(1, tuning.WIDTH // S)
        return Plan("rows", parallel, V, min(C, per - per % 16 if per >= 16 else per))
    return swept(Plan("rows", parallel, V, C), size)


def _banded(p: Plan, size: int, width: int) -> Plan:
    """Return the plan in bands of so many columns: a sixteenth of the tensor each, within BAND."""
    least, most = tuning.BAND
    height = max(4, min(most, max(least, size // 16)) // width // 4 * 4)
    return p._replace(kind="swept", height=height, width=width)


def swept(p: Plan, size: int) -> Plan:
    """Return the plan that sweeps the same matrix in bands."""
    if p.kind == "swept":
        return p
    parts = max(1, p.V // tuning.SIDE)
    return _banded(p, size, p.V if parts == 1 else -(-p.V // (32 * parts)) * 32)


def written(p: Plan, out: Array) -> Plan:
    """Return the plan for writing: in whole rows where lines cross their ends, parts of rows would take 1.4-2x."""
    if p.width == p.V or lined(out, p.V):
        return p
    return _banded(p, out.size, p.V if p.V <= 2 * tuning.WIDTH else tuning.WIDTH)


def lanes_of(x: Array | np.dtype[Any]) -> int:
    """Return the lanes of the vectors for this array, 16 for float64 too: two of them are one step there."""
    return 32 if x.itemsize == 2 else 16


def at_once(p: Plan, grad: Array, out: Array) -> bool:
    """Tell whether gradients of bands with frozen statistics are written while their sums are taken.

    Not to memory of what is read, as sums may be taken again; in parts of rows only if lines do not cross their ends.
    """
    return (p.width == p.V or lined(out, p.V)) and not np.may_share_memory(grad, out)


def room_for_columns(weight: Array, V: int, arrays: int) -> Array:
    """Return arrays of V column constants."""
    return np.zeros(arrays * rows.stride(V) + rows.PAD, weight.dtype)


def lined(x: Array | None, V: int) -> bool:
    """Tell whether every row of V elements of x is whole vectors that ``simd.stream`` may write."""
    return x is not None and x.ctypes.data % (lanes_of(x) * x.itemsize) == 0 and V % lanes_of(x) == 0


def room_for_sums(V: int, down: int) -> Array:
    """Return memory for the sums of V columns of ``down`` bands."""
    return np.empty(down * 2 * rows.stride(V) + rows.PAD, np.float64)


def many(p: Plan, C: int) -> bool:
    """Tell whether inference on a matrix makes a block's statistics when it comes to it: see ``rows.infer_by``."""
    return p.kind == "rows" and p.per < C and C >= tuning.MANY


def streams_from(p: Plan, once: bool) -> int:
    """Return from how many bytes of all tensors on a kernel streams what it writes (see ``tuning.streams``)."""
    if not once:
        return tuning.STREAM
    return tuning.READ_ONCE_RUNS if p.kind == "planes" else tuning.READ_ONCE


def in_one_call(p: Plan, C: int, alone: bool) -> bool:
    """Tell whether inference on a matrix is one call of ``rows.infer``: 0.8-0.97 of the time of bands.

    Where all channels are one block nobody could help.
    """
    return (p.kind == "rows" and (not p.parallel or p.per < C)) or (alone and p.V <= 2 * tuning.WIDTH)
