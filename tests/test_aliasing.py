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
        with pytest.raises(ArgumentValueError, match=r"^out: expected memory apart from"):
            call()
        assert np.array_equal(x, before), name


# Small float32 calls look at the objects alone, not at their memory.
@pytest.mark.parametrize(("dtype", "view"), [(F32, False), (np.float64, False), (np.float64, True)])
def test_running_statistics_that_are_another_array_are_refused(dtype, view):
    """One array under two names, as by ``weight = var = np.ones(3)``: moved while it is read, and then overwritten."""
    x, names = array().astype(dtype), ("weight", "bias", "running_mean", "running_var")
    for first, second in ((0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        vectors = [np.ones(3, dtype) for _ in range(4)]
        vectors[second] = vectors[first][:] if view else vectors[first]
        for options in ({}, {}, {"mask": np.arange(5) < 4}, {"ghost": 2}, {"nonfinite": "raise"}):
            with refused(names[second], ValueError, "the same memory") as caught:
                fastbn.batch_norm_train(x, *vectors, **options)
            assert f"memory apart from {names[first]}" in str(caught.value)
        assert all((v == 1).all() for v in vectors)


def test_parts_of_one_buffer_are_apart():
    for buffer in (np.ones((4, 3), F32), np.ones((3, 4), F32).T):
        want = [np.ones(3, F32) for _ in range(4)]
        y, _ = fastbn.batch_norm_train(array(), *buffer)
        assert np.array_equal(y, fastbn.batch_norm_train(array(), *want)[0]) and np.array_equal(buffer, want)


def test_tensors_that_hold_parameters_are_refused():
    memory = array(dtype=np.float64)
    vector = memory.reshape(-1)[3:6]
    before = memory.copy()
    other = array(dtype=np.float64)
    with refused("out", ValueError, "overlapping memory"):
        fastbn.batch_norm_infer(other, np.zeros(3), np.ones(3), vector, out=memory)
    with refused("out", ValueError, "overlapping memory"):
        fastbn.batch_norm_train(other, None, vector, out=memory)
    with refused("running_var", ValueError, "the same memory"):
        fastbn.batch_norm_train(memory, None, None, np.zeros(3), vector)
    with refused("running_mean", ValueError, "the same memory"):
        fastbn.batch_norm_train(other, None, None, vector, np.ones(3), out=memory)
    assert np.array_equal(memory, before)


@pytest.mark.parametrize("dtype", [F32, np.float64])
def test_tensors_that_hold_running_statistics_are_refused(dtype):
    """Small float32 calls from the second one on ask compiled code."""
    memory, other = array(dtype=dtype), array(dtype=dtype)
    memory.reshape(-1)[3:6] = 1.0
    inside, apart, before = memory.reshape(-1)[3:6], np.ones(3, dtype), memory.copy()
    for _ in range(3):
        fastbn.batch_norm_infer(other, apart, apart, out=np.empty_like(memory))
        fastbn.batch_norm_train(other, None, None, apart.copy(), apart.copy(), residual=before)
        for moved in ((inside, apart), (apart, inside)):
            with refused("out", ValueError, "overlapping memory") as caught:
                fastbn.batch_norm_infer(other, *moved, out=memory)
            assert f"apart from running_{'mean' if moved[0] is inside else 'var'}" in str(caught.value)
            with refused("out", ValueError, "overlapping memory"):
                fastbn.functional.frozen(other, *moved, out=memory)
            named = "running_mean" if moved[0] is inside else "running_var"
            with refused(named, ValueError, "the same memory"):
                fastbn.batch_norm_train(other, None, None, *moved, residual=memory)
    assert np.array_equal(memory, before)


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


@pytest.mark.parametrize("shape", [(4, 3), (16, 3, 40, 80)], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [F32, np.float64])
def test_inference_in_place_leaves_no_gradients_that_need_x(shape, dtype):
    """What backward needs is x; after inference in place y lies there, and gradients would be those of another x."""
    for options in ({}, {"activation": "relu"}, {"affine": False, "activation": "relu"}):
        bn, x = fastbn.BatchNorm(3, dtype=dtype, **options).eval(), array(shape).astype(dtype)
        for _ in range(2):
            x = bn(x, out=x)
        with refused("saved", ValueError, "y in its place"):
            bn.backward(x)
        with refused("saved", ValueError, "y in its place"):
            _ = bn.saved.moments
        bn(x, out=np.empty_like(x))
        bn.backward(x)
    bn = fastbn.BatchNorm(3, affine=False, dtype=dtype).eval()
    bn(x)
    want = bn.backward(x).input
    assert np.array_equal((bn(y := x.copy(), out=y), bn.backward(x).input)[1], want)


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


NORMS = {
    "batch": (fastbn.batch_norm_train, ()),
    "ghosts": (fastbn.batch_norm_train, (("ghost", 2),)),
    "ghosts in turn": (fastbn.batch_norm_train, (("ghost", 2), ("mask", np.arange(5)[:, None] < 4))),
    "masked": (fastbn.batch_norm_train, (("mask", np.arange(5)[:, None] < 4),)),
    "instance": (fastbn.instance_norm, ()),
    "group": (lambda x, *a, **k: fastbn.group_norm(x, 3, *a, **k), ()),
    "layer": (fastbn.layer_norm, ()),
}


# Small float32 calls go another way from the second one on, large ones through other kernels.
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("steps", [3, 400])
def test_out_over_a_parameter_is_refused(name, steps):
    call, options = NORMS[name]
    x = array((5, steps, 3)) if name == "layer" else array((5, 3, steps))
    for which in (0, 1):
        memory = array(x.shape).reshape(-1)
        params = [np.ones(3, F32), np.ones(3, F32)]
        params[which] = memory[3:6]
        out, before = memory.reshape(x.shape), memory.copy()
        for _ in range(3):
            with refused("out", ValueError, "memory"):
                call(x, *params, out=out, **dict(options))
        _, saved = call(x, *params, **dict(options))
        for _ in range(2 if which == 0 or name not in ("group", "layer", "instance") else 0):
            with refused("out", ValueError, "memory"):
                fastbn.backward(x, saved, out=out)
        assert np.array_equal(memory, before)


@pytest.mark.parametrize("which", [0, 1])
def test_out_over_running_statistics_of_ghosts_is_refused(which):
    memory = array((6, 3)).reshape(-1)
    moved = [np.ones(3, F32), np.ones(3, F32)]
    moved[which] = memory[:3]
    with refused(("running_mean", "running_var")[which], ValueError, "the same memory"):
        fastbn.batch_norm_train(
            array((6, 3)), None, None, *moved, mask=np.arange(6) < 5, ghost=3, out=memory.reshape(6, 3)
        )
