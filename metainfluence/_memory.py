"""The host's memory that this process may use: what the kernel can give, and what limits on the process leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")

# Where nothing is known, as outside of Linux.
_DEFAULT = 2e9

# The first version of control groups has no word for "none", and writes the largest number of pages that it can count.
_NO_LIMIT = 2**60


class _Files(NamedTuple):
    """The names that one version of control groups uses: the file system, its usual mounts, limits, use and caches."""

    system: str
    mounts: tuple[str, ...]
    limits: tuple[str, ...]
    used: str
    cached: str


_V1 = _Files("cgroup", ("memory",), ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
# Above memory.high the kernel slows the group down until it has given memory back.
_V2 = _Files("cgroup2", ("", "unified"), ("memory.max", "memory.high"), "memory.current", "inactive_file")


def available(root: Path = _ROOT) -> float:
    """Bytes that may still be allocated: the least of what the kernel can give and what each limit leaves.

    Args:
      root: of the file system, for tests.
    """
    limits = [*_groups(root), *_process(root)]
    free = [*_kernel("MemAvailable", root), *(limit - used for limit, used in limits)]
    return max(min(free, default=_DEFAULT), 0.0)


def most(root: Path = _ROOT) -> float:
    """Bytes that this process could have if nothing else ran: the machine's, or the least limit.

    Args:
      root: of the file system, for tests.
    """
    limits = [*_groups(root), *_process(root)]
    return min([*_kernel("MemTotal", root), *(limit for limit, _ in limits)], default=_DEFAULT)


def _kernel(name: str, root: Path) -> list[float]:
    lines = _text(root / "proc" / "meminfo").splitlines()
    return [1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]


def _process(root: Path) -> Iterator[tuple[float, float]]:
    """(limit, bytes used) of the process itself, as set by `ulimit -v` and `ulimit -d`, and by queues through these."""
    limits = _text(root / "proc" / "self" / "limits").splitlines()
    status = _text(root / "proc" / "self" / "status").splitlines()
    for name, measure in (("Max address space", "VmSize"), ("Max data size", "VmData")):
        used = [1024.0 * int(line.split()[1]) for line in status if line.startswith(f"{measure}:")]
        for line in limits:
            soft = line.removeprefix(name).split()[:1]
            if line.startswith(name) and soft[0].isdigit():
                yield float(soft[0]), sum(used)


def _groups(root: Path) -> Iterator[tuple[float, float]]:
    """(limit, bytes used that cannot be taken back) of every control group with a limit that this process is in.

    A limit also holds for all groups below its own, so the limits above the process's group count too. Inside a
    container, the kernel may name the group by its path outside; only the part below the container's own group is
    mounted.
    """
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _V1 if controllers else _V2
        for top, mounted in _mounts(files, root):
            group = Path(name.lstrip("/"))
            group = group.relative_to(mounted) if group.is_relative_to(mounted) else group
            for folder in dict.fromkeys([top / group, *(top / parent for parent in group.parents)]):
                used, *limits = (_text(folder / file).strip() for file in (files.used, *files.limits))
                for limit in limits:
                    if limit.isdigit() and int(limit) < _NO_LIMIT:
                        taken = float(used) if used.isdigit() else 0.0
                        yield float(limit), max(taken - _cached(folder, files.cached), 0.0)


def _mounts(files: _Files, root: Path) -> list[tuple[Path, Path]]:
    """Where the groups of a version are mounted, each with the group that the mount shows."""
    found = []
    for line in _text(root / "proc" / "self" / "mountinfo").splitlines():
        # The number of optional fields before the dash differs.
        place, _, source = (part.split() for part in line.partition(" - "))
        if source[:1] == [files.system] and (files is _V2 or "memory" in source[-1].split(",")):
            group, top = (part.replace(r"\040", " ").lstrip("/") for part in place[3:5])
            found.append((root / top, Path(group)))
    return found or [(root / "sys" / "fs" / "cgroup" / mount, Path()) for mount in files.mounts]


def _cached(folder: Path, name: str) -> float:
    """Bytes of files that a group holds and would give back."""
    words = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    return sum(float(value) for key, value in words if key == name)


def _text(path: Path) -> str:
    """The content of a file; empty where it cannot be read."""
    try:
        # A group may have any name.
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
