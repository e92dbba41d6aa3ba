"""Compiled kernels on disk: their names last, differ where kernels do, and bad files do not matter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fastbn.cuda import driver, planes, rows, stored
from fastbn.cuda.sweep import Variant

WHAT = Variant("f32", 4, 64)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "folder", lambda: tmp_path)
    return tmp_path


def path(kernel, capability=(9, 0)):
    return stored.Store.of(kernel, capability).path


def test_names_tell_kernels_apart(folder):
    kernels = [
        planes.sums(WHAT), planes.sums(WHAT._replace(backward=True)), planes.sums(WHAT._replace(W=1)),
        planes.sums(WHAT._replace(kind="f16", W=8)), planes.normalise(WHAT), rows.sums(WHAT),
        planes.sums(WHAT._replace(threads=128)),
    ]  # fmt: skip
    assert len({path(k) for k in kernels}) == len(kernels)
    assert path(kernels[0]) != path(kernels[0], (8, 0))
    again = planes.sums.__wrapped__(WHAT)
    assert again is not kernels[0] and path(again) == path(kernels[0])


def test_what_has_no_lasting_name_is_not_kept(folder):
    held = object()
    kernel = driver.Kernel(lambda: held, "T", "f32", 64, 1)
    assert stored.Store.of(kernel, (9, 0)) is None
    assert stored.name_of((1, "a", None, np.float32(2))) == stored.name_of((1, "a", None, np.float32(2)))


def test_files_that_are_no_kernels(folder):
    store = stored.Store.of(planes.sums(WHAT), (9, 0))
    assert store.load_overload(None, None) is None
    store.path.write_bytes(b"no kernel")
    assert store.load_overload(None, None) is None
    store.save_overload(None, SimpleNamespace())  # nothing to be saved
    assert store.path.read_bytes() == b"no kernel" and list(folder.iterdir()) == [store.path]
    store.flush()
    store.flush()
    assert not list(folder.iterdir())


def test_where_nothing_can_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path / "file"))
    stored.folder.cache_clear()
    assert stored.folder() is None and stored.Store.of(planes.sums(WHAT), (9, 0)) is None
    dispatcher = SimpleNamespace(_cache="theirs")
    stored.use(dispatcher, planes.sums(WHAT), (9, 0))
    assert dispatcher._cache == "theirs"
    monkeypatch.setenv("FASTBN_CACHE_DIR", str(tmp_path))
    stored.folder.cache_clear()
    stored.use(dispatcher, planes.sums(WHAT), (9, 0))
    assert isinstance(dispatcher._cache, stored.Store)
    stored.folder.cache_clear()
