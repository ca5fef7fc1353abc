"""Inner products of gradients: no curvature at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from metainfluence._checks import concrete, is_array
from metainfluence.baselines._base import no_solve, stacked_length, weighted_total
from metainfluence.data import Task, Weights, resolve_weights
from metainfluence.influence import Scores, influence_scores, self_influence
from metainfluence.problem import Bilevel
from metainfluence.solvers import identity


def tracin(
    problem: Bilevel,
    target: Callable[..., Array],
    learning_rates: Float[Array, " C"],
    *,
    batch_size: int | None = None,
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores by TracIn, from checkpoints of meta-training.

    Σ_c η_c · w ∂_w⟨D_λF, ∇φ⟩ at λ_c (TracInCP; Pruthi et al., NeurIPS 2020): to first order, the change of φ if the
    datum had been missing from one full-batch gradient step at each checkpoint. It is in the target's units if η_c is
    the learning rate times the number of steps that the checkpoint represents.

    Args:
      problem: the problem.
      target: as in `influence_scores`.
      learning_rates: η, `[C]`, finite.
      batch_size: as in `influence_scores`.

    Returns:
      Function of meta_params with a leading axis for the checkpoints, `[C, ...]`; its info has leaves `[C]`, as
      `solvers.identity` reports.

    Raises:
      ValueError: learning rates that are not a vector or not finite, another number of checkpoints, and as
        `influence_scores`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> score = mi.baselines.tracin(problem, lambda m: m, learning_rates=[0.5, 0.5])
      >>> scores = score(jnp.asarray([0.0, 2.0]), tasks)  # of two checkpoints, 0 and 2
      >>> [round(x, 3) for x in scores.task.tolist()]  # of task 2: 0.5 / 3 * (0 - 5) + 0.5 / 3 * (2 - 5)
      [0.333, 0.0, -1.333]
    """
    if not is_array(learning_rates) and not isinstance(learning_rates, (list, tuple)):
        raise TypeError(f"learning_rates: expected numbers [C], got {learning_rates!r}")
    rates = jnp.asarray(learning_rates, float)
    if rates.ndim != 1 or rates.size == 0:
        raise ValueError(f"learning_rates: expected shape [C] with C > 0, got {rates.shape}")
    if concrete(rates) and not np.all(np.isfinite(np.asarray(rates))):
        raise ValueError("learning_rates: expected finite numbers, got NaN or infinity")
    single = influence_scores(problem, target, solver=identity(), batch_size=batch_size)

    def run(meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Scores:
        count = stacked_length(meta_params, "checkpoints")
        if count != len(rates):
            raise ValueError(f"meta_params: expected the {len(rates)} checkpoints of learning_rates, got {count}")
        weights = resolve_weights(weights, tasks)
        each = jax.lax.map(lambda at: single(at, tasks, *target_args, weights=weights), meta_params)
        task, support, query = (weighted_total(rates, field) for field in each[:3])
        return Scores(task, support, query, each.info)

    return run


def gradient_similarity(
    problem: Bilevel, target: Callable[..., Array], *, batch_size: int | None = None
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores: the cosine between ∂_w D_λF and ∇φ.

    A proxy from −1 to 1 that ranks data as a predicted change on removal does: the scores of `solvers.identity` without
    the lengths of the gradients (as Hanawa et al., ICLR 2021, compare examples). It is 0 where the weight or a gradient
    is 0.

    Args:
      problem: the problem.
      target: as in `influence_scores`.
      batch_size: as in `influence_scores`.

    Returns:
      Function whose info is that of `solvers.identity`.

    Raises:
      ValueError: as `influence_scores`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: jnp.sum(w.query[:, None] * (m[None] - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[[3.0, 0.0]], [[0.0, 4.0]], [[-3.0, 4.0]]]))
      >>> score = jax.jit(mi.baselines.gradient_similarity(problem, lambda m: m[0]))
      >>> [round(x, 3) for x in score(jnp.zeros(2), tasks).task.tolist()]  # of (1, 0) and - query
      [-1.0, 0.0, 0.6]
    """
    products = influence_scores(problem, target, solver=identity(), batch_size=batch_size)
    squares = self_influence(problem, solver=no_solve(), batch_size=batch_size)

    def run(meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Scores:
        weights = resolve_weights(weights, tasks)
        scores = products(meta_params, tasks, *target_args, weights=weights)
        length = optax.tree.norm(jax.grad(target)(meta_params, *target_args))

        def cosine(product: Array, square: Array, weight: Array) -> Array:
            # Both carry the weight: w⟨g, ∇φ⟩ and w‖g‖².
            scale = jnp.sqrt(jnp.maximum(weight * square, 0)) * length.astype(weight.dtype)
            return jnp.where(scale > 0, product / jnp.where(scale > 0, scale, 1), 0)

        fields = zip(scores[:3], squares(meta_params, tasks, weights)[:3], weights, strict=True)
        task, support, query = (cosine(*field) for field in fields)
        return Scores(task, support, query, scores.info)

    return run
