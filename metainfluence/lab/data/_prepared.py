"""Reads datasets that tensorflow-datasets has prepared, without TensorFlow."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metainfluence.lab.data._images import decode


def builder(name: str, root: str | os.PathLike[str] | None = None) -> Any:
    """The newest prepared version of a TFDS dataset.

    Args:
      name: as TFDS calls it.
      root: folder of prepared datasets; None for `TFDS_DATA_DIR` or, if that is not set, `~/tensorflow_datasets`.

    Raises:
      FileNotFoundError: the dataset is not prepared; the message gives the command that prepares it.
    """
    import tensorflow_datasets as tfds

    folder = Path(root or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
    versions = [info.parent for info in folder.glob(f"{name}/*/dataset_info.json")]
    if not versions:
        raise FileNotFoundError(
            f"{name} is not prepared in {folder}, where TFDS_DATA_DIR (or its default) points. Prepare it once: "
            f"pip install 'metainfluence[data]' && tfds build {name} --file_format=array_record"
        )
    newest = max(versions, key=lambda version: [int(part) for part in version.name.split(".") if part.isdigit()])
    return tfds.builder_from_directory(newest)


def examples(source: Any, split: str) -> Iterator[dict[str, Any]]:
    """Iterates over a split's examples, with images as the bytes in the file.

    TFDS's own decoding depends on the installed packages: one-bit PNGs such as Omniglot's get the values 0 and 1
    without OpenCV, and 0 and 255 with it.

    Raises:
      ValueError: a split that is not prepared.
    """
    import tensorflow_datasets as tfds

    if split not in source.info.splits:
        raise ValueError(
            f"split: expected one of {', '.join(source.info.splits)}, which are prepared of {source.info.name}, "
            f"got {split!r}"
        )
    yield from source.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


def columns(
    source: Any, split: str, keys: Sequence[str], *, size: int | None, mode: str
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads a complete split.

    Args:
      source: a dataset from `builder`.
      split: a prepared split.
      keys: integer features to read besides the image.
      size: height and width of the images; None for their own.
      mode: "L" for grey or "RGB" for colour.

    Returns:
      images: float32 [N, size, size] or [N, size, size, 3] in [0, 1].
      features: key -> int64 [N].

    Raises:
      ValueError: a split that is not prepared, or an image that cannot be read or differs in shape from the first; the
        message gives its position.
    """
    images: list[np.ndarray] = []
    rows = []
    for k, example in enumerate(examples(source, split)):
        place = f"{source.info.name}, split {split}, example {k}"
        try:
            images.append(decode(example["image"], size=size, mode=mode))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if images[-1].shape != images[0].shape:
            first, got = images[0].shape, images[-1].shape
            raise ValueError(f"{place}: expected an image of shape {first} as the first has, got {got}; give a size")
        rows.append([int(example[key]) for key in keys])
    table = np.array(rows, np.int64).reshape(len(rows), len(keys))
    return np.stack(images), {key: table[:, column] for column, key in enumerate(keys)}
