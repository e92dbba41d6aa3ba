"""IDX files of every type read back; a header that promises more than the file has is refused."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from fastbn_export.idx import find_mnist, read_idx

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array):
    code = CODES[array.dtype.str[1:]]
    head = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.mark.parametrize("kind", list(CODES))
@pytest.mark.parametrize("zipped", [False, True])
def test_round_trip(tmp_path, kind, zipped):
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    (tmp_path / "a").write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    have = read_idx(tmp_path / "a")
    assert have.dtype == array.dtype and np.array_equal(have, array)


GOOD = idx(np.arange(24, dtype="u1").reshape(2, 3, 4))
HUGE = bytes([0, 0, 8, 2]) + struct.pack(">2i", 2**31 - 1, 2**31 - 1)
BROKEN = {
    "empty": (b"", "00 00 type rank"),
    "text": (b"pictures", "00 00 type rank"),
    "unknown type": (bytes([0, 0, 7, 1]) + GOOD[4:], "00 00 type rank"),
    "rank 0": (bytes([0, 0, 8, 0]), "00 00 type rank"),
    "header cut": (GOOD[:9], "3 sizes of 4 bytes"),
    "data cut": (GOOD[:-1], "24 bytes of data"),
    "data too long": (GOOD + b"x", "24 bytes of data"),
    "negative size": (bytes([0, 0, 8, 1]) + struct.pack(">i", -1), "sizes >= 0"),
    "absurd size": (HUGE, "sizes >= 0 of at most"),
    "large size without data": (bytes([0, 0, 8, 1]) + struct.pack(">i", 2**31 - 1), "bytes of data"),
    "gzip cut": (gzip.compress(GOOD)[:-9], "intact gzip|bytes of data"),
    "gzip of too little": (gzip.compress(GOOD[:-1]), "bytes of data"),
    "gzip of too much": (gzip.compress(GOOD + b"x"), "bytes of data"),
    "no gzip after all": (b"\x1f\x8bnothing", "gzip"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_broken_files_are_told(tmp_path, case):
    data, message = BROKEN[case]
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "a")


def test_missing(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_idx(tmp_path / "a")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        find_mnist(tmp_path)
