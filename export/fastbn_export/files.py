"""Model files in and out: what is read is checked before it is believed, what is written appears whole or not at all.

A model file is untrusted input. External data must lie inside the model's own folder (no absolute path, no "..", no
symbolic link out of it) and its sizes must agree with the tensor's shape *before* memory is asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from fastbn.errors import FastbnError
from fastbn_export.protos import tensors_of

__all__ = [
    "ModelFileError",
    "atomic_path",
    "check_distinct",
    "check_output",
    "disk_size",
    "external_files",
    "load_model",
    "place",
    "save_model",
]

EXTERNAL_ABOVE = 1_900_000_000
"""Bytes of tensors above which a model is saved with external data: protobuf ends at 2 GiB."""

_EXTERNAL_TENSOR = 1024
"""Tensors of fewer bytes stay inside the model file."""

_DEVICES = Path("/dev")
"""Even a link in here that leads to a file (/dev/stdout) is to be written to, not replaced."""


class ModelFileError(FastbnError, ValueError):
    """A file that is no readable ONNX model, or an output that cannot be written."""


def load_model(
    path: str | os.PathLike[str], *, external_data: bool = True, initializers: bool = True
) -> onnx.ModelProto:
    """Read an ONNX model from a file.

    Parameters
    ----------
    path : str or os.PathLike
        The binary ONNX file.
    external_data : bool
        Read the external tensors as well (False leaves them as references).
    initializers : bool
        Read also those that are initializers of the main graph, which hold most of a large model.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    ModelFileError
        Missing, a folder, truncated, not ONNX, with a tensor whose bytes disagree with its shape, or with external
        data that is missing, too short or outside of the model's folder.
    """
    file = Path(path)
    model = _parse(file, _read(file))
    streamed = 0 if initializers else len(model.graph.initializer)  # tensors_of begins with these
    for index, tensor in enumerate(tensors_of(model)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = _external(file, tensor)
            if external_data and index >= streamed:
                _move_in(tensor, *where)
        elif tensor.HasField("raw_data"):
            name = f"{file}: tensor {tensor.name!r}"
            if len(tensor.raw_data) != (needed := _byte_size(tensor, name)):
                raise ModelFileError(
                    f"{name}: expected {needed} bytes for shape {list(tensor.dims)}, got {len(tensor.raw_data)}"
                )
    return model


def external_files(path: str | os.PathLike[str], model: onnx.ModelProto) -> set[Path]:
    """Return the files beside ``path`` that hold tensors of the model which was read from it without them."""
    tensors = [tensor for tensor in tensors_of(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    return {_external(Path(path), tensor)[0] for tensor in tensors}


def disk_size(path: str | os.PathLike[str], model: onnx.ModelProto | None = None) -> int:
    """Return the bytes of a model on disk, its external data included.

    ``model`` is what was read from there without these, if it is at hand: a pipe has no size and is empty by now.
    """
    model = load_model(path, external_data=False) if model is None else model
    own = Path(path).stat().st_size if Path(path).is_file() else model.ByteSize()
    return own + sum(file.stat().st_size for file in external_files(path, model))


def _read(file: Path) -> bytes:
    if file.is_dir():
        raise ModelFileError(f"{file}: expected an ONNX file, got a folder")
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise ModelFileError(f"{file}: cannot be read: {_reason(error)}") from None


def _parse(file: Path, data: bytes) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RecursionError):
        raise ModelFileError(f"{file}: expected an ONNX model, got a truncated file or another format") from None
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelFileError(f"{file}: expected an ONNX model, got a file without a graph")
    return model


def _external(file: Path, tensor: Any) -> tuple[Path, int, int]:
    """Return (file, offset, length) of an external tensor, all of it checked against the disk."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = f"{file}: external data of {tensor.name!r}"
    location = entries.get("location", "")
    if not location or os.path.isabs(location) or "\0" in location:
        raise ModelFileError(f"{name}: expected a path relative to the model, got {location!r}")
    folder = file.parent.resolve()
    data = (folder / location.replace("\\", "/")).resolve()
    if not data.is_relative_to(folder):
        raise ModelFileError(f"{name}: expected a path inside the model's folder, got {location!r}")
    if not data.is_file():
        raise ModelFileError(f"{name}: no such file: {location!r}")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    except ValueError:
        raise ModelFileError(f"{name}: expected whole numbers for offset and length, got {entries}") from None
    needed = _byte_size(tensor, name)
    length = needed if length == -1 else length
    if length != needed:
        raise ModelFileError(f"{name}: expected {needed} bytes for shape {list(tensor.dims)}, got {length}")
    if offset < 0 or offset + length > data.stat().st_size:
        raise ModelFileError(
            f"{name}: expected {length} bytes at {offset}, got a file of {data.stat().st_size} bytes: {location!r}"
        )
    return data, offset, length


def _byte_size(tensor: Any, name: str) -> int:
    dims = tensor.dims
    if dims and min(dims) < 0:
        raise ModelFileError(f"{name}: expected sizes >= 0, got {list(dims)}")
    bits = _bits(tensor.data_type)
    if bits is None:
        raise ModelFileError(f"{name}: expected a known element type, got {tensor.data_type}")
    return -(-int(prod(dims)) * bits // 8)


@cache
def _bits(data_type: int) -> int | None:
    """Bits of one element; None for an unknown type."""
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(data_type)
    except (KeyError, ValueError):
        return None
    packed = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
    return packed.get(onnx.TensorProto.DataType.Name(data_type), int(dtype.itemsize) * 8)


def _move_in(tensor: Any, data: Path, offset: int, length: int) -> None:
    with data.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(length)
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def check_output(path: str | os.PathLike[str], *reads: str | os.PathLike[str] | None) -> None:
    """Refuse an output path that could not be written, or that is one of the inputs, before any work is done.

    Parameters
    ----------
    path : str or os.PathLike
        The file to be.
    *reads : str, os.PathLike or None
        Files that the same command reads, as far as it was given any.

    Raises
    ------
    ModelFileError
        The name is too long, the path is a folder, a device or a pipe, its folder is missing or read-only, or it is
        one of ``reads``.
    """
    out = Path(path)
    try:
        out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # what no file can be called
        raise ModelFileError(f"{out}: cannot be written: {_reason(error)}") from None
    if out.is_dir():
        raise ModelFileError(f"{out}: expected a file to write, got a folder")
    if not out.parent.is_dir():
        raise ModelFileError(f"{out}: no such folder: {out.parent}")
    if out.exists() and (not out.is_file() or out.parent.resolve() == _DEVICES):  # a rename would put a file there
        raise ModelFileError(f"{out}: expected a file to write, got a device or a pipe")
    if not os.access(out.parent, os.W_OK):
        raise ModelFileError(f"{out}: cannot be written: no permission in {out.parent}")
    if any(source is not None and _same_file(out, Path(source)) for source in reads):
        raise ModelFileError(f"{out}: expected another file than the input, which is never touched")


def check_distinct(paths: Sequence[str | os.PathLike[str] | None]) -> None:
    """Refuse outputs of one command that would overwrite each other.

    Raises
    ------
    ModelFileError
        Two of the paths are the same file.
    """
    given = [Path(path) for path in paths if path is not None]
    for index, out in enumerate(given):
        if any(_same_file(out, other) for other in given[:index]):
            raise ModelFileError(f"{out}: expected a file for each output, got one name twice")


def _same_file(first: Path, second: Path) -> bool:
    if first.exists() and second.exists():
        return os.path.samefile(first, second)
    return first.resolve() == second.resolve()


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it becomes ``path`` in one step, on failure it is gone.

    Parameters
    ----------
    path : str or os.PathLike
        The file to be.

    Raises
    ------
    ModelFileError
        The file cannot be written there.
    """
    out = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=".fastbn-", suffix=".part", dir=out.parent)  # short: out's may not be
        os.close(handle)
    except OSError as error:
        raise ModelFileError(f"{out}: cannot be written: {_reason(error)}") from None
    part = Path(name)
    try:
        yield part
        _give_usual_mode(part)
        os.replace(part, out)
    except OSError as error:
        raise ModelFileError(f"{out}: cannot be written: {_reason(error)}") from None
    finally:
        part.unlink(missing_ok=True)


def _give_usual_mode(part: Path) -> None:
    """Undo mkstemp's 0600: an output has the permissions that open() would have given it."""
    mask = os.umask(0)
    os.umask(mask)
    part.chmod(0o666 & ~mask)


def save_model(model: onnx.ModelProto, path: str | os.PathLike[str], *, external: bool | None = None) -> None:
    """Write an ONNX model; it appears under its name whole or not at all.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; it is not changed.
    path : str or os.PathLike
        The file to write. With external data, ``<path>.data`` is written beside it, first.
    external : bool, optional
        Put the large tensors into the data file. Default: only when protobuf's limit of 2 GiB demands it.

    Raises
    ------
    ModelFileError
        The file cannot be written.
    """
    out = Path(path)
    check_output(out)
    if external is None:
        external = sum(len(tensor.raw_data) for tensor in tensors_of(model)) > EXTERNAL_ABOVE
    if external:
        _save_external(model, out)
        return
    try:
        data = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelFileError(f"{out}: cannot be written: {error}") from None
    with atomic_path(out) as part:
        part.write_bytes(data)


def _save_external(model: onnx.ModelProto, out: Path) -> None:
    """Move the large tensors to ``<out>.data``; only the skeleton of the model is copied, never the weights."""
    sidecar = out.with_name(out.name + ".data")
    check_output(sidecar)
    moved: list[tuple[Any, Any, int, int]] = []
    with atomic_path(out) as skeleton, atomic_path(sidecar) as part, part.open("w+b") as stream:
        for tensor in tensors_of(model):
            if (length := len(tensor.raw_data)) >= _EXTERNAL_TENSOR:
                header = onnx.TensorProto()
                moved.append((tensor, header, place(header, sidecar.name, stream, length), length))
                stream.write(tensor.raw_data)
        stream.flush()  # the disk may be full: only now can everything be read back
        try:
            for tensor, header, *_ in moved:
                tensor.ClearField("raw_data")
                tensor.MergeFrom(header)
            skeleton.write_bytes(model.SerializeToString())
        finally:
            for tensor, _, offset, length in moved:  # the caller's model gets its weights back, read from the new file
                stream.seek(offset)
                tensor.raw_data = stream.read(length)
                tensor.ClearField("external_data")
                tensor.ClearField("data_location")


def place(tensor: Any, location: str, stream: Any, length: int) -> int:
    """Make a tensor point to the next `length` bytes of a data file, which are still to be written; return where."""
    stream.write(b"\0" * (-stream.tell() % 64))  # aligned for whoever maps the file
    offset = stream.tell()
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return int(offset)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
