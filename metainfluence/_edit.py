"""The search behind `edit`: steps towards λ at other data weights, each as far as F falls."""

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
        weights *after* each step. Of steps that were no more tried, what is told of the last one stands again.
      objective: F under the new weights, before the first step and after each, `[2 + num_newton_steps]`.
      step_lengths: the part of each step that was taken, `[1 + num_newton_steps]`: 1 for all of it, 0 where F rose
        along all of it or nothing more was tried.
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
      point: the best so far.
      step: from it, which is tried.
      slope: ⟨D_λF, step⟩ there.
      length: the part of the step that is tried; 0 where the point itself is looked at.
      number: of the step, 0 for the first-order one; −1 before that is known.
      running: whether more is to be done.
      edit: what is told, with the entries of steps that are still to come as they are now.
    """

    point: _Point
    step: PyTree
    slope: Array
    length: Array
    number: Array
    running: Array
    edit: Edit


def edited(options: Options, count: int, meta_params: PyTree, tasks: Task, old: Weights, new: Weights) -> Edit:
    """The first-order step and up to `count` Newton steps, each as far as F falls.

    One compiled body serves all: it expands F at the point that is tried, from which the next step starts if it is
    taken. So a whole step costs what Newton's does, and each halving one expansion.
    """
    direction = jax.tree.map(jnp.subtract, new, old)
    chunks = options.chunks(meta_params, tasks)
    # Traced once, for what is told of a step as for the step itself.
    expanded = jax.jit(lambda at, tasks, weights: options.expanded(at, tasks, weights, chunks), inline=True)

    def turn(search: _Search) -> _Search:
        point, asking, looking = search.point, search.number < 0, search.length == 0
        here = jax.tree.map(
            lambda p, s: jnp.where(looking, p, p + search.length.astype(p.dtype) * s), point.meta_params, search.step
        )
        at = expanded(here, tasks, optax.tree.where(asking, old, new))
        tried = _Point(here, at.objective, flat_norm(at.gradient), at.inner_gradient_norm)

        # Armijo's rule; near a minimum differences of F drown in rounding.
        needed = point.value + 1e-4 * search.length * jnp.minimum(search.slope, 0)
        level = point.value + 10 * float(jnp.finfo(point.value.dtype).eps) * jnp.abs(point.value)
        lower = (tried.value <= needed) | ((tried.value <= level) & (tried.norm < point.norm))
        taken = looking | lower | (count == 0)
        ended = ~taken & (search.length < _SHORTEST)
        done = ~looking & (taken | ended)
        follows = search.number < count
        # Where the first-order step leads nowhere, Newton's start where it did, which is looked at once more.
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
    """Leaves with a leading axis for the steps, in which what is now stands from a step on, where it is to be told."""

    def put(kept: Array, now: Array) -> Array:
        return jnp.where(when & (jnp.arange(kept.shape[0], dtype=jnp.int32) >= number), now, kept)

    return jax.tree.map(put, kept, now)
