"""Read a model and write it back: external data stays on disk until needed, nothing is held twice.

Requirement: what is written appears whole or not at all; a model is streamed to its file, tensor by tensor, because
`SerializeToString` needs the whole model a second time and fails beyond 2 GB.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from fastbn.errors import ArgumentTypeError, ArgumentValueError

from .facts import all_graphs
from .files import external_files, load_model, place
from .originals import originals, remember
from .protos import tensors_of, used_names
from .sparse import found, hidden

__all__ = ["LIMIT", "inline_proto", "load", "save"]

_SPARSE = "fastbn.sparse"

_OUTSIDE = onnx.TensorProto.EXTERNAL
_EXTERNAL = 1024  # bytes: smaller tensors stay among the operators
LIMIT = 2_000_000_000
"""Largest model, in bytes, that is written into one protobuf file; beyond it the weights go to a file beside it."""
_MOST = 2**31 - 1
"""Largest protobuf file, in bytes, that anyone can read."""
_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def load(model: Any) -> tuple[onnx.ModelProto, ir.Model]:
    """Read a ModelProto or a file into the editor's representation.

    Returns
    -------
    (proto, model)
        The proto is never changed; the weights of the model are views of it, or of the mapped external data.

    Raises
    ------
    TypeError
        `model` is neither a ModelProto nor a path.
    ValueError
        The file is no ONNX model (`files.ModelFileError`), the model has no graph, or its external data is missing,
        too short, or outside the model's folder.
    """
    if isinstance(model, onnx.ModelProto):
        proto, folder = model, ""
    elif isinstance(model, str | os.PathLike):
        proto, folder = _read(model), os.path.dirname(os.path.abspath(model))
    else:
        raise ArgumentTypeError("model", "an onnx.ModelProto or a path", type(model).__name__)
    if not proto.HasField("graph"):
        raise ArgumentValueError("model", "a graph", "a model without one")
    # External data of a model in memory lies in the current folder; of a file, only the main graph's is left there.
    held = proto.graph.initializer
    external = any(t.data_location == _OUTSIDE for t in held) if folder else external_files("model", proto)
    readable = hidden(proto)
    edited = ir.serde.deserialize_model(readable)
    remember(readable, edited)
    if readable is not proto:
        edited.meta[_SPARSE] = True
    for tensor in _external(edited) if external else ():
        tensor.base_dir = folder or os.getcwd()
    return proto, edited


def _read(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model in a file, checked; what is external stays on disk, if it is an initializer of the main graph.

    The rest (tensors of Constant nodes and bodies, sparse ones) is read in: only initializers of the main graph are
    streamed when the model is written, a reference from anywhere else would be lost in another folder.
    """
    return load_model(path, initializers=False)


def _restore(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Put back what the editor does not carry: sparse initializers, training info, quantization annotations."""
    original = originals(model).proto
    if original is None:
        return
    if model.meta.get(_SPARSE):
        found(proto)
    proto.graph.sparse_initializer.extend(original.graph.sparse_initializer)
    if original.training_info:
        lost = _names(original.graph) - _names(proto.graph) - set(model.graph.initializers)
        proto.training_info.extend(t for t in original.training_info if not lost & _named(t))
    annotations = original.graph.quantization_annotation
    if annotations:
        known = {a.tensor_name for a in proto.graph.quantization_annotation}
        names = {o for n in proto.graph.node for o in n.output} | {v.name for v in proto.graph.input}
        names |= set(model.graph.initializers)
        missing = [a for a in annotations if a.tensor_name in names and a.tensor_name not in known]
        proto.graph.quantization_annotation.extend(missing)


def _names(graph: onnx.GraphProto) -> set[str]:
    """Everything that has a value in a graph."""
    return {v.name for v in (*graph.input, *graph.initializer)} | {o for n in graph.node for o in n.output}


def _named(training: onnx.TrainingInfoProto) -> set[str]:
    """What a step of training reads and updates; it has no meaning where any of that is gone."""
    nodes = (*training.initialization.node, *training.algorithm.node)
    bindings = (*training.initialization_binding, *training.update_binding)
    return {binding.key for binding in bindings}.union(*map(used_names, nodes))


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for _, graph in all_graphs(model):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value


def inline_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as a self-contained proto: external weights are read in.

    New weights move into the proto one by one, so that they are never held twice.
    """
    proto, tensors = _without_initializers(model)
    for value, tensor in tensors:
        target = proto.graph.initializer.add()
        if isinstance(tensor, ir.ExternalTensor | ir.Tensor) and _plain(tensor):
            target.CopyFrom(_header(value, tensor))
            target.raw_data = tensor.tobytes()
            value.const_value = ir.TensorProtoTensor(target)
        else:
            target.CopyFrom(_whole(value, tensor))
    return proto


def _without_initializers(model: ir.Model) -> tuple[onnx.ModelProto, list[tuple[ir.Value, ir.TensorProtocol]]]:
    """The proto of a model whose main graph has no initializers, and these."""
    graph = model.graph
    shell = ir.Graph([], [], nodes=[], name=graph.name, doc_string=graph.doc_string, opset_imports=graph.opset_imports)
    shell.metadata_props.update(graph.metadata_props)
    proto = ir.serde.serialize_model(
        ir.Model(
            shell,
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
            domain=model.domain,
            model_version=model.model_version,
            doc_string=model.doc_string,
            functions=list(model.functions.values()),
            metadata_props=model.metadata_props,
            device_configurations=model.device_configurations,
        )
    )
    originals(model).graph(graph, proto.graph)
    _restore(proto, model)
    return proto, [(v, v.const_value) for v in graph.initializers.values() if v.const_value is not None]


def _header(value: ir.Value, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """A TensorProto without its data."""
    proto = onnx.TensorProto(name=value.name or "", data_type=int(tensor.dtype), dims=list(tensor.shape.numpy()))
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    return proto


def _whole(value: ir.Value, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """A TensorProto with its data, also of an external tensor, which the serializer would leave a reference."""
    if isinstance(tensor, ir.ExternalTensor):
        proto = _header(value, tensor)
        proto.raw_data = tensor.tobytes()
        for key, text in tensor.metadata_props.items():
            proto.metadata_props.add(key=key, value=text)
        return proto
    if isinstance(tensor, ir.TensorProtoTensor) and tensor.raw.name == value.name:
        return tensor.raw
    proto = ir.serde.serialize_tensor(tensor)
    proto.name = value.name or ""
    return proto


def save(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write a model; weights that do not fit into one file go to ``<name>.data`` beside it.

    Raises
    ------
    OSError
        The file cannot be written, or even without its tensors it is too large; nothing is left behind.
    """
    target = Path(path)
    if target.exists() and not target.is_file():  # the rename would put a file in the place of a device
        raise OSError(errno.EINVAL, "expected a file to write, got a folder, a device or a pipe", str(target))
    folder = tempfile.mkdtemp(prefix=".fastbn-", dir=target.parent)
    try:
        temporary = Path(folder) / target.name
        with open(temporary, "wb") as file:
            streamed = _stream(model, file)
        if not streamed:
            data = f"{target.name}.data"
            with open(Path(folder) / data, "wb") as beside:
                skeleton = _serialized(_beside(model, data, beside), target)
            temporary.write_bytes(skeleton)
            os.replace(Path(folder) / data, target.parent / data)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _serialized(proto: onnx.ModelProto, target: Path) -> bytes:
    """The model without its tensors, which protobuf must be able to hold."""
    try:
        data = bytes(proto.SerializeToString())
        size = str(len(data))
    except EncodeError:
        data, size = b"", "more"
    if not data or len(data) > _MOST:
        raise OSError(errno.EFBIG, f"expected at most {_MOST} bytes beside the tensors, got {size}", str(target))
    return data


def _beside(model: ir.Model, location: str, file: BinaryIO) -> onnx.ModelProto:
    """Write the weights to a data file, tensor by tensor, and return the model that points to them."""
    proto, tensors = _without_initializers(model)
    if _held(proto) > LIMIT:
        for inner in tensors_of(proto):
            _move_out(inner, location, file)
    for value, tensor in tensors:
        if _size(tensor) < _EXTERNAL or tensor.dtype == ir.DataType.STRING or not _plain(tensor):
            proto.graph.initializer.append(_whole(value, tensor))
            _move_out(proto.graph.initializer[-1], location, file)
            continue
        header = _header(value, tensor)
        place(header, location, file, tensor.nbytes)
        _write(tensor, file)
        proto.graph.initializer.append(header)
    return proto


def _held(proto: onnx.ModelProto) -> int:
    """Bytes of all tensors in a model, of Constant nodes, bodies and functions, too."""
    return sum(_bytes(tensor) for tensor in tensors_of(proto))


def _bytes(tensor: Any) -> int:
    return len(tensor.raw_data) if tensor.HasField("raw_data") else int(tensor.ByteSize())


def _move_out(tensor: Any, location: str, file: BinaryIO) -> None:
    """Move the bytes of a tensor to the data file, unless they are few or strings."""
    if tensor.data_type == onnx.TensorProto.STRING or _bytes(tensor) < _EXTERNAL:
        return
    if any(len(getattr(tensor, field)) for field in _TYPED):
        raw = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data
        for field in _TYPED:
            tensor.ClearField(field)
        tensor.raw_data = raw
    if len(tensor.raw_data) >= _EXTERNAL:
        place(tensor, location, file, len(tensor.raw_data))
        file.write(tensor.raw_data)
        tensor.ClearField("raw_data")


def _stream(model: ir.Model, file: BinaryIO) -> bool:
    """Write the wire format of ModelProto: all fields but the graph, then the graph, its initializers last.

    Nothing is written, and the answer is False, where that is too large for one file.
    """
    proto, tensors = _without_initializers(model)
    if sum(_size(tensor) for _, tensor in tensors) + _held(proto) >= LIMIT:
        return False
    inner = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads = [_head(value, tensor) for value, tensor in tensors]
    total = len(inner) + sum(len(_field(5, length)) + length for _, length, _ in heads)
    rest = proto.SerializeToString()
    if len(rest) + len(_field(7, total)) + total > _MOST:
        return False
    file.write(rest)
    file.write(_field(7, total))
    file.write(inner)
    for head, length, tensor in heads:
        file.write(_field(5, length))
        file.write(head)
        if tensor is not None:
            _write(tensor, file)
    return True


def _head(value: ir.Value, tensor: ir.TensorProtocol) -> tuple[bytes, int, ir.TensorProtocol | None]:
    """A TensorProto up to its raw bytes, its whole length, and the tensor whose bytes follow (None: included)."""
    if _size(tensor) < _EXTERNAL or tensor.dtype == ir.DataType.STRING or not _plain(tensor):
        text = _whole(value, tensor).SerializeToString()
        return text, len(text), None
    head = _header(value, tensor).SerializeToString() + _field(9, tensor.nbytes)
    return head, len(head) + tensor.nbytes, tensor


def _size(tensor: ir.TensorProtocol | None) -> int:
    """Bytes of a tensor in the file, about: what says whether it is a large one must not cost more than a small one."""
    if isinstance(tensor, ir.TensorProtoTensor):
        return int(tensor.raw.ByteSize())
    return 0 if tensor is None else int(tensor.nbytes)


def _write(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    """Write the raw bytes, without copying them where the storage allows."""
    to_file = getattr(tensor, "tofile", None)
    if to_file is not None:
        to_file(file)
    else:
        file.write(tensor.tobytes())


def _plain(tensor: ir.TensorProtocol) -> bool:
    """Whether the tensor's bytes are its array, so that nothing but `tofile` is needed."""
    return not tensor.metadata_props and np.dtype(tensor.dtype.numpy()).itemsize * tensor.size == tensor.nbytes


def _field(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    out, value = bytearray([number << 3 | 2]), length
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
