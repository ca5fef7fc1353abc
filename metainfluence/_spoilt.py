"""Which tasks make a derivative NaN or infinite: by their data, or by a program that has no derivative there."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from metainfluence._checks import concrete
from metainfluence.data import Task, Weights, map_examples, name_not_finite, not_finite, unit_weights
from metainfluence.operators import flat_norm
from metainfluence.problem import Bilevel, evaluate

_AT_ONCE = 64


class SpoiltTaskWarning(UserWarning):
    """Tasks whose own gradients are NaN or infinite though their data are not, and which are treated as absent."""


def finite_gradients(problem: Bilevel, meta_params: PyTree, tasks: Task, weights: Weights) -> Array:
    """Which tasks' own total gradients are finite, `[T]`."""

    def finite(data: tuple[Task, Weights]) -> Array:
        return jnp.isfinite(flat_norm(jax.grad(lambda m: evaluate(problem, m, *data)[0])(meta_params)))

    return jax.lax.map(finite, (tasks, weights), batch_size=_AT_ONCE)


class Rest(NamedTuple):
    """Data without what spoils the sum.

    Attributes:
      tasks: with other data in place of what spoils the sum.
      rows: the task whose data stand in each task's place.
      lost: which tasks have a weight but are treated as absent, `[T]`.
      undefined: for which weights there is no derivative, as booleans.
    """

    tasks: Task
    rows: np.ndarray
    lost: np.ndarray
    undefined: Weights

    def weights(self, weights: Weights) -> Weights:
        """Weights of the examples that stand there now, and 0 for the tasks that are treated as absent."""
        support, query = (jnp.asarray(leaf)[self.rows] for leaf in (weights.support, weights.query))
        return Weights(jnp.where(self.lost, 0, weights.task), support, query)

    def left_out(self, weights: Weights) -> Spoilt:
        """What is missing from sums over these tasks."""
        return Spoilt(weights, self.undefined)


class Spoilt(NamedTuple):
    """What a sum over tasks has left out.

    Attributes:
      weights: as they were given.
      undefined: see `Rest`.
    """

    weights: Weights
    undefined: Weights

    def sensitivity(self, found: Weights) -> Weights:
        """∂_w of something, NaN where there is none."""
        return jax.tree.map(lambda none, value: jnp.where(none, jnp.nan, value), self.undefined, found)

    def along(self, direction: Weights, found: PyTree) -> PyTree:
        """A derivative along a direction, NaN where the direction asks for what is undefined."""
        asked = jax.tree.map(lambda none, d: jnp.any(none & (d != 0)), self.undefined, direction)
        none = jnp.any(jnp.stack(jax.tree.leaves(asked)))
        return jax.tree.map(lambda leaf: jnp.where(none, jnp.nan, leaf), found)


def sensitivity_of(spoilt: Spoilt | None, found: Weights, many: bool = False) -> Weights:
    """dφ/dw of a target, or of several on a leading axis, NaN where there is none."""
    if spoilt is None:
        return found
    return jax.vmap(spoilt.sensitivity)(found) if many else spoilt.sensitivity(found)


def change_along(spoilt: Spoilt | None, direction: Weights, found: PyTree, many: bool = False) -> PyTree:
    """The change along a direction, or along several on a leading axis, NaN where one asks for what is undefined."""
    if spoilt is None:
        return found
    return jax.vmap(spoilt.along)(direction, found) if many else spoilt.along(direction, found)


def solutions_of(spoilt: Spoilt | None, rhs: PyTree, solutions: PyTree, many: bool) -> PyTree:
    """Solutions, NaN where spoilt tasks made the right-hand side NaN: some solvers answer 0 there."""
    if spoilt is None:
        return solutions

    def one(rhs: PyTree, solution: PyTree) -> PyTree:
        none = ~jnp.isfinite(flat_norm(rhs))
        return jax.tree.map(lambda leaf: jnp.where(none, jnp.nan, leaf), solution)

    return (jax.vmap(one) if many else one)(rhs, solutions)


def weighed(weights: Weights, sensitivity: Weights, spoilt: Spoilt | None) -> Weights:
    """The product w · dφ/dw; 0 where w is 0, even if dφ/dw is NaN."""
    product = jax.tree.map(jnp.multiply, weights, sensitivity)
    return product if spoilt is None else jax.tree.map(lambda w, p: jnp.where(w == 0, 0, p), weights, product)


def without_spoilt(
    problem: Bilevel,
    norm: Array,
    meta_params: PyTree,
    tasks: Task,
    weights: Weights,
    present: Weights | None = None,
) -> Rest | None:
    """The tasks, where those that spoil the sum have another one's data at weight 0; None where nothing is spoilt.

    Zero times NaN is NaN, so a weight of 0 does not take a task out of a sum. Under jit nothing can be detected.

    Args:
      problem: the problem.
      norm: ‖D_λF‖, finite or not.
      meta_params: λ.
      tasks: stacked tasks.
      weights: their weights.
      present: weights by which a datum counts as absent; None for `weights`.

    Warns:
      SpoiltTaskWarning: naming the tasks with non-zero weight and finite data whose own gradient is not finite.

    Raises:
      ValueError: naming the leaf and the tasks with data that are not finite.
    """
    if not concrete(norm, meta_params, tasks, weights) or np.isfinite(np.asarray(norm)):
        return None
    name_not_finite(norm, tasks, "tasks")

    each = jax.jit(lambda *data: finite_gradients(problem, *data))
    spoilt = np.flatnonzero(~np.asarray(each(meta_params, tasks, weights)))
    if not spoilt.size or spoilt.size == len(weights.task):
        return None
    undefined: Any = jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), weights)
    present = weights if present is None else present
    rest = _without_examples(tasks, present, spoilt)
    if rest is not None:
        tasks, (undefined.support[:], undefined.query[:]) = rest
        spoilt = np.flatnonzero(~np.asarray(each(meta_params, tasks, weights)))
    lost = np.zeros(len(weights.task), bool)
    lost[spoilt] = np.asarray(present.task)[spoilt] != 0
    if np.any(lost):
        found = told_of_spoilt(problem, meta_params, tasks, weights, np.flatnonzero(lost))
        warnings.warn(found, SpoiltTaskWarning, stacklevel=4)
    rows = np.arange(len(weights.task))
    if spoilt.size:
        rows[spoilt] = np.setdiff1d(rows, spoilt)[0]
    undefined.task[spoilt], undefined.support[lost], undefined.query[lost] = True, True, True
    return Rest(jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], tasks), rows, lost, undefined)


def told_of_spoilt(problem: Bilevel, meta_params: PyTree, tasks: Task, weights: Weights, lost: np.ndarray) -> str:
    """Which tasks are treated as absent, why, and what to do."""
    named = f"{'task' if lost.size == 1 else 'tasks'} {', '.join(map(str, lost[:8]))}{' …' if lost.size > 8 else ''}"
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf)[lost[0]], (tasks, weights))
    where, examples = _place(problem, meta_params, *one)
    pairs = {side: [(int(lost[0]), j) for j in found] for side, found in examples.items() if found}
    sides = ", ".join(f"{side}={found[:4]}" for side, found in pairs.items())
    remedy = sides if sides and lost.size == 1 else f"tasks={lost[:8].tolist()}"
    return (
        f"tasks: expected finite gradients, got NaN or infinity from the program of {named}, whose data are finite: "
        f"{where}; taken for absent, with scores of NaN, and the others keep theirs. Add a small number inside it, or "
        f"say so (weights=mi.drop(weights, {remedy}))"
    )


def told_of_source(problem: Bilevel, meta_params: PyTree, ids: Sequence[Any], first: Task) -> str:
    """Which tasks of a source make gradients NaN, and of the first of them, why.

    Args:
      problem: the problem.
      meta_params: λ.
      ids: of these tasks.
      first: the first of them, single.
    """
    named = ", ".join(map(repr, ids[:8])) + (" …" if len(ids) > 8 else "")
    data = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], first)
    cause = not_finite(data, f"source[{ids[0]!r}]")
    if cause is None:
        weights = jax.tree.map(lambda leaf: leaf[0], unit_weights(data))
        where = _place(problem, meta_params, jax.tree.map(jnp.asarray, first), weights)[0]
        cause = f"the data of {ids[0]!r} are finite; {where}"
    else:
        cause = cause.removesuffix(" in task 0")
    return f"expected finite gradients, got NaN or infinity from tasks {named}: {cause}"


def _without_examples(
    tasks: Task, weights: Weights, spoilt: np.ndarray
) -> tuple[Task, tuple[np.ndarray, np.ndarray]] | None:
    """Tasks in which examples of weight 0 of the spoilt ones have another example's data, and which examples these are.

    None where there are none.
    """
    changed = []
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
        batch = map_examples(
            lambda leaf, rows=rows: jnp.asarray(leaf)[np.arange(len(rows))[:, None], rows], getattr(tasks, side)
        )
        tasks = tasks._replace(**{side: batch})
        changed.append(rows != np.arange(own.shape[1]))
    return (tasks, (changed[0], changed[1])) if any(map(np.any, changed)) else None


def _place(problem: Bilevel, meta_params: PyTree, task: Task, weights: Weights) -> tuple[str, dict[str, list[int]]]:
    """Where in a task's program a derivative is lost: at examples, at an inner step, or in the adapted parameters.

    And the examples.
    """
    single = jax.jit(lambda m, t, w: finite_gradients(problem, m, *jax.tree.map(lambda x: x[None], (t, w)))[0])
    found: dict[str, list[int]] = {"support": [], "query": []}
    for side in ("support", "query"):
        size = getattr(weights, side).shape[0]
        for j in range(size if 1 < size <= _AT_ONCE else 0):
            rows = np.arange(size)
            rows[j] = (j + 1) % size
            batch = map_examples(lambda leaf, rows=rows: leaf[rows], getattr(task, side))
            if single(meta_params, task._replace(**{side: batch}), weights):
                found[side].append(j)
    if named := [f"{side} example {j}" for side, each in found.items() for j in each]:
        return f"a norm, root, log or quotient at 0 that goes with {' or '.join(named[:4])}", found
    if problem.adapt is not None:
        norms = getattr(problem.adapt, "inner_gradient_norms", None)
        norms = None if norms is None else np.asarray(jax.jit(norms)(meta_params, task, weights))
        if norms is not None and np.any(norms == 0):
            step = int(np.argmax(norms == 0))
            told = f"its inner gradient is exactly 0 at step {step}, where a norm, as in clipping, has no derivative"
            return told, found
        params = jax.jit(problem.adapt)(meta_params, task, weights)
        if not all(np.all(np.isfinite(np.asarray(leaf))) for leaf in jax.tree.leaves(params)):
            return "its adapted parameters are NaN, as the mean (0/0) of a class without examples", found
    return "a norm, root, log or quotient at 0, as in clipping a gradient that is 0 or a class without examples", found
