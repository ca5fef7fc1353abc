"""What a run is about, as far as its result depends on it, in a form that can be compared and put into words."""

from __future__ import annotations

import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def library() -> str:
    """Version of this library and digest of its code, the lab's left out."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] != "lab":
            digest.update(path.read_bytes())
    try:
        version = metadata.version("metainfluence")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return f"{version} {digest.hexdigest()[:16]}"


def of_arrays(tree: PyTree) -> str:
    """Digest of a pytree's structure, shapes, dtypes and values."""
    digest = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        key = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if key else leaf)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def of_texts(texts: Iterable[str]) -> str:
    """Digest of some texts and their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def of_function(fn: Callable[..., Any], *args: Any) -> str:
    """Digest of what a function computes: its jaxpr at some arguments, and the values of the constants in it."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    digest = hashlib.sha256(_ADDRESS.sub("", str(jaxpr.jaxpr)).encode())
    digest.update(of_arrays([np.asarray(constant) for constant in jaxpr.consts]).encode())
    return digest.hexdigest()[:16]


def of_closure(value: Any) -> Any:
    """What a strategy was made with: the numbers, names and functions in its functions' closures, as JSON."""
    return _described(value, frozenset())


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
            "code": hashlib.sha256(value.__code__.co_code).hexdigest()[:8],
            **{name: inside(cell.cell_contents) for name, cell in zip(names, cells, strict=True)},
        }
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: inside(item) for name, item in zip(value._fields, value, strict=True)}
    if isinstance(value, (list, tuple)):
        return [inside(item) for item in value]
    if isinstance(value, dict):
        return {str(name): inside(item) for name, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return of_arrays(value)
    return type(value).__qualname__


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
