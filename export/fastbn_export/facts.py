"""What is known about a model: shapes, types, constants, versions. The planner asks; nothing here changes the model.

Requirement: an answer is certain or it is None. Shapes are inferred once, on first need, on a copy without weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from . import constants
from .affine import Array, Dims
from .channels import declared, known_dims, merge

__all__ = ["Facts", "all_graphs", "holding", "subgraphs"]


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs in a node's attributes (bodies of If, Loop, Scan)."""
    for attribute in node.attributes.data.values():  # the dictionary itself: every fold walks over all nodes
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from attribute.as_graphs()


def all_graphs(model: ir.Model) -> Iterator[tuple[str, ir.Graph]]:
    """Every graph of a model with its scope: the main graph (""), functions, and their subgraphs, outermost first."""
    stack: list[tuple[str, ir.Graph]] = [(f"function {f.name}", f.graph) for f in reversed(model.functions.values())]
    stack.append(("", model.graph))
    while stack:
        scope, graph = stack.pop()
        yield scope, graph
        inner = []
        for node in graph:
            for sub in subgraphs(node):
                place = node.name or node.op_type
                inner.append((f"{scope}/{place}" if scope else place, sub))
        stack.extend(reversed(inner))


def holding(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """The functions that hold a BatchNormalization, themselves or in a function that they call."""
    calls: dict[ir.OperatorIdentifier, set[ir.OperatorIdentifier]] = {}
    found = set()
    for identifier, function in model.functions.items():
        nodes = list(function.all_nodes())
        calls[identifier] = {n.op_identifier() for n in nodes} & set(model.functions)
        if any(n.op_type == "BatchNormalization" and n.domain == "" for n in nodes):
            found.add(identifier)
    while more := {i for i, called in calls.items() if called & found} - found:
        found |= more
    return found


def _is_static(dims: Dims | None) -> bool:
    return dims is not None and all(isinstance(d, int) for d in dims)


def _written_type(value: ir.Value) -> ir.DataType | None:
    """The type of a value from what it is computed from, without inference, which sees no types inside functions."""
    for _ in range(64):
        if value.dtype is not None:
            return value.dtype
        node = value.producer()
        if node is None or node.domain != "" or any(a.is_ref() for a in node.attributes.data.values()):
            return None
        if node.op_type in ("Constant", "ConstantOfShape"):
            written = node.attributes.get("value")
            if written is not None:
                return ir.DataType(written.value.dtype)
            floats = node.op_type == "ConstantOfShape" or any(a in node.attributes for a in _FLOAT_VALUES)
            return ir.DataType.FLOAT if floats else None
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        following = 1 if node.op_type in ("CastLike", "DequantizeLinear", *_LIKE_WEIGHTS) else 0
        source = node.inputs[following] if following < len(node.inputs) else None
        if source is None or node.op_type not in _KEEP_TYPE:
            return None
        value = source
    return None


_FLOAT_VALUES = ("value_float", "value_floats")
_SHAPERS = (
    "Identity",
    "Reshape",
    "Transpose",
    "Unsqueeze",
    "Squeeze",
    "Flatten",
    "Expand",
    "Gather",
    "Slice",
    "Concat",
)
_REST = (
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Sqrt",
        "Reciprocal",
        "Neg",
        "Exp",
        "Log",
        "Tanh",
        "Sigmoid",
        "Softplus",
        "Abs",
        "Pow",
    ),
    *("Sum", "Max", "Min", "Clip", "Tile", "Split", "Pad", "Sign", "CastLike", "DequantizeLinear"),
    *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceL1", "ReduceL2"),
)
_LIKE_WEIGHTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_NETWORK = ("BatchNormalization", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool", *_LIKE_WEIGHTS)
_KEEP_TYPE = frozenset((*_SHAPERS, *_REST, *_NETWORK))


_SHAPED = frozenset(
    ("Reshape", "Resize", "Upsample", "Expand", "Slice", "Split", "Pad", "Tile", "Squeeze", "Unsqueeze")
)
_PROPAGATIONS = 12
"""Most times that shapes are inferred again with what the shapes before them made known."""


class Facts:
    """Answers about one model that is being folded.

    Parameters
    ----------
    model : onnx_ir.Model
        The model. Edits may change it between questions: values keep their shapes, new constants are read afresh.
    """

    def __init__(self, model: ir.Model):
        self.model = model
        self.graphs = tuple(all_graphs(model))  # no fold adds or removes a graph
        self._dims: dict[ir.Value, Dims] = {}
        self._channels: dict[ir.Value, Dims | None] = {}
        self._dtypes: dict[ir.Value, ir.DataType] = {}
        self._inferred = False
        self._folded: dict[ir.Value, Array | None] = {}
        self._frozen_inputs = model.ir_version < 4
        self._symbols = {d for v in model.graph.inputs for d in declared(self, v) or () if isinstance(d, str)}
        self._function_opsets = {f.graph: f.opset_imports.get("", 0) for f in model.functions.values()}
        self._main_opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        self._opsets: dict[ir.Graph, int] = {}
        for function in model.functions.values():
            for inner in function.subgraphs():
                self._opsets[inner] = self._function_opsets[function.graph]

    def opset(self, node: ir.Node) -> int:
        """Version of the standard operators that `node` obeys."""
        graph = node.graph
        if not self._function_opsets or graph is None:
            return self._main_opset
        return self._function_opsets.get(graph, self._opsets.get(graph, self._main_opset))

    def dims(self, value: ir.Value) -> Dims | None:
        """Shape of a value as far as it is known; None when even the rank is unknown."""
        known = self._cheap(value)
        if not self._inferred and (known is None or any(map(self._vague, known))):
            self._infer()
            known = self._cheap(value)
        return known

    def _cheap(self, value: ir.Value) -> Dims | None:
        """What is known without inference, or known since it ran."""
        known = self._dims.get(value)
        return known if known is not None else known_dims(self, value, self._channels)

    def _vague(self, size: int | str | None) -> bool:
        """Whether inference may know better: symbols that no input has, some tool made up where it knew no size."""
        return size is None or (isinstance(size, str) and size not in self._symbols)

    def rank(self, value: ir.Value) -> int | None:
        """Number of dimensions, or None."""
        dims = self._cheap(value) or self.dims(value)
        return None if dims is None else len(dims)

    def size(self, value: ir.Value, axis: int) -> int | str | None:
        """Length of one axis (a symbol where it is symbolic), None where it is unknown or there is no such axis."""
        for ask in (self._cheap, self.dims):
            dims = ask(value)
            if dims is not None and (axis >= len(dims) or not self._vague(dims[axis])):
                break
        return None if dims is None or axis >= len(dims) else dims[axis]

    def contradicts(self, value: ir.Value, axis: int, size: int) -> bool:
        """Whether a value certainly has no axis of this length there, as far as is known without inference."""
        dims = self._cheap(value)
        return dims is not None and (axis >= len(dims) or (isinstance(d := dims[axis], int) and d != size))

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Element type, or None."""
        if value.const_value is not None:
            return value.const_value.dtype
        known = value.dtype or self._dtypes.get(value) or _written_type(value)
        if known is None and not self._inferred:
            self._infer()
            known = self._dtypes.get(value)
        return known

    def learn(self, value: ir.Value, like: ir.Value) -> None:
        """A new value has the shape and type of `like`."""
        if (dims := self._dims.get(like)) is not None:
            self._dims[value] = dims
        if (dtype := self._dtypes.get(like)) is not None:
            self._dtypes[value] = dtype

    def forget(self, value: ir.Value) -> None:
        """The constant expression behind a value has been rewritten, and with it all that is computed from it."""
        stack = [value]
        while stack:
            current = stack.pop()
            if self._folded.get(current) is not None:
                del self._folded[current]
                stack.extend(out for use in current.uses() for out in use.node.outputs)

    def forget_shape(self, value: ir.Value) -> None:
        """A constant has been replaced in place by one that may have grown."""
        self._dims.pop(value, None)
        self._channels.pop(value, None)

    def is_overridable(self, value: ir.Value) -> bool:
        """Whether a value has a constant default that the caller may replace (an initializer that is an input)."""
        return value.is_initializer() and value.is_graph_input() and not self._frozen_inputs

    def constant(self, value: ir.Value | None) -> Array | None:
        """The constant that a value always holds, or None.

        Initializers, Constant nodes and expressions of them. Float expressions are computed in float64 where the
        operators allow it, so the type of the array may be wider than the type of the value.
        """
        if value is None:
            return None
        if value.is_initializer():
            if value.const_value is None or self.is_overridable(value):
                return None
            return constants.tensor_array(value.const_value)
        node = value.producer()
        if node is None:
            return None
        if value not in self._folded:
            constants.evaluate(self, value, self._folded)
        return self._folded.get(value)

    def stored(self, value: ir.Value | None) -> Any:
        """Where a known constant is stored: another object when it has changed; None when it was never asked for."""
        if value is None:
            return None
        return value.const_value if value.is_initializer() else self._folded.get(value)

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether `constant` has an answer, found more cheaply for plain initializers."""
        if value is None:
            return False
        if value.is_initializer():
            return value.const_value is not None and not self.is_overridable(value)
        return self.constant(value) is not None

    def _infer(self) -> None:
        """Run ONNX's shape inference once, on a skeleton without weights, and keep the result aside."""
        self._inferred = True
        from .shapes import infer  # only a model that needs it pays for it

        self._learn(infer(self.model))
        known: dict[ir.Value, Array] = {}
        for _ in range(_PROPAGATIONS):
            before = len(known)
            self._evaluate_shapes(known)
            if len(known) == before:
                break
            self._folded = {v: a for v, a in self._folded.items() if a is not None}
            self._learn(infer(self.model, known))

    def _learn(self, inferred: Mapping[ir.Value, tuple[Dims | None, ir.DataType | None]]) -> None:
        self._dims.clear()  # symbols that inference makes up mean something within one run only
        for value, (dims, dtype) in inferred.items():
            merged = merge(declared(self, value), dims)
            if merged is not None:
                self._dims[value] = merged
            if dtype is not None:
                self._dtypes[value] = dtype

    def _evaluate_shapes(self, known: dict[ir.Value, Array]) -> None:
        """Find the integer operands of operators whose output shape is still unknown."""
        for node in self.model.graph:
            if node.op_type not in _SHAPED or all(_is_static(self._dims.get(o)) for o in node.outputs):
                continue
            for value in node.inputs[1:]:
                maker = None if value is None else value.producer()
                if value is None or maker is None or self._evaluate_shape(value, known):
                    continue
                for piece in maker.inputs if maker.op_type == "Concat" and maker.domain == "" else ():
                    if piece is not None and piece.producer() is not None:  # one size of several that are not known
                        self._evaluate_shape(piece, known)

    def _evaluate_shape(self, value: ir.Value, known: dict[ir.Value, Array]) -> bool:
        if value in known:
            return True
        array = self.constant(value)
        if array is None or array.size > 64 or array.dtype not in (np.int64, np.float32):
            return False
        known[value] = array
        return True
