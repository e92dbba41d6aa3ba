"""Calls whose arrays were seen before: what was checked of them then is not checked again, only where they lie.

Checks and plans of a small call take longer than its kernel. A call is known by its options and the shape of x, and by
the types, shapes, strides, dtypes and devices of all its arrays; it is remembered after it went through in full without
a copy. The next such call records its launches, those after it only put other addresses into them. What depends on
addresses (overlaps, alignment) is looked at whenever they are others than before, and whatever is doubtful is left to
the full way, errors included.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from fastbn.cuda import choice
from fastbn.cuda.arrays import DeviceArray, Flat, Library
from fastbn.cuda.driver import current_device
from fastbn.cuda.recorded import Replay, Runner
from fastbn.saved import Gradients

__all__ = ["Back", "Known", "RememberedSaved", "apart", "gradients_of", "keep", "moment", "prove"]

MOST = 4096  # calls that are remembered; then all are forgotten
PROVEN = 256  # sets of addresses that were found to be right, of one kind of call; then all are forgotten
gradients_of: Callable[[Any], Gradients] = functools.partial(tuple.__new__, Gradients)  # half the time of its own way


def moment() -> tuple[int, int]:
    """Return what else a call is known by: where kernels are launched, and how often they were chosen anew."""
    return current_device(), choice.chosen.times


def keep(calls: dict[Any, Any], key: Any, known: Known | None) -> None:
    """Remember a call."""
    if known is not None:
        if len(calls) >= MOST:
            calls.clear()
        calls[key] = known


def apart(at: int, nbytes: int, vectors: Sequence[int], size: int) -> bool:
    """Tell whether memory is apart from vectors of ``size`` bytes each."""
    for vector in vectors:  # noqa: SIM110  (a generator costs twice as much)
        if at - size < vector < at + nbytes:
            return False
    return True


def prove(proven: dict[Any, Any], where: tuple[int, ...], what: Any) -> None:
    """Remember addresses that were found to be right."""
    if len(proven) >= PROVEN:
        proven.clear()
    proven[where] = what


class Back:
    """Gradients that went through: what their arrays are like, and their launches, into other memory or in place."""

    __slots__ = ("apart", "inplace", "moment", "proven", "same")

    def __init__(self, same: Callable[..., bool]):
        self.same, self.moment = same, moment()
        self.apart: Replay | None = None
        self.inplace: Replay | None = None
        self.proven: dict[tuple[int, ...], Runner] = {}


class Known:
    """What all calls with the same key share: x without its memory, and how kernels see it."""

    __slots__ = (
        "backs", "device", "geometry", "kind", "library", "nbytes", "proven", "same", "size", "width",
    )  # fmt: skip

    def __init__(self, library: Library, x: DeviceArray, given: Sequence[Any], channels: int):
        self.library, self.geometry, self.device, self.size = library, x.geometry, x.device, x.size
        self.kind, self.nbytes = "f64" if x.kind == "f64" else "f32", x.size * x.itemsize
        self.width = channels * (8 if self.kind == "f64" else 4)  # bytes of a parameter
        self.same = library.guard(given)
        self.proven: dict[tuple[int, ...], Runner] = {}  # what launches at addresses that were found to be right
        self.backs: list[Back | None] = [None, None, None]  # without out, with out the gradient itself, with another

    def array(self, value: Any, address: int) -> DeviceArray:
        """See an array with the geometry of x."""
        return DeviceArray(self.library, value, address, self.geometry, self.device)

    def flat(self, value: Any, address: int) -> Flat:
        """See an array with the size of x as kernels do."""
        return Flat(address, self.size, self.geometry.kind, value)

    def gradients(self, saved: Any, grad: Any, out: Any) -> Gradients | None:
        """Gradients, if such a gradient was seen before; else None."""
        case = 0 if out is None else 1 if out is grad else 2
        back, library, source = self.backs[case], self.library, saved.source
        if back is None or not (back.same(grad, out) if case == 2 else back.same(grad)) or back.moment != moment():
            return None
        target = out if case else library.like(source)
        at, to = library.addresses((grad, target))
        where = (*saved.ats, at, to)
        run = back.proven.get(where)
        if run is None:
            return self._gradients(saved, back, grad, target, where, case > 0)
        return self.results(saved, target, run(source, where if at != to else where[:-1])[0])

    def _gradients(
        self, saved: Any, back: Back, grad: Any, target: Any, where: tuple[int, ...], given: bool
    ) -> Gradients | None:
        """Gradients at addresses that are new; None where they are not right. ``given``: the caller gave target."""
        *ats, at, to = where
        distance = abs(at - to)
        if abs(ats[0] - to) < self.nbytes or 0 < distance < self.nbytes:
            return None
        if given and not apart(to, self.nbytes, ats[2:], self.width):
            return None
        aligned = not (self.low(where) | at | to) & 15
        replay = back.apart if distance else back.inplace
        if replay is not None and aligned:
            run = replay.runner(self.library, saved.source)
            prove(back.proven, where, run)
            return self.results(saved, target, run(saved.source, where if distance else where[:-1])[0])
        made, replay = self.backward(saved, self.array(grad, at).flat(), self.flat(target, to))
        if aligned and distance:
            back.apart = replay
        elif aligned:
            back.inplace = replay
        return self.results(saved, target, made)

    def low(self, ats: Sequence[int]) -> int:
        """Return the addresses that must be aligned, or'ed, of those that are saved and come first."""
        raise NotImplementedError

    def backward(self, saved: Any, grad: Flat, target: Flat) -> tuple[list[Any], Replay | None]:
        """Launch a gradient; returns those of parameters and the recorded launches.

        The arrays of these are in the order of ``ats``, with grad behind, and target unless it is grad.
        """
        raise NotImplementedError

    def results(self, saved: Any, target: Any, made: Sequence[Any]) -> Gradients:
        """Return what ``fastbn.backward`` does, of what was allocated for it."""
        raise NotImplementedError

    def fits(self, value: DeviceArray) -> bool:
        """Tell whether an array like x lies in memory as x does."""
        raise NotImplementedError

    def learn(self, grad: Any, out: Any) -> None:
        """Remember a gradient that went through, if it lies in memory as x does."""
        given = (grad,) if out is None or out is grad else (grad, out)
        with contextlib.suppress(AttributeError, TypeError):  # another library's
            if all(self.fits(self.library.wrap(value)) for value in given):
                self.backs[0 if out is None else len(given)] = Back(self.library.guard(given))


class RememberedSaved:
    """What a known call saves, beside a ``Saved``: arrays as the caller has them; what else there is, when asked for.

    ``ats``: the addresses of x, of the statistics and of the parameters that backward reads.
    """

    __slots__ = ()

    remembered: ClassVar[tuple[str, ...]] = ("ats", "known", "params", "source", "stored")

    source: Any  # x; None once it was let go
    known: Any
    ats: tuple[int, ...]
    stored: Any  # the statistics
    params: tuple[Any, Any]  # weight and bias

    @property
    def x(self) -> DeviceArray:
        """The input."""
        if self.source is None:
            raise AttributeError("x")
        found: DeviceArray = self.known.array(self.source, self.ats[0])
        return found

    def release(self) -> None:
        """Let go of x; see ``Saved.release``."""
        self.source = None

    def gradients(self, grad_output: Any, out: Any) -> Gradients:
        """See ``fastbn.backward``."""
        if self.source is None:
            raise AttributeError("x")
        found: Gradients | None = self.known.gradients(self, grad_output, out)
        if found is None:
            of: Any = self
            found = of._gradients(grad_output, out)
            self.known.learn(grad_output, out)
        assert found is not None
        return found
