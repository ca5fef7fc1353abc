"""Scores without any derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from metainfluence._checks import check_batch_size
from metainfluence._chunks import reduce_tasks
from metainfluence.baselines._base import dtype_of, unsolved
from metainfluence.data import Task, Weights, leaves_by_kind, resolve_weights
from metainfluence.influence import Scores
from metainfluence.problem import Bilevel, check_meta_params


def plain_loss(
    problem: Bilevel, target: Callable[..., Array] | None = None, *, batch_size: int | None = None
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores: minus the loss; a high one counts as harm.

    A task's score is − w_k L_k, a query example's − v_kj times its ℓ_out at its task's adapted parameters, a support
    example's − u_kj times its ℓ_out at the same parameters. They are a proxy for the order, in the loss's units.

    Args:
      problem: the problem. For one made by `from_task_loss`, the losses of query examples are read off its derivative
        in their weights, which assumes that the task loss is their mean.
      target: not used; accepted, like its arguments, so that methods can be exchanged.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once.

    Returns:
      Function whose support scores are NaN where the outer loss cannot be evaluated on support examples: where their
      arrays are unlike those of the query examples, and for a problem made by `from_task_loss`. Nothing is solved: see
      `metainfluence.baselines` on the report.

    Raises:
      ValueError: tasks, weights or meta_params that are malformed or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> scores = mi.baselines.plain_loss(problem)(jnp.asarray(2.0), tasks)
      >>> scores.task.tolist(), int(scores.info.num_matvecs)
      ([-2.0, -0.5, -4.5], 0)
    """
    del target
    check_batch_size(batch_size)

    def losses(params: PyTree, meta_params: PyTree, task: Task, own: Weights) -> tuple[Array, Array]:
        """L_k, and ℓ_out of its query examples: L_k is linear in v with the slopes ℓ / (number of real examples)."""

        def outer(query: Array) -> Array:
            return problem.outer(params, meta_params, task, own._replace(query=query))

        loss, slopes = jax.value_and_grad(outer)(own.query)
        mask = task.query_mask
        real = slopes.shape[0] if mask is None else jnp.sum(mask, dtype=slopes.dtype)
        return loss, slopes * real

    def run(meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Scores:
        del target_args
        check_meta_params(meta_params)
        weights = resolve_weights(weights, tasks)
        alike = problem.adapt is not None and _alike(tasks.support, tasks.query)

        def single(task: Task, own: Weights) -> Weights:
            params = None if problem.adapt is None else problem.adapt(meta_params, task, own)
            loss, query = losses(params, meta_params, task, own)
            support = jnp.full_like(own.support, jnp.nan)
            if alike:
                turned = task._replace(query=task.support, query_mask=task.support_mask)
                _, support = losses(params, meta_params, turned, own._replace(query=own.support))
            return jax.tree.map(lambda w, loss: -w * loss.astype(w.dtype), own, Weights(loss, support, query))

        _, scores = reduce_tasks(lambda data: ((), jax.vmap(single)(*data)), (tasks, weights), batch_size)
        return Scores(scores.task, scores.support, scores.query, unsolved(dtype_of(meta_params)))

    return run


def _alike(support: PyTree, query: PyTree) -> bool:
    """Whether a loss that reads query examples can read support examples."""
    kinds = [
        [(jnp.shape(leaf)[1 + of_examples :], jnp.result_type(leaf)) for _, leaf, of_examples in leaves_by_kind(side)]
        for side in (support, query)
    ]
    structures: list[Any] = [jax.tree.structure(side) for side in (support, query)]
    return structures[0] == structures[1] and kinds[0] == kinds[1]


def random_scores(
    problem: Bilevel | None = None, target: Callable[..., Array] | None = None, *, seed: int = 0
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores: normal random numbers, a random order.

    Args:
      problem: not used; accepted so that methods can be exchanged.
      target: not used, like its arguments.
      seed: of the numbers, which are the same on every machine.

    Returns:
      Function whose scores are 0 for padding and for data of weight 0. Nothing is solved: see
      `metainfluence.baselines` on the report.

    Raises:
      ValueError: tasks, weights or meta_params that are malformed or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> weights = mi.drop(mi.unit_weights(tasks), tasks=[1])
      >>> one, same, other = (
      ...     mi.baselines.random_scores(seed=seed)(jnp.asarray(2.0), tasks, weights=weights).task for seed in (0, 0, 1)
      ... )
      >>> (one == same).tolist(), (one == other).tolist(), float(one[1])
      ([True, True, True], [False, True, False], 0.0)
    """
    del problem, target

    def run(meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Scores:
        del target_args
        check_meta_params(meta_params)
        weights = resolve_weights(weights, tasks)
        masks = (None, tasks.support_mask, tasks.query_mask)
        keys = jax.random.split(jax.random.key(seed), 3)

        def draw(key: Array, weight: Array, mask: Array | None) -> Array:
            present = (weight != 0) if mask is None else mask & (weight != 0)
            return jnp.where(present, jax.random.normal(key, weight.shape, weight.dtype), 0)

        task, support, query = map(draw, keys, weights, masks)
        return Scores(task, support, query, unsolved(dtype_of(meta_params)))

    return run
