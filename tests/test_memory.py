"""Memory that a process may use, read from fake file systems: control groups, nested and in containers."""

import os

import pytest

from metainfluence import _memory

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712


def system(root, group, files, *, free=64 * GIB):
    """A file system with a machine's memory, the groups of this process and their files."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: {128 * GIB // 1024} kB\nMemAvailable: {free // 1024} kB\n")
    (root / "proc" / "self" / "cgroup").write_text(group)
    for name, content in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


NESTED_V2 = {
    "system.slice/slurmstepd.scope/job_7/memory.max": 4_000_000_000,
    "system.slice/slurmstepd.scope/job_7/memory.current": 0,
    "system.slice/slurmstepd.scope/job_7/step_0/memory.max": "max",
    "system.slice/slurmstepd.scope/job_7/step_0/memory.current": 0,
}
NESTED_V1 = {
    "memory/memory.limit_in_bytes": UNLIMITED_V1,
    "memory/memory.usage_in_bytes": 9_000_000_000,
    "memory/slurm/uid_1/job_7/memory.limit_in_bytes": 4_000_000_000,
    "memory/slurm/uid_1/job_7/memory.usage_in_bytes": 0,
}


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/\n", {"memory.max": 4_000_000_000, "memory.current": 0}),
        ("0::/system.slice/slurmstepd.scope/job_7/step_0\n", NESTED_V2),
        ("0::/user.slice/run-1.scope\n", {"user.slice/run-1.scope/memory.max": 4_000_000_000}),
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/uid_1/job_7\n0::/\n", NESTED_V1),
        # A container of the first version, whose group is mounted and not named as the kernel names it.
        (
            "4:memory:/docker/0123456789ab\n1:name=systemd:/docker/0123456789ab\n",
            {"memory/memory.limit_in_bytes": 4_000_000_000, "memory/memory.usage_in_bytes": 0},
        ),
        # Both versions at once, memory in the second.
        ("1:name=systemd:/a\n0::/a\n", {"unified/a/memory.max": 4_000_000_000, "unified/a/memory.current": 0}),
    ],
    ids=["v2", "v2 nested", "v2 scope", "v1 nested", "v1 in a container", "hybrid"],
)
def test_limits_of_control_groups_are_seen(group, files, tmp_path):
    root = system(tmp_path, group, files)
    assert _memory.available(root) == _memory.most(root) == 4e9


def test_what_a_group_uses_is_taken_and_its_caches_are_not(tmp_path):
    files = {"a/memory.max": 4_000_000_000, "a/memory.current": 3_000_000_000}
    root = system(tmp_path, "0::/a\n", {**files, "a/memory.stat": "anon 5\ninactive_file 1000000000"})
    assert _memory.available(root) == 2e9
    assert _memory.most(root) == 4e9


def test_the_least_limit_on_the_way_up_counts(tmp_path):
    files = {"a/b/memory.max": 8_000_000_000, "a/memory.max": 2_000_000_000, "c/memory.max": 1_000_000_000}
    assert _memory.available(system(tmp_path, "0::/a/b\n", files)) == 2e9


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": 5}),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": UNLIMITED_V1}),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": 5}),
        ("", {}),
    ],
)
def test_without_a_limit_the_machine_counts(group, files, tmp_path):
    root = system(tmp_path, group, files)
    assert _memory.available(root) == 64 * GIB
    assert _memory.most(root) == 128 * GIB


def test_where_nothing_is_known_a_little_is_taken(tmp_path):
    assert _memory.available(tmp_path) == _memory.most(tmp_path) == 2e9


def test_this_machine():
    assert 1e8 < _memory.available() <= _memory.most()
    assert _memory.most() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
