"""A finite list of identified N-way K-shot tasks over any array dataset, with damage recorded as ground truth.

A list of tasks holds only ids, so it is small, can be saved, and is the same on every machine. `materialize` turns it
into the arrays that the library scores. Functions that damage a list return a new list.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

import metainfluence as mi
from metainfluence.lab.data.datasets import Dataset, check_split

CLEAN, FLIPPED, SHORTCUT, NOISE, WRONG_DOMAIN = "clean", "flipped labels", "shortcut", "noise images", "wrong domain"
KINDS = (CLEAN, FLIPPED, SHORTCUT, NOISE, WRONG_DOMAIN)
DIM = 0.15  # the share of its images' brightness that a shortcut task keeps
NO_NOISE = -1


class FewShotTasks(NamedTuple):
    """T identified tasks; task k is row k. Example ids are indices into the dataset.

    Labels are ways (0 … ways - 1), as the learner sees them: after any flip. The last five fields are ground truth.
    """

    classes: np.ndarray  # int [T, ways]: the dataset's class behind each way
    support_ids: np.ndarray  # int [T, n_support]
    support_labels: np.ndarray  # int [T, n_support]
    query_ids: np.ndarray  # int [T, n_query]
    query_labels: np.ndarray  # int [T, n_query]
    support_flipped: np.ndarray  # bool [T, n_support]: which support labels were replaced
    query_flipped: np.ndarray  # bool [T, n_query]: which query labels were replaced
    shortcut: np.ndarray  # bool [T]: which tasks teach the shortcut
    noise_seed: np.ndarray  # int [T]: seed of the noise that replaces all the task's images; NO_NOISE for none
    wrong_domain: np.ndarray  # bool [T]: which tasks come from another dataset


class Batch(NamedTuple):
    """Labelled images, the leaves of a task's support or query set: images [..., n, *image], labels [..., n]."""

    images: jax.Array
    labels: jax.Array


def sample_tasks(
    labels: np.ndarray,
    *,
    num_tasks: int,
    ways: int,
    shots: int,
    queries: int,
    seed: int,
    pool: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
) -> FewShotTasks:
    """Sample tasks whose support and query sets share no example.

    Task k draws from a generator seeded with (seed, k), so it does not depend on the number of tasks.

    Args:
      labels: int [N], the dataset's classes.
      num_tasks: T.
      ways: classes per task.
      shots: support examples per class.
      queries: query examples per class.
      seed: seed of the list.
      pool: int [M], the ids, and hence the classes, that may be used; None for all.
      class_names: one per class, for messages; None for their numbers.

    Returns:
      The undamaged tasks, with examples ordered by way.

    Raises:
      ValueError: the pool has fewer classes than `ways`, a class has fewer than `shots + queries` examples, or a number
        is not positive.
    """
    for name, value in {"num_tasks": num_tasks, "ways": ways, "shots": shots, "queries": queries}.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    labels = np.asarray(labels)
    pool = np.arange(len(labels)) if pool is None else np.asarray(pool)
    of_pool = labels[pool]
    members = {int(c): pool[of_pool == c] for c in np.unique(of_pool)}
    if len(members) < ways:
        raise ValueError(f"ways: expected at most {len(members)}, the number of classes in the pool, got {ways}")
    for label, ids in members.items():
        if len(ids) < shots + queries:
            named = label if class_names is None else repr(class_names[label])
            raise ValueError(
                f"shots + queries: expected at most {len(ids)}, the examples of class {named}, got {shots + queries}"
            )
    names = np.array(list(members))
    classes: list[np.ndarray] = []
    drawn: list[list[np.ndarray]] = []
    for k in range(num_tasks):
        rng = np.random.default_rng([seed, k])
        chosen = rng.choice(names, size=ways, replace=False)
        classes.append(chosen)
        drawn.append([rng.choice(members[int(c)], size=shots + queries, replace=False) for c in chosen])
    examples = np.reshape(drawn, (num_tasks, ways, shots + queries))
    way = np.arange(ways)
    return FewShotTasks(
        classes=np.reshape(classes, (num_tasks, ways)),
        support_ids=examples[:, :, :shots].reshape(num_tasks, -1),
        support_labels=np.tile(np.repeat(way, shots), (num_tasks, 1)),
        query_ids=examples[:, :, shots:].reshape(num_tasks, -1),
        query_labels=np.tile(np.repeat(way, queries), (num_tasks, 1)),
        support_flipped=np.zeros((num_tasks, ways * shots), bool),
        query_flipped=np.zeros((num_tasks, ways * queries), bool),
        shortcut=np.zeros(num_tasks, bool),
        noise_seed=np.full(num_tasks, NO_NOISE),
        wrong_domain=np.zeros(num_tasks, bool),
    )


def sample(
    dataset: Dataset, split: str, *, num_tasks: int, ways: int, shots: int, queries: int, seed: int
) -> FewShotTasks:
    """Sample tasks of one split of a dataset, as `sample_tasks` does.

    Raises:
      ValueError: an unknown split, or what `sample_tasks` raises.
    """
    check_split(dataset, split)
    pool, shape = dataset.pools[split], {"ways": ways, "shots": shots, "queries": queries}
    names = dataset.class_names
    return sample_tasks(dataset.labels, num_tasks=num_tasks, seed=seed, pool=pool, class_names=names, **shape)


def take(tasks: FewShotTasks, index: ArrayLike | slice) -> FewShotTasks:
    """The tasks in `index` as a new list: integers [n], booleans [T] or a slice."""
    rows = np.arange(len(tasks.classes))[index if isinstance(index, slice) else np.atleast_1d(index)]
    return FewShotTasks(*(field[rows] for field in tasks))


def join(*lists: FewShotTasks) -> FewShotTasks:
    """Concatenates lists of tasks.

    Raises:
      ValueError: lists that differ in ways, shots or queries.
    """
    shapes = [tuple(field.shape[1:] for field in tasks) for tasks in lists]
    for position, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"lists[{position}]: expected the numbers of ways, support and query examples of lists[0], "
                f"{(shapes[0][0], shapes[0][1], shapes[0][3])}, got {(shape[0], shape[1], shape[3])}"
            )
    return FewShotTasks(*(np.concatenate(fields) for fields in zip(*lists, strict=True)))


def flip_labels(tasks: FewShotTasks, index: ArrayLike, *, share: float, seed: int, side: str = "query") -> FewShotTasks:
    """Replace a share of the labels of the tasks in `index` by another way's label, drawn uniformly.

    Args:
      tasks: the list to damage; it is not modified.
      index: the tasks to damage.
      share: share of each such task's labels on the side, between 0 and 1.
      seed: seed of the choice of examples and of the new labels; one generator per (seed, task) and side.
      side: "query", "support" or "both".

    Raises:
      ValueError: a share out of range, an unknown side, or too few labels that are not flipped yet.
    """
    _check_share(share)
    for name, stream in _sides(side):
        labels, flipped = getattr(tasks, f"{name}_labels").copy(), getattr(tasks, f"{name}_flipped").copy()
        count = round(share * labels.shape[1])
        for k in np.asarray(index, int).tolist():
            rng = np.random.default_rng([seed, k, *stream])
            # A label that is flipped twice may be correct again.
            whole = np.flatnonzero(~flipped[k])
            if len(whole) < count:
                raise ValueError(
                    f"share: expected at most {len(whole)} labels to flip in task {k}, since its others are flipped "
                    f"already, got {count}"
                )
            chosen = rng.choice(whole, size=count, replace=False)
            labels[k, chosen] = _other_way(labels[k, chosen], tasks, rng)
            flipped[k, chosen] = True
        tasks = tasks._replace(**{f"{name}_labels": labels, f"{name}_flipped": flipped})
    return tasks


def flip_examples(tasks: FewShotTasks, *, share: float, seed: int, side: str = "query") -> FewShotTasks:
    """Replace a share of all tasks' labels, wherever they fall, by another way's label, drawn uniformly.

    Args:
      tasks: the list to damage; it is not modified.
      share: share of the labels of all tasks on the side, between 0 and 1.
      seed: seed of the choice of examples and of the new labels.
      side: "query", "support" or "both", each of which loses the share.

    Raises:
      ValueError: a share out of range, an unknown side, or too few labels that are not flipped yet.
    """
    _check_share(share)
    for name, stream in _sides(side):
        labels, flipped = getattr(tasks, f"{name}_labels").copy(), getattr(tasks, f"{name}_flipped").copy()
        count = round(share * labels.size)
        rng = np.random.default_rng([seed, *stream])
        whole = np.flatnonzero(~flipped)
        if len(whole) < count:
            raise ValueError(f"share: expected at most {len(whole)} labels that are not flipped yet, got {count}")
        chosen = rng.choice(whole, size=count, replace=False)
        labels.flat[chosen] = _other_way(labels.flat[chosen], tasks, rng)
        flipped.flat[chosen] = True
        tasks = tasks._replace(**{f"{name}_labels": labels, f"{name}_flipped": flipped})
    return tasks


def add_shortcut(tasks: FewShotTasks, index: ArrayLike) -> FewShotTasks:
    """Make the tasks in `index` teach a shortcut: images dimmed, the label painted into one pixel of the top row."""
    return tasks._replace(shortcut=_marked(tasks.shortcut, index, True))


def add_noise(tasks: FewShotTasks, index: ArrayLike, *, seed: int) -> FewShotTasks:
    """Replace all images of the tasks in `index` by noise, every pixel uniform in [0, 1], fixed for (seed, task)."""
    rows = np.asarray(index, int).ravel()
    seeds = [int(np.random.SeedSequence([seed, k]).generate_state(1)[0]) for k in rows.tolist()]
    return tasks._replace(noise_seed=_marked(tasks.noise_seed, rows, seeds))


def replace_by_foreign(tasks: FewShotTasks, index: ArrayLike, foreign: FewShotTasks) -> FewShotTasks:
    """Replace the tasks in `index` by tasks from the wrong domain.

    Args:
      tasks: the list to damage; it is not modified.
      index: int [n], the tasks to replace.
      foreign: n tasks of another dataset's classes, sampled from a split that `datasets.add_foreign` adds.

    Raises:
      ValueError: another number of tasks, or tasks of another shape.
    """
    rows = np.asarray(index, int).ravel()
    if len(foreign.classes) != len(rows):
        raise ValueError(f"foreign: expected {len(rows)} tasks, one for each in index, got {len(foreign.classes)}")
    both = join(tasks, foreign._replace(wrong_domain=np.ones(len(rows), bool)))
    order = np.arange(len(tasks.classes))
    order[rows] = len(order) + np.arange(len(rows))
    return take(both, order)


def harm(tasks: FewShotTasks) -> np.ndarray:
    """The ground truth, [T] strings of `KINDS`; a task with several kinds of damage counts as the first of them."""
    flipped = tasks.support_flipped.any(axis=1) | tasks.query_flipped.any(axis=1)
    damaged = [flipped, tasks.shortcut, tasks.noise_seed != NO_NOISE, tasks.wrong_domain]
    return np.select(damaged, [FLIPPED, SHORTCUT, NOISE, WRONG_DOMAIN], CLEAN)


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

    def batch(ids, labels, stream):
        looked_up = images[ids]
        for k in np.flatnonzero(tasks.noise_seed != NO_NOISE):
            rng = np.random.default_rng([tasks.noise_seed[k], stream])
            looked_up[k] = rng.random(looked_up[k].shape)
        painted = DIM * looked_up[tasks.shortcut]
        task, example = np.indices(painted.shape[:2])
        column = labels[tasks.shortcut]
        painted[(task, example, column) if images.ndim == 2 else (task, example, 0, column)] = 1.0
        looked_up[tasks.shortcut] = painted
        return Batch(jnp.asarray(looked_up, jnp.result_type(float)), jnp.asarray(labels))

    support = batch(tasks.support_ids, tasks.support_labels, 0)
    query = batch(tasks.query_ids, tasks.query_labels, 1)
    return mi.Task(support, query, None, None)


def indexed(tasks: FewShotTasks) -> mi.Task:
    """Like `materialize`, with ids instead of images, for `lookup`, so that thousands of tasks take little memory.

    Raises:
      ValueError: tasks whose images are damaged, since a lookup would lose the damage.
    """
    if tasks.shortcut.any() or (tasks.noise_seed != NO_NOISE).any():
        raise ValueError("tasks: expected none with a shortcut or noise images, which only materialize can apply")
    support = Batch(jnp.asarray(tasks.support_ids), jnp.asarray(tasks.support_labels))
    query = Batch(jnp.asarray(tasks.query_ids), jnp.asarray(tasks.query_labels))
    return mi.Task(support, query, None, None)


def lookup(tasks: mi.Task, images: jax.Array) -> mi.Task:
    """Tasks made by `indexed`, with the images that their ids point to: pure, for use inside a compiled step."""
    support, query = (Batch(images[side.images], side.labels) for side in (tasks.support, tasks.query))
    return tasks._replace(support=support, query=query)


class TaskSource:
    """Tasks that are materialised on access: a random-access sequence of single `metainfluence.Task`s.

    Args:
      tasks: T tasks.
      images: as `materialize` takes them.
    """

    def __init__(self, tasks: FewShotTasks, images: np.ndarray):
        self.tasks, self.images = tasks, images

    def __len__(self) -> int:
        return len(self.tasks.classes)

    def __getitem__(self, k: int) -> mi.Task:
        if not -len(self) <= k < len(self):
            raise IndexError(f"k: expected a task from 0 to {len(self) - 1}, got {k}")
        return jax.tree.map(lambda leaf: leaf[0], materialize(take(self.tasks, k), self.images))


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")


def _sides(side: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The selected sides, and the key that separates their random streams."""
    if side not in ("query", "support", "both"):
        raise ValueError(f"side: expected 'query', 'support' or 'both', got {side!r}")
    streams: dict[str, tuple[int, ...]] = {"query": (), "support": (1,)}
    return ((name, stream) for name, stream in streams.items() if side in (name, "both"))


def _other_way(labels: np.ndarray, tasks: FewShotTasks, rng: np.random.Generator) -> np.ndarray:
    ways = tasks.classes.shape[1]
    return (labels + rng.integers(1, ways, size=len(labels))) % ways


def _marked(field: np.ndarray, index: ArrayLike, value: Any) -> np.ndarray:
    marked = field.copy()
    marked[np.asarray(index, int)] = value
    return marked
