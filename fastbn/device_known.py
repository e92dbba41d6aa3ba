"""Batch norm of arrays that were seen before, on a GPU; how calls are remembered is ``device_remembered``'s."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

from fastbn import arguments, device, layout, running
from fastbn import device_arguments as checks
from fastbn.cuda import launch
from fastbn.cuda.arrays import DeviceArray, Flat, Library
from fastbn.cuda.libraries import quick
from fastbn.cuda.recorded import Replay, Runner, record
from fastbn.device_remembered import Known, RememberedSaved, apart, gradients_of, keep, moment, prove
from fastbn.saved import Gradients

__all__ = ["infer", "train"]

_calls: dict[Any, KnownBatch] = {}


class KnownSaved(RememberedSaved, device.DeviceSaved):  # type: ignore[override]
    """What backward needs after a known call."""

    __slots__ = RememberedSaved.remembered

    mask = y = None
    residual = frozen = False

    @property
    def axis(self) -> int:  # type: ignore[override]
        """The channel axis."""
        return self.known.axis  # type: ignore[no-any-return]

    @property
    def layout(self) -> layout.Layout:  # type: ignore[override]
        """How x lies in memory."""
        return self.known.where  # type: ignore[no-any-return]

    @property
    def relu(self) -> bool | None:  # type: ignore[override]
        """The activation."""
        return self.known.relu  # type: ignore[no-any-return]

    @property
    def count(self) -> int:  # type: ignore[override]
        """Values per channel."""
        return self.known.count  # type: ignore[no-any-return]

    @property
    def vectors(self) -> Flat:  # type: ignore[override]
        """The statistics; behind them may be scratch."""
        return Flat(self.ats[1], 4 * self.known.channels, self.known.kind, self.stored)

    @property
    def weight(self) -> Flat | None:  # type: ignore[override]
        """The scale."""
        return self._parameter(0, 2)

    @property
    def bias(self) -> Flat | None:  # type: ignore[override]
        """The shift."""
        return self._parameter(1, -1)

    def _parameter(self, i: int, at: int) -> Flat | None:
        known, value = self.known, self.params[i]
        return None if value is None else Flat(self.ats[at], known.channels, known.kind, value)

    @property
    def affine(self) -> tuple[bool, bool]:
        """Tell whether the caller gave weight and bias."""
        return self.params[0] is not None, self.params[1] is not None

    def restored(self, x: Any, y: Any) -> device.DeviceSaved:
        """Return what this was before ``release``."""
        known = self.known
        array = checks.tensor("x", x)
        if known.geometry == array.geometry and known.library is array.library:
            ats = (array.address, *self.ats[1:])
            return known.saved(x, ats, self.stored, self.params, self.updated)  # type: ignore[no-any-return]
        found = device.DeviceSaved()
        for name in ("axis", "bias", "count", "frozen", "layout", "mask", "relu", "residual", "updated", "vectors"):
            setattr(found, name, getattr(self, name))
        found.weight, found.x, found.y = self.weight, array, None
        return found


class KnownBatch(Known):
    """What all calls with the same key share."""

    __slots__ = ("axis", "channels", "count", "kept", "moves", "relu", "replays", "separate", "where")

    def __init__(
        self, library: Library, x: DeviceArray, given: Sequence[Any], axis: int, where: layout.Layout, relu: bool | None
    ):
        super().__init__(library, x, given, where.dims[1])
        self.axis, self.where, self.channels, self.relu = axis, where, where.dims[1], relu
        self.count = where.dims[0] * where.dims[2]
        self.kept = self.moves = 0  # how many of x, weight and bias there are, whether running statistics are moved
        self.separate: dict[tuple[int, ...], bool] = {}  # parameters that were found apart from each other
        self.replays: list[Replay | None] = [None] * 4  # into other memory, in place; the same, parameters unaligned

    def vector(self, value: Any) -> Flat | None:
        """See a parameter or a statistic as kernels do."""
        return None if value is None else Flat(self.library.address(value), self.channels, self.kind, value)

    def fits(self, value: DeviceArray) -> bool:
        """Tell whether an array like x lies in memory as x does."""
        return layout.of(value.shape, value.strides, value.itemsize, self.axis) == self.where

    def low(self, ats: Sequence[int]) -> int:
        """Return what must be aligned."""
        return ats[0]

    def right(self, ats: tuple[int, ...], out: Any, vectors: tuple[Any, ...]) -> bool:
        """Tell whether arrays of a training step are apart; ``ats``: where they lie, as in ``train``."""
        params, nbytes, width = ats[1:-1], self.nbytes, self.width
        if abs(ats[0] - ats[-1]) < nbytes or not (out is None or apart(ats[-1], nbytes, params, width)):
            return False
        weight, bias, mean, var = vectors
        return mean is None or (
            apart(ats[0], nbytes, params[-2:], width)
            and (params in self.separate or self.alone(params, (weight, bias), mean, var))
        )

    def alone(self, ats: tuple[int, ...], params: Sequence[Any], mean: Any, var: Any) -> bool:
        """Tell whether running statistics are apart from each other and from parameters; ``ats``: where they lie."""
        given = {str(i): self.vector(value) for i, value in enumerate(params) if value is not None}
        try:
            running.refuse_shared(self.vector(mean), self.vector(var), given, Flat.shares)
        except ValueError:  # the full way says which
            return False
        prove(self.separate, ats, True)
        return True

    def again(self, run: Runner, x: Any, ats: tuple[int, ...], weight: Any, bias: Any) -> KnownSaved:
        """``train`` at addresses that were found to be right."""
        made, bases = run(x, ats)
        saved = KnownSaved()
        saved.known, saved.source, saved.ats = self, x, (ats[0], bases[0], *ats[1 : self.kept])
        saved.stored, saved.params, saved.updated = made[0], (weight, bias), self.moves
        return saved

    def train(
        self, x: Any, ats: tuple[int, ...], y: Any, vectors: tuple[Any, ...], momentum: Any, eps: Any, unbiased: bool,
        update: bool,
    ) -> KnownSaved:  # fmt: skip
        """``launch.train``, recorded, with what backward needs; ``vectors``: weight, bias, running statistics.

        ``ats``: where x lies, those of the vectors that there are, and y.
        """
        weight, bias, mean, _ = vectors
        self.kept = 1 + (weight is not None) + (bias is not None)
        self.moves = int(update and mean is not None)
        replay, aligned = self.replays[0], not (ats[0] | ats[-1]) & 15
        if replay is not None and aligned:
            run = replay.runner(self.library, x)
            prove(self.proven, ats, run)
            return self.again(run, x, ats, weight, bias)
        flats: Any = [self.array(x, ats[0]).flat(), self.flat(y, ats[-1]), *map(self.vector, vectors)]
        moved = flats[4:] if update else (None, None)
        do: Any = launch.train
        call = functools.partial(
            do, flats[0], None, *flats[1:4], *moved, self.where.dims, float(eps), float(momentum), self.relu, unbiased
        )  # fmt: skip
        inputs = [flats[0], *(flat for flat in flats[2:] if flat is not None), flats[1]]
        stats, replay = record(call, inputs, lambda stats: (stats,), tail=True)
        if aligned:
            self.replays[0] = replay
        saved_at = (ats[0], stats.address, *ats[1 : self.kept])
        return self.saved(x, saved_at, stats.array_owner, (weight, bias), self.moves)

    def saved(self, x: Any, ats: tuple[int, ...], stored: Any, params: tuple[Any, Any], updated: int) -> KnownSaved:
        """Return what backward needs."""
        saved = KnownSaved()
        saved.known, saved.source, saved.ats = self, x, ats
        saved.stored, saved.params, saved.updated = stored, params, updated
        return saved

    def infer(self, x: Any, ats: tuple[int, ...], y: Any, vectors: tuple[Any, ...], eps: Any) -> None:
        """``launch.infer``, recorded; ``vectors``: running statistics, weight, bias.

        ``ats``: where x and those of the vectors lie that there are, and y unless that is x.
        """
        inplace, given_ats = y is x or ats[0] == ats[-1], ats
        to = ats[0] if inplace else ats[-1]
        if inplace and y is not x:
            ats = ats[:-1]
        low = functools.reduce(operator.or_, ats)
        case = inplace + 2 * (low & 15 != 0)
        replay, aligned = self.replays[case], not (ats[0] | to) & 15
        if replay is not None and aligned:
            run = replay.runner(self.library, x)
            if ats is given_ats:
                prove(self.proven, ats, run)
            run(x, ats)
            return
        source, target, flats = self.array(x, ats[0]).flat(), self.flat(y, to), [self.vector(v) for v in vectors]
        given: Any = launch.Given(flats[0], flats[1], float(eps))  # type: ignore[arg-type]
        call = functools.partial(
            launch.infer, source, None, target, flats[2], flats[3], given, self.where.dims, self.relu
        )  # fmt: skip
        inputs = [source, *(flat for flat in flats if flat is not None), *(() if inplace else (target,))]
        replay = record(call, inputs, lambda nothing: ())[1]
        if aligned:
            self.replays[case] = replay

    def backward(self, saved: Any, grad: Flat, target: Flat) -> tuple[list[Any], Replay | None]:
        """Launch a gradient; returns those of parameters and the recorded launches."""
        x, stats, params = saved.x.flat(), saved.vectors, (saved.weight, saved.bias)
        call = functools.partial(
            launch.backward, x, grad, None, target, None, *params, stats, self.where.dims, False, self.relu
        )  # fmt: skip
        inputs = [x, stats, *(flat for flat in params if flat is not None), grad]
        inputs += [] if target.address == grad.address else [target]
        grads, replay = record(call, inputs, lambda grads: grads)
        return [flat.array_owner for flat in grads], replay

    def results(self, saved: Any, target: Any, made: Sequence[Any]) -> Gradients:
        """Return what ``fastbn.backward`` does."""
        weight, bias = saved.params
        return gradients_of((target, None if weight is None else made[0], None if bias is None else made[1], None))


def _learn(
    key: Any, given: Sequence[Any], library: Library, x: Any, vectors: tuple[Any, ...], axis: Any, activation: Any,
    out: Any,
) -> KnownBatch | None:  # fmt: skip
    """Keep a call that went through, if nothing in it was copied."""
    try:
        hash(key)
        if any(v is not None and not library.wrap(v).c_contiguous for v in vectors):
            return None
        array = library.wrap(x)
        axis = layout.normalise_axis(axis, array.ndim)
        where = layout.of(array.shape, array.strides, array.itemsize, axis)
        if not array.size or where is None:
            return None
        known = KnownBatch(library, array, given, axis, where, arguments.activation(activation))
        if not known.fits(library.wrap(library.like(x) if out is None else out)):
            return None
    except (AttributeError, TypeError):  # another library's
        return None
    keep(_calls, key, known)
    return known


def train(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: Any, eps: Any, axis: Any, activation: Any,
    out: Any, update: bool, unbiased: bool,
) -> tuple[Any, device.DeviceSaved]:  # fmt: skip
    """``device.train`` without residual and mask."""
    library, vectors = quick(type(x)), (weight, bias, mean, var)
    if library is not None:
        given = [v for v in (x, weight, bias, mean, var, out) if v is not None]
        key = (
            x.shape, x.dtype, weight is None, bias is None, mean is None, var is None, out is None, momentum, eps,
            axis, activation, update, unbiased, *moment(),
        )  # fmt: skip
        try:
            known = _calls.get(key)
        except TypeError:  # an option that cannot be one
            known = None
        if known is not None and known.same(*given):
            y = library.like(x) if out is None else out
            ats = (*library.addresses(given), library.address(y)) if out is None else (*library.addresses(given),)
            run = known.proven.get(ats)
            if run is not None:
                return y, known.again(run, x, ats, weight, bias)
            if known.right(ats, out, vectors):
                return y, known.train(x, ats, y, vectors, momentum, eps, unbiased, update)
    y, saved = device.train(
        x, weight, bias, mean, var, momentum, eps, axis, activation, None, out, update_stats=update, unbiased=unbiased
    )
    if library is not None:
        known = _learn(key, given, library, x, vectors, axis, activation, out)
        if known is not None:
            flats = saved.x, saved.vectors, saved.weight, saved.bias
            ats = (*(flat.address for flat in flats if flat is not None),)
            saved = known.saved(x, ats, saved.vectors.array_owner, (weight, bias), saved.updated)
    return y, saved


def infer(x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, activation: Any, out: Any) -> Any:
    """``device.infer`` without residual."""
    library, vectors, other = quick(type(x)), (mean, var, weight, bias), None if out is x else out
    if library is not None:
        given = [v for v in (x, mean, var, weight, bias, other) if v is not None]
        key = (
            x.shape, x.dtype, mean is None or var is None, weight is None, bias is None, out is None, out is x, eps,
            axis, activation, *moment(),
        )  # fmt: skip
        try:
            known = _calls.get(key)
        except TypeError:  # an option that cannot be one
            known = None
        if known is not None and known.same(*given):
            y = library.like(x) if out is None else out
            ats = (*library.addresses(given), library.address(y)) if out is None else (*library.addresses(given),)
            run = known.proven.get(ats)
            if run is not None:
                run(x, ats)
                return y
            distance = known.nbytes if out is x else abs(ats[0] - ats[-1])
            read = ats[1:] if out is x else ats[1:-1]
            if (distance >= known.nbytes or not distance) and (
                out is None or apart(ats[0] if out is x else ats[-1], known.nbytes, read, known.width)
            ):
                known.infer(x, ats, y, vectors, eps)
                return y
    y = device.infer(x, mean, var, weight, bias, eps, axis, activation, None, out)
    if library is not None:
        _learn(key, given, library, x, vectors, axis, activation, out)
    return y
