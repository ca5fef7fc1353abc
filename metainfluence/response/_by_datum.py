"""Scores of the data behind the examples: one datum may appear in many tasks, on either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, PyTree, Shaped

from metainfluence._checks import concrete
from metainfluence.data import Task, sizes
from metainfluence.response._response import Scores


class DatumScores(NamedTuple):
    """Scores summed by datum, in the order of the ids.

    Attributes:
      ids: `[n]`, each id once.
      score: `[n]`, the sum of the datum's scores over both sides of all tasks: to first order, the change of the target
        when the datum is removed everywhere.
      places: `[n]`, how often the datum appears.
    """

    ids: Shaped[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    places: Int[np.ndarray, " n"]


def by_datum(scores: Scores, tasks: Task, ids: str | Callable[[PyTree], Any] = "id") -> DatumScores:
    """Adds up the scores of examples that are the same datum, by its id, over both sides and all tasks.

    For tasks that an episodic sampler drew from one data set, with the ids as a leaf of each side. Padding is left out.
    For use outside jit.

    Args:
      scores: of `tasks`, as `influence_scores` returns.
      tasks: stacked tasks.
      ids: the key of the leaf that holds the ids `[T, n]` on both sides; or (support or query) -> ids, None for a side
        without ids.

    Raises:
      TypeError: traced values; sides without that key.
      ValueError: ids whose shape is not that of the scores.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.mean(w.query * (m - task.query["x"]) ** 2))
      >>> query = {"x": jnp.asarray([[0.0, 1.0], [1.0, 6.0]]), "id": jnp.asarray([[10, 11], [11, 12]])}
      >>> tasks = mi.Task(support=(), query=query)  # datum 11 stands in both
      >>> scores = mi.influence_scores(problem, lambda m: m)(jnp.asarray(2.0), tasks)  # the mean is 2
      >>> found = mi.by_datum(scores, tasks)
      >>> found.ids.tolist(), found.score.round(3).tolist(), found.places.tolist()
      ([10, 11, 12], [0.5, 0.5, -1.0], [1, 2, 1])
    """
    if not concrete(scores, tasks):
        raise TypeError("scores: expected values, got traced arrays; call this outside jit")
    size = sizes(tasks)
    names, values = [], []
    for side in ("support", "query"):
        batch, own, mask = getattr(tasks, side), np.asarray(getattr(scores, side)), getattr(tasks, f"{side}_mask")
        if not getattr(size, side):
            continue
        found = _ids_of(batch, ids, side)
        if found is None:
            continue
        found = np.asarray(found)
        if found.shape != own.shape:
            raise ValueError(
                f"ids: expected those of tasks.{side} in the shape {own.shape} of its scores, got {found.shape}"
            )
        real = np.ones(own.shape, bool) if mask is None else np.asarray(mask)
        names.append(found[real])
        values.append(own[real])
    if not names:
        raise ValueError("ids: expected ids on at least one side of the tasks, got none")
    unique, places = np.unique(np.concatenate(names), return_inverse=True)
    total = np.zeros(len(unique), np.result_type(*values))
    np.add.at(total, places, np.concatenate(values))
    return DatumScores(unique, total, np.bincount(places, minlength=len(unique)))


def _ids_of(batch: PyTree, ids: str | Callable[[PyTree], Any], side: str) -> Any:
    if callable(ids):
        return ids(batch)
    try:
        return batch[ids]
    except (TypeError, KeyError, IndexError):
        raise TypeError(
            f"ids: expected tasks.{side} to hold a leaf {ids!r}, got {type(batch).__name__}; name another key, or pass "
            "a function (support or query) -> ids"
        ) from None
