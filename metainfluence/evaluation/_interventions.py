"""Which data are removed: stacked `Weights` with a leading axis for the interventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from metainfluence.data import Weights, drop
from metainfluence.evaluation._bootstrap import check_share, numbers

_FIELDS = (("tasks", "task"), ("support", "support"), ("query", "query"))  # drop's argument, and the weights it clears


def leave_one_out(weights: Weights, tasks: Any = (), support: Any = (), query: Any = ()) -> Weights:
    """One intervention for each named datum, which removes only that one.

    Args:
      weights: of stacked tasks.
      tasks: indices of tasks, `[m]`.
      support: pairs (task, example) of support examples, `[m, 2]`.
      query: pairs (task, example) of query examples, `[m, 2]`.

    Returns:
      Weights with a leading axis: first the tasks, then the support, then the query examples.

    Raises:
      TypeError: as `metainfluence.drop`.
      ValueError: as `metainfluence.drop`; no datum named.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> weights = mi.unit_weights(mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]])))
      >>> found = mi.evaluation.leave_one_out(weights, tasks=[0, 2], query=[(1, 0)])
      >>> found.task.tolist()
      [[0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
      >>> found.query[..., 0].tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    """
    named = {"tasks": tasks, "support": support, "query": query}
    drop(weights, **named)
    groups = [{kind: [datum]} for kind, data in named.items() for datum in np.atleast_1d(data)]
    if not groups:
        raise ValueError("tasks, support, query: expected at least one datum to leave out, got none")
    return leave_groups_out(weights, groups)


def leave_groups_out(weights: Weights, groups: Sequence[Any]) -> Weights:
    """One intervention for each group, which removes all its data.

    Args:
      weights: of stacked tasks.
      groups: for each group, the indices of its tasks, or a mapping of arguments of `metainfluence.drop`, such as
        `{"tasks": [3], "query": [(0, 1)]}`. An empty group removes nothing.

    Returns:
      Weights with a leading axis for the groups.

    Raises:
      TypeError: as `metainfluence.drop`; a mapping with other names.
      ValueError: as `metainfluence.drop`; no groups.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> weights = mi.unit_weights(mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]])))
      >>> found = mi.evaluation.leave_groups_out(weights, [[0, 1], {"tasks": [2], "query": [(0, 0)]}])
      >>> found.task.tolist()
      [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
      >>> found.query[..., 0].tolist()
      [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]
    """
    if len(groups) == 0:
        raise ValueError("groups: expected at least one group, got none")
    stacked = {name: np.repeat(np.asarray(getattr(weights, field))[None], len(groups), 0) for name, field in _FIELDS}
    places: dict[str, list[np.ndarray]] = {name: [] for name, _ in _FIELDS}
    for row, group in enumerate(groups):
        named = group if isinstance(group, Mapping) else {"tasks": group}
        unknown = set(named) - set(places)
        if unknown:
            raise TypeError(f"groups[{row}]: expected the names tasks, support and query, got {sorted(unknown)}")
        for name, data in named.items():
            index, width = np.asarray(data), stacked[name].ndim - 1
            index = index.reshape(-1, 1) if width == 1 and index.ndim == 1 else index
            if index.size == 0:
                continue
            if index.dtype.kind not in "iu":
                raise TypeError(f"groups[{row}].{name}: expected integer indices, got {index.dtype}")
            if index.ndim != 2 or index.shape[1] != width:
                kind = "indices [m]" if width == 1 else "pairs (task, example) [m, 2]"
                raise ValueError(f"groups[{row}].{name}: expected {kind}, got shape {np.shape(data)}")
            places[name].append(np.column_stack([np.full(len(index), row), index]))
    found = {name: np.concatenate(rows) for name, rows in places.items() if rows}
    # drop checks the indices, in one call for all groups since it dispatches to JAX.
    drop(weights, **{name: index[:, 1:] for name, index in found.items()})
    for name, index in found.items():
        stacked[name][tuple(index.T)] = 0.0
    return Weights(*(jnp.asarray(stacked[name]) for name, _ in _FIELDS))


def random_subsets(
    weights: Weights, num_subsets: int, share: float, seed: int
) -> tuple[Weights, Bool[np.ndarray, "m T"]]:
    """Interventions that each keep a random share of the tasks, for `linear_datamodeling_score`.

    Args:
      weights: of T stacked tasks.
      num_subsets: m.
      share: of the tasks that each subset keeps, rounded to whole tasks.
      seed: of the draws, which are the same on every machine.

    Returns:
      Weights with a leading axis `[m]`, and which tasks each subset keeps.

    Raises:
      TypeError: `weights` is no `Weights`.
      ValueError: `num_subsets` not positive, a share outside (0, 1), or one that keeps no task or all.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> weights = mi.unit_weights(mi.Task((), jnp.asarray([[0.0], [1.0], [5.0], [6.0]])))
      >>> found, kept = mi.evaluation.random_subsets(weights, num_subsets=3, share=0.75, seed=0)
      >>> found.task.sum(axis=1).tolist(), (kept == (found.task == 1)).all().tolist()
      ([3.0, 3.0, 3.0], True)
    """
    if not isinstance(weights, Weights):
        raise TypeError(f"weights: expected metainfluence.Weights, got {type(weights).__name__}")
    if isinstance(num_subsets, bool) or not isinstance(num_subsets, int) or num_subsets < 1:
        raise ValueError(f"num_subsets: expected a positive integer, got {num_subsets!r}")
    check_share("share", share)
    count = weights.task.shape[0]
    size = round(share * count)
    if not 0 < size < count:
        raise ValueError(f"share: expected one that keeps from 1 to {count - 1} of {count} tasks, got {share!r}")
    rng = np.random.default_rng(seed)
    # The order of random numbers is a random order: one draw for all subsets.
    kept = np.argsort(rng.random((num_subsets, count)), axis=1) < size
    return leave_groups_out(weights, [np.flatnonzero(~row) for row in kept]), kept


class Brittleness(NamedTuple):
    """What becomes of the target when the data that help most are removed.

    Attributes:
      counts: tasks removed, `[n]`.
      outcomes: the target after retraining without them, `[n, ...]`.
      before: the target after retraining with all data.
    """

    counts: np.ndarray
    outcomes: Float[np.ndarray, "n ..."]
    before: Float[np.ndarray, "..."]

    @property
    def changes(self) -> Float[np.ndarray, "n ..."]:
        """Outcomes minus the outcome with all data; the higher, the better the scores identify what helps."""
        return self.outcomes - self.before


def brittleness(
    scores: Float[Array, " T"], outcome: Callable[[Weights], Any], weights: Weights, counts: Sequence[int]
) -> Brittleness:
    """The target after removal of the k tasks with the highest scores, for several k.

    The counterfactual test of Ilyas et al. (Datamodels, ICML 2022, §4.1) and of Park et al. (TRAK, ICML 2023).

    Args:
      scores: `[T]`, predicted change of the target on removal; ties keep the order of the tasks.
      outcome: (stacked weights `[1 + n, ...]`) -> the target after retraining on each, `[1 + n, ...]`: `retrain`
        followed by the target. The first intervention removes nothing.
      weights: of the T tasks.
      counts: k, from 1 to T − 1.

    Raises:
      ValueError: scores of another shape or not finite, counts outside their range, or outcomes of another length.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> weights = mi.unit_weights(mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]])))
      >>> scores = jnp.asarray([0.667, 0.333, -1.0])  # of the mean of 0, 1 and 5
      >>> def mean(weights):
      ...     return weights.task @ jnp.asarray([0.0, 1.0, 5.0]) / weights.task.sum(axis=-1)
      >>> found = mi.evaluation.brittleness(scores, mean, weights, counts=[1, 2])
      >>> found.outcomes.tolist(), found.changes.tolist()
      ([3.0, 5.0], [1.0, 3.0])
    """
    total = weights.task.shape[0]
    values = numbers("scores", scores, (1,))
    if len(values) != total:
        raise ValueError(f"scores: expected shape ({total},), got {values.shape}")
    sizes = np.asarray(counts)
    if sizes.ndim != 1 or sizes.size == 0 or sizes.dtype.kind not in "iu" or sizes.min() < 1 or sizes.max() >= total:
        raise ValueError(f"counts: expected integers from 1 to {total - 1}, got {counts!r}")
    order = np.argsort(-values, kind="stable")
    outcomes = np.asarray(outcome(leave_groups_out(weights, [order[:k] for k in (0, *sizes)])), float)
    if outcomes.shape[:1] != (1 + len(sizes),):
        raise ValueError(f"outcome: expected {1 + len(sizes)} on the leading axis, got shape {outcomes.shape}")
    return Brittleness(sizes, outcomes[1:], outcomes[0])
