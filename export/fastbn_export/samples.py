"""Inputs to try a model on: made up to fit its declared types and shapes, or read from the user's npz.

A dynamic dimension of one name has one size everywhere. Which sizes a model accepts cannot be read off it (a UNet
wants multiples of 32, a kernel wants room), nor which integers it takes for indices: so a short ladder of guesses is
offered, best first, and the caller keeps the first that runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fastbn.errors import ArgumentTypeError, ArgumentValueError

__all__ = ["Feeds", "draw", "given", "guesses", "is_dynamic", "optional_inputs", "required_inputs", "size_name"]

Feeds = dict[str, Any]
"""One sample: input name -> array."""

_SIZES = ((3, (16, 18, 20, 22)), (2, (32,)), (1, (64,)), (1, (224,)), (2, (8, 9, 10)), (1, (1,)), (1, (128,)))
"""(size of an unnamed or first dynamic dimension, sizes that the others take in turn), in the order tried."""

_INTEGERS = ((0, 8), (0, 2), (1, 2), (0, 1))
"""Half-open ranges that integer inputs are drawn from, in the order tried."""

_WORDS = ("batch", "norm", "fold", "scale", "shift", "")
_MOST_ELEMENTS = 1 << 28


def required_inputs(model: onnx.ModelProto) -> list[Any]:
    """Return the graph inputs that have no initialiser, that is, which a caller must give."""
    initialised = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initialised]


def optional_inputs(model: onnx.ModelProto) -> list[Any]:
    """Return the graph inputs that a caller may give, in place of their initialiser (IR version 4 and later)."""
    if model.ir_version < 4:  # there every initialiser is listed among the inputs, and is a constant
        return []
    initialised = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name in initialised]


def guesses(model: onnx.ModelProto, samples: int, seed: int) -> Iterator[list[Feeds]]:
    """Yield lists of ``samples`` random inputs, in another guess about sizes and integers each time.

    Floats are standard normal; the first dynamic dimension of an input is taken for the batch.

    Raises
    ------
    ArgumentTypeError
        An input is no tensor: give inputs then.
    """
    inputs = required_inputs(model)
    for value in inputs:
        if value.type.WhichOneof("value") != "tensor_type":
            raise ArgumentTypeError(
                value.name, "a tensor input (others: inputs=, or --no-verify)", value.type.WhichOneof("value")
            )
    has_integers = any(_is_integer(value.type.tensor_type.elem_type) for value in inputs)
    dynamic = any(is_dynamic(dim) for value in inputs for dim in value.type.tensor_type.shape.dim)
    for first, others in _SIZES if dynamic else _SIZES[:1]:
        shapes = _fill_shapes(inputs, first, others)
        for low, high in _INTEGERS if has_integers else _INTEGERS[:1]:
            rng = np.random.default_rng(seed)
            yield [
                {v.name: draw(rng, v.type.tensor_type.elem_type, shapes[v.name], low, high) for v in inputs}
                for _ in range(samples)
            ]


def given(model: onnx.ModelProto, inputs: Any) -> list[Feeds]:
    """Return the user's inputs as a list of samples, checked against the model.

    Parameters
    ----------
    model : onnx.ModelProto
        The model whose inputs they are.
    inputs : mapping of str to array_like, path to an npz file, or a sequence of such mappings
        One sample, or several.

    Raises
    ------
    ArgumentValueError, ArgumentTypeError
        No sample; a missing, unknown or unconvertible input; an unreadable npz.
    """
    if isinstance(inputs, (str, os.PathLike)):
        inputs = read_npz(inputs)
    if not isinstance(inputs, Iterable):
        raise ArgumentTypeError("inputs", "a mapping, a sequence of mappings or a path", type(inputs).__name__)
    samples = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not samples:
        raise ArgumentValueError("inputs", "at least one sample", "none")
    wanted = {value.name: value for value in required_inputs(model)}
    allowed = set(wanted) | {value.name for value in model.graph.input}
    for sample in samples:
        if not isinstance(sample, Mapping):
            raise ArgumentTypeError("inputs", "mappings of input name to array", type(sample).__name__)
        if missing := set(wanted) - set(sample):
            raise ArgumentValueError("inputs", f"arrays named {sorted(wanted)}", f"none for {sorted(missing)}")
        if unknown := set(sample) - allowed:
            raise ArgumentValueError("inputs", f"arrays named {sorted(wanted)}", f"also {sorted(unknown)}")
    values = {value.name: value for value in model.graph.input}
    return [{name: _as_declared(values[name], array) for name, array in sample.items()} for sample in samples]


def read_npz(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read all arrays of an npz file, never unpickling anything."""
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ArgumentValueError(os.fspath(path), "an npz file of named arrays", "a single array")
        with archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise ArgumentValueError(os.fspath(path), "an npz file", "no such file") from None
    except ArgumentValueError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy's header parser: each has its own
        raise ArgumentValueError(os.fspath(path), "an npz file of named arrays", f"unreadable: {error}") from None


def _as_declared(value: Any, array: Any) -> Any:
    if value.type.WhichOneof("value") != "tensor_type":
        return array
    kind = value.type.tensor_type
    array = np.asarray(array)
    dtype = _dtype(kind.elem_type)
    if kind.elem_type == TensorProto.STRING:
        return array.astype(object)
    if array.dtype != dtype:
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise ArgumentTypeError(value.name, str(dtype), array.dtype)
        array = array.astype(dtype)
    if kind.HasField("shape"):
        declared = [None if is_dynamic(dim) else dim.dim_value for dim in kind.shape.dim]
        fits = len(declared) == array.ndim and all(
            want in (None, have) for want, have in zip(declared, array.shape, strict=True)
        )
        if not fits:
            raise ArgumentValueError(value.name, f"shape {declared}", list(array.shape))
    return array


def _dtype(elem_type: int) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
    return dtype


def _is_integer(elem_type: int) -> bool:
    return elem_type != TensorProto.STRING and _dtype(elem_type).kind in "iu"


def is_dynamic(dim: Any) -> bool:
    """Return whether the size of a declared dimension is for the caller to choose."""
    return not dim.HasField("dim_value") or dim.dim_value < 0  # some exporters write -1 for "any"


def size_name(value: Any, axis: int, dim: Any) -> str:
    """Return what a dynamic size is called; without a name it is the batch if it comes first, and itself otherwise."""
    return str(dim.dim_param) or ("first axis" if axis == 0 else f"{value.name} axis {axis}")


def _fill_shapes(inputs: list[Any], first: int, others: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    named: dict[str, int] = {}
    turn = 0
    shapes = {}
    for value in inputs:
        shape = []
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not is_dynamic(dim):
                shape.append(dim.dim_value)
                continue
            name = size_name(value, axis, dim)
            if name not in named:
                named[name] = first if axis == 0 else others[turn % len(others)]
                turn += axis != 0
            shape.append(named[name])
        if np.prod(shape, dtype=np.float64) > _MOST_ELEMENTS:
            raise ArgumentValueError(value.name, f"at most {_MOST_ELEMENTS} elements", shape)
        shapes[value.name] = tuple(shape)
    return shapes


def draw(rng: np.random.Generator, elem_type: int, shape: tuple[int, ...], low: int = 0, high: int = 2) -> NDArray[Any]:
    """Return random values of an element type: floats standard normal, integers from a range."""
    if elem_type == TensorProto.STRING:
        return rng.choice(np.array(_WORDS, dtype=object), size=shape)
    dtype = _dtype(elem_type)
    if dtype.kind == "b":
        return np.asarray(rng.integers(0, 2, size=shape)).astype(bool)
    if dtype.kind == "c":
        return np.asarray(rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(dtype)
    if dtype in (np.dtype(np.uint8), np.dtype(np.int8)) and (low, high) == _INTEGERS[0]:
        return np.asarray(rng.integers(0, 128, size=shape)).astype(dtype)  # pictures and quantised values
    if dtype.kind in "iu":
        return np.asarray(rng.integers(low, high, size=shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)
