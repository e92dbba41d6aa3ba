"""What the control group of a container allows."""

from __future__ import annotations

import pytest

from fastbn import limits, recycled

V1 = "9:name=systemd:/\n4:memory:/a\n3:cpu,cpuacct:/a/b\n0::/\n"
V2 = "0::/a/b\n"
CORES = [
    (V2, {"a/b/cpu.max": "max 100000"}, None),
    (V2, {"a/b/cpu.max": "150000 100000"}, 2),
    (V2, {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000", "cpu.max": "max 100000"}, 3),
    (V2, {"cpu.max": "20000 100000"}, 1),  # a container that sees no group but its own
    ("0::/../x\n", {"cpu.max": "500000 100000"}, 5),
    (V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "cpu/a/b/cpu.cfs_period_us": "100000"}, None),
    (V1, {"cpu/a/b/cpu.cfs_quota_us": "250000", "cpu/a/b/cpu.cfs_period_us": "50000"}, 5),
    (V1, {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 2),
    (V1, {"unified/cpu.max": "200000 100000"}, 2),
    (V1, {"cpu/cpu.cfs_quota_us": "200000"}, None),  # half of it, or nonsense
    (V2, {"cpu.max": "0 0"}, None),
    (V2, {"cpu.max": ""}, None),
    (V2, {}, None),
    ("", {"cpu.max": "100000 100000"}, None),
]
MEMORY = [
    (V2, {"a/b/memory.max": "max"}, None),
    (V2, {"a/b/memory.max": "max", "a/memory.max": "3000", "memory.max": "5000"}, 3000),
    (V1, {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, 9223372036854771712),  # none, on version 1
    (V1, {"memory/memory.limit_in_bytes": "4096"}, 4096),
    (V2, {}, None),
]


def system(root, groups, files):
    """Write what the kernel would show of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return str(root)


@pytest.mark.parametrize(("groups", "files", "found"), CORES)
def test_cores(groups, files, found, tmp_path):
    assert limits.cores(system(tmp_path, groups, files)) == found


def test_nothing_there(tmp_path):
    assert limits.cores(str(tmp_path)) is None is limits.memory(str(tmp_path))


@pytest.mark.parametrize(("groups", "files", "found"), MEMORY)
def test_memory(groups, files, found, tmp_path):
    assert limits.memory(system(tmp_path, groups, files)) == found


def test_kept_memory_is_a_part_of_the_container(monkeypatch):
    monkeypatch.setattr(limits, "memory", lambda: 800)
    assert recycled._limit.__wrapped__(None) == 100
    assert recycled._limit.__wrapped__("4096") == 4096
