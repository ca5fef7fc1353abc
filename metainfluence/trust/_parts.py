"""Which part of a training run bends: the same run with all parts but one replaced by their tangents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from metainfluence.data import Task, Weights
from metainfluence.differentiation import taylor
from metainfluence.problem import Bilevel, meta_regularization, total_objective
from metainfluence.training import Run, floats_of, taken, with_floats


class Bent(NamedTuple):
    """λ at the ends of runs at other weights, `[D, ...]`, minus λ at the end of the run itself.

    Attributes:
      optimizer: with the gradient replaced by its tangent in (λ, w), and the optimiser as it is.
      gradient: with the optimiser's update replaced by its tangent in (gradient, state), and the gradient as it is.
    """

    optimizer: PyTree
    gradient: PyTree


def bent_ends(
    run: Run, problem: Bilevel, optimizer: optax.GradientTransformation
) -> Callable[[PyTree, Task, Weights, Weights], Bent]:
    """Makes (start, tasks, weights, changes of the weights `[D, ...]`) -> Bent.

    Every part has a tangent along the run. With all parts replaced by their tangents, the end is linear in w, and its
    derivative is the run's own. If one part is left as it is, any deviation from linear is due to that part alone.
    """

    def update(gradient: PyTree, state: PyTree) -> PyTree:
        meta_params, inner = state
        updates, inner = optimizer.update(gradient, inner, meta_params)
        return optax.apply_updates(meta_params, updates), inner

    def ends(start: PyTree, tasks: Task, weights: Weights, changes: Weights) -> Bent:
        def step(carry: tuple[PyTree, PyTree, PyTree], each: Any) -> tuple[tuple[PyTree, PyTree, PyTree], None]:
            state, curved, flat = carry
            _, row = each
            batch, own = taken(row, tasks, weights)
            gradient_map = jax.grad(total_objective(problem))

            def gradient(meta_params: PyTree, weights: Weights) -> PyTree:
                return gradient_map(meta_params, batch, weights)

            def updated(slope: PyTree, floats: list[Array]) -> list[Array]:
                return floats_of(update(slope, with_floats(state, floats)))

            slope, tangent = jax.linearize(gradient, state[0], own)
            after = update(slope, state)

            def single(curved: PyTree, flat: PyTree, change: Weights) -> tuple[PyTree, PyTree]:
                (moved,) = taken(row, change)
                rate = tangent(_less(curved[0], state[0]), moved)
                curved = update(jax.tree.map(jnp.add, slope, rate), curved)
                there = gradient(flat[0], jax.tree.map(jnp.add, own, moved))
                along = (_less(there, slope), _less(floats_of(flat), floats_of(state)))
                shift = jax.jvp(updated, (slope, floats_of(state)), along)[1]
                return curved, with_floats(after, jax.tree.map(jnp.add, floats_of(after), shift))

            curved, flat = jax.vmap(single)(curved, flat, changes)
            return (after, curved, flat), None

        state = run.begin(start)
        count = changes.task.shape[0]
        copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), state)
        each = (jnp.arange(run.num_steps), run.batches(weights.task.shape[0]))
        (end, curved, flat), _ = jax.lax.scan(step, (state, copies, copies), each)
        return Bent(*(jax.vmap(_less, in_axes=(0, None))(moved[0], end[0]) for moved in (curved, flat)))

    return ends


def inner_share(problem: Bilevel) -> Callable[[PyTree, PyTree, Task, Weights], Float[Array, ""]]:
    """Makes (meta_params, changes `[D, ...]`, tasks, weights) -> the share of the gradient's bend due to θ(λ).

    The share is from 0 to 1. With θ(λ) replaced by its tangent at λ, only the outer loss bends; the rest of the bend is
    due to the adaptation.
    """
    adapt = problem.adapt
    assert adapt is not None

    def bend(gradient: Callable[[PyTree], PyTree], at: PyTree, change: PyTree) -> PyTree:
        # Both points in one batch, so that the program holds one copy of the gradient and its derivative.
        points = jax.tree.map(lambda leaf, step: jnp.stack([leaf, leaf + step]), at, change)
        steps = jax.tree.map(lambda step: jnp.stack([step, jnp.zeros_like(step)]), change)
        values, rates = jax.vmap(lambda point, step: jax.jvp(gradient, (point,), (step,)))(points, steps)
        return jax.tree.map(lambda value, rate: value[1] - value[0] - rate[0], values, rates)

    def share(meta_params: PyTree, changes: PyTree, tasks: Task, weights: Weights) -> Array:
        def with_tangent(point: PyTree) -> Array:
            def single(task: Task, own: Weights) -> Array:
                tangent = taylor(lambda m: (adapt(m, task, own), None), meta_params, problem.hvp)[1]
                return problem.outer(tangent(point), point, task, own)

            losses = jax.vmap(single)(tasks, weights)
            return jnp.vdot(losses, weights.task) / losses.shape[0] + meta_regularization(problem, point)

        def single(change: PyTree) -> tuple[Array, Array]:
            whole = bend(lambda m: jax.grad(total_objective(problem))(m, tasks, weights), meta_params, change)
            outer = bend(jax.grad(with_tangent), meta_params, change)
            return optax.tree.norm(_less(whole, outer)), optax.tree.norm(outer)

        inner, outer = map(jnp.sum, jax.vmap(single)(changes))
        return inner / jnp.maximum(inner + outer, float(jnp.finfo(inner.dtype).tiny))

    return share


def _less(left: PyTree, right: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, left, right)
