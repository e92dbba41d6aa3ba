"""``out`` and inputs: the very same memory where that works, memory apart, or an error before anything is written."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn import ArgumentValueError
from tests.test_arguments import F32, SHAPE, array, refused, vector


def overlapping():
    """Yield (x, out) that share memory in every way but exactly."""
    memory = array((5, 3, 5))
    yield "shifted", memory[:4], memory[1:]
    memory = array((3, 3, 5))
    yield "other order", memory, memory.transpose(1, 0, 2)
    memory = array()
    yield "backwards", memory[::-1], memory
    memory = np.zeros((4, 3, 10), F32)
    yield "steps", memory[:, :, ::2], memory.reshape(-1)[:60].reshape(SHAPE)


@pytest.mark.parametrize(("x", "out"), [pytest.param(x, out, id=name) for name, x, out in overlapping()])
def test_overlapping_out_is_refused(x, out):
    before = x.copy()
    mean, var = vector(), vector()
    _, saved = fastbn.batch_norm_train(x)
    other = array(x.shape)
    for name, call in {
        "x (train)": lambda: fastbn.batch_norm_train(x, out=out),
        "x (infer)": lambda: fastbn.batch_norm_infer(x, mean, var, out=out),
        "residual": lambda: fastbn.batch_norm_infer(other, mean, var, residual=x, out=out),
        "residual (train)": lambda: fastbn.batch_norm_train(other, residual=x, out=out),
        "grad_output": lambda: fastbn.backward(x, fastbn.batch_norm_train(other)[1], out=out),
        "saved x": lambda: fastbn.backward(other, saved, out=out),
    }.items():
        if name == "saved x" and saved.x is not x:
            continue  # a copy was kept
        with pytest.raises(
            ArgumentValueError, match=r"^out: expected memory apart from|^out: expected the memory order"
        ):
            call()
        assert np.array_equal(x, before), name


def test_exact_aliases():
    x = array()
    with refused("out", ValueError, "the same memory"):
        fastbn.batch_norm_train(x, out=x)
    _, saved = fastbn.batch_norm_train(x)
    with refused("out", ValueError, "the same memory"):
        fastbn.backward(array(), saved, out=x)
    _, saved = fastbn.batch_norm_train(x, residual=array())
    grad = array()
    with refused("out", ValueError, "the same memory"):  # grad.residual is grad_output itself
        fastbn.backward(grad, saved, out=grad)
    y, saved = fastbn.batch_norm_train(x, residual=array(), activation="relu")
    with refused("out", ValueError, "the same memory"):  # y holds the signs
        fastbn.backward(array(), saved, out=y)


def test_the_residual_gradient_is_not_overwritten():
    _, saved = fastbn.batch_norm_train(array(), residual=array())
    memory = array()
    want = memory[::-1].copy()
    try:
        grads = fastbn.backward(memory[::-1], saved, out=memory)
    except ArgumentValueError:
        assert np.array_equal(memory[::-1], want)
    else:
        assert np.array_equal(grads.residual, want)


def test_interleaved_memory_without_a_shared_byte_is_fine():
    memory = array((4, 3, 5))
    x, out = memory[::3], memory[1:3]
    want = fastbn.batch_norm_infer(x.copy(), vector(), vector())
    assert np.array_equal(fastbn.batch_norm_infer(x, vector(), vector(), out=out), want)
