"""Every rank, axis and stride gives the numbers of the plain array, its memory order, and no copy where none is due."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import ArgumentTypeError, ArgumentValueError, layout, reference
from tests.oracle import case, check_backward, check_infer, check_train, normal, same_bits
from tests.tolerances import BF16, DTYPES, arithmetic


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_dense_arrays_are_viewed_in_memory_order(order, axis):
    shape = (2, 3, 4, 5)
    x = np.arange(120.0).reshape([shape[a] for a in order]).transpose(np.argsort(order))
    assert x.shape == shape
    found = layout.of(x.shape, x.strides, x.itemsize, axis % 4)
    place = order.index(axis % 4)
    before, behind = (math.prod(shape[a] for a in part) for part in (order[:place], order[place + 1 :]))
    assert found == layout.Layout(order, (before, shape[axis], behind))
    flat = layout.flat(x, found)
    assert np.shares_memory(flat, x) and np.array_equal(flat, np.arange(120.0))
    made = layout.empty_like(x, found)
    assert made.shape == x.shape and made.strides == x.strides
    assert layout.like(x, found) is x and layout.matches(x, found, axis % 4)
    kept, settled = layout.settle(x, axis % 4)
    assert kept is x and settled == found


def test_channels_last_strides_are_rows():
    nchw = np.empty((2, 5, 6, 3), np.float32).transpose(0, 3, 1, 2)
    assert layout.of(nchw.shape, nchw.strides, 4, 1).dims == (2 * 5 * 6, 3, 1)
    assert layout.of((4, 7), (28, 4), 4, 1).dims == (4, 7, 1)
    assert layout.of((4, 7), (4, 16), 4, 1).dims == (1, 7, 4)  # a Fortran matrix is channels first


@pytest.mark.parametrize(
    "view",
    [lambda x: x[::2], lambda x: x[:, ::2], lambda x: x[::-1], lambda x: x[:, :, 1:], lambda x: x[:, :, ::-1]],
)
def test_gaps_and_backward_strides_have_no_layout(view):
    x = view(np.empty((4, 6, 5)))
    assert layout.of(x.shape, x.strides, x.itemsize, 1) is None
    copy, where = layout.settle(x, 1)
    assert copy.flags.c_contiguous and where == layout.contiguous(x.shape, 1)


@pytest.mark.parametrize("shape", [(4, 1, 6), (4, 3, 1), (1, 5), (5, 1), (1, 1, 1), (2, 3, 4)], ids=str)
def test_contiguous_arrays_have_the_dims_of_their_strides(shape):
    x = np.empty(shape)
    for axis in range(len(shape)):
        assert layout.contiguous(shape, axis).dims == layout.of(shape, x.strides, x.itemsize, axis).dims


def unaligned(x):
    memory = np.empty(x.nbytes + 1, np.uint8)
    moved = memory[1:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


@pytest.mark.parametrize("shape", [(64, 1), (16, 1, 33), (4, 1, 3, 70), (6, 3, 5)], ids=str)
def test_unaligned_arrays_get_the_same_bits(shape, rng):
    x = rng.standard_normal(shape).astype(np.float32)
    moved = unaligned(x)
    assert not moved.flags.aligned
    calls = [lambda x: fastbn.batch_norm_train(x), lambda x: fastbn.batch_norm_train(x, ghost=4)]
    if len(shape) > 2:
        calls.append(fastbn.instance_norm)
    for call in calls:
        (y, saved), (other, own) = call(x), call(moved)
        assert same_bits(y, other) and same_bits(saved.mean, own.mean)
        assert same_bits(fastbn.backward(x, saved).input, fastbn.backward(moved, own).input)


def test_broadcasts_have_no_layout():
    x = np.broadcast_to(np.ones((1, 3, 1)), (4, 3, 5))
    assert layout.of(x.shape, x.strides, x.itemsize, 1) is None


def test_axes_of_one_element_may_have_any_stride():
    x = np.lib.stride_tricks.as_strided(np.arange(6.0), (1, 3, 2, 1), (7, 16, 8, -40))
    found = layout.of(x.shape, x.strides, 8, 1)
    assert found.dims == (1, 3, 2)
    assert np.array_equal(layout.flat(x, found), np.arange(6.0))
    y, _ = fastbn.batch_norm_train(x)
    assert np.array_equal(y, fastbn.batch_norm_train(np.ascontiguousarray(x))[0])


def test_sizes_beyond_32_bits_are_exact():
    found = layout.of((70_000, 7, 70_000), (7 * 70_000 * 4, 70_000 * 4, 4), 4, 1)
    assert found.dims == (70_000, 7, 70_000)
    assert math.prod(layout.of((3, 2**20, 2**20), (2**42, 2**22, 4), 4, 0).dims) == 3 * 2**40


@pytest.mark.parametrize("axis", [2, -3, 17])
def test_axis_out_of_range(axis):
    with pytest.raises(ArgumentValueError, match=r"^axis: expected an axis of an array of rank 2, got"):
        layout.normalise_axis(axis, 2)


@pytest.mark.parametrize("axis", [None, 1.0, "1", True, (1,), np.array([1])])
def test_axis_of_a_wrong_type(axis):
    with pytest.raises(ArgumentTypeError, match=r"^axis: expected an integer, got"):
        layout.normalise_axis(axis, 2)


def test_numpy_integers_are_axes():
    assert layout.normalise_axis(np.int8(-1), 3) == 2


# -- any view of memory through the public functions -------------------------------------------------------------


@st.composite
def views(draw):
    """Draw (shape of the base, how to view it): permuted, stepped, reversed, broadcast, unaligned or read-only."""
    rank = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank)))
    order = tuple(draw(st.permutations(range(rank))))
    kind = draw(st.sampled_from(["dense", "stepped", "reversed", "broadcast", "read-only", "unaligned"]))
    return shape, order, kind, draw(st.integers(-rank, rank - 1))


def view(x, order, kind):
    """Return an array equal to x that lies in memory in another way."""
    axes = np.argsort(order)
    if kind == "stepped":
        memory = np.zeros([2 * n + 1 for n in np.array(x.shape)[list(order)]], x.dtype)
        memory = memory[tuple(slice(1, None, 2) for _ in order)]
    elif kind == "unaligned":
        memory = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape([x.shape[a] for a in order])
    else:
        memory = np.zeros([x.shape[a] for a in order], x.dtype)
    if kind == "reversed":
        memory = memory[tuple(slice(None, None, -1) for _ in order)]
    memory = memory.transpose(axes)
    memory[...] = x
    if kind == "broadcast":
        memory = np.broadcast_to(memory[:1], x.shape)
    if kind == "read-only":
        memory.flags.writeable = False
    return memory


@given(drawn=views(), dtype=st.sampled_from([np.dtype("f4"), np.dtype("f8"), BF16]), seed=st.integers(0, 2**32 - 1))
def test_any_view_of_memory(drawn, dtype, seed):
    shape, order, kind, axis = drawn
    rng = np.random.default_rng(seed)
    plain = case(rng, shape, dtype, axis=axis % len(shape), activation="relu", residual=True)
    x = view(plain.x, order, kind)
    plain = plain._replace(x=np.array(x, order="C"))
    c = plain._replace(x=x, residual=view(plain.residual, order[::-1], kind if kind != "broadcast" else "dense"))
    kinds = arithmetic(dtype)
    mean, var = rng.normal(size=shape[axis]).astype(kinds), rng.uniform(0.5, 2, shape[axis]).astype(kinds)
    y = check_infer(c, mean, var)
    if kind in ("dense", "read-only") and x.size > 1:
        kept = layout.of(x.shape, x.strides, x.itemsize, axis % x.ndim)
        assert layout.matches(y, kept, axis % x.ndim), "the memory order of x is kept"
    if x.size // x.shape[axis] > 2:
        _, saved = check_train(c)
        grad = view(rng.standard_normal(shape).astype(dtype), order, kind)
        check_backward(c, saved, grad)
        moments = fastbn.Moments.of(x, axis)
        np.testing.assert_allclose(moments.mean, saved.mean, rtol=1e-5, atol=1e-5)
    assert np.array_equal(x, plain.x)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
def test_layouts_agree_to_the_bit_where_their_kernel_is_the_same(dtype, rng):
    x = normal(rng, (8, 5, 6, 7), dtype)
    rows = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    last, _ = fastbn.batch_norm_train(rows, axis=-1)
    strided, _ = fastbn.batch_norm_train(rows.transpose(0, 3, 1, 2))
    assert strided.strides == rows.transpose(0, 3, 1, 2).strides
    assert same_bits(strided.transpose(0, 2, 3, 1), last)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_out_decides_the_memory_order(order, rng):
    c = case(rng, (6, 5, 40), np.float32, activation="relu", residual=True)
    out = view(np.zeros_like(c.x), order, "dense")
    mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
    assert check_infer(c, mean, var, out=out) is out
    y, saved = check_train(c, out=out)
    assert y is out
    check_backward(c, saved, rng.standard_normal(c.x.shape).astype(np.float32))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)], ids=str)
def test_a_single_sample_is_not_copied(order, rng):
    x = view(rng.standard_normal((1, 5, 6, 70)).astype(np.float32), order, "dense")
    want = reference.normalise(x, (2, 3))
    for call in (fastbn.instance_norm, lambda x: fastbn.batch_norm_train(x, ghost=2)):
        y, saved = call(x)
        assert getattr(saved, "f", saved).x is x and y.transpose(order).flags.c_contiguous
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        assert fastbn.backward(x, saved).input.transpose(order).flags.c_contiguous


def test_no_copy_is_made_of_dense_input(rng):
    x = normal(rng, (6, 5, 4, 3), np.float32)
    for seen in (x, x.transpose(1, 0, 2, 3), np.asfortranarray(x), x.transpose(0, 3, 1, 2)):
        assert fastbn.batch_norm_train(seen)[1].x is seen


@pytest.mark.parametrize("ghost", [None, 2])
def test_gradients_go_to_any_memory_order(rng, ghost):
    """Also where x was copied because ``out`` of the forward pass had another one."""
    x, g = rng.standard_normal((2, 6, 5, 4)).astype(np.float32)
    for order in ("C", "F"):
        _, saved = fastbn.batch_norm_train(x, out=np.empty(x.shape, np.float32, order=order), ghost=ghost)
        want = fastbn.backward(g, saved).input
        for other in ("C", "F"):
            out = np.empty(x.shape, np.float32, order=other)
            assert fastbn.backward(g, saved, out=out).input is out
            np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
