"""MNIST's IDX files: two zero bytes, a type, a rank, big-endian sizes, then the values in C order; plain or gzipped.

The header of a file from elsewhere is believed only as far as there are bytes behind it: memory is asked for when the
file has them, never because the header says so.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fastbn.errors import ArgumentValueError

__all__ = ["find_mnist", "read_idx"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_BYTES = 1 << 32
_CHUNK = 1 << 24


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """Read an IDX file, gzipped or not (told by its first bytes).

    Returns
    -------
    ndarray
        In the machine's byte order.

    Raises
    ------
    ArgumentValueError
        Missing, not IDX, too short, too long, or broken compression; the message names the file.
    """
    file = Path(path)
    try:
        with file.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            size = None if zipped else os.fstat(raw.fileno()).st_size
            with gzip.GzipFile(fileobj=raw) if zipped else raw as stream:
                return _parse(file, stream, size)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArgumentValueError(str(file), "an intact gzip file", error) from None
    except OSError as error:
        raise ArgumentValueError(str(file), "a readable file", (error.strerror or str(error)).lower()) from None


def _parse(file: Path, stream: BinaryIO, size: int | None) -> NDArray[Any]:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or head[3] == 0:
        raise ArgumentValueError(str(file), "an IDX file (00 00 type rank)", head.hex(" ") or "an empty file")
    sizes = stream.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise ArgumentValueError(str(file), f"{head[3]} sizes of 4 bytes", f"{len(sizes)} bytes")
    shape = struct.unpack(f">{head[3]}i", sizes)
    dtype = np.dtype(_TYPES[head[2]])
    if min(shape) < 0 or prod(shape) * dtype.itemsize > _MOST_BYTES:
        raise ArgumentValueError(str(file), f"sizes >= 0 of at most {_MOST_BYTES} bytes", shape)
    needed = prod(shape) * dtype.itemsize
    if size is not None and size - 4 - len(sizes) != needed:
        raise ArgumentValueError(str(file), f"{needed} bytes of data for {shape}", f"{size - 4 - len(sizes)}")
    data = bytearray()
    while len(data) < needed and (chunk := stream.read(min(_CHUNK, needed - len(data)))):
        data += chunk
    if len(data) != needed or stream.read(1):
        raise ArgumentValueError(str(file), f"{needed} bytes of data for {shape}", f"{len(data)} or more")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def find_mnist(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the paths of MNIST's four files in a folder: train-images, train-labels, t10k-images, t10k-labels.

    Raises
    ------
    ArgumentValueError
        A file is missing.
    """
    found = {}
    for part, rank in (("train-images", 3), ("train-labels", 1), ("t10k-images", 3), ("t10k-labels", 1)):
        names = [f"{part}{dot}idx{rank}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
        paths = [Path(folder) / name for name in names if (Path(folder) / name).is_file()]
        if not paths:
            raise ArgumentValueError(str(folder), f"a folder with {names[0]} (or .gz)", "no such file in it")
        found[part] = paths[0]
    return found
