"""The host's memory that this process may use: what the kernel can give, and what control groups leave of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")

# Where nothing is known, as outside of Linux.
_DEFAULT = 2e9


class _Files(NamedTuple):
    """How one version of control groups calls its files: where they are mounted, the limit, the use, and its caches."""

    mounts: tuple[str, ...]
    limit: str
    used: str
    cached: str


_V1 = _Files(("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files(("", "unified"), "memory.max", "memory.current", "inactive_file")


def available(root: Path = _ROOT) -> float:
    """Bytes that may still be allocated: the least of what the kernel can give and what each control group leaves.

    Args:
      root: of the file system, for tests.
    """
    free = [*_kernel("MemAvailable", root), *(limit - used for limit, used in _groups(root))]
    return max(min(free, default=_DEFAULT), 0.0)


def most(root: Path = _ROOT) -> float:
    """Bytes that this process could have if nothing else ran: the machine's, or the least limit of a control group.

    Args:
      root: of the file system, for tests.
    """
    return min([*_kernel("MemTotal", root), *(limit for limit, _ in _groups(root))], default=_DEFAULT)


def _kernel(name: str, root: Path) -> list[float]:
    lines = _text(root / "proc" / "meminfo").splitlines()
    return [1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]


def _groups(root: Path) -> Iterator[tuple[float, float]]:
    """(limit, bytes used that cannot be taken back) of every control group with a limit that this process is in.

    A limit holds for all groups below its own, so that those above the process's count, too. Inside of a container the
    kernel may name the group by its path outside, which is not mounted; the container's own group is then the mount.
    """
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _V1 if controllers else _V2
        for mount in files.mounts:
            top = root / "sys" / "fs" / "cgroup" / mount
            group = Path(name.lstrip("/"))
            for folder in (top / group, *(top / parent for parent in group.parents)):
                limit, used = (_text(folder / file).strip() for file in (files.limit, files.used))
                if limit.isdigit():
                    yield float(limit), max(float(used or 0) - _cached(folder, files.cached), 0.0)


def _cached(folder: Path, name: str) -> float:
    """Bytes of files that a group holds and would give back."""
    words = [line.split() for line in _text(folder / "memory.stat").splitlines()]
    return sum(float(value) for key, value in words if key == name)


def _text(path: Path) -> str:
    """The content of a file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
