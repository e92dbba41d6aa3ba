"""The launches of a call, recorded once and made again at other addresses: what a small call costs is the host's work.

Between two calls alike in everything but where their arrays lie, kernels, grids and numbers are the same; only
addresses differ. They are put into the recorded arguments, and what the call allocates is allocated anew. An address
that could mean two arrays (one array given twice) makes a call that is not recorded.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastbn.cuda import driver
from fastbn.cuda.arrays import ITEMSIZE, WIDE, Flat, Library

__all__ = ["Replay", "Runner", "record"]

Runner = Callable[[Any, Sequence[int]], tuple[Sequence[Any], list[int]]]  # (like, addresses) -> what was made, where
TAIL = 1 << 14  # elements of scratch up to which it lies behind the first result instead of alone
ALIGNED = 4  # elements from which a result begins at a multiple of: 128-bit accesses
UNIT = 64  # the same of scratch: whole lines


class Step:
    """One launch: its numbers, and which of them are addresses."""

    __slots__ = ("fills", "grid", "numbers", "shared", "what")

    def __init__(self, what: driver.Kernel, grid: tuple[int, ...], args: tuple[Any, ...], shared: int):
        self.what, self.grid, self.shared = what, grid, shared
        self.numbers = [0 if a is None or type(a) is Flat else a for a in args]
        self.fills: list[tuple[int, int]] = []  # (argument, slot of its address)

    def prepare(self, slots: list[tuple[int, str]]) -> Any:
        """Return what launches it; not before the first replay: the first launch may choose another way to launch."""
        if driver.SIMULATED:
            return functools.partial(self.simulate, slots)
        return self.what.launcher(self.grid, self.shared).bind(self.numbers, self.fills)

    def simulate(self, slots: list[tuple[int, str]], stream: int, at: list[int]) -> None:
        """Launch in the simulator."""
        args = [*self.numbers]
        for place, slot in self.fills:
            args[place] = Flat(at[slot], *slots[slot])
        absent = [None if c in "TAIM" and a == 0 else a for c, a in zip(self.what.letters, args, strict=True)]
        driver.run(self.what, self.grid, stream, tuple(absent), self.shared)


class Made(NamedTuple):
    """What is allocated: ``sizes``, and where each vector lies in it (which of it, bytes into it).

    ``split``: the sizes of the parts that the only one is cut into, and which of these are the results.
    """

    sizes: list[Any]
    offsets: list[tuple[int, int]]
    split: tuple[list[int], list[int]] | None = None


class Replay:
    """What is launched, and what is allocated for it."""

    __slots__ = ("dtype", "made", "parts", "run", "slots", "steps")

    def __init__(self, steps: list[Step], slots: list[tuple[int, str]], made: Made, parts: list[tuple[int, int]]):
        self.steps, self.slots = steps, slots  # slots: size and kind of each array; inputs, results, scratch, parts
        self.made = made
        self.parts = parts  # of others: (slot, bytes into it)
        self.dtype = "float64" if any(kind == "f64" for _, kind in slots) else "float32"
        self.run: Runner | None = None

    def runner(self, library: Library, like: Any) -> Runner:
        """Return what launches and allocates for arrays like this one.

        It returns the arrays that were allocated, results first, and their addresses.
        """
        if self.run is None:
            self.run = _runner(self, library, like)
        return self.run


def _runner(replay: Replay, library: Library, like: Any) -> Runner:
    """Return a function with everything at hand, as ``launcher.bound`` does."""
    (sizes, offsets, split), parts, dtype = replay.made, replay.parts, replay.dtype
    launches = [step.prepare(replay.slots) for step in replay.steps]
    makes, stream = [library.maker(size, dtype, like) for size in sizes], library.stream
    address = library.pointer or library.address
    first = makes[0] if len(sizes) == 1 else None
    behind = [offset for _, offset in offsets[1:]]  # of one allocation, whose first vector is where it begins
    each = offsets == [(k, 0) for k in range(len(sizes))]
    lengths, pick = ([], None) if split is None else (split[0], operator.itemgetter(*split[1]))

    def run(like: Any, addresses: Sequence[int]) -> tuple[Sequence[Any], list[int]]:
        if first is not None:
            value = first(like)
            base = address(value)
            made, bases = [value], [base]
            at = [*addresses, base]
            for offset in behind:
                at.append(base + offset)
            if pick is not None:
                made = pick(library.cut(value, lengths))
        else:
            made, bases = [], []
            for make in makes:
                value = make(like)
                made.append(value)
                bases.append(address(value))
            at = [*addresses, *(bases if each else [bases[k] + offset for k, offset in offsets])]
        if parts:
            at += [at[slot] + offset for slot, offset in parts]
        at.append(0)  # the last one is where there is no array
        handle = stream(like)
        for launch in launches:
            launch(handle, at)
        return made, bases

    return run


def record(
    call: Callable[[], Any], inputs: Sequence[Flat], results: Callable[[Any], Sequence[Flat]], tail: bool = False
) -> Any:
    """Do a call that launches; returns what it returned and its ``Replay``, None where it cannot be replayed.

    ``inputs``: the arrays that it was given; ``results``: those of its vectors that it returned; ``tail``: scratch may
    lie behind the first of them.
    """
    steps: list[Any] = []
    driver.recorder.steps = steps
    try:
        value = call()
    finally:
        driver.recorder.steps = None
    return value, _replay(steps, inputs, results(value), tail)


def _replay(steps: list[Any], inputs: Sequence[Flat], results: Sequence[Flat], tail: bool) -> Replay | None:
    if len({flat.address for flat in inputs}) < len(inputs):
        return None
    known = [*inputs, *results]
    used = [a for _, _, args, _ in steps for a in args if type(a) is Flat]
    scratch: list[Flat] = []
    for flat in sorted(used, key=lambda flat: -flat.size):  # parts after what they are parts of
        if any(flat.shares(other) for other in (*known, *scratch)):
            continue
        if flat.kind not in WIDE or WIDE[flat.kind] != flat.kind:
            return None
        scratch.append(flat)
    slots = [*known, *scratch]
    parts: dict[tuple[int, int], int] = {}
    places = [_place(flat, slots, parts) for flat in used]
    if any(place is None for place in places):
        return None
    shapes = [(flat.size, flat.kind) for flat in slots] + [(0, "")] * len(parts)
    found, rest = [], iter(places)
    for what, grid, args, shared in steps:
        step = Step(what, grid, args, shared)
        step.fills = [(i, next(rest)) for i, a in enumerate(args) if type(a) is Flat]  # type: ignore[misc]
        for (_, slot), flat in zip(step.fills, (a for a in args if type(a) is Flat), strict=True):
            shapes[slot] = max(shapes[slot], (flat.size, flat.kind))
        found.append(step)
    return Replay(found, shapes, _allocations(results, scratch, tail), list(parts))


def _place(flat: Flat, slots: list[Flat], parts: dict[tuple[int, int], int]) -> int | None:
    """Return the slot of an array, a new one for a part of another; None where it reaches beyond that."""
    found = [k for k, whole in enumerate(slots) if whole.address == flat.address]
    found = found or [k for k, whole in enumerate(slots) if whole.shares(flat)]
    whole = slots[found[0]]
    offset, itemsize = flat.address - whole.address, ITEMSIZE[whole.kind]
    if flat.kind != whole.kind or offset < 0 or offset + flat.size * itemsize > whole.size * itemsize:
        return None
    return found[0] if not offset else parts.setdefault((found[0], offset), len(slots) + len(parts))


def _allocations(results: Sequence[Flat], scratch: list[Flat], tail: bool) -> Made:
    """Say what is allocated: each result by itself, all scratch together, behind the first result if it is small."""
    sizes: list[Any] = [_shape(flat) for flat in results]
    offsets = [(k, 0) for k in range(len(results))]
    small = bool(results) and sum(flat.size + UNIT for flat in (*results[1:], *scratch)) <= TAIL
    if small and scratch and len(results) > 1 and all(type(size) is int for size in sizes):
        return _together(results, scratch)
    if scratch and not (small and tail):
        sizes.append(0)
    where = 0 if small and tail else len(sizes) - 1
    for flat in scratch:
        start = -(-sizes[where] // UNIT) * UNIT
        offsets.append((where, start * ITEMSIZE[flat.kind]))
        sizes[where] = start + flat.size
    return Made(sizes, offsets)


def _together(results: Sequence[Flat], scratch: list[Flat]) -> Made:
    """Put all into one allocation, which is cut: quicker than three on a GPU."""
    end, lengths, places, offsets = 0, [], [], []
    for k, flat in enumerate((*results, *scratch)):
        unit = ALIGNED if k < len(results) else UNIT
        start = -(-end // unit) * unit
        offsets.append((0, start * ITEMSIZE[flat.kind]))
        if k < len(results):
            lengths += [start - end] * (start > end)
            places.append(len(lengths))
            lengths.append(flat.size)
            cut = start + flat.size
        end = start + flat.size
    return Made([end], offsets, ([*lengths, end - cut], places))


def _shape(flat: Flat) -> Any:
    """Return what a result is made with: a number is quicker than the shape of a vector."""
    shape = getattr(flat.owner, "shape", None)
    return flat.size if shape is None or len(shape) == 1 else tuple(shape)
