"""What a run leaves on disk: files that are whole or not there, each with its checksum in its name, behind a lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metainfluence.files import write_atomically

_NAME = re.compile(r"(?P<kind>[a-z_]+)-(?P<number>\d{8})-(?P<digest>[0-9a-f]{32})\.(?:npz|parquet)")

_FOUND = b"+"


class Store:
    """Numbered files of several kinds in one folder.

    A file is written under another name and renamed, so that a process killed at any moment leaves whole files only;
    the digest in its name tells damage that came later. Arrays are kept as .npz without pickles.

    Args:
      folder: which `opened` has made and locked; None keeps nothing.
      agree: gives every process what the first one read, where several run in step and only that one has a folder.
    """

    def __init__(self, folder: Path | None, agree: Callable[[bytes], bytes] = lambda content: content):
        self.folder = folder
        self._agree = agree
        # The lock keeps others from changing what is there.
        self._known: dict[tuple[str, int], list[Path]] = {}
        for path in [] if folder is None else sorted(folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match:
                self._known.setdefault((match["kind"], int(match["number"])), []).append(path)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, agree: Callable[[bytes], bytes] = lambda content: content) -> Iterator[Store]:
        """A store whose folder is made and locked against every other process.

        Raises:
          OSError: the folder cannot be made or written to.
          BlockingIOError: another process holds it.
        """
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise BlockingIOError(f"out: another process is writing {folder}; wait until it ends") from error
                # The process that held it before may have removed the folder when it had finished.
                if not _is_at(descriptor, folder / "lock"):
                    continue
                for left in folder.glob("*.tmp"):
                    left.unlink()
                try:
                    yield cls(folder, agree)
                except BaseException:
                    # A run that was refused before it wrote anything leaves nothing.
                    if {path.name for path in folder.iterdir()} == {"lock"}:
                        shutil.rmtree(folder)
                    raise
                return
            finally:
                os.close(descriptor)

    def write(self, kind: str, number: int, content: bytes | Mapping[str, np.ndarray], suffix: str = "npz") -> None:
        """Writes one file in the place of those of the same kind and number."""
        if self.folder is None:
            return
        if not isinstance(content, bytes):
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **content)
            content = buffer.getvalue()
        path = self.folder / f"{kind}-{number:08d}-{_digest(content)}.{suffix}"
        write_atomically(path, content)
        for other in self._known.get((kind, number), []):
            if other != path:
                other.unlink()
        self._known[kind, number] = [path]

    def replace(self, kind: str, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes one file and then removes those of the same kind and lower numbers."""
        self.write(kind, number, arrays)
        for known, older in list(self._known):
            if known == kind and older < number:
                self._drop(kind, older)

    def numbers(self, kind: str) -> list[int]:
        """Numbers of the files of a kind, ascending."""
        found = sorted(number for known, number in self._known if known == kind)
        return json.loads(self._agree(json.dumps(found).encode()))

    def read(self, kind: str, number: int) -> bytes | None:
        """Content of a file, or None where there is none that is whole; a damaged one is removed."""
        here = self.read_here(kind, number)
        content = self._agree(b"" if here is None else _FOUND + here)
        return content[1:] if content else None

    def arrays(self, kind: str, number: int) -> dict[str, np.ndarray] | None:
        """Arrays of a file, or None where there is none that is whole."""
        content = self.read(kind, number)
        if content is None:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return dict(archive)

    def latest(self, kind: str) -> tuple[int, dict[str, np.ndarray]] | None:
        """Number and arrays of the last file of a kind that is whole."""
        for number in reversed(self.numbers(kind)):
            arrays = self.arrays(kind, number)
            if arrays is not None:
                return number, arrays
        return None

    def forget(self, kind: str) -> None:
        """Removes all files of a kind."""
        for known, number in list(self._known):
            if known == kind:
                self._drop(kind, number)

    def clear(self) -> None:
        """Removes all files but the lock."""
        if self.folder is not None:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
            self._known.clear()

    def shared(self, read: Callable[[], Any]) -> Any:
        """What the first process reads, which JSON can hold, on all processes."""
        return json.loads(self._agree(json.dumps(read() if self.folder is not None else None).encode()))

    def remove(self) -> None:
        """Removes the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder)

    @property
    def manifest(self) -> dict[str, Any] | None:
        """What the run is about, or None."""
        path = None if self.folder is None else self.folder / "manifest.json"
        return self.shared(lambda: json.loads(path.read_bytes()) if path is not None and path.exists() else None)

    @manifest.setter
    def manifest(self, value: dict[str, Any]) -> None:
        if self.folder is not None:
            write_atomically(self.folder / "manifest.json", json.dumps(value, indent=1).encode())

    def read_here(self, kind: str, number: int) -> bytes | None:
        """As `read`, for the process with the folder alone."""
        for path in self._known.get((kind, number), []):
            content = path.read_bytes()
            match = _NAME.fullmatch(path.name)
            assert match is not None
            if _digest(content) == match["digest"]:
                return content
        self._drop(kind, number)
        return None

    def _drop(self, kind: str, number: int) -> None:
        for path in self._known.pop((kind, number), []):
            path.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
