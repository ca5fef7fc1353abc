"""Which tasks make a derivative NaN or infinite: by their data, or by a program that has no derivative there."""

from __future__ import annotations

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


def without_spoilt(problem: Bilevel, norm: Array, meta_params: PyTree, tasks: Task, weights: Weights) -> Task | None:
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

    each = jax.jit(lambda *data: finite_gradients(problem, *data))(meta_params, tasks, weights)
    spoilt = np.flatnonzero(~np.asarray(each))
    if not spoilt.size or spoilt.size == len(each):
        return None
    if np.any(np.asarray(weights.task)[spoilt] != 0):
        named = f"{'task' if spoilt.size == 1 else 'tasks'} {', '.join(map(str, spoilt[:8]))}"
        raise ValueError(
            f"tasks: expected finite gradients, got NaN or infinity from the program of {named}"
            f"{' …' if spoilt.size > 8 else ''}, whose data are finite: a norm, root, log or quotient at 0, as in "
            "clipping a gradient that is 0 or a class without examples; add a small number inside it, or drop the task"
        )
    rows = np.arange(len(each))
    rows[spoilt] = np.flatnonzero(np.asarray(each))[0]
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], tasks)
