"""Compile ahead: run every kernel once on small arrays, so that later processes find it in the disk cache."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

import fastbn
from fastbn import arguments, functional
from fastbn.cpu import tuning

# One shape for each kernel, and the axis to repeat it along until results stream: channels-first, one cached block of
# rows, rows swept in bands.
SHAPES = {"planes": ((2, 4, 512), 2), "rows": ((64, 100), 1), "rows swept": ((4096, 80), 0)}


def _dtypes() -> list[np.dtype[Any]]:
    dtypes = [np.dtype(name) for name in ("float32", "float64", "float16")]
    if importlib.util.find_spec("ml_dtypes") is not None:
        dtypes.append(np.dtype(importlib.import_module("ml_dtypes").bfloat16))
    return dtypes


def tasks() -> list[tuple[str, Callable[[], None]]]:
    """Return what there is to compile, as (label, call) pairs in the order to run them."""
    return [
        (f"{kind} {dtype.name}", functools.partial(_run, shape, axis, dtype))
        for dtype, (kind, (shape, axis)) in itertools.product(_dtypes(), SHAPES.items())
    ]


def _variants(x: npt.NDArray[Any]) -> Iterator[dict[str, Any]]:
    for activation, residual in itertools.product((None, "relu"), (None, x)):
        yield {"activation": activation, "residual": residual}


def _run(shape: tuple[int, ...], axis: int, dtype: np.dtype[Any]) -> None:
    x: npt.NDArray[Any] = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    parameters = arguments.arithmetic(dtype)
    mean, var = np.zeros(shape[1], parameters), np.ones(shape[1], parameters)
    fastbn.Moments.of(x)
    for variant in (*_variants(x), *_variants(x)):  # a small call goes through a gate from the second one on
        fastbn.batch_norm_infer(x, mean, var, **variant)
        _, saved = fastbn.batch_norm_train(x, None, None, mean, var, **variant)
        fastbn.backward(x, saved)
    for mask in (np.arange(x[:, 0].size) % 2 > 0, np.arange(x[:, 0].size) > 0):  # values and runs are packed
        fastbn.batch_norm_train(x, mask=mask.reshape(x[:, 0].shape))
    large = np.repeat(x, 1 + tuning.READ_ONCE_RUNS // (2 * x.nbytes), axis)
    for some in (x, large):
        _run_fused(some)
        _run_fused(np.ascontiguousarray(some[..., 1:]))


def _run_fused(x: npt.NDArray[Any]) -> None:
    """Run what depends on whether results stream and whether runs or rows are whole lines.

    Where gradients read signs instead of the output, and where they write the residual's gradient.
    """
    parameters = arguments.arithmetic(x.dtype)
    given = np.zeros(x.shape[1], parameters), np.ones(x.shape[1], parameters)
    fused: dict[str, Any] = {"activation": "relu", "residual": x}
    _, saved = fastbn.batch_norm_train(x, None, None, *given, **fused)
    fastbn.backward(x, saved)
    functional.frozen(x, *given, **fused)
