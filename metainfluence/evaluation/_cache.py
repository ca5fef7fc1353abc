"""Results of a long computation on disk, chunk by chunk: complete or absent, and never another computation's."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metainfluence._disk import read_manifest, replacing, write_manifest

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder that holds a manifest and one .npz file for each chunk."""

    folder: Path

    @staticmethod
    def open(folder: Path, parts: Mapping[str, str]) -> Cache:
        """Makes the folder, or checks that it belongs to the same computation.

        Args:
          folder: made with its parents where it is missing.
          parts: name -> fingerprint of everything that the results depend on.

        Raises:
          ValueError: the folder holds results of another computation, naming the parts that differ; or files but no
            manifest that can be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        if not path.exists():
            if any(folder.glob("chunk-*.npz")):
                raise ValueError(f"cache: expected a folder with {MANIFEST}, got {folder} with results but without it")
            write_manifest(path, parts)
            return Cache(folder)
        try:
            found = read_manifest(path)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"cache: expected a manifest in {path}, got a damaged file; remove the folder")
        names = [name for name in {**parts, **found} if found.get(name) != parts.get(name)]
        if names:
            raise ValueError(
                f"cache: expected a folder of the same computation, got {folder}, in which these differ: "
                f"{', '.join(names)}; name another folder"
            )
        return Cache(folder)

    def read(self, number: int, shapes: Sequence[Any]) -> list[np.ndarray] | None:
        """The arrays of one chunk; None where its file is missing, damaged, or not of these shapes and dtypes."""
        try:
            # A .npz file is a zip file, whose checksums are compared on reading. Opened here, since NumPy leaves a file
            # open that it cannot read.
            with self._path(number).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = [stored[f"arr_{k}"] for k in range(len(shapes))]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError):
            return None
        # Dtypes that NumPy does not know, such as bfloat16, come back as bytes.
        arrays = [a.view(s.dtype) if a.dtype.kind == "V" else a for a, s in zip(arrays, shapes, strict=True)]
        matching = all(a.shape == s.shape and a.dtype == s.dtype for a, s in zip(arrays, shapes, strict=True))
        return arrays if matching else None

    def write(self, number: int, arrays: Sequence[np.ndarray]) -> None:
        """Writes one chunk."""
        with replacing(self._path(number)) as temporary, temporary.open("wb") as file:
            np.savez(file, *arrays)

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.npz"
