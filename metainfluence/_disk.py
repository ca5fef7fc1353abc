"""Writing to disk: complete files, a locked store of them, and what tells one run from another."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import inspect
import io
import json
import os
import re
import shutil
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

_NAME = re.compile(r"(?P<kind>[a-z_]+)-(?P<number>\d{8})-(?P<digest>[0-9a-f]{32})\.(?:npz|parquet|txt)")
_FOUND = b"+"
_MANIFEST = "manifest.json"
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent, even if the machine loses power."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another name to write to; that file becomes `path` at the end, or is removed if an exception is raised."""
    # A unique name, since not all who write have a lock.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist yet, the lowest first."""
    found = []
    while not folder.exists():
        found.append(folder)
        folder = folder.parent
    return found


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders one after the other, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def write_manifest(path: Path, parts: Mapping[str, Any]) -> None:
    """Writes what identifies a run."""
    write_atomically(path, json.dumps(dict(parts), indent=1).encode())


def read_manifest(path: Path) -> Any:
    """What identifies a run; None where there is no file.

    Raises:
      ValueError: the file is damaged.
    """
    return json.loads(path.read_bytes()) if path.exists() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Store:
    """Numbered files of several kinds in one folder.

    A file is written under another name and renamed, so that a process killed at any moment leaves only complete files;
    the digest in its name reveals later damage. Arrays are stored as .npz without pickles.

    Args:
      folder: made and locked by `opened`; None stores nothing.
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
        made = missing(folder)
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
                    # A run that ends before it has saved any progress leaves nothing, so that its arguments may be
                    # corrected.
                    if {path.name for path in folder.iterdir()} <= {"lock", _MANIFEST}:
                        shutil.rmtree(folder)
                        remove_empty(made[1:])
                    raise
                return
            finally:
                os.close(descriptor)

    def write(self, kind: str, number: int, content: bytes | Mapping[str, np.ndarray], suffix: str = "npz") -> None:
        """Writes one file in place of those of the same kind and number."""
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
        """Content of a file, or None where there is no undamaged one; a damaged one is removed."""
        here = self.read_here(kind, number)
        content = self._agree(b"" if here is None else _FOUND + here)
        return content[1:] if content else None

    def arrays(self, kind: str, number: int) -> dict[str, np.ndarray] | None:
        """Arrays of a file, or None where there is no undamaged one."""
        content = self.read(kind, number)
        if content is None:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return dict(archive)

    def latest(self, kind: str) -> tuple[int, dict[str, np.ndarray]] | None:
        """Number and arrays of the last undamaged file of a kind."""
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
        """What identifies the run; None where there is none, or where it was killed before it had saved anything."""
        folder = self.folder
        return self.shared(lambda: read_manifest(folder / _MANIFEST) if folder is not None and self._known else None)

    @manifest.setter
    def manifest(self, value: dict[str, Any]) -> None:
        if self.folder is not None:
            write_manifest(self.folder / _MANIFEST, value)

    def read_here(self, kind: str, number: int) -> bytes | None:
        """As `read`, but only for the process with the folder."""
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


def library() -> str:
    """Version of this library and digest of its code, the lab's left out."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] != "lab":
            digest.update(path.read_bytes())
    try:
        version = metadata.version("metainfluence")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version} {digest.hexdigest()[:16]}"


def of_arrays(*trees: Any) -> str:
    """Digest of the structure, shapes, dtypes and values of pytrees; None and numbers may be leaves."""
    digest = hashlib.sha256()
    leaves, structure = jax.tree.flatten(trees, is_leaf=lambda leaf: leaf is None)
    digest.update(str(structure).encode())
    for leaf in leaves:
        if leaf is None or isinstance(leaf, (bool, int, float)):
            digest.update(repr(leaf).encode())
            continue
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            digest.update(str(leaf.dtype).encode())
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def of_texts(texts: Iterable[str]) -> str:
    """Digest of some texts and their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def of_function(fn: Callable[..., Any], *args: Any) -> str:
    """Digest of what a function computes: its jaxpr at some arguments, and the values of the constants in it."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    digest = hashlib.sha256(_ADDRESS.sub("", str(jaxpr.jaxpr)).encode())
    digest.update(of_arrays([np.asarray(constant) for constant in jaxpr.consts]).encode())
    return digest.hexdigest()[:16]


def of_strategy(strategy: Any) -> Any:
    """A strategy's identity as JSON: the call that made it or, where that is not all, what its functions close over.

    Another Python gives the same for the same strategy: no bytecode is used.
    """
    call = getattr(strategy, "called", None)
    if call is not None and call.named and repr(strategy) == call.text:
        return call.text
    return {"call": repr(strategy), "functions": _described(strategy, frozenset())}


def _described(value: Any, above: frozenset[int]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if id(value) in above:
        return "…"
    inside = functools.partial(_described, above=above | {id(value)})
    if isinstance(value, functools.partial):
        return {"function": inside(value.func), "arguments": inside([*value.args, value.keywords])}
    if isinstance(value, types.FunctionType):
        names, cells = value.__code__.co_freevars, value.__closure__ or ()
        return {
            "name": value.__qualname__,
            "source": _source(value),
            **{name: inside(cell.cell_contents) for name, cell in zip(names, cells, strict=True)},
        }
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        call = getattr(value, "called", None)
        if above and call is not None and call.named and repr(value) == call.text:
            return call.text
        fields = zip(value._fields, value, strict=True)
        return {name: inside(item) for name, item in fields if name != "called"}
    if isinstance(value, (list, tuple)):
        return [inside(item) for item in value]
    if isinstance(value, dict):
        return {str(name): inside(item) for name, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return of_arrays(value)
    return type(value).__qualname__


def _source(function: types.FunctionType) -> str | None:
    """Digest of a function's text; None where there is none, and for this library's code, which has its own digest."""
    if (function.__module__ or "").partition(".")[0] == __name__.partition(".")[0]:
        return None
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return None
    return of_texts([inspect.cleandoc(text)])


def difference(ours: Any, theirs: Any) -> str | None:
    """The first difference of two manifests in words; None where there is none."""
    for name, expected, got in _differences("", ours, theirs):
        return f"{name}: this run has {expected!r}, that one {got!r}"
    return None


def _differences(name: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            yield from _differences(f"{name}.{key}" if name else key, ours.get(key), theirs.get(key))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for place, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(f"{name}[{place}]", mine, other)
    elif ours != theirs:
        yield name, ours, theirs
