"""Meta-parameters in a file that any tool can read: an .npz of plain arrays, one per leaf, named by its path."""

import io
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metainfluence._disk import write_atomically

ROOT = "meta_params"


def _named(meta_params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(meta_params)
    return {ROOT + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def save(path: Path, meta_params: Any) -> None:
    """Writes meta-parameters; reading them needs no pickle."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(leaf) for name, leaf in _named(meta_params).items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load(path: Path, like: Any) -> Any:
    """Reads what `save` wrote.

    Args:
      path: the file.
      like: meta-parameters of the same structure, shapes and dtypes, or their shapes.

    Raises:
      ValueError: the file is not of this kind, or holds other meta-parameters.
      FileNotFoundError: there is no such file.
    """
    expected = _named(like)
    try:
        with np.load(path, allow_pickle=False) as archive:
            if set(archive.files) != set(expected):
                raise ValueError(f"arrays {', '.join(sorted(archive.files))}")
            found = {name: archive[name] for name in expected}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected a file of meta-parameters, and there is none") from error
    # NumPy reports a file that is no archive as an error about pickles, which says nothing here.
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected meta-parameters {', '.join(expected)} in an .npz without pickles, got {error}"
        ) from error
    for name, leaf in expected.items():
        if (found[name].shape, found[name].dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"{path}: expected {name} of shape {leaf.shape} and dtype {leaf.dtype}, "
                f"got {found[name].shape} and {found[name].dtype}"
            )
    arrays = [jax.numpy.asarray(found[name]) for name in expected]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)
