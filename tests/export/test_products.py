"""Gemm, MatMul, Einsum: a constant factor takes the map along its axes, a computed one is asked for the scale."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from fastbn_export.fold import fold
from onnx import helper, version_converter

from .folding import Model, check, feeds_for, folded, is_folded, is_left, ops, run


@pytest.mark.parametrize(
    ("transposed", "c"), list(itertools.product([0, 1], [None, (), (1,), (4,), (1, 4), (3, 1), (3, 4)]))
)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (1.0, 0.0)])
def test_gemm(transposed, c, alpha, beta):
    m = Model()
    extra = [] if c is None else [m.weight(*c)]
    y = m.op("Gemm", m.input(3, 5), m.weight(*((4, 5) if transposed else (5, 4))), *extra,
             alpha=alpha, beta=beta, transB=transposed)  # fmt: skip
    is_folded(m.build(m.bn(y, 4)), "Gemm")


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_rows(trans):
    m = Model()
    y = m.op("Gemm", m.weight(*((5, 4) if trans else (4, 5))), m.input(5, 3), m.weight(3), transA=trans)
    is_folded(m.build(m.bn(m.op("Transpose", y, perm=[1, 0]), 4)), "Gemm", "Transpose")


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_gemm_with_an_offset_computed_by_another(beta):
    m = Model()
    c = m.op("Gemm", m.input(3, 6), m.weight(6, 4), m.weight(4))
    y = m.op("Gemm", m.input(3, 5), m.weight(5, 4), c, beta=beta, alpha=0.7)
    is_folded(m.build(m.op("Relu", m.bn(y, 4))), "Gemm", "Gemm", "Relu")


def test_gemm_with_an_offset_from_outside():
    m = Model()
    is_left(
        m.build(m.bn(m.op("Gemm", m.input(3, 5), m.weight(5, 4), m.input(4)), 4)), "offset C of Gemm is a graph input"
    )


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 2, 3, 5)])
@pytest.mark.parametrize("add", [None, "after", "before"])
def test_matmul(shape, add):
    m = Model()
    y = m.op("MatMul", m.input(*shape), m.weight(5, 4))
    if add:
        y = m.op("Add", *([y, m.weight(4)] if add == "after" else [m.weight(4), y]))
    rank = len(shape)
    perm = [0, rank - 1, *range(1, rank - 1)]
    if rank > 2:
        y = m.op("Transpose", y, perm=perm)
    z = m.bn(y, 4)
    if rank > 2:
        z = m.op("Transpose", z, perm=[perm.index(i) for i in range(rank)])
    result = is_folded(m.build(z))
    assert ops(result.model).count("Add") == (0 if rank == 2 and not add else 1)


def test_matmul_constant_on_the_left():
    m = Model()
    is_folded(m.build(m.bn(m.op("MatMul", m.weight(4, 5), m.input(2, 5, 7)), 4)), "MatMul", "Add")


def test_matmul_batched_weight():
    m = Model()
    is_folded(m.build(m.bn(m.op("MatMul", m.input(2, 4, 3, 5), m.weight(4, 5, 6)), 4)), "MatMul", "Add")


def test_matmul_square_and_transposed():
    m = Model()
    y = m.op("Transpose", m.op("MatMul", m.input(4, 5), m.weight(5, 4)), perm=[1, 0])
    is_left(m.build(m.bn(y, 4)), "axis of MatMul's data")


@pytest.mark.parametrize("equation", ["btk,kc->bct", "kc,btk->bct"])
def test_einsum(equation):
    m = Model()
    x, w = m.input(2, 7, 5), m.weight(5, 4)
    y = m.op("Einsum", *((x, w) if equation.startswith("b") else (w, x)), equation=equation)
    is_folded(m.build(m.bn(y, 4)), "Einsum", "Add")


@pytest.mark.parametrize(("ta", "tb", "c"), list(itertools.product([0, 1], [0, 1], [None, (5,), (1,), (3, 1), (3, 5)])))
def test_into_a_gemm(ta, tb, c):
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(3, 4)), 4)
    y = m.op("Transpose", y, perm=[1, 0]) if ta else y
    extra = [] if c is None else [m.weight(*c)]
    y = m.op("Gemm", y, m.weight(*((5, 4) if tb else (4, 5))), *extra, alpha=0.5, beta=0.3, transA=ta, transB=tb)
    result = is_folded(m.build(y))
    assert ops(result.model)[-1] == "Gemm"


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_into_a_matmul(add, rank):
    m = Model()
    y = m.op("Sigmoid", m.input(*[2, 3, 4][3 - rank :]))
    y = m.bn(y, 4) if rank == 2 else m.op("Transpose", m.bn(m.op("Transpose", y, perm=[0, 2, 1]), 4), perm=[0, 2, 1])
    y = m.op("MatMul", y, m.weight(4, 5))
    is_folded(m.build(m.op("Relu", m.op("Add", y, m.weight(5)) if add else y)))


def test_into_an_einsum():
    m = Model()
    y = m.op("Transpose", m.bn(m.op("Sigmoid", m.input(2, 4, 3)), 4), perm=[0, 2, 1])
    is_folded(m.build(m.op("Relu", m.op("Einsum", y, m.weight(4, 5), equation="btk,kc->btc"))))


def linear_over_time(m, *shape):
    """Conv1d, then a product along its last axis: (2, 4, ...)."""
    return m.op("MatMul", m.op("Conv", m.input(2, 3, 8), m.weight(4, 3, 3), pads=[1, 1]), m.weight(*shape))


@pytest.mark.parametrize("shape", [(8, 5), (8,), (1, 8, 5)])
def test_a_map_along_the_rows_of_a_matmul(shape):
    m = Model()
    is_folded(m.build(m.bn(linear_over_time(m, *shape), 4)), "Conv", "MatMul", "Add")


def test_downstream_goes_first_where_upstream_leaves_an_add():
    m = Model()
    y = m.op("Conv", m.bn(linear_over_time(m, 8, 5), 4), m.weight(2, 4, 1))
    result = is_folded(m.build(y), "Conv", "MatMul", "Conv")
    assert result.report.entries[0].direction == "downstream"


@pytest.mark.parametrize("channels", [1, 4])
def test_two_computed_factors(channels):
    """Attention scores of each head: the one factor that has all heads takes the scale."""
    m = Model()
    x = m.input(2, 3, 5, 6)
    q, k = (m.op("Conv", x, m.weight(c, 3, 1, 1)) for c in (4, channels))
    y = m.op("MatMul", q, m.op("Transpose", k, perm=[0, 1, 3, 2]))
    is_folded(m.build(m.bn(y, 4)), "Conv", "Conv", "Transpose", "MatMul", "Add")


def test_a_factor_read_twice_stays():
    m = Model()
    y = m.op("Gemm", m.input(4, 4), m.weight(4, 4))
    is_left(m.build(m.bn(m.op("MatMul", y, y), 4)), "has other readers")


@pytest.mark.parametrize(("ta", "tb", "c"), list(itertools.product([0, 1], [0, 1], [None, (3,), (5, 1)])))
@pytest.mark.parametrize("axis", [0, 1])
def test_gemm_of_two_computed_factors(ta, tb, c, axis):
    m = Model()
    a, b = (m.op("Gemm", m.input(6, 4), m.weight(4, n)) for n in (5, 3))
    a = a if ta else m.op("Transpose", a)
    b = m.op("Transpose", b) if tb else b
    extra = [] if c is None else [m.weight(*c)]
    y = m.op("Gemm", a, b, *extra, transA=ta, transB=tb, alpha=0.5, beta=1.5)
    is_folded(m.build(m.bn(y, 3) if axis else m.bn(m.op("Transpose", y), 5)))


def test_gemm_of_data_whose_rows_are_the_channels():
    m = Model()
    y = m.op("Transpose", m.op("Gemm", m.input(4, 5), m.weight(5, 3)))
    is_left(m.build(m.bn(y, 4)), "axis of Gemm's data")


@pytest.mark.parametrize("op", ["Gather", "Slice"])
def test_one_channel_that_is_broadcast_to_several(op):
    """The scale is one of one channel; behind the product there are three."""
    m = Model()
    y = m.op("MatMul", m.bn(m.input(2, 1, 4, 5), 1, parameters=m.positive(1)), m.weight(3, 5, 6))
    y = m.op("Gather", y, m.ints(0, 2), axis=1) if op == "Gather" else m.op("Slice", y, m.ints(1), m.ints(3), m.ints(1))
    is_left(m.build(y), "MatMul broadcasts along the channels")


@pytest.mark.parametrize("equation", ["nkctv,kvw->nctw", "nkc...v,kvw->nc...w"])
def test_graph_convolution(equation):
    """Yan et al. 2018, "Spatial Temporal Graph Convolutional Networks": a Conv, cut into parts, times the graph."""
    m = Model()
    y = m.op("Reshape", m.op("Conv", m.input(2, 3, 5, 4), m.weight(6, 3, 1, 1)), m.ints(2, 2, 3, 5, 4))
    y = m.op("Einsum", y, m.weight(2, 4, 4), equation=equation)
    m.infos.append(helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, (2, 3, 5, 4)))
    is_folded(m.build(m.bn(y, 3)), "Conv", "Reshape", "Einsum", "Add")


@pytest.mark.parametrize(
    ("equation", "data", "weight"),
    [
        ("bij,kij->bk", (2, 3, 4), (5, 3, 4)),
        ("bij,ij->bj", (2, 3, 4), (3, 4)),
        ("bi,i->bi", (2, 3), (3,)),
        ("bi,ijk->bk", (2, 3), (3, 4, 5)),
        ("...ij,ik->...jk", (2, 3, 4), (3, 5)),
    ],
)
def test_a_shift_that_stays_a_vector_in_an_einsum(equation, data, weight):
    m = Model()
    y = m.op("Einsum", m.bn(m.input(*data), 3), m.weight(*weight), equation=equation)
    is_folded(m.build(y), "Einsum", "Add")


@pytest.mark.parametrize(
    ("equation", "data", "weight", "reason"),
    [
        ("bij,kij->bk", (2, 3, 1), (5, 3, 4), "may not have 4 entries"),
        ("bij,ij->bj", (2, 3, 4), (3, 1), "may not have 1 entries"),
        ("bij,ijk->bjk", (2, 3, 4), (3, 4, 5), "does not stay a vector"),
        ("bij,ik->bk", (2, 3, 4), (3, 5), "does not stay a vector"),
        ("bi,i->b", (2, 3), (3,), "does not stay a vector"),
    ],
)
def test_a_shift_that_does_not(equation, data, weight, reason):
    m = Model()
    is_left(m.build(m.op("Einsum", m.bn(m.input(*data), 3), m.weight(*weight), equation=equation)), reason)
    m = Model()
    y = m.op("Einsum", m.bn(m.input(*data), 3, parameters=m.positive(3)), m.weight(*weight), equation=equation)
    is_folded(m.build(y), "Einsum")


def test_a_scale_passes_an_einsum_along_other_axes():
    m = Model()
    y = m.bn(m.op("Sigmoid", m.input(2, 3, 4, 5)), 3, parameters=m.positive(3))
    y = m.op("Einsum", y, m.weight(5, 5), equation="nctv,vw->nctw")
    is_folded(m.build(m.op("Conv", y, m.weight(2, 3, 3, 3), pads=[1] * 4)), "Sigmoid", "Einsum", "Conv")


@pytest.mark.parametrize("rank", [2, 3])
def test_the_shift_of_a_matmul_before_opset_7(rank):
    """Add broadcasts by attributes there; no runtime at hand has these opsets, but the converter knows them."""
    m = Model(opset=6, ir_version=3)
    y = m.op("MatMul", m.input(*(2, 6)[: rank - 1], 5), m.weight(5, 4))
    y = m.op("Transpose", y, perm=[0, 2, 1]) if rank == 3 else y
    model = m.build(m.bn(y, 4, is_test=1))
    result = fold(model).model
    onnx.checker.check_model(result, full_check=True)
    assert "Add" in ops(result)
    old, new = (version_converter.convert_version(each, 9) for each in (model, result))
    for a, b in zip(run(old, feeds_for(model)), run(new, feeds_for(model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_duplicate_does_not_copy_what_asks_others():
    m = Model()
    y = linear_over_time(m, 8, 5)
    result = check(m.build(m.bn(y, 4), m.op("Relu", y)), duplicate=True)
    assert not folded(result)
