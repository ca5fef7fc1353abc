"""Editing by a few gradient steps, a common way to forget data without a solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from metainfluence._checks import check_batch_size, check_positive
from metainfluence._chunks import Chunks
from metainfluence.baselines._base import dtype_of, unsolved
from metainfluence.curvature import exact
from metainfluence.data import Task, Weights, resolve_weights
from metainfluence.influence import Edit
from metainfluence.problem import Bilevel, check_meta_params, knows_inner
from metainfluence.response import Seen, gradient_map


def gradient_ascent(
    problem: Bilevel, learning_rate: Any, num_steps: int, *, batch_size: int | None = None
) -> Callable[..., Edit]:
    """Makes (meta_params, tasks, new_weights, weights=None) -> Edit by gradient ascent on what is removed.

    It climbs the part of F that the new weights lack, F(λ, weights) − F(λ, new_weights); for whole tasks that is (1/T)
    Σ of their losses (the negative gradient of Golatkar, Achille and Soatto, CVPR 2020). It has no maximum in general:
    with many steps λ diverges.

    Args:
      problem: the problem.
      learning_rate: of every step, positive.
      num_steps: number of steps.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once.

    Returns:
      Function whose info has the leading axis `[num_steps]`. Nothing is solved; as in `metainfluence.edit`, its
      `outer_gradient_norm` is ‖D_λF‖ under the new weights after each step.

    Raises:
      ValueError: a learning rate or a number of steps that is not positive, new weights of the wrong shape or not
        finite, and tasks, weights or meta_params that are malformed or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> without = mi.drop(mi.unit_weights(tasks), tasks=[2])
      >>> edited = mi.baselines.gradient_ascent(problem, 0.3, num_steps=1)(jnp.asarray(2.0), tasks, without)
      >>> round(float(edited.meta_params), 3)  # away from 5: 2 + 0.3 / 3 * (2 - 5)
      1.7
    """
    check_positive("learning_rate", learning_rate)

    def descent(new: PyTree, old: Callable[[], PyTree]) -> PyTree:
        return jax.tree.map(jnp.subtract, new, old())

    return _steps(problem, optax.sgd(learning_rate), num_steps, batch_size, descent)


def fine_tune(
    problem: Bilevel, optimizer: optax.GradientTransformation, num_steps: int, *, batch_size: int | None = None
) -> Callable[..., Edit]:
    """Makes (meta_params, tasks, new_weights, weights=None) -> Edit by a few steps of training on what is left.

    Full-batch steps on F at the new weights, starting from λ: a warm start cut short.

    Args:
      problem: the problem.
      optimizer: any optax optimiser; it starts afresh.
      num_steps: number of steps of the optimiser.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once.

    Returns:
      As `gradient_ascent`.

    Raises:
      TypeError: no optimiser.
      ValueError: as `gradient_ascent`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> import optax
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task((), jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> without = mi.drop(mi.unit_weights(tasks), tasks=[2])
      >>> tune = mi.baselines.fine_tune(problem, optax.sgd(0.5), num_steps=20)
      >>> edited = tune(jnp.asarray(2.0), tasks, without)
      >>> round(float(edited.meta_params), 2)  # the mean of 0 and 1
      0.5
      >>> round(float(edited.info.outer_gradient_norm[-1]), 2)
      0.0
    """
    if not isinstance(optimizer, (optax.GradientTransformation, optax.GradientTransformationExtraArgs)):
        raise TypeError(f"optimizer: expected one of optax, as optax.adam(1e-3), got {optimizer!r}")
    return _steps(problem, optimizer, num_steps, batch_size, lambda new, old: new)


def _steps(
    problem: Bilevel,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    batch_size: int | None,
    descent: Callable[[PyTree, Callable[[], PyTree]], PyTree],
) -> Callable[..., Edit]:
    """Steps along `descent`, computed from D_λF at the new weights and, if it asks for that, at the old ones."""
    check_positive("num_steps", num_steps, integer=True)
    check_batch_size(batch_size)
    gradient = gradient_map(problem, Chunks(batch_size, keep=False))

    def run(meta_params: PyTree, tasks: Task, new_weights: Weights, weights: Weights | None = None) -> Edit:
        check_meta_params(meta_params)
        old = resolve_weights(weights, tasks)
        new = resolve_weights(new_weights, tasks, name="new_weights")

        def at(meta_params: PyTree, weights: Weights) -> tuple[PyTree, Seen]:
            return gradient(exact(), meta_params, tasks, meta_params, weights)

        def step(carry: tuple[PyTree, Any], _: None) -> tuple[tuple[PyTree, Any], tuple[Array, Array]]:
            current, state = carry
            slope, seen = at(current, new)
            updates, state = optimizer.update(descent(slope, lambda: at(current, old)[0]), state, current)
            return (optax.apply_updates(current, updates), state), (optax.tree.norm(slope), seen.inner_gradient_norm)

        start = (meta_params, optimizer.init(meta_params))
        (edited, _), (norms, inner_norms) = jax.lax.scan(step, start, length=num_steps)
        final, there = at(edited, new)
        inner = jnp.append(inner_norms[1:], there.inner_gradient_norm)
        info = unsolved(dtype_of(meta_params), (num_steps,))._replace(
            outer_gradient_norm=jnp.append(norms[1:], optax.tree.norm(final)),
            inner_gradient_norm=inner if knows_inner(problem) else None,
        )
        return Edit(edited, info)

    return run
