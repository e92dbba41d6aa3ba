"""Layer, instance and group norm for arrays on a GPU; those seen before as ``device_remembered`` describes.

What is checked, and how a call is done in full, is in ``device_sets``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fastbn import device_sets
from fastbn.cuda import launch_sets
from fastbn.cuda.arrays import DeviceArray, Flat, Library
from fastbn.cuda.libraries import quick
from fastbn.cuda.plan_sets import Sizes
from fastbn.cuda.recorded import Replay, Runner, record
from fastbn.device_remembered import Known, RememberedSaved, apart, gradients_of, keep, moment, prove
from fastbn.device_sets import DeviceSetsSaved, move
from fastbn.saved import Gradients

__all__ = ["DeviceSetsSaved", "group_norm", "instance_norm", "layer_norm", "move"]

_calls: dict[Any, KnownSets] = {}


class KnownSetsSaved(RememberedSaved, DeviceSetsSaved):  # type: ignore[override]
    """What backward needs after a known call."""

    __slots__ = RememberedSaved.remembered

    axis = None
    updated = 0

    @property
    def keep(self) -> Flat:  # type: ignore[override]
        """The input as kernels take it."""
        return self.x.flat()

    @property
    def sizes(self) -> Sizes:  # type: ignore[override]
        """What the sets are."""
        return self.known.d  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The shape of the statistics."""
        return self.known.shape  # type: ignore[no-any-return]

    @property
    def count(self) -> int:  # type: ignore[override]
        """Values per set."""
        return self.known.d.n  # type: ignore[no-any-return]

    @property
    def vectors(self) -> Flat:  # type: ignore[override]
        """The statistics; behind them may be scratch."""
        return Flat(self.ats[1], 4 * self.known.d.sets, self.known.kind, self.stored)

    @property
    def weight(self) -> Flat | None:  # type: ignore[override]
        """The scale."""
        known, value = self.known, self.params[0]
        return None if value is None else Flat(self.ats[2], known.d.C, known.kind, value)

    @property
    def affine(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:  # type: ignore[override]
        """The shapes of weight and bias."""
        return self.known.affine  # type: ignore[no-any-return]


class KnownSets(Known):
    """What all calls with the same key share."""

    __slots__ = ("affine", "d", "kept", "replay", "shape")

    def __init__(self, library: Library, saved: DeviceSetsSaved, given: Sequence[Any]):
        super().__init__(library, saved.x, given, saved.sizes.C)
        self.d, self.shape, self.affine = saved.sizes, saved.shape, saved.affine
        self.kept = 1 if saved.affine[0] is None else 2  # how many of x and weight there are
        self.replay: Replay | None = None

    def vector(self, value: Any) -> Flat | None:
        """See a parameter as kernels do."""
        return None if value is None else Flat(self.library.address(value), self.d.C, self.kind, value)

    def fits(self, value: DeviceArray) -> bool:
        """Tell whether an array like x lies in memory as x does."""
        return value.c_contiguous

    def low(self, ats: Sequence[int]) -> int:
        """Return what must be aligned."""
        return ats[0] | ats[self.kept]  # x; the statistics or weight

    def right(self, ats: tuple[int, ...], out: Any) -> bool:
        """Tell whether y is apart from what is read; ``ats``: where arrays lie, as in ``train``."""
        if abs(ats[0] - ats[-1]) < self.nbytes:
            return False
        return out is None or apart(ats[-1], self.nbytes, ats[1:-1], self.width)

    def again(self, run: Runner, x: Any, ats: tuple[int, ...], params: tuple[Any, Any]) -> KnownSetsSaved:
        """``train`` at addresses that were found to be right."""
        made, bases = run(x, ats)
        return self.saved(x, (ats[0], bases[0], *ats[1 : self.kept]), made[0], params)

    def train(self, x: Any, ats: tuple[int, ...], y: Any, params: tuple[Any, Any], eps: Any) -> KnownSetsSaved:
        """``launch_sets.train``, recorded, with what backward needs; ``ats``: where x, the params and y lie."""
        low = 0
        for at in ats:
            low |= at
        aligned = not low & 15
        if self.replay is not None and aligned:
            run = self.replay.runner(self.library, x)
            prove(self.proven, ats, run)
            return self.again(run, x, ats, params)
        source, target = self.array(x, ats[0]).flat(), self.flat(y, ats[-1])
        weight, bias = vectors = self.vector(params[0]), self.vector(params[1])
        call = functools.partial(launch_sets.train, source, target, weight, bias, self.d, float(eps))
        inputs = [source, *(flat for flat in vectors if flat is not None), target]
        stats, replay = record(call, inputs, lambda stats: (stats,), tail=True)
        if aligned:
            self.replay = replay
        return self.saved(x, (ats[0], stats.address, *ats[1 : self.kept]), stats.array_owner, params)

    def saved(self, x: Any, ats: tuple[int, ...], stored: Any, params: tuple[Any, Any]) -> KnownSetsSaved:
        """Return what backward needs."""
        saved = KnownSetsSaved()
        saved.known, saved.source, saved.ats, saved.stored, saved.params = self, x, ats, stored, params
        return saved

    def backward(self, saved: Any, grad: Flat, target: Flat) -> tuple[list[Any], Replay | None]:
        """Launch a gradient; returns those of parameters and the recorded launches."""
        x, stats, weight = saved.keep, saved.vectors, saved.weight

        def call() -> list[Flat]:
            dweight, dbias = (None if s is None else saved.parameter_gradient(s).flat() for s in self.affine)
            launch_sets.backward(x, grad, target, weight, stats, dweight, dbias, self.d)
            return [flat for flat in (dweight, dbias) if flat is not None]

        inputs = [x, stats, *(() if weight is None else (weight,)), grad]
        inputs += [] if target.address == grad.address else [target]
        grads, replay = record(call, inputs, lambda grads: grads)
        return [flat.array_owner for flat in grads], replay

    def results(self, saved: Any, target: Any, made: Sequence[Any]) -> Gradients:
        """Return what ``fastbn.backward`` does."""
        weight, bias = self.affine
        dweight = None if weight is None else made[0]
        return gradients_of((target, dweight, None if bias is None else made[0 if weight is None else 1], None))


def _learn(
    key: Any, given: Sequence[Any], library: Library, x: Any, params: tuple[Any, Any], saved: DeviceSetsSaved, y: Any
) -> DeviceSetsSaved:
    """Remember a call that went through, if nothing in it was copied; returns what it saved."""
    try:
        hash(key)
        arrays = (saved.x, *(library.wrap(v) for v in (*params, y) if v is not None))
        if saved.axis not in (None, 1) or not saved.x.size or not all(array.c_contiguous for array in arrays):
            return saved
        known = KnownSets(library, saved, given)
    except (AttributeError, TypeError):  # another library's
        return saved
    keep(_calls, key, known)
    ats = (flat.address for flat in (saved.x, saved.vectors, saved.weight) if flat is not None)
    return known.saved(x, (*ats,), saved.vectors.array_owner, params)


def _normalise(
    full: Callable[..., tuple[Any, DeviceSetsSaved]], x: Any, weight: Any, bias: Any, options: tuple[Any, ...],
    eps: Any, out: Any,
) -> tuple[Any, DeviceSetsSaved]:  # fmt: skip
    """Do a call as an earlier one if there was one, else in full."""
    library = quick(type(x))
    if library is not None:
        given = [v for v in (x, weight, bias, out) if v is not None]
        key = full, x.shape, x.dtype, weight is None, bias is None, out is None, eps, options, *moment()
        try:
            known = _calls.get(key)
        except TypeError:  # an option that cannot be one
            known = None
        if known is not None and known.same(*given):
            y = library.like(x) if out is None else out
            ats = (*library.addresses(given), library.address(y)) if out is None else (*library.addresses(given),)
            run = known.proven.get(ats)
            if run is not None:
                return y, known.again(run, x, ats, (weight, bias))
            if known.right(ats, out):
                return y, known.train(x, ats, y, (weight, bias), eps)
    y, saved = full(x, weight, bias, *options, eps, out)
    return y, saved if library is None else _learn(key, given, library, x, (weight, bias), saved, y)


def instance_norm(x: Any, weight: Any, bias: Any, axis: Any, eps: Any, out: Any) -> tuple[Any, DeviceSetsSaved]:
    """See ``fastbn.instance_norm``."""
    return _normalise(device_sets.instance_norm, x, weight, bias, (axis,), eps, out)


def group_norm(
    x: Any, num_groups: Any, weight: Any, bias: Any, axis: Any, eps: Any, out: Any
) -> tuple[Any, DeviceSetsSaved]:
    """See ``fastbn.group_norm``."""
    return _normalise(device_sets.group_norm, x, weight, bias, (num_groups, axis), eps, out)


def layer_norm(x: Any, weight: Any, bias: Any, axis: Any, eps: Any, out: Any) -> tuple[Any, DeviceSetsSaved]:
    """See ``fastbn.layer_norm``."""
    return _normalise(device_sets.layer_norm, x, weight, bias, (axis,), eps, out)
