"""Samples of another kind than those that a model was first seen to run on: other sizes, other optional inputs.

A candidate that holds one batch size, or the default of an input that the caller may override, agrees with the
reference on all samples of one kind. Which sizes and values a model takes cannot be read off it: tries are offered,
best first, and the first that the reference runs on is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from fastbn_export.samples import Feeds, draw, is_dynamic, optional_inputs, required_inputs, size_name

__all__ = ["Run", "overridden", "resized", "vary"]

Run = Callable[[Feeds], Any]
"""Returns what the reference makes of a sample, or None where it refuses it."""

_MOST_OVERRIDDEN = 1 << 22
"""Elements of optional inputs that are overridden, at most; the smallest ones first."""

_ONE_BY_ONE, _EACH = 12, 4
"""Tries of optional inputs by themselves, at most, and of values for each."""

_LARGER = 2.0
"""How much larger than the first one a sample may be, unless it is small."""

_SMALL = 1 << 16


def vary(
    model: onnx.ModelProto, samples: list[Feeds], outputs: list[Any], run: Run, seed: int
) -> tuple[list[Feeds], list[Any]]:
    """Replace the last of several samples by one of other sizes, and one by one with other optional inputs.

    Parameters
    ----------
    model : onnx.ModelProto
        The reference.
    samples, outputs : list
        What it runs on, and what it makes of that.
    run : callable
        Runs it.
    seed : int
        Seed of the random values.

    Returns
    -------
    (samples, outputs)
        As many; the first one is as it was.
    """
    samples, outputs = list(samples), list(outputs)
    if len(samples) < 2:
        return samples, outputs
    rng = np.random.default_rng([seed, 1])
    for sample in resized(model, samples[-1], rng):
        if (made := run(sample)) is not None:
            samples[-1], outputs[-1] = sample, made
            break
    place = max(len(samples) - 2, 1)
    found = overridden(model, samples[place], run, rng)
    if found is not None:
        samples[place], outputs[place] = found
    return samples, outputs


def resized(model: onnx.ModelProto, sample: Feeds, rng: np.random.Generator) -> Iterator[Feeds]:
    """Yield samples with other sizes in the dynamic dimensions: the batch above all, the others halved or doubled."""
    inputs = required_inputs(model)
    sizes = _sizes(inputs, {name: np.shape(array) for name, array in sample.items()})
    before = {name: size for name, (size, _) in sizes.items()}
    elements = sum(np.size(array) for array in sample.values())
    seen = [before]
    for batch, others in ((True, _half), (True, _double), (True, _same), (False, _half), (False, _double)):
        after = {
            name: (1 if size != 1 else 2) if is_first and batch else size if is_first else others(size)
            for name, (size, is_first) in sizes.items()
        }
        shapes = {value.name: _shape(value, after, np.shape(sample[value.name])) for value in inputs}
        larger = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
        if after not in seen and larger <= max(_LARGER * elements, _SMALL):
            seen.append(after)
            yield {value.name: _redrawn(rng, value, sample[value.name], shapes[value.name]) for value in inputs}


def overridden(
    model: onnx.ModelProto, sample: Feeds, run: Run, rng: np.random.Generator
) -> tuple[Feeds, list[Any]] | None:
    """Return a sample that also gives the optional inputs, other values than their defaults; None where none is taken.

    Floats are moved and keep their signs (a variance stays one), all at once if the reference takes that. Integers
    are sizes, axes and positions as a rule: other ones are tried one by one.
    """
    defaults = _defaults(model)
    values = {value.name: value for value in optional_inputs(model) if value.name in defaults}
    known = _sizes(required_inputs(model), {name: np.shape(array) for name, array in sample.items()})
    floats = [name for name in values if _is_float(defaults[name])]
    found: tuple[Feeds, list[Any]] | None = None

    def take(changes: Feeds) -> bool:
        nonlocal found
        feeds = {**(sample if found is None else found[0]), **changes}
        made = run(feeds) if changes else None
        if made is not None:
            found = feeds, made
        return made is not None

    def moved(names: list[str], others: Callable[[int], int]) -> Feeds:
        own = {name: np.shape(defaults[name]) for name in names}
        sizes = {name: others(size) for name, (size, _) in _sizes([values[name] for name in names], own).items()}
        sizes |= {name: size for name, (size, _) in known.items()}
        return {name: _moved(rng, defaults[name], _shape(values[name], sizes, own[name])) for name in names}

    if not any(take(moved(floats, others)) for others in (_half, _same)):
        for name in floats[:_EACH] if len(floats) > 1 else ():
            take(moved([name], _same))
    left = _ONE_BY_ONE
    for name in [name for name in values if defaults[name].dtype.kind in "iub"]:
        for other in _others(defaults[name])[:left]:
            left -= 1
            if take({name: other}):
                break
    return found


def _sizes(inputs: list[Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, bool]]:
    """Return the size of each dynamic dimension by its name, and whether it is an input's first."""
    sizes: dict[str, tuple[int, bool]] = {}
    for value in inputs:
        for axis, (dim, size) in enumerate(zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=False)):
            if is_dynamic(dim):
                sizes.setdefault(size_name(value, axis, dim), (size, axis == 0))
    return sizes


def _shape(value: Any, sizes: dict[str, int], own: tuple[int, ...]) -> tuple[int, ...]:
    dims = list(value.type.tensor_type.shape.dim)
    if len(dims) != len(own):
        return own
    return tuple(
        sizes.get(size_name(value, axis, dim), size) if is_dynamic(dim) else size
        for axis, (dim, size) in enumerate(zip(dims, own, strict=True))
    )


def _half(size: int) -> int:
    return size // 2 if size > 1 else 2


def _double(size: int) -> int:
    return 2 * size


def _same(size: int) -> int:
    return size


def _is_float(array: NDArray[Any]) -> bool:
    return array.dtype.name in ("float16", "bfloat16", "float32", "float64")


def _redrawn(rng: np.random.Generator, value: Any, array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an array of another shape; integers and words out of those that the reference took."""
    if array.shape == shape:
        return array
    if _is_float(array) or array.dtype.kind in "bc" or not array.size:
        return draw(rng, value.type.tensor_type.elem_type, shape)
    return np.asarray(rng.choice(array.reshape(-1), size=shape)).astype(array.dtype)


def _defaults(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Return the default of each optional input that is at hand, up to a number of elements."""
    optional = {value.name for value in optional_inputs(model)}
    tensors = [t for t in model.graph.initializer if t.name in optional and t.data_location != TensorProto.EXTERNAL]
    defaults, elements = {}, 0
    for tensor in sorted(tensors, key=lambda tensor: int(np.prod(tensor.dims, dtype=np.int64))):
        elements += int(np.prod(tensor.dims, dtype=np.int64))
        if elements <= _MOST_OVERRIDDEN:
            defaults[tensor.name] = numpy_helper.to_array(tensor)
    return defaults


def _moved(rng: np.random.Generator, default: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return values that are up to a quarter larger or smaller, so that outputs stay about as large as they are.

    Zeros become small values, of both signs where the default has negative ones.
    """
    wide = np.resize(default.astype(np.float64), shape)
    typical = float(np.abs(wide).mean()) if wide.size else 0.0
    offset = 0.1 * (typical or 1.0) * rng.standard_normal(shape)
    offset = offset if (wide < 0).any() else np.abs(offset)
    return np.asarray(np.where(wide == 0, offset, wide * rng.uniform(0.75, 1.25, shape))).astype(default.dtype)


def _others(default: NDArray[Any]) -> list[NDArray[Any]]:
    """Return integers that might do as well: in another order, one of them halved, less one, or one more."""
    if default.dtype.kind == "b":
        return [~default]
    flat = default.reshape(-1)
    tries = [] if np.array_equal(flat, flat[::-1]) else [flat[::-1]]
    for change in (_halved, _less, _more):
        for place in reversed(range(min(flat.size, _EACH))):
            other = flat.copy()
            other[place] = change(int(flat[place]))
            if other[place] != flat[place]:
                tries.append(other)
    return [np.ascontiguousarray(other.reshape(default.shape)) for other in tries[:_EACH]]


def _halved(integer: int) -> int:
    return integer // 2 if integer > 1 and integer % 2 == 0 else integer


def _less(integer: int) -> int:
    return integer - 1 if integer > 0 else integer


def _more(integer: int) -> int:
    return integer + 1 if 0 <= integer < 127 else integer  # which fits any type
