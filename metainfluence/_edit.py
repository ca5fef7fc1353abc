"""The search behind `edit`: steps towards λ at other data weights, each shortened until F falls."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from metainfluence.data import Task, Weights
from metainfluence.operators import flat_norm
from metainfluence.response import Options, solve_once
from metainfluence.solvers import SolveInfo


class Edit(NamedTuple):
    """Edited meta-parameters, and how far they got.

    Attributes:
      meta_params: λ as predicted for the new weights.
      info: report on the solves, leading axis 1 + num_newton_steps; here `outer_gradient_norm` is ‖D_λF‖ under the new
        weights *after* each step. Steps that were not tried repeat the entries of the last one that was.
      objective: F under the new weights, before the first step and after each, `[2 + num_newton_steps]`.
      step_lengths: the part of each step that was taken, `[1 + num_newton_steps]`: 1 for all of it, 0 where F did not
        fall along it or the step was not tried.
    """

    meta_params: PyTree
    info: SolveInfo
    objective: Float[Array, " steps"] | None = None
    step_lengths: Float[Array, " steps"] | None = None


# A step that must be made shorter than this for F to fall is not taken.
_SHORTEST = 1e-3


class _Point(NamedTuple):
    """λ with F, ‖D_λF‖ and the largest ‖∂_θ L_in‖, under the new weights."""

    meta_params: PyTree
    value: Array
    norm: Array
    inner_norm: Array | None


class _Search(NamedTuple):
    """An edit under way.

    Attributes:
      point: the best point so far.
      step: the step from there that is being tried.
      slope: ⟨D_λF, step⟩ at the point.
      length: the part of the step that is tried; 0 where the point itself is evaluated.
      number: the step's number, 0 for the first-order one; −1 before that is computed.
      running: whether the search goes on.
      edit: the result so far; entries of steps still to come hold the present values.
    """

    point: _Point
    step: PyTree
    slope: Array
    length: Array
    number: Array
    running: Array
    edit: Edit


def edited(options: Options, count: int, meta_params: PyTree, tasks: Task, old: Weights, new: Weights) -> Edit:
    """The first-order step and up to `count` Newton steps, each shortened until F falls.

    One compiled body serves all steps: it expands F at the point that is tried, and the next step starts there if the
    point is taken. So a full step costs what a Newton step costs, and each halving costs one expansion.
    """
    direction = jax.tree.map(jnp.subtract, new, old)
    chunks = options.chunks(meta_params, tasks)
    # Traced once, for the report's shapes and for the steps themselves.
    expanded = jax.jit(lambda at, tasks, weights: options.expanded(at, tasks, weights, chunks), inline=True)

    def turn(search: _Search) -> _Search:
        point, asking, looking = search.point, search.number < 0, search.length == 0
        here = jax.tree.map(
            lambda p, s: jnp.where(looking, p, p + search.length.astype(p.dtype) * s), point.meta_params, search.step
        )
        at = expanded(here, tasks, optax.tree.where(asking, old, new))
        tried = _Point(here, at.objective, flat_norm(at.gradient), at.inner_gradient_norm)

        # Armijo's rule; near a minimum, differences of F drown in rounding.
        needed = point.value + 1e-4 * search.length * jnp.minimum(search.slope, 0)
        level = point.value + 10 * float(jnp.finfo(point.value.dtype).eps) * jnp.abs(point.value)
        lower = (tried.value <= needed) | ((tried.value <= level) & (tried.norm < point.norm))
        taken = looking | lower | (count == 0)
        ended = ~taken & (search.length < _SHORTEST)
        done = ~looking & (taken | ended)
        follows = search.number < count
        # Where the first-order step fails, Newton's steps start from the same point, which is evaluated once more.
        again = ended & (search.number == 0) & follows
        solving = asking | (done & taken & follows) | (looking & (search.number > 0))
        number = jnp.where(asking | (done & taken & follows) | again, search.number + 1, search.number)
        point = optax.tree.where(taken, tried, point)

        def solved() -> tuple[PyTree, SolveInfo]:
            rhs = jax.lax.cond(asking, lambda: at.mixed(direction), lambda: at.gradient)
            solution, info = solve_once(options, at, rhs)
            return jax.tree.map(jnp.negative, solution), info

        def unsolved() -> tuple[PyTree, SolveInfo]:
            return search.step, jax.tree.map(lambda leaf: leaf[-1], search.edit.info)

        step, info = jax.lax.cond(solving, solved, unsolved)
        slope = optax.tree.vdot(at.gradient, step).astype(point.value.dtype)
        # Where H is indefinite Newton's step may lead uphill.
        turned = solving & ~asking & (slope > 0)
        step = jax.tree.map(lambda leaf: jnp.where(turned, -leaf, leaf), step)
        slope = jnp.where(solving | looking, jnp.where(turned, -slope, slope), search.slope)
        length = jnp.where(looking | taken, jnp.ones_like(search.length), search.length / 2)

        objective: Any = search.edit.objective
        told = search.edit.info._replace(outer_gradient_norm=None, inner_gradient_norm=None)
        told = _from(number, told, info._replace(outer_gradient_norm=None, inner_gradient_norm=None), solving)
        moved = (search.edit.info.outer_gradient_norm, search.edit.info.inner_gradient_norm, search.edit.step_lengths)
        reached = (point.norm, point.inner_norm, jnp.where(taken, search.length, 0))
        outer, inner, lengths = _from(search.number, moved, reached, done)
        values = _from(search.number, objective[:1], point.value, looking & (search.number == 0))
        values = jnp.concatenate([values, _from(search.number, objective[1:], point.value, done)])
        told = told._replace(outer_gradient_norm=outer, inner_gradient_norm=inner)
        return _Search(
            point=point,
            step=step,
            slope=slope,
            length=jnp.where(asking | again, jnp.zeros_like(length), length),
            number=number,
            running=looking | ~done | (taken & follows) | again,
            edit=Edit(point.meta_params, told, values, lengths),
        )

    def nothing(info: SolveInfo, value: Array) -> _Search:
        zeros = jax.tree.map(lambda leaf: jnp.zeros((count + 1, *leaf.shape), leaf.dtype), info)
        zero = jnp.zeros((), value.dtype)
        norms: Any = (info.outer_gradient_norm, info.inner_gradient_norm)
        point = _Point(meta_params, zero, *jax.tree.map(lambda norm: jnp.zeros((), norm.dtype), norms))
        edit = Edit(meta_params, zeros, jnp.zeros(count + 2, value.dtype), jnp.zeros(count + 1, value.dtype))
        step = jax.tree.map(jnp.zeros_like, meta_params)
        return _Search(point, step, zero, zero, jnp.int32(-1), jnp.bool_(True), edit)

    def first() -> tuple[SolveInfo, Array]:
        at = expanded(meta_params, tasks, old)
        return solve_once(options, at, at.gradient)[1], at.objective

    last = jax.lax.while_loop(lambda search: search.running, turn, nothing(*jax.eval_shape(first)))
    return last.edit


def _from(number: Array, kept: PyTree, now: PyTree, when: Array) -> PyTree:
    """Leaves with a leading axis of steps, with `now` written in from step `number` on, where `when` holds."""

    def put(kept: Array, now: Array) -> Array:
        return jnp.where(when & (jnp.arange(kept.shape[0], dtype=jnp.int32) >= number), now, kept)

    return jax.tree.map(put, kept, now)
