"""Shows single examples on a page: a small picture, or a line of text."""

import base64
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from metainfluence.lab.data.places import Place
from metainfluence.scoring import Source

LARGEST = 64  # pixels of a picture's longer side
FEW = 4  # numbers of a leaf that are written out
SLACK = 0.01  # above 1 and below 0, for rounding and interpolation
QUALITY = 80  # of photographs, which take ten times the bytes as PNG


class Shown(NamedTuple):
    """One example: a picture as a data URI, or a text; None if missing."""

    picture: str | None = None
    text: str | None = None


def gallery(
    source: Source,
    place: Callable[[int], Place],
    *,
    images: Callable[[Any], Any] | None = None,
    text: Callable[[Any], Sequence[str]] | None = None,
) -> Callable[[int], Shown]:
    """Makes (row of a score file about an example) -> the example.

    Args:
      source: the tasks.
      place: (row) -> the place of its datum in the source.
      images: (a task's support or query) -> [n, H, W] or [n, H, W, C] from 0 to 1; None for data other than images.
      text: (a task's support or query) -> a string for each example; None for the contents of its short leaves.

    Raises:
      ValueError: when called, for images of an invalid shape, or if there is not exactly one text per example.
    """

    @functools.lru_cache(maxsize=8)
    def side_of(task: int, side: str) -> tuple[Callable[[int], Shown], int]:
        single = source[task]
        mask, data = getattr(single, f"{side}_mask"), getattr(single, side)
        size = len(jax.tree.leaves(data)[0])
        real = np.flatnonzero(np.ones(size, bool) if mask is None else np.asarray(mask))
        if images is not None:
            pixels = checked(images(data))
            return lambda k: Shown(picture=data_uri(pixels[real[k]])), len(real)
        lines = described(data, size) if text is None else list(text(data))
        if len(lines) != size:
            raise ValueError(f"text: expected a string for each of {size} {side} examples, got {len(lines)}")
        return lambda k: Shown(text=None if lines[real[k]] is None else str(lines[real[k]])), len(real)

    def shown(row: int) -> Shown:
        task, side, example = place(row)
        if side is None or example is None:
            return Shown()
        find, size = side_of(task, side)
        if example >= size:
            raise ValueError(f"scores: expected {size} {side} examples in task {task}, got more")
        return find(example)

    return shown


def checked(images: Any) -> np.ndarray:
    """Images as an array of values from 0 to 1.

    Raises:
      ValueError: their shape is not that of pictures, or their values are not brightness.
    """
    found = np.asarray(images)
    if found.ndim not in (3, 4) or (found.ndim == 4 and found.shape[-1] not in (1, 3)):
        raise ValueError(f"images: expected [n, H, W] or [n, H, W, 3], got shape {found.shape}")
    if found.dtype == np.uint8:
        return found / np.float32(255)
    low, high = (float(end(found, initial=0.0, where=np.isfinite(found))) for end in (np.min, np.max))
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(
            f"images: expected values from 0 to 1, or uint8, got some from {low:.3g} to {high:.3g}; scale them back to "
            "what they were before they were normalised"
        )
    return found


def data_uri(pixels: np.ndarray) -> str:
    """A picture of at most `LARGEST` pixels a side: small ones and drawings unchanged, photographs as JPEG."""
    levels = np.clip(np.nan_to_num(pixels) * 255, 0, 255).round().astype(np.uint8)
    picture = Image.fromarray(levels[..., 0] if levels.ndim == 3 and levels.shape[-1] == 1 else levels)
    large = max(picture.size) > LARGEST
    if large:
        picture.thumbnail((LARGEST, LARGEST))
    buffer, kind = io.BytesIO(), "JPEG" if large and picture.mode == "RGB" else "PNG"
    picture.save(buffer, kind, **({"quality": QUALITY} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def described(data: Any, size: int) -> list[str | None]:
    """Each example as the numbers of its short leaves, as in "x 0.31, y -1.2"; None if no leaf is short."""
    leaves = [
        (jax.tree_util.keystr(path, simple=True, separator="."), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(data)
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    short = [(name, leaf.reshape(size, -1)) for name, leaf in leaves if leaf[:1].size <= FEW]
    if not short:
        return [None] * size
    return [
        ", ".join(f"{name} {' '.join(f'{number:.3g}' for number in leaf[k].tolist())}".strip() for name, leaf in short)
        for k in range(size)
    ]
