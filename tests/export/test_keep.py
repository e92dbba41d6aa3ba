"""Which normalizations are left alone: by name, by pattern, by function, and never by the letters of a name."""

from __future__ import annotations

import pytest
from fastbn_export.keep import keeper

NAMES = ["bn0", "bn1", "b", "block[0].bn"]


@pytest.mark.parametrize(
    ("keep", "skip", "expected"),
    [
        (None, (), []),
        ("bn0", (), ["bn0"]),
        ("bn*", ["b"], ["bn0", "bn1", "b"]),
        (["bn1", "block[0].bn"], (), ["bn1", "block[0].bn"]),
        (lambda name: name == "b", "bn1", ["bn1", "b"]),
        (None, "bn0", ["bn0"]),
        (None, "bn*", []),
        (None, iter(["bn0", "none"]), ["bn0"]),
    ],
)
def test_names_patterns_and_functions(keep, skip, expected):
    kept = keeper(keep, skip)
    assert [name for name in NAMES if kept(name)] == expected


@pytest.mark.parametrize("wrong", [{"keep": 3}, {"keep": [1]}, {"skip": 5}, {"skip": [b"bn0"]}])
def test_anything_else_is_refused(wrong):
    with pytest.raises(TypeError, match=f"{next(iter(wrong))}: expected"):
        keeper(**{"keep": None, **wrong})
