"""A model that grows by random operators, which ``maker`` registers in the order of their files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import numpy_helper

from .folding import Model

Shape = tuple[int, ...]
_MAKERS: list[tuple[float, Callable[[Fuzz, str, Shape], tuple[str, Shape] | None]]] = []


def maker(weight: float) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        _MAKERS.append((weight, function))
        return function

    return register


class Fuzz(Model):
    """A model that grows by random operators; every value has a static shape."""

    def __init__(self, seed: int, dtype: Any, opset: int):
        super().__init__(opset=opset, dtype=dtype, seed=seed)
        self.pool: list[tuple[str, Shape]] = []
        self.shared: dict[tuple[Shape, bool], str] = {}
        self.plain_names = bool(self.rng.random() < 0.7)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def name(self, prefix: str) -> str:
        self.count += 1
        if self.plain_names:
            return f"{prefix}{self.count}"
        return f"{self.pick('a', 'conv.bias', 'bn', 'x/y:0', 'ä')}_{self.count}"

    def parameter(self, *shape: int, positive: bool = False) -> str:
        """A constant: shared, a Constant node, or behind an Identity, by chance."""
        key = (shape, positive)
        if key in self.shared and self.chance(0.2):
            return self.shared[key]
        fan = max(1, int(np.prod(shape[1:])))
        array = self.rng.standard_normal(shape) / np.sqrt(fan)
        array = (np.abs(array) + 0.5 if positive else array).astype(self.dtype)
        way = self.rng.random()
        if way < 0.15 and self.opset >= 9:
            name = str(self.op("Constant", value=numpy_helper.from_array(array)))
        else:
            name = self.constant(array)
            if way > 0.9:
                name = str(self.op("Identity", name))
        self.shared[key] = name
        return name

    def with_axes(self, op_type: str, x: str, axis: int) -> Any:
        """Axes are an input since opset 13."""
        return self.op(op_type, x, self.ints(axis)) if self.opset >= 13 else self.op(op_type, x, axes=[axis])

    def step(self) -> None:
        """Add one operator behind one of the latest values."""
        index = len(self.pool) - 1 - int(self.rng.geometric(0.7) - 1)
        name, shape = self.pool[max(index, 0)]
        weights = np.asarray([w for w, _ in _MAKERS])
        for _ in range(20):
            _, make = _MAKERS[int(self.rng.choice(len(_MAKERS), p=weights / weights.sum()))]
            mark = len(self.nodes), len(self.initializers)
            made = make(self, name, shape)
            if made is not None:
                self.pool.append(made)
                return
            assert mark == (len(self.nodes), len(self.initializers)), f"{make} left something behind"
