"""Random valid models over the operators that the fold engine knows, with random attributes, sharing and names."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from . import fuzz_layers, fuzz_layouts, fuzz_passes  # noqa: F401 -- in this order: a seed is a model
from .fuzz_model import Fuzz


def random_model(seed: int, dtype: Any = np.float64, opset: int | None = None) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    modern = dtype == np.float64  # the reference evaluator trains BatchNormalization before opset 14
    opset = opset or int(rng.choice([14, 15, 17, 18, 20, 21] if modern else [8, 9, 10, 11, 12, 13, 15, 17, 18, 21]))
    fuzz = Fuzz(seed, dtype, opset)
    shape = fuzz.pick((2, 4, 6, 6), (1, 6, 4, 4), (2, 5, 4), (3, 4), (2, 3, 8, 8), (2, 4, 1, 1))
    fuzz.pool.append((fuzz.input(*shape), shape))
    for _ in range(int(rng.integers(4, 16))):
        fuzz.step()
    read = {i for n in fuzz.nodes for i in n.input}
    outputs = [(n, s) for n, s in fuzz.pool[1:] if n not in read or fuzz.chance(0.05)]
    for n, s in outputs:
        fuzz.output(n, shape=s)
    if fuzz.chance(0.2):
        for node in fuzz.nodes:
            node.name = fuzz.pick("", node.name)
    return fuzz.build()
