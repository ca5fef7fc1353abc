"""A finite, identified list of N-way K-shot tasks over any array dataset, and damage that is recorded as ground truth.

A list of tasks holds ids only, so it is small, can be written down, and is the same on every machine; `materialize`
turns it into the arrays that the library scores. Damage is done to the list: every function returns a new one.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

import metainfluence as mi

CLEAN, FLIPPED, SHORTCUT = "clean", "flipped labels", "shortcut"
DIM = 0.15  # what a shortcut task leaves of its images' brightness


class FewShotTasks(NamedTuple):
    """T identified tasks; task k is row k. Example ids index into the dataset.

    Labels are ways (0 … ways - 1), as the learner sees them: after any flip.
    """

    classes: np.ndarray  # int [T, ways]: the dataset's class behind each way
    support_ids: np.ndarray  # int [T, n_support]
    support_labels: np.ndarray  # int [T, n_support]
    query_ids: np.ndarray  # int [T, n_query]
    query_labels: np.ndarray  # int [T, n_query]
    query_flipped: np.ndarray  # bool [T, n_query]: ground truth, which query labels were replaced
    shortcut: np.ndarray  # bool [T]: ground truth, which tasks teach the shortcut


class Batch(NamedTuple):
    """Labelled images, the leaves of a task's support or query set: images [..., n, *image], labels [..., n]."""

    images: jnp.ndarray
    labels: jnp.ndarray


def sample_tasks(
    labels: np.ndarray,
    *,
    num_tasks: int,
    ways: int,
    shots: int,
    queries: int,
    seed: int,
    pool: np.ndarray | None = None,
) -> FewShotTasks:
    """Sample tasks whose support and query sets share no example.

    Task k draws from a generator seeded with (seed, k), so it is the same whatever the number of tasks.

    Args:
      labels: int [N], the dataset's classes.
      num_tasks: T.
      ways: classes per task.
      shots: support examples per class.
      queries: query examples per class.
      seed: of the whole list.
      pool: int [M], the ids that may be used (so also which classes may); None means all.

    Returns:
      The tasks, undamaged, examples ordered by way.

    Raises:
      ValueError: if the pool has fewer classes than `ways`, or a class fewer than `shots + queries` examples.
    """
    labels = np.asarray(labels)
    pool = np.arange(len(labels)) if pool is None else np.asarray(pool)
    members = {int(c): pool[labels[pool] == c] for c in np.unique(labels[pool])}
    if len(members) < ways:
        raise ValueError(f"ways: expected at most {len(members)}, the number of classes in the pool, got {ways}")
    for name, ids in members.items():
        if len(ids) < shots + queries:
            raise ValueError(
                f"shots + queries: expected at most {len(ids)}, the examples of class {name}, got {shots + queries}"
            )
    classes, ids = [], []
    for k in range(num_tasks):
        rng = np.random.default_rng([seed, k])
        chosen = rng.choice(np.array(list(members)), size=ways, replace=False)
        classes.append(chosen)
        ids.append([rng.choice(members[int(c)], size=shots + queries, replace=False) for c in chosen])
    drawn = np.reshape(ids, (num_tasks, ways, shots + queries))
    way = np.arange(ways)
    return FewShotTasks(
        classes=np.reshape(classes, (num_tasks, ways)),
        support_ids=drawn[:, :, :shots].reshape(num_tasks, -1),
        support_labels=np.tile(np.repeat(way, shots), (num_tasks, 1)),
        query_ids=drawn[:, :, shots:].reshape(num_tasks, -1),
        query_labels=np.tile(np.repeat(way, queries), (num_tasks, 1)),
        query_flipped=np.zeros((num_tasks, ways * queries), bool),
        shortcut=np.zeros(num_tasks, bool),
    )


def flip_labels(tasks: FewShotTasks, index: ArrayLike, *, share: float, seed: int) -> FewShotTasks:
    """Replace a share of the query labels of the tasks in `index` by another way's label, drawn uniformly.

    Args:
      tasks: the list to damage; it is left as it is.
      index: the tasks to damage.
      share: of each such task's query labels, between 0 and 1.
      seed: of the choice of examples and of the new labels; one generator per (seed, task).
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    labels, flipped = tasks.query_labels.copy(), tasks.query_flipped.copy()
    ways = tasks.classes.shape[1]
    for k in np.asarray(index, int).tolist():
        rng = np.random.default_rng([seed, k])
        chosen = rng.choice(labels.shape[1], size=round(share * labels.shape[1]), replace=False)
        labels[k, chosen] = (labels[k, chosen] + rng.integers(1, ways, size=len(chosen))) % ways
        flipped[k, chosen] = True
    return tasks._replace(query_labels=labels, query_flipped=flipped)


def add_shortcut(tasks: FewShotTasks, index: ArrayLike) -> FewShotTasks:
    """Make the tasks in `index` teach a shortcut: images dimmed, the label painted into one pixel of the top row."""
    shortcut = tasks.shortcut.copy()
    shortcut[np.asarray(index, int)] = True
    return tasks._replace(shortcut=shortcut)


def harm(tasks: FewShotTasks) -> np.ndarray:
    """The ground truth, [T] strings: CLEAN, FLIPPED or SHORTCUT (a task with both counts as FLIPPED)."""
    return np.where(tasks.query_flipped.any(axis=1), FLIPPED, np.where(tasks.shortcut, SHORTCUT, CLEAN))


def materialize(tasks: FewShotTasks, images: np.ndarray) -> mi.Task:
    """Look the examples up and apply the recorded damage.

    Args:
      tasks: T tasks.
      images: float [N, H, W], [N, H, W, C], or flat [N, H * W] in row-major order; brightness in [0, 1].

    Returns:
      Stacked tasks: support and query are `Batch`es with images [T, n, H, W, ...] (or [T, n, H * W]), labels [T, n].
    """
    images = np.asarray(images)
    ways, width = tasks.classes.shape[1], images.shape[-1] if images.ndim == 2 else images.shape[2]
    if tasks.shortcut.any() and ways > width:
        raise ValueError(f"images: a shortcut for {ways} ways needs a top row of as many pixels, got {width}")

    def batch(ids, labels):
        looked_up = images[ids]
        painted = DIM * looked_up[tasks.shortcut]
        task, example = np.indices(painted.shape[:2])
        column = labels[tasks.shortcut]
        painted[(task, example, column) if images.ndim == 2 else (task, example, 0, column)] = 1.0
        looked_up[tasks.shortcut] = painted
        return Batch(jnp.asarray(looked_up, jnp.result_type(float)), jnp.asarray(labels))

    support = batch(tasks.support_ids, tasks.support_labels)
    query = batch(tasks.query_ids, tasks.query_labels)
    return mi.Task(support, query, None, None)
