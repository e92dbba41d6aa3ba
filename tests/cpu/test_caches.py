"""Which cache blocks are made for, and that results do not depend on it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import pytest

from fastbn.cpu import caches

XEON = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n"


def cache_folder(path, *sizes):
    for i, (level, size) in enumerate(sizes):
        index = path / f"index{i}"
        index.mkdir(parents=True)
        (index / "level").write_text(f"{level}\n")
        (index / "size").write_text(f"{size}\n")
    return path


@pytest.mark.parametrize(("text", "size"), [("2048K", 2 << 20), ("1M", 1 << 20), ("4096", 4096), ("many", 0)])
def test_size_of_the_second_cache(text, size, tmp_path):
    assert caches.second(cache_folder(tmp_path, (1, "48K"), (1, "32K"), (2, text), (3, "300M"))) == size


def test_nothing_is_known(tmp_path):
    assert caches.second(tmp_path / "none") == 0 and caches.vendor(tmp_path / "none") == ""
    (tmp_path / "cpuinfo").write_text("CPU implementer\t: 0x41\n")
    assert caches.vendor(tmp_path / "cpuinfo") == ""


def test_vendor(tmp_path):
    (tmp_path / "cpuinfo").write_text(XEON)
    assert caches.vendor(tmp_path / "cpuinfo") == "GenuineIntel"


@pytest.mark.parametrize(
    ("vendor", "second", "expected"),
    [
        ("GenuineIntel", 2 << 20, 2 << 20), ("GenuineIntel", 256 << 10, 0), ("GenuineIntel", 0, 0),
        ("AuthenticAMD", 1 << 20, 0),
    ],
)  # fmt: skip
def test_what_blocks_fit_in(vendor, second, expected, monkeypatch):
    monkeypatch.delenv("FASTBN_CORE_CACHE", raising=False)
    monkeypatch.setattr(caches, "vendor", lambda: vendor)
    monkeypatch.setattr(caches, "second", lambda: second)
    assert caches.core() == expected
    monkeypatch.setenv("FASTBN_CORE_CACHE", "12345")
    assert caches.core() == 12345


# Channels-first of several blocks under a small cache, with ends that are no whole vectors, into an output that begins
# inside of a line, behind a ReLU and a residual or not, of one sample and of half precision; a residual's gradient that
# is written with the sums; and a mask of long runs.
DIGEST = """
import hashlib
import numpy as np, fastbn
from fastbn.cpu import planes, tuning
found = hashlib.sha256()
shapes = {
    (7, 19, 80, 16): "f2", (9, 21, 31, 37): "f4", (7, 67, 32, 40): "f4", (1, 130, 71, 73): "f4", (5, 34, 1031): "f4",
}
for shape, kind in shapes.items():
    rng = np.random.default_rng(1)
    x, g = (rng.standard_normal(shape).astype(kind) for _ in range(2))
    w, b = (rng.standard_normal(shape[1]).astype("f4") for _ in range(2))
    out = np.empty(x.size + 3, kind)[3:].reshape(shape)
    for relu, residual in ((None, None), ("relu", None), ("relu", g)) if kind == "f4" else ((None, None), ("relu", g)):
        y, saved = fastbn.batch_norm_train(x, w, b, activation=relu, residual=residual)
        gradients = fastbn.backward(g, saved, out=out)
        found.update(b"".join(a.tobytes() for a in (y, *gradients) if a is not None))
lengths = np.array([1031, 900, 400, 1000, 77])
y, saved = fastbn.batch_norm_train(x, w, b, lengths=lengths)
found.update(b"".join(a.tobytes() for a in (y, *fastbn.backward(g, saved)[:3])))
print(tuning.CORE_CACHE, tuning.STREAM, planes.SLAB, found.hexdigest())
"""


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="blocks are the kernels'")
def test_the_same_bits_whatever_the_cache(python):
    with ThreadPoolExecutor(2) as both:
        done = both.map(lambda size: python(DIGEST, FASTBN_CORE_CACHE=size).stdout.split(), (0, 300_000))
        said = list(done)
    assert said[0][:3] == ["0", str(10 << 20), "50000"] and said[1][:3] == ["300000", "375000", "781"]
    assert said[0][3] == said[1][3]


def test_a_place_of_its_own_for_each_cache(python, tmp_path):
    code = "from fastbn.cpu import _jit; print(_jit.cache_folder())"
    folders = {python(code, FASTBN_CACHE_DIR=tmp_path, FASTBN_CORE_CACHE=size).stdout for size in (0, 1 << 20, 1 << 21)}
    assert len(folders) == 3
