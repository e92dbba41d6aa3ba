"""What counts as the same."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn_export.compare import Tolerance, agree, error, flatten, spread
from fastbn_export.float64 import fingerprints, lift, narrowest
from fastbn_export.protos import nodes_of, operator_counts, parameter_count, tensors_of, used_names
from onnx import TensorProto, helper, numpy_helper

from .onnx_models import graph, initializers, value

ONE = np.array([[1.0, 2.0], [3.0, 4.0]])
NAN = np.array([[1.0, np.nan], [np.inf, -np.inf]])


@pytest.mark.parametrize(
    ("have", "want", "reason"),
    [
        (ONE, ONE, None),
        (ONE * (1 + 1e-12), ONE, None),
        (ONE * (1 + 1e-6), ONE, "values are off"),
        (NAN, NAN, None),
        (NAN, ONE, "not finite"),
        (ONE, NAN, "not finite"),
        (-NAN, NAN, "not finite"),
        (ONE[:1], ONE, "shape"),
        (ONE.astype(int), ONE.astype(int), None),
        (ONE.astype(int) + 1, ONE.astype(int), "4 of 4 values differ"),
        (np.array(["a"], object), np.array(["b"], object), "1 of 1 values differ"),
        (np.zeros((0, 3)), np.zeros((0, 3)), None),
        (ONE + 1j, ONE + 1j, None),
        (ONE + 2j, ONE + 1j, "values are off"),
    ],
)
def test_agree(have, want, reason):
    told = agree([have], [want])
    assert (told is None) == (reason is None) and (reason or "") in (told or "")


def test_noise_is_allowed_in_its_own_channel_only():
    want = np.zeros((100, 2))
    noise = np.zeros((100, 2))
    noise[:, 0] = 1e-3
    off = want.copy()
    off[0, 0] = 5e-3
    assert agree([off], [want], noise=[noise]) is None
    off[0, 1] = 5e-3
    assert "at [0, 1]" in agree([off], [want], noise=[noise])
    assert agree([off], [want], noise=[noise], per_channel=False) is None


def test_few_values_share_their_noise():
    assert spread([np.array([[1.0, 2.0]])], True).shape == ()
    assert spread([np.ones((20, 2))], True).tolist() == [[1.0, 1.0]]


def test_user_tolerance_is_elementwise():
    user = Tolerance(rtol=0.1, atol=0.0)
    assert agree([np.array([1.05, 100.0])], [np.array([1.0, 100.0])], user=user) is None
    assert agree([np.array([1.2, 100.0])], [np.array([1.0, 100.0])], user=user) is not None


def test_error_of_half_types_is_computed_wide():
    a = np.array([60000], np.float16)
    assert error(-a, a).tolist() == [120000.0]


def test_flatten_names_items():
    flat = flatten(["a", "b", "c"], [np.ones(1), [np.ones(1), {"k": np.ones(2)}], None])
    assert [name for name, _ in flat] == ["a", "b[0]", "b[1][k]"]


def nested():
    """Return a model with float weights at the top, in an If body and in a Constant, and a Cast to float16."""
    branch = helper.make_graph(
        [helper.make_node("Add", ["h", "inner"], ["t"])],
        "branch",
        [],
        [value("t")],
        [numpy_helper.from_array(np.ones(2, np.float32), "inner")],
    )
    nodes = [
        helper.make_node("Cast", ["x"], ["c"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["c"], ["h"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["k"], value_float=0.1),
        helper.make_node("ConstantOfShape", ["s"], ["z"]),
        helper.make_node("If", ["flag"], ["i"], then_branch=branch, else_branch=branch),
        helper.make_node("Sum", ["i", "k", "z", "w"], ["y"]),
    ]
    constants = [("w", np.float32([0.1, 1e-30])), ("s", np.array([1])), ("flag", np.array(True))]
    return graph(nodes, [value("x", shape=[2])], [value("y", shape=[2])], constants)


def test_walks_see_nested_things():
    model = nested()
    assert operator_counts(model)["Add"] == 2 and operator_counts(model)["Constant"] == 0
    assert len(list(tensors_of(model))) == 5 and parameter_count(model) == 2 + 1 + 1 + 2 + 2
    branching = next(n for n in nodes_of(model) if n.op_type == "If")
    assert used_names(branching) >= {"flag", "h"}


def test_lift_leaves_no_small_float_and_keeps_values():
    model = nested()
    before = model.SerializeToString()
    high = lift(model)
    assert model.SerializeToString() == before
    assert {t.data_type for t in tensors_of(high)} & {TensorProto.FLOAT, TensorProto.FLOAT16} == set()
    assert initializers(high)["w"].tolist() == np.float32([0.1, 1e-30]).astype(float).tolist()
    from onnx.reference import ReferenceEvaluator

    (y,) = ReferenceEvaluator(high).run(None, {"x": np.array([0.1, 0.2])})
    assert y.dtype == np.float64
    np.testing.assert_allclose(
        y, np.array([0.1, 0.2]) + 1 + np.float64(np.float32(0.1)) + [np.float32(0.1), 0], rtol=1e-15
    )


def test_rounding_moves_what_changed_by_half_an_ulp_equal_values_alike():
    w = np.full(64, np.float32(0.3))
    w[32:] = np.float32(0.7)
    nodes, io = [helper.make_node("Mul", ["x", "w"], ["y"])], ([value("x", shape=[64])], [value("y", shape=[64])])
    model = graph(nodes, *io, [("w", w)])
    assert np.array_equal(initializers(lift(model, fingerprints(model), np.random.default_rng(0)))["w"], w)
    moved = {
        tuple(
            np.round((initializers(lift(model, set(), np.random.default_rng(s)))["w"] - w) / w * 2**24, 6)[[0, 31, 32]]
        )
        for s in range(40)
    }
    assert moved == {(a, a, b) for a in (-1, 1) for b in (-1, 1)}


def test_narrowest_type_sets_the_tolerance():
    assert narrowest(nested()) == "float16"
