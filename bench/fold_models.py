"""The models that the exporter is measured on.

Those that onnx ships, ResNet-50 with 100 MB of weights, long chains, and three graphs whose batch normalizations
onnxruntime does not fold by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
from onnx import TensorProto, helper, numpy_helper

LIGHT = ("resnet50", "densenet121", "inception_v2", "shufflenet")


def light(name: str) -> onnx.ModelProto:
    """Return a model bundled with onnx; its weights are ConstantOfShape expressions."""
    folder = Path(onnx.backend.test.__file__).parent / "data" / "light"
    return onnx.load(folder / f"light_{name}.onnx")


def with_weights(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """Return the model with random float32 initializers in the place of its ConstantOfShape expressions."""
    rng = np.random.default_rng(seed)
    shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    variances = {n.input[4] for n in model.graph.node if n.op_type == "BatchNormalization"}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    made.ir_version = 8  # initializers need not be inputs
    graph = made.graph
    for node in [n for n in graph.node if n.op_type == "ConstantOfShape"]:
        shape = tuple(shapes[node.input[0]])
        deviation = 1 / np.sqrt(max(1, np.prod(shape[1:])))
        array = rng.standard_normal(shape, np.float32) * np.float32(deviation)
        array = np.abs(array) + np.float32(0.5) if node.output[0] in variances else array
        graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for held in (graph.initializer, graph.input):
        for unused in [item for item in held if item.name not in used]:
            held.remove(unused)
    given = {tensor.name for tensor in graph.initializer}
    for item in [item for item in graph.input if item.name in given]:
        graph.input.remove(item)  # a constant, not a default that the caller may override
    return made


class Chain:
    """A graph of one operator after the other."""

    def __init__(self, *shape: int | str):
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shape, self.last = shape, "input"

    def constant(self, array: np.ndarray) -> str:
        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, np.float32), name))
        return name

    def add(self, op: str, *constants: np.ndarray, **attributes: object) -> None:
        names = [self.constant(array) for array in constants]
        output = f"value{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *names], [output], name=output, **attributes))
        self.last = output

    def weight(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))

    def statistics(self, channels: int) -> list[np.ndarray]:
        """Weight, bias, mean, variance."""
        r = self.rng
        return [*(f(channels) for f in (r.random, r.standard_normal, r.standard_normal)), r.random(channels) + 0.5]

    def model(self) -> onnx.ModelProto:
        value = helper.make_tensor_value_info("input", TensorProto.FLOAT, self.shape)
        out = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "chain", [value], [out], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def convolutions(count: int) -> onnx.ModelProto:
    """Return ``count`` times Conv, BatchNormalization, Relu with 4 channels."""
    chain = Chain("N", 4, 8, 8)
    for _ in range(count):
        chain.add("Conv", chain.weight(4, 4, 1, 1))
        chain.add("BatchNormalization", *chain.statistics(4))
        chain.add("Relu")
    return chain.model()


def gemms() -> onnx.ModelProto:
    """Return a multilayer perceptron: Gemm, BatchNormalization, Relu."""
    chain = Chain(64, 256)
    for _ in range(8):
        chain.add("Gemm", chain.weight(256, 256), chain.weight(256, 1)[:, 0], transB=1)
        chain.add("BatchNormalization", *chain.statistics(256))
        chain.add("Relu")
    return chain.model()


def sequences() -> onnx.ModelProto:
    """Return Linear over the last axis of (N, T, C), BatchNorm1d over (N, C, T), as PyTorch exports it."""
    chain = Chain(8, 100, 64)
    for _ in range(4):
        chain.add("MatMul", chain.weight(64, 64))
        chain.add("Add", chain.weight(64, 1)[:, 0])
        chain.add("Transpose", perm=[0, 2, 1])
        chain.add("BatchNormalization", *chain.statistics(64))
        chain.add("Transpose", perm=[0, 2, 1])
        chain.add("Relu")
    return chain.model()


def mobilenet() -> onnx.ModelProto:
    """Return depthwise separable convolutions, their batch normalization written out as Sub, Div, Mul, Add."""
    chain = Chain(1, 32, 56, 56)

    def norm(channels: int) -> None:
        weight, bias, mean, variance = (a.reshape(1, -1, 1, 1) for a in chain.statistics(channels))
        for op, array in (("Sub", mean), ("Div", np.sqrt(variance + 1e-5)), ("Mul", weight), ("Add", bias)):
            chain.add(op, array)

    for inner, outer in ((32, 64), (64, 64), (64, 96), (96, 96)):
        chain.add("Conv", chain.weight(inner, 1, 3, 3), group=inner, pads=[1, 1, 1, 1])
        norm(inner)
        chain.add("Clip", np.float32(0), np.float32(6))
        chain.add("Conv", chain.weight(outer, inner, 1, 1))
        norm(outer)
        chain.add("Clip", np.float32(0), np.float32(6))
    return chain.model()


RUN_TIME: dict[str, Callable[[], onnx.ModelProto]] = {
    "Gemm + BN": gemms,
    "Linear + Transpose + BN + Transpose": sequences,
    "MobileNet, BN written out": mobilenet,
}
