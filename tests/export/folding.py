"""Small models for the tests of the fold engine, and the judge: same numbers, valid, idempotent, input untouched."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from fastbn_export.fold import FoldResult, fold
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

ELEMENT = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(bool): TensorProto.BOOL,
}
TOLERANCE = {np.dtype(np.float64): 1e-11, np.dtype(np.float32): 2e-5, np.dtype(np.float16): 2e-2}


class Model:
    """Builds one graph, operator by operator; names are short and predictable."""

    def __init__(self, opset: int = 17, dtype: Any = np.float32, seed: int = 0, ir_version: int = 8):
        self.opset, self.dtype, self.ir_version = opset, np.dtype(dtype), ir_version
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.infos: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.count = 0

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def input(self, *shape: int | str, name: str | None = None, dtype: Any = None) -> str:
        name = name or self.name("x")
        element = ELEMENT[np.dtype(dtype or self.dtype)]
        self.inputs.append(helper.make_tensor_value_info(name, element, shape))
        return name

    def constant(self, array: Any, name: str | None = None) -> str:
        name = name or self.name("k")
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int, dtype: Any = None, name: str | None = None) -> str:
        fan = max(1, int(np.prod(shape[1:])) if len(shape) > 1 else 1)
        array = self.rng.standard_normal(shape) / np.sqrt(fan)
        return self.constant(array.astype(dtype or self.dtype), name)

    def ints(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64))

    def op(self, op_type: str, *inputs: str, outputs: Any = 1, name: str | None = None, **attributes: Any) -> Any:
        outs = [self.name("t") for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        name = self.name(f"{op_type.lower()}_") if name is None else name
        domain = attributes.pop("domain", "")
        self.nodes.append(helper.make_node(op_type, list(inputs), outs, name=name, domain=domain, **attributes))
        return outs[0] if len(outs) == 1 else outs

    def statistics(self, channels: int, dtype: Any = None) -> tuple[np.ndarray, ...]:
        r, dtype = self.rng, dtype or self.dtype
        return tuple(
            v.astype(dtype)
            for v in (
                r.uniform(0.5, 1.5, channels) * np.where(r.random(channels) < 0.3, -1, 1),
                r.standard_normal(channels),
                r.standard_normal(channels),
                r.uniform(0.5, 1.5, channels),
            )
        )

    def bn(self, x: str, channels: int, *, parameters: Any = None, dtype: Any = None, **attributes: Any) -> str:
        attributes.setdefault("epsilon", 1e-3)
        if attributes["epsilon"] is None:
            del attributes["epsilon"]
        arrays = parameters or self.statistics(channels, dtype)
        return str(self.op("BatchNormalization", x, *map(self.constant, arrays), **attributes))

    def positive(self, channels: int) -> tuple[np.ndarray, ...]:
        """Parameters with a positive scale and no shift."""
        gamma, _, _, variance = self.statistics(channels)
        zero = np.zeros(channels, self.dtype)
        return np.abs(gamma), zero, zero, variance

    def output(self, name: str, dtype: Any = None, shape: Any = None) -> None:
        element = ELEMENT[np.dtype(dtype or self.dtype)]
        info = helper.make_tensor_value_info(name, element, shape)
        self.outputs.append(info)

    def build(self, *outputs: str) -> onnx.ModelProto:
        for name in outputs:
            self.outputs.append(onnx.ValueInfoProto(name=name))  # shape inference fills it in
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.initializers, value_info=self.infos)
        if self.ir_version < 4:
            known = {i.name for i in self.inputs}
            for t in self.initializers:
                if t.name not in known:
                    graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(d, 1) for d in {f.domain for f in self.functions}]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version, functions=self.functions)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for mine, other in zip(model.graph.output, inferred.graph.output, strict=True):
            if not mine.type.tensor_type.HasField("shape"):
                mine.CopyFrom(other)
            assert mine.type.tensor_type.HasField("shape"), f"{mine.name}: state its shape"
        onnx.checker.check_model(model)
        return model


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run in onnxruntime, all optimizations off; in ONNX's reference where an old one has no kernel (DeformConv)."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except NoKernel:
        return list(ReferenceEvaluator(model).run(None, feeds))
    return list(session.run(None, feeds))


def feeds_for(model: onnx.ModelProto, seed: int = 0, sizes: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """Random values for all inputs that have no default."""
    rng = np.random.default_rng(seed)
    defaults = {t.name for t in model.graph.initializer}
    feeds = {}
    for info in model.graph.input:
        if info.name in defaults:
            continue
        tensor = info.type.tensor_type
        shape = [d.dim_value or (sizes or {}).get(d.dim_param, 3) for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            feeds[info.name] = np.asarray(rng.random(shape) < 0.5)
        elif np.issubdtype(dtype, np.integer):
            feeds[info.name] = rng.integers(0, 3, shape).astype(dtype)
        else:
            feeds[info.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def check(
    model: onnx.ModelProto, *, tolerance: float | None = None, sizes: dict[str, int] | None = None, **options: Any
) -> FoldResult:
    """Fold and hold every promise that does not depend on the model; returns the result for more."""
    before = model.SerializeToString()
    result = fold(model, **options)
    assert model.SerializeToString() == before, "the input was modified"
    onnx.checker.check_model(result.model, full_check=True)
    assert [o.name for o in result.model.graph.output] == [o.name for o in model.graph.output]
    again = fold(result.model, **options)
    assert again.model.SerializeToString() == result.model.SerializeToString(), "folding twice changed something"
    if not options.get("duplicate"):
        assert sum(result.report.ops_after.values()) <= sum(result.report.ops_before.values()), "the model grew"
    _no_leftovers(model, result.model)
    feeds = feeds_for(model, sizes=sizes)
    for old, new in zip(run(model, feeds), run(result.model, feeds), strict=True):
        assert old.dtype == new.dtype and old.shape == new.shape
        limit = TOLERANCE.get(old.dtype, 0.0) if tolerance is None else tolerance
        top = max(1.0, float(np.abs(old).max(initial=0)))
        np.testing.assert_allclose(new, old, rtol=0, atol=limit * top)
    return result


def _no_leftovers(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    def unused(model: onnx.ModelProto) -> set[str]:
        read = {i for n in _nodes(model.graph) for i in n.input} | {o.name for o in model.graph.output}
        return {t.name for t in model.graph.initializer} - read

    assert unused(after) <= unused(before), "dead initializers"
    names = [o for n in after.graph.node for o in n.output if o] + [t.name for t in after.graph.initializer]
    assert len(set(names)) == len(names), "names are not unique"


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += _nodes(attribute.g)
    return found


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def folded(result: FoldResult) -> bool:
    """Whether nothing is left, neither as BatchNormalization nor in the report."""
    return result.report.left == 0 and "BatchNormalization" not in result.report.ops_after


def is_folded(model: onnx.ModelProto, *expected: str, **options: Any) -> FoldResult:
    """Fold, check, and expect nothing left; `expected` are all operators that are."""
    result = check(model, **options)
    assert folded(result), [e.reason for e in result.report.entries]
    if expected:
        assert ops(result.model) == list(expected)
    return result


def is_left(model: onnx.ModelProto, reason: str, **options: Any) -> FoldResult:
    """Fold, check, and expect something left for this reason."""
    result = check(model, **options)
    reasons = [e.reason for e in result.report.entries if not e.folded]
    assert any(reason in r for r in reasons), reasons
    return result


def chain(n: int = 3, **options: Any) -> onnx.ModelProto:
    """Blocks of Conv, BatchNormalization and Relu, named by their number."""
    m = Model(**options)
    x = m.input(1, 4, 4, 4)
    for i in range(n):
        arrays = [m.constant(a) for a in m.statistics(4)]
        x = m.op("Conv", x, m.weight(4, 4, 1, 1), name=f"conv{i}")
        x = m.op("Relu", m.op("BatchNormalization", x, *arrays, name=f"block{i}.bn"))
    return m.build(x)


def conv(m, *shape, out=4):
    """A convolution whose output has this shape."""
    return m.op("Conv", m.input(shape[0], 3, *shape[2:]), m.weight(out, 3, *[1] * (len(shape) - 2)))
