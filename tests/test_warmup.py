"""After the warm-up no process compiles: every kernel that the functions can reach was compiled, for every dtype."""

from __future__ import annotations

import os
import sys

import numba
import pytest

from fastbn import warmup
from fastbn.cpu import plans

if numba.config.DISABLE_JIT:
    pytest.skip("there is nothing to compile without the JIT", allow_module_level=True)

USE = """
import itertools, numba, numpy as np, fastbn
from fastbn import warmup
from fastbn.cpu import plans
label = {label!r}
for name, call in warmup.tasks():
    if name.endswith(label):
        call()  # loads from the cache what an earlier process compiled
from numba.core import event
listener = event.RecordingListener()
from tests.oracle import SHAPES, case
from fastbn.functional import frozen
rng = np.random.default_rng(0)
with event.install_listener("numba:compile", listener):
    for shapes in SHAPES.values():
        for shape in shapes:
            for activation, residual in itertools.product((None, "relu"), (False, True)):
                c = case(rng, shape, np.dtype(label), activation=activation, residual=residual)
                rm, rv = c.bias.copy(), np.abs(c.weight)
                for stats in ((None, None), (rm, rv)):
                    y, saved = fastbn.batch_norm_train(c.x, c.weight, c.bias, *stats, **c.options())
                fastbn.backward(c.x, saved)
                fastbn.batch_norm_infer(c.x, rm, rv, **c.options())
                fastbn.backward(c.x, frozen(c.x, rm, rv, c.weight, c.bias, **c.options())[1])
            fastbn.Moments.of(c.x)
    for shape in ((4, 8, 200000), (4, 8, 200001), (64, 100000), (50000, 128), (50000, 127)):  # large: signs are kept
        x = np.ones(shape, np.dtype(label))
        stats = np.zeros(shape[1], x.dtype), np.ones(shape[1], x.dtype)
        for y, saved in (
            fastbn.batch_norm_train(x, None, None, *stats, activation="relu", residual=x),
            frozen(x, *stats, activation="relu", residual=x),
        ):
            assert saved.signs is not None
            fastbn.backward(x, saved)
compiled = {{str(e.data["dispatcher"].py_func.__name__) for _, e in listener.buffer}}
print(sorted(compiled))
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_is_compiled_after_the_warm_up(dtype, python):
    result = python(USE.format(label=dtype), PYTHONPATH=os.pathsep.join(sys.path))
    assert result.stdout.strip() == "[]"


def test_tasks_are_labelled_and_cover_every_kernel_and_dtype():
    tasks = warmup.tasks()
    labels = [label for label, _ in tasks]
    assert len(set(labels)) == len(labels) and all(callable(call) for _, call in tasks)
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        assert sum(label.endswith(f" {dtype}") for label in labels) >= 3, dtype


def test_shapes_reach_every_kernel():
    kinds = {plans.plan((s[0], s[1], s[2] if len(s) > 2 else 1)).kind for s, _ in warmup.SHAPES.values()}
    assert kinds == {"planes", "rows", "swept"}
