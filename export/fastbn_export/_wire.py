"""How two of our processes talk: framed messages of one JSON header and raw array bytes, without pickle.

The child runs a model that may be hostile, so nothing it sends is ever unpickled. A frame is
``<8 bytes: header length><header: JSON><the bytes of the arrays, in order>``. Values are arrays (any dtype, strings
included), lists of values (ONNX sequences), dicts of values (ONNX maps) and None (an absent optional).
"""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

import numpy as np

__all__ = ["dtype_named", "receive", "send"]

Value = Any
"""ndarray | list[Value] | dict[str, Value] | None."""


def send(stream: BinaryIO, message: dict[str, Any], values: list[Value] | None = None) -> None:
    """Write one frame: a JSON-able ``message`` and any number of values."""
    buffers: list[Any] = []
    described = [_describe(value, buffers) for value in values or []]
    header = json.dumps({"message": message, "values": described}).encode()
    stream.write(struct.pack("<q", len(header)))
    stream.write(header)
    for buffer in buffers:
        stream.write(buffer)
    stream.flush()


def receive(stream: BinaryIO) -> tuple[dict[str, Any], list[Value]]:
    """Read one frame. Raises EOFError when the other side is gone."""
    (length,) = struct.unpack("<q", _exactly(stream, 8))
    header = json.loads(_exactly(stream, length))
    return header["message"], [_rebuild(description, stream) for description in header["values"]]


def _describe(value: Value, buffers: list[Any]) -> dict[str, Any]:
    if value is None:
        return {"none": True}
    if isinstance(value, dict):
        return {
            "keys": [str(key) for key in value],
            "list": [_describe(np.asarray(item), buffers) for item in value.values()],
        }
    if isinstance(value, (list, tuple)):
        return {"list": [_describe(item, buffers) for item in value]}
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        return {"text": [_text(item) for item in array.ravel().tolist()], "shape": array.shape}
    array = np.ascontiguousarray(array).reshape(array.shape)
    buffers.append(array.reshape(-1).view(np.uint8))
    return {"dtype": array.dtype.name, "shape": array.shape}


def _text(item: object) -> str:
    return item.decode("utf-8", "backslashreplace") if isinstance(item, bytes) else str(item)


def _rebuild(described: dict[str, Any], stream: BinaryIO) -> Value:
    if "none" in described:
        return None
    if "list" in described:
        items = [_rebuild(item, stream) for item in described["list"]]
        return dict(zip(described["keys"], items, strict=True)) if "keys" in described else items
    if "text" in described:
        return np.array(described["text"], dtype=object).reshape(described["shape"])
    dtype = dtype_named(described["dtype"])
    count = int(np.prod(described["shape"], dtype=np.int64))
    data = _exactly(stream, count * dtype.itemsize)
    return np.frombuffer(data, np.uint8).view(dtype).reshape(described["shape"])


def dtype_named(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name, the half types of ml_dtypes included."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return dtype


def _exactly(stream: BinaryIO, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        got = stream.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise EOFError("the other process is gone")
        view = view[got:]
    return data
