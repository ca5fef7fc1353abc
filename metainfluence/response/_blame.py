"""Which tasks make a derivative NaN or infinite: by their data, or by a program that has no derivative there."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from metainfluence._checks import concrete
from metainfluence.data import Task, Weights, name_not_finite
from metainfluence.operators import flat_norm
from metainfluence.problem import Bilevel, evaluate

_AT_ONCE = 64


def finite_gradients(problem: Bilevel, meta_params: PyTree, tasks: Task, weights: Weights) -> Array:
    """Which tasks' own total gradients are finite, `[T]`."""

    def finite(data: tuple[Task, Weights]) -> Array:
        return jnp.isfinite(flat_norm(jax.grad(lambda m: evaluate(problem, m, *data)[0])(meta_params)))

    return jax.lax.map(finite, (tasks, weights), batch_size=_AT_ONCE)


class Rest(NamedTuple):
    """Data without what spoils the sum at weight 0.

    Attributes:
      tasks: in which other data stand in its place.
      rows: the tasks whose data stand in each task's place.
    """

    tasks: Task
    rows: np.ndarray

    def weights(self, weights: Weights) -> Weights:
        """Weights of the examples that stand there now; those of the tasks are as they were."""
        support, query = (jnp.asarray(leaf)[self.rows] for leaf in (weights.support, weights.query))
        return Weights(weights.task, support, query)


def without_spoilt(problem: Bilevel, norm: Array, meta_params: PyTree, tasks: Task, weights: Weights) -> Rest | None:
    """Tasks in which those of weight 0 that spoil the sum have another one's data; None where nothing is spoilt.

    Zero times NaN is NaN, so that to weigh a task by 0 does not take it out of a sum. Under jit nothing can be told.

    Args:
      problem: the problem.
      norm: ‖D_λF‖, finite or not.
      meta_params: λ.
      tasks: stacked tasks.
      weights: their weights.

    Raises:
      ValueError: naming the leaf and the tasks with data that are not finite, or the tasks with finite data whose own
        gradient is not.
    """
    if not concrete(norm, meta_params, tasks, weights) or np.isfinite(np.asarray(norm)):
        return None
    name_not_finite(norm, tasks, "tasks")

    each = jax.jit(lambda *data: finite_gradients(problem, *data))
    spoilt = np.flatnonzero(~np.asarray(each(meta_params, tasks, weights)))
    if not spoilt.size or spoilt.size == len(weights.task):
        return None
    rest = _without_examples(tasks, weights, spoilt)
    if rest is not None:
        tasks = rest
        spoilt = np.flatnonzero(~np.asarray(each(meta_params, tasks, weights)))
    if np.any(np.asarray(weights.task)[spoilt] != 0):
        spoilt = spoilt[np.asarray(weights.task)[spoilt] != 0]
        named = f"{'task' if spoilt.size == 1 else 'tasks'} {', '.join(map(str, spoilt[:8]))}"
        where = _place(problem, meta_params, *jax.tree.map(lambda leaf: jnp.asarray(leaf)[spoilt[0]], (tasks, weights)))
        raise ValueError(
            f"tasks: expected finite gradients, got NaN or infinity from the program of {named}"
            f"{' …' if spoilt.size > 8 else ''}, whose data are finite: {where}; add a small number inside it, or drop "
            f"the task (weights=mi.drop(weights, tasks={spoilt[:8].tolist()})), and the others keep their scores"
        )
    rows = np.arange(len(weights.task))
    if spoilt.size:
        rows[spoilt] = np.setdiff1d(rows, spoilt)[0]
    return Rest(jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], tasks), rows)


def _without_examples(tasks: Task, weights: Weights, spoilt: np.ndarray) -> Task | None:
    """Tasks in which examples of weight 0 of the spoilt ones have another example's data; None where there are none."""
    changed = False
    for side in ("support", "query"):
        own = np.asarray(getattr(weights, side))
        mask = getattr(tasks, f"{side}_mask")
        real = np.ones(own.shape, bool) if mask is None else np.asarray(mask)
        rows = np.tile(np.arange(own.shape[1]), (own.shape[0], 1))
        for k in spoilt:
            present = np.flatnonzero((own[k] != 0) & real[k])
            absent = (own[k] == 0) & real[k]
            if present.size and np.any(absent):
                rows[k, absent] = present[0]
                changed = True
        batch = jax.tree.map(
            lambda leaf, rows=rows: jnp.asarray(leaf)[np.arange(len(rows))[:, None], rows], getattr(tasks, side)
        )
        tasks = tasks._replace(**{side: batch})
    return tasks if changed else None


def _place(problem: Bilevel, meta_params: PyTree, task: Task, weights: Weights) -> str:
    """Where in a task's program a derivative is lost: at examples, at an inner step, or in the adapted parameters."""
    single = jax.jit(lambda m, t, w: finite_gradients(problem, m, *jax.tree.map(lambda x: x[None], (t, w)))[0])
    found = []
    for side in ("support", "query"):
        size = getattr(weights, side).shape[0]
        for j in range(size if 1 < size <= _AT_ONCE else 0):
            rows = np.arange(size)
            rows[j] = (j + 1) % size
            batch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], getattr(task, side))
            if single(meta_params, task._replace(**{side: batch}), weights):
                found.append(f"{side} example {j}")
    if found:
        return f"a norm, root, log or quotient at 0 that goes with {' or '.join(found[:4])}"
    if problem.adapt is not None:
        norms = getattr(problem.adapt, "inner_gradient_norms", None)
        norms = None if norms is None else np.asarray(jax.jit(norms)(meta_params, task, weights))
        if norms is not None and np.any(norms == 0):
            step = int(np.argmax(norms == 0))
            return f"its inner gradient is exactly 0 at step {step}, where a norm, as in clipping, has no derivative"
        params = jax.jit(problem.adapt)(meta_params, task, weights)
        if not all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(params)):
            return "its adapted parameters are NaN, as the mean (0/0) of a class without examples"
    return "a norm, root, log or quotient at 0, as in clipping a gradient that is 0 or a class without examples"
