"""Image datasets with pools of example ids for meta-training and meta-testing, and checks that pools do not leak.

A few-shot dataset is split by class: training tasks and test tasks share no class. A dataset of only ten classes, such
as digits, is split by example: all pools hold all classes but share no example.
"""

import difflib
import importlib
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from metainfluence import _memory
from metainfluence.lab.data._images import decode_file, image_files

# name -> the module whose `dataset` reads it; only the requested module is imported, with the packages that it needs.
LOADERS = {
    "digits": "metainfluence.lab.data.digits",
    "mnist": "metainfluence.lab.data.mnist",
    "omniglot": "metainfluence.lab.data.omniglot",
    "cifar_fs": "metainfluence.lab.data.cifar_fs",
    "fc100": "metainfluence.lab.data.fc100",
    "mini_imagenet": "metainfluence.lab.data.mini_imagenet",
}

MESH_CELLS = 4  # across the image, along which with_distortions bends it


class Dataset(NamedTuple):
    """Labelled images.

    Attributes:
      name: name of the dataset.
      images: float32 [N, H, W], or [N, H, W, C] in colour, in [0, 1].
      labels: int64 [N], indices of `class_names`.
      class_names: one per class.
      pools: split -> ids of its examples, int64 [M], ascending; "train", "test" and, if there is one, "val".
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    pools: Mapping[str, np.ndarray]


def load(name: str, *, size: int | None = None, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Load a dataset by its name.

    Args:
      name: a key of `LOADERS`, or a folder, which `image_folder` reads in colour.
      size: height and width of the images; None for the dataset's own; a folder has none.
      root: folder with the data; None for the one in the dataset's environment variable: TFDS_DATA_DIR for omniglot,
        mnist, cifar_fs and fc100, METAINFLUENCE_MINI_IMAGENET for mini_imagenet. Digits come with scikit-learn.

    Raises:
      ValueError: an unknown name, a size that is not a positive integer, a folder without a size, or unexpected data.
      FileNotFoundError: the data is missing; the message says how to get it.
    """
    if name not in LOADERS:
        if is_folder(name):
            if size is None:
                raise ValueError(
                    f"size: expected the height and width that images of the folder {name} are to have, got None"
                )
            return image_folder(name, size=size)
        nearest = difflib.get_close_matches(str(name), LOADERS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"name: expected one of {', '.join(LOADERS)}, got {name!r}; nearest is {nearest!r}, and a folder of images "
            "is named by its path"
        )
    if size is not None:
        check_size(size)
    return importlib.import_module(LOADERS[name]).dataset(size=size, root=root)


def is_folder(name: str) -> bool:
    """Whether a dataset's name means a folder: no key of `LOADERS`, but a path of several parts or one that exists."""
    return name not in LOADERS and (os.sep in name or Path(name).is_dir())


def check_size(size: int) -> None:
    """Raises ValueError unless `size` is a positive integer."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size: expected None or a positive integer, got {size!r}")


def check_pools(
    groups: np.ndarray, pools: Mapping[str, np.ndarray], names: Sequence[str], kind: str = "classes"
) -> None:
    """Raises ValueError, naming what is shared, if two pools have examples of the same group.

    Args:
      groups: int [N], the group of every example: its class, its alphabet, or the example itself.
      pools: split -> ids.
      names: names of the groups.
      kind: what the groups are, for the message.
    """
    splits = list(pools)
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            shared = np.intersect1d(groups[pools[first]], groups[pools[second]])
            if len(shared):
                listed = ", ".join(str(names[group]) for group in shared[:10]) + (", …" if len(shared) > 10 else "")
                raise ValueError(
                    f"pools: expected {first!r} and {second!r} to share no {kind}, got {len(shared)} in both: {listed}"
                )


def by_class(
    labels: np.ndarray, class_names: Sequence[str], splits: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Pools of all examples of the named classes.

    Args:
      labels: int [N].
      class_names: names of the labels.
      splits: split -> its classes' names.

    Raises:
      ValueError: a name that is not a class, or a class in two splits.
    """
    index = {name: label for label, name in enumerate(class_names)}
    unknown = [name for names in splits.values() for name in names if name not in index]
    if unknown:
        raise ValueError(f"splits: expected names of classes, got {', '.join(unknown)}")
    pools = {split: np.flatnonzero(np.isin(labels, [index[name] for name in names])) for split, names in splits.items()}
    check_pools(labels, pools, class_names)
    return pools


def by_example(labels: np.ndarray, *, test_share: float = 0.5, seed: int = 0) -> dict[str, np.ndarray]:
    """Pools "train" and "test" that both hold all classes and share no example."""
    from sklearn.model_selection import train_test_split

    ids = np.arange(len(labels))
    train, test = train_test_split(ids, test_size=test_share, stratify=labels, random_state=seed)
    return {"train": np.sort(train), "test": np.sort(test)}


def with_rotations(dataset: Dataset, splits: Sequence[str] = ("train",)) -> Dataset:
    """Adds the images of some splits, turned by 90°, 180° and 270°, as additional classes.

    The usual augmentation for Omniglot (Santoro et al., ICML 2016): a turned character is another character.

    Args:
      dataset: with square images, split by class.
      splits: splits that get additional classes; others are unchanged.

    Raises:
      ValueError: an unknown split, images that are not square, or pools that share classes.
    """
    for split in splits:
        check_split(dataset, split)
    height, width = dataset.images.shape[1:3]
    if height != width:
        raise ValueError(f"dataset: expected square images, got {height} x {width}")
    turned = {
        f"turned {90 * turns}°": lambda images, turns=turns: np.rot90(images, turns, axes=(1, 2)) for turns in (1, 2, 3)
    }
    return _with_classes(dataset, splits, turned)


def with_mirrors(dataset: Dataset, splits: Sequence[str] = ("train",)) -> Dataset:
    """Adds the images of some splits, mirrored left to right, as additional classes; not meant for photographs.

    Args:
      dataset: split by class.
      splits: splits that get additional classes; others are unchanged.

    Raises:
      ValueError: an unknown split, or pools that share classes.
    """
    for split in splits:
        check_split(dataset, split)
    return _with_classes(dataset, splits, {"mirrored": lambda images: images[:, :, ::-1]})


def _with_classes(
    dataset: Dataset, splits: Sequence[str], changes: Mapping[str, Callable[[np.ndarray], np.ndarray]]
) -> Dataset:
    """Adds all classes of some splits, changed in each of several ways, as new classes named after the change."""
    check_pools(dataset.labels, dataset.pools, dataset.class_names)
    images, labels, names = [dataset.images], [dataset.labels], list(dataset.class_names)
    pools, count = dict(dataset.pools), len(dataset.labels)
    for split in splits:
        ids = dataset.pools[split]
        classes, local = np.unique(dataset.labels[ids], return_inverse=True)
        for name, change in changes.items():
            images.append(change(dataset.images[ids]))
            labels.append(len(names) + local)
            names += [f"{dataset.class_names[label]} {name}" for label in classes]
            pools[split] = np.concatenate([pools[split], count + np.arange(len(ids))])
            count += len(ids)
    return Dataset(dataset.name, np.concatenate(images), np.concatenate(labels), tuple(names), pools)


def with_distortions(dataset: Dataset, split: str = "train", *, copies: int = 4, seed: int = 0) -> Dataset:
    """Adds distorted copies of a split's images as additional examples of their classes.

    Each copy is randomly turned by up to 15°, sheared by up to 0.2, scaled by 0.85 to 1.15 and moved by up to a tenth
    of the image. It is also bent, by moving the knots of a 4 × 4 mesh by up to a twentieth. Uncovered areas are black.
    Handwriting varies in these ways, so classes are preserved.

    Args:
      dataset: grey images, with bright ink on black.
      split: the split whose images are copied.
      copies: copies of each image.
      seed: seed of the distortions; one generator per (seed, image).

    Raises:
      ValueError: an unknown split, or images in colour.
    """
    check_split(dataset, split)
    if dataset.images.ndim != 3:
        raise ValueError(f"dataset: expected images in grey, [N, H, W], got shape {dataset.images.shape}")
    ids = dataset.pools[split]
    height, width = dataset.images.shape[1:]
    added = np.empty((len(ids), copies, height, width), np.float32)
    for row, k in enumerate(ids.tolist()):
        rng = np.random.default_rng([seed, k])
        picture = Image.fromarray(np.ascontiguousarray(dataset.images[k]))
        for copy in range(copies):
            mesh = _random_mesh(rng, width, height)
            moved = picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
            added[row, copy] = np.asarray(moved)
    count = len(dataset.labels)
    pool = np.concatenate([ids, count + np.arange(len(ids) * copies)])
    return dataset._replace(
        images=np.concatenate([dataset.images, added.reshape(-1, height, width)]),
        labels=np.concatenate([dataset.labels, np.repeat(dataset.labels[ids], copies)]),
        pools={**dataset.pools, split: pool},
    )


def with_crops(
    dataset: Dataset, split: str = "train", *, copies: int = 4, size: int | None = None, seed: int = 0
) -> Dataset:
    """Adds parts of a split's images as additional examples of their classes.

    Each copy shows a window of half to all of the image's area, with aspect ratio 3:4 to 4:3, stretched to the image's
    shape and mirrored at random. Photographs vary in these ways, so classes are preserved.

    Args:
      dataset: square images, read larger than `size`, so that the parts are sharp.
      split: the split whose images are copied.
      copies: copies of each image.
      size: height and width of all images of the result; None keeps the present ones.
      seed: seed of the windows; one generator per (seed, image).

    Raises:
      ValueError: an unknown split, or images that are not square.
    """
    check_split(dataset, split)
    height, width = dataset.images.shape[1:3]
    if height != width:
        raise ValueError(f"dataset: expected square images, got {height} x {width}")
    size = height if size is None else size
    ids = dataset.pools[split]
    added = np.empty((len(ids), copies, size, size, *dataset.images.shape[3:]), np.float32)
    for row, k in enumerate(ids.tolist()):
        rng = np.random.default_rng([seed, k])
        image = dataset.images[k] if dataset.images.ndim == 4 else dataset.images[k][..., None]
        planes = [Image.fromarray(np.ascontiguousarray(image[..., c], np.float32)) for c in range(image.shape[-1])]
        for copy in range(copies):
            box = _random_window(rng, height)
            parts = [plane.resize((size, size), Image.Resampling.BILINEAR, box=box) for plane in planes]
            part = np.stack([np.asarray(each) for each in parts], axis=-1)
            part = part[:, ::-1] if rng.random() < 0.5 else part
            added[row, copy] = part.reshape(added.shape[2:])
    count = len(dataset.labels)
    pool = np.concatenate([ids, count + np.arange(len(ids) * copies)])
    return dataset._replace(
        images=np.concatenate([resized(dataset.images, size), added.reshape(-1, *added.shape[2:])]),
        labels=np.concatenate([dataset.labels, np.repeat(dataset.labels[ids], copies)]),
        pools={**dataset.pools, split: pool},
    )


def _random_window(rng: np.random.Generator, length: int) -> tuple[float, float, float, float]:
    """A random part of a square image: left, top, right and bottom."""
    area, ratio = rng.uniform(0.5, 1), np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
    width, height = (min(1.0, np.sqrt(area * by)) * length for by in (ratio, 1 / ratio))
    left, top = rng.uniform(0, length - width), rng.uniform(0, length - height)
    return float(left), float(top), float(left + width), float(top + height)


def _random_mesh(rng: np.random.Generator, width: int, height: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Cells of the copy, and the image corners that each is drawn from, in Pillow's format."""
    angle, shear, scale = rng.uniform([-np.pi / 12, -0.2, 0.85], [np.pi / 12, 0.2, 1.15])
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) / scale
    columns, rows = (np.linspace(0, length, MESH_CELLS + 1).round().astype(int) for length in (width, height))
    knots = np.stack(np.meshgrid(columns, rows, indexing="ij"), axis=-1)
    size = np.array([width, height])
    moved = (knots - size * (0.5 + rng.uniform(-0.1, 0.1, size=2))) @ matrix.T + size / 2
    moved += rng.uniform(-0.05, 0.05, size=moved.shape) * size
    cells = [(i, j) for i in range(MESH_CELLS) for j in range(MESH_CELLS)]
    return [
        (
            (int(columns[i]), int(rows[j]), int(columns[i + 1]), int(rows[j + 1])),
            (
                *moved[i, j].tolist(),
                *moved[i, j + 1].tolist(),
                *moved[i + 1, j + 1].tolist(),
                *moved[i + 1, j].tolist(),
            ),
        )
        for i, j in cells
    ]


def add_foreign(dataset: Dataset, other: Dataset) -> Dataset:
    """Adds another dataset's examples, for tasks from the wrong domain.

    Args:
      dataset: its image shape and pools are kept.
      other: its images are resized, and converted to grey or colour, to fit.

    Returns:
      A dataset with the pools of both, those of `other` under "<its name>/<split>".
    """
    images = resized(other.images, dataset.images.shape[1])
    if images.ndim == 4 and dataset.images.ndim == 3:
        images = images.mean(axis=-1, dtype=np.float32)
    elif images.ndim == 3 and dataset.images.ndim == 4:
        images = np.repeat(images[..., None], dataset.images.shape[-1], axis=-1)
    if images.shape[1:] != dataset.images.shape[1:]:
        raise ValueError(f"other: expected images of shape {dataset.images.shape[1:]}, got {images.shape[1:]}")
    foreign = {f"{other.name}/{split}": len(dataset.labels) + ids for split, ids in other.pools.items()}
    return Dataset(
        dataset.name,
        np.concatenate([dataset.images, images]),
        np.concatenate([dataset.labels, len(dataset.class_names) + other.labels]),
        (*dataset.class_names, *(f"{other.name}/{name}" for name in other.class_names)),
        {**dataset.pools, **foreign},
    )


def check_split(dataset: Dataset, split: str) -> None:
    """Raises ValueError unless the dataset has the split."""
    if split not in dataset.pools:
        raise ValueError(f"split: expected one of {', '.join(dataset.pools)} of {dataset.name}, got {split!r}")


def resized(images: np.ndarray, size: int | None) -> np.ndarray:
    """Images [N, H, W] or [N, H, W, C] as [N, size, size, …], averaged down or interpolated up; None: unchanged."""
    if size is None or images.shape[1:3] == (size, size):
        return images
    check_size(size)
    method = Image.Resampling.BOX if size < min(images.shape[1:3]) else Image.Resampling.BILINEAR
    channels = images[..., None] if images.ndim == 3 else images
    result = np.empty((len(images), size, size, channels.shape[-1]), np.float32)
    for k, image in enumerate(channels):
        for c in range(channels.shape[-1]):
            plane = Image.fromarray(np.ascontiguousarray(image[..., c], np.float32))
            result[k, ..., c] = np.asarray(plane.resize((size, size), method))
    return result[..., 0] if images.ndim == 3 else result


def image_folder(path: str | os.PathLike[str], *, size: int, color: bool = True, name: str | None = None) -> Dataset:
    """Reads any folder of images laid out as split/class/image.jpg (or .png).

    Images are decoded into memory once, in the order of their names. Nothing is written to disk.

    Args:
      path: the folder; its subfolders are the splits.
      size: height and width that images are resized to.
      color: three channels; otherwise one, in grey.
      name: name of the dataset; None for the folder's.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a file that is not a readable image, or a transparent or animated image; a link that leads out of the
        folder; a class or a file in two splits; a folder without splits, classes or images; images that would not fit
        into this machine's memory.
    """
    check_size(size)
    root = Path(path)
    files, splits = image_files(root)
    class_names = tuple(sorted({file.parent.name for file in files}))
    index = {name: label for label, name in enumerate(class_names)}
    shape = (len(files), size, size, 3) if color else (len(files), size, size)
    check_memory(shape)
    labels = np.array([index[file.parent.name] for file in files])
    pools = {split: np.flatnonzero(np.array([file.parent.parent.name == split for file in files])) for split in splits}
    check_pools(labels, pools, class_names)
    # An accented letter is one character or two, depending on the system that named the folder.
    spelt, groups = np.unique([unicodedata.normalize("NFC", name) for name in class_names], return_inverse=True)
    check_pools(groups[labels], pools, spelt.tolist())
    targets, groups = np.unique([os.path.realpath(file) for file in files], return_inverse=True)
    check_pools(groups, pools, targets.tolist(), "files")
    images = np.empty(shape, np.float32)
    for k, file in enumerate(files):
        images[k] = decode_file(file, size=size, mode="RGB" if color else "L")
    return Dataset(name or root.resolve().name, images, labels, class_names, pools)


def check_memory(shape: Sequence[int]) -> None:
    """Raises ValueError if float32 images of this shape exceed the memory of the machine, or of its job."""
    needed = 4 * int(np.prod(shape, dtype=object))
    available = _memory.most()
    if needed > available:
        raise ValueError(
            f"size: expected images that fit into {available / 2**30:.1f} GiB of memory, got {shape[0]} of "
            f"{shape[1]} x {shape[2]}, which take {needed / 2**30:.1f} GiB; choose a smaller size"
        )
