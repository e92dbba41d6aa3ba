"""The launches of a call, recorded once and made again at other addresses: what a small call costs is the host's work.

Between two calls alike in everything but where their arrays lie, kernels, grids and numbers are the same; only
addresses differ. They are put into the recorded arguments, and what the call allocates is allocated anew. An address
that could mean two arrays (one array given twice) makes a call that is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastbn.cuda import driver
from fastbn.cuda.arrays import WIDE, Flat, Library

__all__ = ["Replay", "record"]

TAIL = 1 << 14  # elements of scratch up to which it lies behind the first result instead of alone
UNIT = 64  # elements from which each vector begins at a multiple of: 128-bit accesses, whole lines


class Step:
    """One launch: its numbers, and which of them are addresses."""

    __slots__ = ("fills", "grid", "launch", "numbers", "shared", "what")

    def __init__(self, what: driver.Kernel, grid: tuple[int, ...], args: tuple[Any, ...], shared: int):
        self.what, self.grid, self.shared = what, grid, shared
        self.numbers = [0 if a is None or type(a) is Flat else a for a in args]
        self.fills: list[tuple[int, int]] = []  # (argument, slot of its address)
        self.launch: Any = None


class Replay:
    """What is launched, and what is allocated for it."""

    __slots__ = ("dtype", "offsets", "sizes", "slots", "steps")

    def __init__(self, steps: Sequence[Step], slots: list[tuple[int, str]], sizes: list[int], offsets: list[Any]):
        self.steps, self.slots = steps, slots  # slots: size and kind of each array, inputs first
        self.sizes, self.offsets = sizes, offsets  # of what is allocated; (which of it, bytes into it) for each slot
        self.dtype = "float64" if any(kind == "f64" for _, kind in slots) else "float32"

    def __call__(self, library: Library, like: Any, stream: int, addresses: list[int]) -> list[Flat]:
        """Launch; returns the vectors that were allocated, results first."""
        made = [library.vector(size, self.dtype, like) for size in self.sizes]
        at = addresses + [made[k].address + offset for k, offset in self.offsets]
        for step in self.steps:
            if driver.SIMULATED:
                args = [*step.numbers]
                for place, slot in step.fills:
                    args[place] = Flat(at[slot], *self.slots[slot])
                absent = [None if c in "TAIM" and a == 0 else a for c, a in zip(step.what.letters, args, strict=True)]
                driver.run(step.what, step.grid, stream, tuple(absent), step.shared)
                continue
            numbers = step.numbers.copy()
            for place, slot in step.fills:
                numbers[place] = at[slot]
            if step.launch is None:  # not before: the first launch may choose another way to launch
                step.launch = step.what.launcher(step.grid, step.shared)
            step.launch(stream, numbers)
        return made


def record(
    call: Callable[[], Any], inputs: Sequence[Flat | None], results: Callable[[Any], Sequence[Flat]], tail: bool = False
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


def _replay(steps: list[Any], inputs: Sequence[Flat | None], results: Sequence[Flat], tail: bool) -> Replay | None:
    given = [flat.address for flat in inputs if flat is not None]
    if len(set(given)) < len(given):
        return None
    slots = [(0, "") if flat is None else (flat.size, flat.kind) for flat in inputs]
    where = {flat.address: k for k, flat in enumerate(inputs) if flat is not None}
    made: list[Flat] = []
    for flat in [*results, *(a for _, _, args, _ in steps for a in args if type(a) is Flat)]:
        if flat.address in where:
            slot = slots[where[flat.address]]
            if slot != (flat.size, flat.kind):
                return None
            continue
        if flat.kind not in WIDE or WIDE[flat.kind] != flat.kind:
            return None
        where[flat.address] = len(slots)
        slots.append((flat.size, flat.kind))
        made.append(flat)
    found = []
    for what, grid, args, shared in steps:
        step = Step(what, grid, args, shared)
        step.fills = [(i, where[a.address]) for i, a in enumerate(args) if type(a) is Flat]
        found.append(step)
    return Replay(found, slots, *_allocations(made, len(results), tail))


def _allocations(made: list[Flat], results: int, tail: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Sizes of what is allocated, and where each vector lies in it; small scratch behind the first result."""
    sizes, offsets = [flat.size for flat in made[:results]], [(k, 0) for k in range(results)]
    scratch = made[results:]
    behind = tail and bool(results) and sum(flat.size + UNIT for flat in scratch) <= TAIL
    itemsize = 8 if made and made[0].kind == "f64" else 4
    for flat in scratch:
        if behind:
            start = -(-sizes[0] // UNIT) * UNIT
            offsets.append((0, start * itemsize))
            sizes[0] = start + flat.size
        else:
            offsets.append((len(sizes), 0))
            sizes.append(flat.size)
    return sizes, offsets
