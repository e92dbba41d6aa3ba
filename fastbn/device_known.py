"""Calls whose arrays were seen before: what was checked of them then is not checked again, only where they lie.

Checks and plans of a small call take longer than its kernel. A call is known by the types, shapes, strides, dtypes and
devices of its arrays and by its options; it is remembered after it went through ``device`` without a copy. The next
such call records its launches, those after it only put other addresses into them. What depends on addresses (overlaps,
alignment) is looked at every time, and whatever is doubtful is left to ``device``, errors included.
"""

from __future__ import annotations

import functools
from typing import Any

from fastbn import arguments, device, layout
from fastbn.cuda import choice, launch
from fastbn.cuda.arrays import DeviceArray, Flat, Library
from fastbn.cuda.driver import current_device
from fastbn.cuda.libraries import quick
from fastbn.cuda.recorded import Replay, record
from fastbn.saved import Gradients

__all__ = ["infer", "train"]

MOST = 4096  # calls that are remembered; then all are forgotten

_calls: dict[Any, Known] = {}


class Known:
    """What all calls with the same key share: x without its memory, and how kernels see it."""

    __slots__ = (
        "axis", "channels", "count", "device", "geometry", "grads", "kind", "library", "nbytes", "relu", "replays",
        "same", "size", "where",
    )  # fmt: skip

    def __init__(
        self, library: Library, x: DeviceArray, axis: int, where: layout.Layout, relu: bool | None, same: list[Any]
    ):
        self.same = same
        self.library, self.geometry, self.device, self.relu = library, x.geometry, x.device, relu
        self.axis, self.where, self.channels, self.nbytes = axis, where, where.dims[1], x.size * x.itemsize
        self.kind, self.size, self.count = "f64" if x.kind == "f64" else "f32", x.size, where.dims[0] * where.dims[2]
        self.replays: dict[bool, Replay | None] = {}  # by whether it works in place
        self.grads: dict[Any, Replay | None] = {}  # by (gradient, out), those that went through

    def array(self, value: Any, address: int) -> DeviceArray:
        """See an array with the geometry of x."""
        return DeviceArray(self.library, value, address, self.geometry, self.device)

    def flat(self, value: Any, address: int) -> Flat:
        """See an array with the size of x as kernels do."""
        return Flat(address, self.size, self.geometry.kind, value)

    def vector(self, value: Any) -> Flat | None:
        """See a parameter or a statistic as kernels do."""
        return None if value is None else Flat(self.library.address(value), self.channels, self.kind, value)

    def output(self, x: Any, at: int, out: Any, in_place: bool) -> tuple[Any, int]:
        """Return where results go, and its address; 0 if that overlaps x."""
        y = self.library.like(x) if out is None else out
        to = self.library.address(y)
        distance = abs(at - to)
        return y, to if distance >= self.nbytes or (in_place and not distance) else 0

    def train(
        self, x: Any, at: int, y: Any, to: int, vectors: tuple[Any, ...], momentum: Any, eps: Any, unbiased: bool
    ) -> device.DeviceSaved:
        """``launch.train``, recorded, with what backward needs; ``vectors``: weight, bias, running statistics."""
        library, replay, source = self.library, self.replays.get(False), self.array(x, at)
        weight, bias = self.vector(vectors[0]), self.vector(vectors[1])
        if replay is not None and not (at | to) & 15:
            stats = replay(library, x, library.stream(x), [at, to, *library.addresses(vectors)])[0]
            stats.size = 4 * self.channels  # scratch may lie behind
        else:
            flats = source.flat(), self.flat(y, to), weight, bias, self.vector(vectors[2]), self.vector(vectors[3])
            call = functools.partial(
                launch.train, flats[0], None, *flats[1:], self.where.dims, float(eps), float(momentum), self.relu,
                unbiased,
            )  # fmt: skip
            stats, recorded = record(call, flats, lambda stats: (stats,), tail=True)
            if not (at | to) & 15:
                self.replays[False] = recorded
        return self._saved(source, stats, weight, bias, vectors[2] is not None)

    def _saved(
        self, source: DeviceArray, stats: Flat, weight: Flat | None, bias: Flat | None, moved: bool
    ) -> device.DeviceSaved:
        saved = device.DeviceSaved()
        saved.x, saved.axis, saved.layout, saved.count, saved.vectors = source, self.axis, self.where, self.count, stats
        saved.weight, saved.bias, saved.relu, saved.frozen = weight, bias, self.relu, False
        saved.residual, saved.updated, saved.y, saved.mask, saved.known = False, int(moved), None, None, self
        return saved

    def infer(self, x: Any, at: int, y: Any, to: int, vectors: tuple[Any, ...], eps: Any) -> None:
        """``launch.infer``, recorded; ``vectors``: running statistics, weight, bias."""
        library, replay = self.library, self.replays.get(at == to)
        if replay is not None and not (at | to) & 15:
            replay(library, x, library.stream(x), [at, 0 if at == to else to, *library.addresses(vectors)])
            return
        source, target, flats = self.array(x, at).flat(), self.flat(y, to), [self.vector(v) for v in vectors]
        given: Any = launch.Given(flats[0], flats[1], float(eps))  # type: ignore[arg-type]
        call = functools.partial(
            launch.infer, source, None, target, flats[2], flats[3], given, self.where.dims, self.relu
        )  # fmt: skip
        recorded = record(call, (source, None if at == to else target, *flats), lambda nothing: ())[1]
        if not (at | to) & 15:
            self.replays[at == to] = recorded

    def gradients(self, saved: device.DeviceSaved, grad: Any, out: Any) -> Gradients | None:
        """Gradients, if such a gradient was seen before; else None."""
        key = _gradient_key(self.library, grad, out)
        if key is None or (key, False) not in self.grads:
            return None
        x, at = saved.x, self.library.address(grad)
        target, to = self.output(x.owner, x.address, out, in_place=False)
        distance = abs(at - to)
        if not to or 0 < distance < self.nbytes:
            return None
        dweight, dbias = self._backward(saved, (key, not distance), grad, at, target, to)
        weight = None if saved.weight is None else dweight.owner
        return Gradients(target, weight, None if saved.bias is None else dbias.owner, None)

    def _backward(
        self, saved: device.DeviceSaved, key: Any, grad: Any, at: int, target: Any, to: int
    ) -> tuple[Flat, Flat]:
        x, weight, bias, stats = saved.x, saved.weight, saved.bias, saved.vectors
        replay, aligned = self.grads.get(key), not (x.address | at | to) & 15
        if replay is not None and aligned:
            addresses = [x.address, at, 0 if at == to else to, stats.address]
            addresses += [0 if v is None else v.address for v in (weight, bias)]
            dweight, dbias, *_ = replay(self.library, x.owner, self.library.stream(x.owner), addresses)
            return dweight, dbias
        flats = x.flat(), self.flat(grad, at), self.flat(target, to)
        call = functools.partial(
            launch.backward, flats[0], flats[1], None, flats[2], None, weight, bias, stats, self.where.dims,
            saved.frozen, self.relu,
        )  # fmt: skip
        inputs = (*flats[:2], None if at == to else flats[2], stats, weight, bias)
        grads, recorded = record(call, inputs, lambda grads: grads)
        if aligned:
            self.grads[key] = recorded
        dweight, dbias = grads
        return dweight, dbias

    def learn(self, saved: device.DeviceSaved, grad: Any, out: Any) -> None:
        """Remember a gradient that went through, if it lies in memory as x does."""
        key = _gradient_key(self.library, grad, out)
        if key is not None and all(a is None or _layout(self.library, a, self.axis) == self.where for a in (grad, out)):
            self.grads.setdefault((key, False), None)


def _gradient_key(library: Library, grad: Any, out: Any) -> Any:
    key, found = key_of(library, (grad, out), ())
    return None if key is None else (key, *found[4:])


def _layout(library: Library, value: Any, axis: int) -> layout.Layout | None:
    array = library.wrap(value)
    return layout.of(array.shape, array.strides, array.itemsize, axis)


def key_of(library: Library, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Return what a call is known by, and what must be equal too; None where that cannot be said.

    Few things are hashed and many compared: that takes half the time.
    """
    try:
        found = library.signatures(arrays)
        key = (current_device(), choice.chosen.times, options, len(found), *found[:4])
        hash(key)
    except (AttributeError, TypeError):
        return None, None
    return key, found


def _remember(
    key: Any, same: Any, library: Library, x: Any, vectors: tuple[Any, ...], axis: Any, activation: Any, out: Any
) -> Known | None:
    """Keep a call that went through, if nothing in it was copied."""
    if key is None or any(v is not None and not library.wrap(v).c_contiguous for v in vectors):
        return None
    array = library.wrap(x)
    axis = layout.normalise_axis(axis, array.ndim)
    where = layout.of(array.shape, array.strides, array.itemsize, axis)
    if not array.size or where is None or _layout(library, library.like(x), axis) != where:
        return None
    if out is not None and _layout(library, out, axis) != where:
        return None
    if len(_calls) >= MOST:
        _calls.clear()
    _calls[key] = known = Known(library, array, axis, where, arguments.activation(activation), same)
    return known


def train(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: Any, eps: Any, axis: Any, activation: Any,
    out: Any, update: bool, unbiased: bool,
) -> tuple[Any, device.DeviceSaved]:  # fmt: skip
    """``device.train`` without residual and mask."""
    library, key, same = quick(type(x)), None, None
    if library is not None:
        options = ("train", momentum, eps, axis, activation, update, unbiased)
        key, same = key_of(library, (x, weight, bias, mean, var, out), options)
        known = _calls.get(key)
        twice = mean is not None and (
            mean is var or any(v is mean or v is var for v in (weight, bias) if v is not None)
        )
        if known is not None and known.same == same and not twice:
            at = library.address(x)
            y, to = known.output(x, at, out, in_place=False)
            if to:
                moved = (mean, var) if update else (None, None)
                return y, known.train(x, at, y, to, (weight, bias, *moved), momentum, eps, unbiased)
    y, saved = device.train(
        x, weight, bias, mean, var, momentum, eps, axis, activation, None, out, update_stats=update, unbiased=unbiased
    )
    if library is not None:
        saved.known = _remember(key, same, library, x, (weight, bias, mean, var), axis, activation, out)
    return y, saved


def infer(x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, activation: Any, out: Any) -> Any:
    """``device.infer`` without residual."""
    library, key, same = quick(type(x)), None, None
    if library is not None:
        key, same = key_of(library, (x, mean, var, weight, bias, out), ("infer", eps, axis, activation))
        known = _calls.get(key)
        if known is not None and known.same == same:
            at = library.address(x)
            y, to = known.output(x, at, out, in_place=True)
            if to and mean is not None and var is not None:
                known.infer(x, at, y, to, (mean, var, weight, bias), eps)
                return y
    y = device.infer(x, mean, var, weight, bias, eps, axis, activation, None, out)
    if library is not None:
        _remember(key, same, library, x, (mean, var, weight, bias), axis, activation, out)
    return y
