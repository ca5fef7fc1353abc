"""Parts of an experiment on disk, so that an interrupted one continues where it stopped."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metainfluence._disk import write_atomically

Make = Callable[[], dict[str, Any]]


class Kept:
    """Named arrays that are made once and then read.

    The folder belongs to one configuration and one version of the code, which `results.claim` ensures.

    Args:
      folder: folder of the files; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder

    def __call__(self, name: str, make: Make) -> dict[str, np.ndarray]:
        """The arrays that `make` returns, or returned when this name was first used."""
        path = None if self._folder is None else self._folder / f"{name}.npz"
        if path is not None and path.exists():
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        found = {key: np.asarray(value) for key, value in make().items()}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **found)
            write_atomically(path, buffer.getvalue())
        return found

    def tree(self, name: str, make: Callable[[], tuple[Any, float]], like: Any) -> tuple[Any, float]:
        """The same for a pytree with the structure of `like`, and the seconds that making it took."""

        def arrays() -> dict[str, Any]:
            tree, seconds = make()
            return {"seconds": seconds} | {f"leaf {k}": leaf for k, leaf in enumerate(jax.tree.leaves(tree))}

        found = self(name, arrays)
        leaves = [jnp.asarray(found[f"leaf {k}"]) for k in range(len(found) - 1)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), float(found["seconds"])

    def below(self, name: str) -> "Kept":
        """The store in a subfolder."""
        return Kept(None if self._folder is None else self._folder / name)
