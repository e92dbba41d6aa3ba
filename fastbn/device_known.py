"""Calls whose arrays were seen before: what was checked of them then is not checked again, only where they lie.

Checks and plans of a small call take longer than its kernel. A call is known by the types, shapes, strides, dtypes and
devices of its arrays and by its options; it is remembered after it went through ``device`` without a copy. What depends
on addresses (overlaps) is looked at every time, and whatever is doubtful is left to ``device``, errors included.
"""

from __future__ import annotations

from typing import Any

from fastbn import arguments, device, layout
from fastbn.cuda import launch
from fastbn.cuda.arrays import DeviceArray, Flat, Library
from fastbn.cuda.libraries import quick
from fastbn.saved import Gradients

__all__ = ["infer", "train"]

MOST = 4096  # calls that are remembered; then all are forgotten

_calls: dict[Any, Known] = {}


class Known:
    """What all calls with the same key share: x without its memory, and how kernels see it."""

    __slots__ = ("axis", "channels", "device", "geometry", "grads", "kind", "library", "nbytes", "relu", "where")

    def __init__(self, library: Library, x: DeviceArray, axis: int, where: layout.Layout, relu: bool | None):
        self.library, self.geometry, self.device, self.relu = library, x.geometry, x.device, relu
        self.axis, self.where, self.channels, self.nbytes = axis, where, where.dims[1], x.size * x.itemsize
        self.kind = "f64" if x.kind == "f64" else "f32"
        self.grads: set[Any] = set()  # keys of (gradient, out) that went through

    def array(self, value: Any, address: int) -> DeviceArray:
        """See an array with the geometry of x."""
        return DeviceArray(self.library, value, address, self.geometry, self.device)

    def flat(self, value: Any, address: int) -> Flat:
        """See an array with the size of x as kernels do."""
        return Flat(address, self.geometry.size, self.geometry.kind, value)

    def vector(self, value: Any) -> Flat | None:
        """See a parameter or a statistic as kernels do."""
        return None if value is None else Flat(self.library.address(value), self.channels, self.kind, value)

    def output(self, x: Any, at: int, out: Any, in_place: bool) -> tuple[Any, int]:
        """Return where results go, and its address; 0 if that overlaps x."""
        y = self.library.like(x) if out is None else out
        to = self.library.address(y)
        distance = abs(at - to)
        return y, to if distance >= self.nbytes or (in_place and not distance) else 0

    def gradients(self, saved: device.DeviceSaved, grad: Any, out: Any) -> Gradients | None:
        """Gradients, if such a gradient was seen before; else None."""
        key = key_of(self.library, (grad, out), ())
        if key is None or key not in self.grads:
            return None
        x, at = saved.x, self.library.address(grad)
        target, to = self.output(x.owner, x.address, out, in_place=False)
        distance = abs(at - to)
        if not to or 0 < distance < self.nbytes:
            return None
        dweight, dbias = launch.backward(
            x.flat(), self.flat(grad, at), None, self.flat(target, to), None, saved.weight, saved.bias, saved.vectors,
            self.where.dims, saved.frozen, self.relu,
        )  # fmt: skip
        weight = None if saved.weight is None else dweight.array_owner
        return Gradients(target, weight, None if saved.bias is None else dbias.array_owner, None)

    def learn(self, saved: device.DeviceSaved, grad: Any, out: Any) -> None:
        """Remember a gradient that went through, if it lies in memory as x does."""
        key = key_of(self.library, (grad, out), ())
        if key is not None and all(a is None or _layout(self.library, a, self.axis) == self.where for a in (grad, out)):
            self.grads.add(key)


def _layout(library: Library, value: Any, axis: int) -> layout.Layout | None:
    array = library.wrap(value)
    return layout.of(array.shape, array.strides, array.itemsize, axis)


def key_of(library: Library, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> Any:
    """Return what a call is known by; None where that cannot be said."""
    signature = library.signature
    try:
        key = (library.current(), *[None if a is None else signature(a) for a in arrays], *options)
        hash(key)
    except (AttributeError, TypeError):
        return None
    return key


def _remember(
    key: Any, library: Library, x: Any, vectors: tuple[Any, ...], axis: Any, activation: Any, out: Any
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
    _calls[key] = known = Known(library, array, axis, where, arguments.activation(activation))
    return known


def train(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: Any, eps: Any, axis: Any, activation: Any,
    out: Any, update: bool, unbiased: bool,
) -> tuple[Any, device.DeviceSaved]:  # fmt: skip
    """``device.train`` without residual and mask."""
    library, key = quick(type(x)), None
    if library is not None:
        options = ("train", momentum, eps, axis, activation, update, unbiased)
        key = key_of(library, (x, weight, bias, mean, var, out), options)
        known = _calls.get(key)
        if known is not None:
            at = library.address(x)
            y, to = known.output(x, at, out, in_place=False)
            if to:
                return y, _train(
                    known, known.array(x, at), y, to, (weight, bias, mean, var), momentum, eps, update, unbiased
                )
    y, saved = device.train(
        x, weight, bias, mean, var, momentum, eps, axis, activation, None, out, update_stats=update, unbiased=unbiased
    )
    if library is not None:
        saved.known = _remember(key, library, x, (weight, bias, mean, var), axis, activation, out)
    return y, saved


def _train(
    known: Known, x: DeviceArray, y: Any, to: int, vectors: tuple[Any, ...], momentum: Any, eps: Any, update: bool,
    unbiased: bool,
) -> device.DeviceSaved:  # fmt: skip
    weight, bias, mean, var = [known.vector(v) for v in vectors]
    if not update:
        mean = var = None
    dims = known.where.dims
    saved = device.DeviceSaved()
    saved.vectors = launch.train(
        x.flat(),
        None,
        known.flat(y, to),
        weight,
        bias,
        mean,
        var,
        dims,
        float(eps),
        float(momentum),
        known.relu,
        unbiased,
    )
    saved.x, saved.axis, saved.layout, saved.count = x, known.axis, known.where, dims[0] * dims[2]
    saved.weight, saved.bias, saved.relu, saved.frozen = weight, bias, known.relu, False
    saved.residual, saved.updated, saved.y, saved.mask, saved.known = False, int(mean is not None), None, None, known
    return saved


def infer(x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: Any, axis: Any, activation: Any, out: Any) -> Any:
    """``device.infer`` without residual."""
    library, key = quick(type(x)), None
    if library is not None:
        key = key_of(library, (x, mean, var, weight, bias, out), ("infer", eps, axis, activation))
        known = _calls.get(key)
        if known is not None:
            at = library.address(x)
            y, to = known.output(x, at, out, in_place=True)
            m, v = known.vector(mean), known.vector(var)
            if to and m is not None and v is not None:
                source, given = known.array(x, at).flat(), launch.Given(m, v, float(eps))
                target, w, b = known.flat(y, to), known.vector(weight), known.vector(bias)
                launch.infer(source, None, target, w, b, given, known.where.dims, known.relu)
                return y
    y = device.infer(x, mean, var, weight, bias, eps, axis, activation, None, out)
    if library is not None:
        _remember(key, library, x, (mean, var, weight, bias), axis, activation, out)
    return y
