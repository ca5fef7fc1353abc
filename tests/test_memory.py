"""Memory that a process may use, read from fake file systems: control groups, nested and in containers."""

import os
import resource
from pathlib import Path

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
        ("0::/run.scope\n", {"run.scope/memory.max": "max", "run.scope/memory.high": 4_000_000_000}),
        ("0::/jobs/größe\n", {"jobs/größe/memory.max": 4_000_000_000}),
    ],
    ids=["v2", "v2 nested", "v2 scope", "v1 nested", "v1 in a container", "hybrid", "v2 high", "any name"],
)
def test_limits_of_control_groups_are_seen(group, files, tmp_path):
    root = system(tmp_path, group, files)
    assert _memory.available(root) == _memory.most(root) == 4e9


@pytest.mark.parametrize(
    ("mounts", "group", "files"),
    [
        # A job inside of a container that sees no more than its own groups, which the kernel names from outside.
        (
            "40 31 0:29 /docker/ab /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory",
            "4:memory:/docker/ab/job\n",
            {"memory/memory.limit_in_bytes": 9_000_000_000, "memory/job/memory.limit_in_bytes": 4_000_000_000},
        ),
        (
            "40 31 0:29 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate",
            "0::/docker/ab/job\n",
            {"memory.max": "max", "job/memory.max": 4_000_000_000},
        ),
        # Mounted elsewhere, and beside others.
        (
            (
                "39 31 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
                "40 31 0:29 / /sys/fs/cgroup/by\\040size rw master:2 - cgroup none rw,hugetlb,memory"
            ),
            "4:hugetlb,memory:/job\n3:cpu:/job\n",
            {"by size/job/memory.limit_in_bytes": 4_000_000_000, "memory/job/memory.limit_in_bytes": 1_000_000_000},
        ),
    ],
    ids=["v1 below a container's group", "v2 below a container's group", "another place"],
)
def test_groups_are_where_they_are_mounted(mounts, group, files, tmp_path):
    root = system(tmp_path, group, files)
    (root / "proc" / "self" / "mountinfo").write_text(f"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n{mounts}\n")
    assert _memory.available(root) == _memory.most(root) == 4e9


@pytest.mark.parametrize(("name", "measure"), [("Max address space", "VmSize"), ("Max data size", "VmData")])
def test_limits_of_the_process_itself_are_seen(name, measure, tmp_path):
    root = system(tmp_path, "0::/\n", {})
    told = "Limit                     Soft Limit           Hard Limit           Units     \n"
    for other in ("Max data size", "Max address space"):
        soft = "4000000000" if other == name else "unlimited "
        told += f"{other:<26}{soft}           unlimited            bytes     \n"
    (root / "proc" / "self" / "limits").write_text(told)
    assert _memory.available(root) == _memory.most(root) == 4e9
    (root / "proc" / "self" / "status").write_text(f"Name:\tpython\n{measure}:\t 1000000 kB\n")
    assert _memory.available(root) == 4e9 - 1.024e9
    assert _memory.most(root) == 4e9


def test_a_limit_in_force_is_seen():
    before = resource.getrlimit(resource.RLIMIT_AS)
    (mapped,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize:"))
    asked = 1024 * int(mapped.split()[1]) + GIB
    try:
        resource.setrlimit(resource.RLIMIT_AS, (asked, before[1]))
        assert _memory.available() <= GIB
        assert _memory.most() <= asked
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


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
    for name, content in {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(content))
    assert _memory.available(tmp_path) == _memory.most(tmp_path) == 2e9


def test_this_machine():
    assert 1e8 < _memory.available() <= _memory.most()
    assert _memory.most() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
