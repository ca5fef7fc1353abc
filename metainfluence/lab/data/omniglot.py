"""Omniglot: handwritten characters of many alphabets, 20 drawings of each (Lake et al., Science 2015)."""

import os
from typing import NamedTuple

import numpy as np

from metainfluence.lab.data import _prepared as prepared
from metainfluence.lab.data.datasets import Dataset, check_pools

SIZE = 28


class Characters(NamedTuple):
    """A split of Omniglot.

    Attributes:
      images: float32 [N, size, size], ink 1 on 0, averaged down from 105 × 105 pixels.
      labels: int [N], the characters as TFDS numbers them.
      alphabets: int [N].
      names: character -> "<alphabet>_<number within it>".
      alphabet_names: names of all alphabets.
    """

    images: np.ndarray
    labels: np.ndarray
    alphabets: np.ndarray
    names: dict[int, str]
    alphabet_names: tuple[str, ...]


def characters(split: str, *, size: int = SIZE, root: str | os.PathLike[str] | None = None) -> Characters:
    """Read a split of the prepared dataset.

    Args:
      split: a TFDS split: "train", "test", "small1" or "small2".
      size: height and width of the images.
      root: folder of prepared datasets; None for `TFDS_DATA_DIR`.

    Raises:
      FileNotFoundError: the dataset is not prepared; the message gives the command that prepares it.
      ValueError: a split that is not prepared.
    """
    source = prepared.builder("omniglot", root)
    keys = ("label", "alphabet", "alphabet_char_id")
    paper, table = prepared.columns(source, split, keys, size=size, mode="L")
    alphabets = tuple(source.info.features["alphabet"].names)
    names = {
        int(label): f"{alphabets[alphabet]}_{number}"
        for label, alphabet, number in zip(*(table[key] for key in keys), strict=True)
    }
    return Characters(1 - paper, table["label"], table["alphabet"], names, alphabets)


def load(split: str = "small1") -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of `characters`."""
    read = characters(split)
    return read.images, read.labels


def dataset(*, size: int | None = None, root: str | os.PathLike[str] | None = None) -> Dataset:
    """The small background sets: small1 for training; for testing, the alphabets of small2 that are not in small1.

    Greek and Latin are in both, so all of small2 would test on characters seen in training.
    """
    size = SIZE if size is None else size
    train, test = (characters(split, size=size, root=root) for split in ("small1", "small2"))
    new = ~np.isin(test.alphabets, train.alphabets)
    return join(train, test._replace(images=test.images[new], labels=test.labels[new], alphabets=test.alphabets[new]))


def join(train: Characters, test: Characters) -> Dataset:
    """Combines two splits into one dataset with the pools "train" and "test".

    Raises:
      ValueError: alphabets that are in both; the message names them.
    """
    alphabets = np.concatenate([train.alphabets, test.alphabets])
    ids = np.arange(len(alphabets))
    pools = {"train": ids[: len(train.labels)], "test": ids[len(train.labels) :]}
    check_pools(alphabets, pools, [f"alphabet {name}" for name in train.alphabet_names], "alphabets")
    classes, labels = np.unique(np.concatenate([train.labels, test.labels]), return_inverse=True)
    names = {**train.names, **test.names}
    return Dataset(
        "omniglot",
        np.concatenate([train.images, test.images]),
        labels,
        tuple(names[int(label)] for label in classes),
        pools,
    )
