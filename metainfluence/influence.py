"""Influence: the derivative of the meta-parameters' optimum λ*(w) with respect to the data weights w.

    dλ*/dw = − H⁻¹ · ∂_w D_λ F

Forward mode (a direction in w) gives the change of λ: `task_if`, `instance_if`, `group_influence`, `edit`. Reverse mode
(a target φ(λ)) solves H s = ∇φ once and gives the scores of all data together: `influence_scores`.

Signs: `delta` is dλ*/dw, the change on up-weighting, so removal is λ − delta. A score is the predicted change of the
target on removal, − w · dφ/dw: positive, the datum helps (removing it raises the target loss); negative, it harms.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from metainfluence import solvers
from metainfluence._calls import maker
from metainfluence._target import target_gradient
from metainfluence.bilevel import Bilevel, check_meta_params, task_loss, with_hvp
from metainfluence.curvature import Curvature, Expansion, check_curvature, exact, expand, gradient_map
from metainfluence.damping import RANK as DAMPING_RANK
from metainfluence.damping import rule as damping_rule
from metainfluence.differentiation import REVERSE
from metainfluence.operators import Operator, check_damping
from metainfluence.preflight import Chunks, fitting_chunks
from metainfluence.solvers import SolveInfo, Solver
from metainfluence.tasks import (
    Task,
    Weights,
    check_batch_size,
    check_mesh,
    concrete,
    described,
    is_array,
    name_not_finite,
    reduce_tasks,
    resolve_weights,
    sizes,
)


class Influence(NamedTuple):
    """Derivatives of λ*.

    Attributes:
      delta: pytree like meta_params; with a leading axis for the data where there are several.
      info: report on the solves, one entry per right-hand side.
    """

    delta: PyTree
    info: SolveInfo


class Scores(NamedTuple):
    """Predicted change of the target when a datum is removed; positive helps, negative harms, padding has 0.

    Attributes:
      task: `[T]`.
      support: `[T, n_support]`.
      query: `[T, n_query]`.
      info: report on the solves.
    """

    task: Float[Array, " T"]
    support: Float[Array, "T n_support"]
    query: Float[Array, "T n_query"]
    info: SolveInfo


class Edit(NamedTuple):
    """Edited meta-parameters.

    Attributes:
      meta_params: λ as predicted for the new weights.
      info: report on the solves, leading axis 1 + num_newton_steps; here `outer_gradient_norm` is ‖D_λF‖ under the new
        weights *after* each step, and its smallest entry tells how far the result is from the new optimum.
    """

    meta_params: PyTree
    info: SolveInfo


class _Point(NamedTuple):
    """λ with all that its solves share; `matvecs` are those that chose the damping, `chunks` what fits in memory."""

    meta_params: PyTree
    tasks: Task
    weights: Weights
    expansion: Expansion
    gradient_norm: Array
    operator: Operator
    state: Any
    damping: Array
    matvecs: int
    chunks: Chunks


class _Method(NamedTuple):
    """The strategies that all makers take."""

    problem: Bilevel
    solver: Solver
    damping: Any
    curvature: Curvature
    batch_size: int | None
    mesh: Mesh | None

    @staticmethod
    def of(
        problem: Bilevel,
        solver: Solver | None,
        curvature: Curvature | None,
        damping: Any,
        batch_size: int | None,
        mesh: Mesh | None,
    ) -> _Method:
        curvature = exact() if curvature is None else curvature
        solver = solvers.auto() if solver is None else solver
        if not isinstance(solver, Solver):
            raise TypeError(f"solver: expected one of metainfluence.solvers, as cg(), got {solver!r}")
        check_curvature(problem, curvature)
        if isinstance(damping, str) and damping != "auto":
            raise ValueError(f'damping: expected a non-negative number or "auto", got {damping!r}')
        if not isinstance(damping, str):
            check_damping(damping)
        check_batch_size(batch_size)
        check_mesh(mesh)
        return _Method(problem, solver, damping, curvature, batch_size, mesh)

    def at(self, meta_params: PyTree, tasks: Task, weights: Weights | None, vectors: int = 1) -> _Point:
        """λ with what its solves for some right-hand sides share."""
        check_meta_params(meta_params)
        weights = resolve_weights(weights, tasks)
        chunks = Chunks(self.batch_size, None)
        if self.batch_size is None:
            chunks = fitting_chunks(self.problem, self.curvature, meta_params, tasks, vectors, self.mesh)
        expansion = expand(self.problem, self.curvature, chunks.tasks, self.mesh)(meta_params, tasks, weights)
        norm = optax.tree.norm(expansion.gradient)
        name_not_finite(norm, tasks, "tasks")
        damping, matvecs = self.damping, 0
        if isinstance(damping, str):
            fixed = jax.lax.stop_gradient((expansion.operator, expansion.gradient, meta_params))
            damping, matvecs = damping_rule(*fixed).value, DAMPING_RANK
        damping = jnp.asarray(damping, expansion.operator.shift.dtype)
        operator = expansion.operator.damped(damping)
        state = jax.lax.stop_gradient(self.solver.init(jax.lax.stop_gradient(operator)))
        return _Point(meta_params, tasks, weights, expansion, norm, operator, state, damping, matvecs, chunks)

    def solve(self, point: _Point, rhs: PyTree) -> tuple[PyTree, SolveInfo]:
        return self._solve(point, rhs, point.operator.matvec, self.solver.solve)

    def solve_all(self, point: _Point, rhs: PyTree) -> tuple[PyTree, SolveInfo]:
        """Solves for right-hand sides on a leading axis, in step: one batched product per step."""
        solve_many = self.solver.solve_many
        if solve_many is None or not self.solver.shares:
            if point.chunks.vectors is None:
                return jax.vmap(lambda rhs: self.solve(point, rhs))(rhs)
            return jax.lax.map(lambda rhs: self.solve(point, rhs), rhs, batch_size=point.chunks.vectors)
        return self._solve(point, rhs, jax.vmap(point.operator.matvec), solve_many)

    @staticmethod
    def _solve(
        point: _Point, rhs: PyTree, matvec: Callable[[PyTree], PyTree], solve: Callable[..., Any]
    ) -> tuple[PyTree, SolveInfo]:
        fixed = jax.lax.stop_gradient(point.operator)
        # Differentiated as the solution that it is, and not through the solver's steps.
        solution, info = jax.lax.custom_linear_solve(
            matvec, rhs, lambda _, rhs: solve(fixed, point.state, rhs), symmetric=True, has_aux=True
        )
        shape = info.status.shape
        info = info._replace(
            num_matvecs=info.num_matvecs + point.matvecs,
            outer_gradient_norm=jnp.broadcast_to(point.gradient_norm, shape),
            inner_gradient_norm=jnp.broadcast_to(point.expansion.inner_gradient_norm, shape),
            damping=jnp.broadcast_to(point.damping, shape),
        )
        return solution, info

    def solve_direction(self, point: _Point, direction: Weights) -> tuple[PyTree, SolveInfo]:
        """dλ*/dw along a direction in w."""
        direction = jax.tree.map(lambda d, w: d.astype(w.dtype), direction, point.weights)
        mixed = point.expansion.mixed(direction)
        return self.solve(point, jax.tree.map(jnp.negative, mixed))


def _term(problem: Bilevel, meta_params: PyTree, task: Task, weights: Weights, count: int) -> Array:
    """One task's term of F, w_k L_k / T."""
    value = task_loss(problem)(meta_params, task, weights)
    return value * weights.task.astype(value.dtype) / count


def _columns(problem: Bilevel, term: Callable[[PyTree, PyTree], Array], meta_params: PyTree, weights: PyTree) -> PyTree:
    """∂_w D_λ of a term: a pytree like the weights, of pytrees like λ with the weights' axes leading."""
    if problem.hvp == REVERSE:
        return jax.jacrev(lambda m: jax.grad(term, argnums=1)(m, weights))(meta_params)
    columns = jax.jacfwd(lambda w: jax.grad(term)(meta_params, w))(weights)
    # jacfwd nests the weights inside the leaves of λ, with their axes last.
    columns = jax.tree.transpose(jax.tree.structure(meta_params), jax.tree.structure(weights), columns)
    return jax.tree.map(
        lambda w, column: jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0) if w.ndim else leaf, column),
        weights,
        columns,
    )


@maker("(meta_params, tasks)")
def task_if(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
) -> Callable[..., Influence]:
    """Makes (meta_params, tasks, weights=None) -> Influence of every task: task-IF.

    delta[k] = dλ*/dw_k = − H⁻¹ D_λ L_k / T, so that λ − delta[k] predicts λ without task k (arXiv 2501.15963, §4). All
    T right-hand sides are stepped together, with one batched Hessian product per step.

    Args:
      problem: the problem.
      solver: one of `metainfluence.solvers`; None for `auto()`.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      damping: non-negative number added to every eigenvalue of H, or "auto" for the rule of `damping.auto`.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once where they fit in what memory
        is free, and else as many tasks, and right-hand sides, as do: see `preflight`.
      mesh: devices over which the task axis is sharded, over all axes of the mesh; None for where the tasks are.
      hvp: how derivatives of gradients are taken, "forward_over_reverse" or "reverse_over_reverse", see `bilevel`; None
        for the problem's own, which is the first unless it was told otherwise.

    Returns:
      Function whose delta has leaves `[T, ...]`, and info `[T]`.

    Raises:
      ValueError: as `total_hessian`; and for tasks, weights or meta_params that are malformed or not finite.
    """
    problem = with_hvp(problem, hvp)
    method = _Method.of(problem, solver, curvature, damping, batch_size, mesh)
    loss = task_loss(problem)

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Influence:
        point = method.at(meta_params, tasks, weights, sizes(tasks).lead[0])
        count = point.weights.task.shape[0]

        def chunk(data: tuple[Task, Weights]) -> tuple[tuple[()], PyTree]:
            gradients = jax.vmap(lambda task, w: jax.grad(loss)(meta_params, task, w))(*data)
            return (), jax.tree.map(lambda g: -g / count, gradients)

        _, rhs = reduce_tasks(chunk, (tasks, point.weights), point.chunks.tasks, mesh)
        return Influence(*method.solve_all(point, rhs))

    return run


@maker("(meta_params, tasks, index)")
def instance_if(
    problem: Bilevel,
    side: str,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
) -> Callable[..., Influence]:
    """Makes (meta_params, tasks, index, weights=None) -> Influence of every example on one side of task `index`.

    delta[j] = dλ*/dw of example j. For a query example − H⁻¹ (w_k b_kj/T) D_λ ℓ_out; for a support example − H⁻¹ ∂_u
    D_λF, the mixed derivative through the adapted parameters, which contains every term of the paper's D_λP with the
    opposite sign. λ − delta[j] predicts λ without the example, on either side.

    Args:
      problem: the problem.
      side: "support" or "query".
      solver: as in `task_if`, like the other arguments.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.

    Returns:
      Function whose delta has leaves `[n, ...]`, and info `[n]`; 0 for padding.

    Raises:
      ValueError: an unknown side, an index out of range, and as `task_if`.
    """
    if side not in ("support", "query"):
        raise ValueError(f"side: expected 'support' or 'query', got {side!r}")
    problem = with_hvp(problem, hvp)
    method = _Method.of(problem, solver, curvature, damping, batch_size, mesh)

    def run(meta_params: PyTree, tasks: Task, index: Any, weights: Weights | None = None) -> Influence:
        count = sizes(tasks).lead[0]
        if not is_array(index) or jnp.ndim(index) != 0 or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
            raise TypeError(f"index: expected one integer, got {described(index)}")
        if concrete(index) and not 0 <= int(index) < count:
            raise ValueError(f"index: expected a task from 0 to {count - 1}, got {int(index)}")
        point = method.at(meta_params, tasks, weights, getattr(sizes(tasks), side))
        task, own = jax.tree.map(lambda leaf: leaf[index], (tasks, point.weights))

        def term(meta_params: PyTree, values: Array) -> Array:
            return _term(problem, meta_params, task, own._replace(**{side: values}), count)

        rhs = jax.tree.map(jnp.negative, _columns(problem, term, meta_params, getattr(own, side)))
        return Influence(*method.solve_all(point, rhs))

    return run


@maker("(meta_params, tasks, direction)")
def group_influence(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
) -> Callable[..., Influence]:
    """Makes (meta_params, tasks, direction, weights=None) -> Influence along a direction in the data weights.

    delta = (dλ*/dw) · direction, by one solve. λ + delta predicts λ at the weights w + direction; to remove a group,
    pass the direction `new_weights − weights`.

    Args:
      problem: the problem.
      solver: as in `task_if`, like the other arguments.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.

    Raises:
      ValueError: a direction of the wrong shape or not finite, and as `task_if`.
    """
    problem = with_hvp(problem, hvp)
    method = _Method.of(problem, solver, curvature, damping, batch_size, mesh)

    def run(meta_params: PyTree, tasks: Task, direction: Weights, weights: Weights | None = None) -> Influence:
        direction = resolve_weights(direction, tasks, name="direction")
        point = method.at(meta_params, tasks, weights)
        return Influence(*method.solve_direction(point, direction))

    return run


@maker("(meta_params, tasks, *target_args)")
def influence_scores(
    problem: Bilevel,
    target: Callable[..., Array],
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores of all tasks and all examples, by one solve.

    Solves H s = ∇φ, then − dφ/dw = ∂_w ⟨D_λF, s⟩ by one transposed product with the mixed derivative ∂_w D_λF.

    Args:
      problem: the problem.
      target: φ: (meta_params, *target_args) -> scalar, as made by `query_loss`. Its arguments are passed on at the
        call, so that held-out data are data to jit.
      solver: as in `task_if`, like the other arguments.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.

    Returns:
      Function whose scores are − w · dφ/dw at the current weights: the predicted change of φ on removal, in its units.

    Raises:
      ValueError: a target that is no scalar, and as `task_if`.
    """
    if not callable(target):
        expected = "a function (meta_params, *target_args) -> scalar"
        raise TypeError(f"target: expected {expected}, got {reprlib.repr(target)}")
    problem = with_hvp(problem, hvp)
    method = _Method.of(problem, solver, curvature, damping, batch_size, mesh)

    def run(meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Scores:
        # What is wrong with the target is told before the longer part.
        check_meta_params(meta_params)
        weights = resolve_weights(weights, tasks)
        slope = target_gradient(target, meta_params, target_args)
        point = method.at(meta_params, tasks, weights)
        direction, info = method.solve(point, slope)
        sensitivity = point.expansion.mixed_transposed(direction)
        task, support, query = jax.tree.map(jnp.multiply, point.weights, sensitivity)
        return Scores(task, support, query, info)

    return run


@maker("(meta_params, tasks)")
def self_influence(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
) -> Callable[..., Scores]:
    """Makes (meta_params, tasks, weights=None) -> Scores of every datum on its own term of F.

    With g = ∂_w D_λF of a datum, its score is w · gᵀ H⁻¹ g: the predicted change of ∂F/∂w, the datum's own term of F,
    on its removal. Not negative where H is positive definite. High values mark data that λ had to be bent for. One
    solve per datum, all of a task's in step.

    Args:
      problem: the problem.
      solver: as in `task_if`, like the other arguments.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.

    Returns:
      Function whose info has leaves `[T, 1 + n_support + n_query]`: the task, its support and its query examples.
    """
    problem = with_hvp(problem, hvp)
    method = _Method.of(problem, solver, curvature, damping, batch_size, mesh)

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Scores:
        size = sizes(tasks)
        point = method.at(meta_params, tasks, weights, 1 + size.support + size.query)
        count = point.weights.task.shape[0]

        def single(data: tuple[Task, Weights]) -> tuple[Weights, SolveInfo]:
            task, own = data
            columns = _columns(problem, lambda m, w: _term(problem, m, task, w, count), meta_params, own)
            task_column = jax.tree.map(lambda leaf: leaf[None], columns.task)
            rhs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), task_column, columns.support, columns.query)
            solution, info = method.solve_all(point, rhs)
            products = jax.vmap(optax.tree.vdot)(rhs, solution)
            split = 1 + own.support.shape[0]
            parts = Weights(products[0], products[1:split], products[split:])
            return jax.tree.map(lambda w, p: w * p.astype(w.dtype), own, parts), info

        (task, support, query), info = jax.lax.map(single, (tasks, point.weights))
        return Scores(task, support, query, info)

    return run


@maker("(meta_params, tasks, new_weights)")
def edit(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    num_newton_steps: int = 1,
) -> Callable[..., Edit]:
    """Makes (meta_params, tasks, new_weights, weights=None) -> Edit: λ at new data weights, without retraining.

    First order: λ + (dλ*/dw) · (new_weights − weights). Then `num_newton_steps` Newton steps on F at the new weights,
    λ − H⁻¹ D_λF, each with the Hessian at the point reached.

    A Newton step may lead away, too, where H is indefinite or changes much along it. Of the points from the first-order
    one on that with the smallest ‖D_λF‖ is the answer; `info.outer_gradient_norm` holds that of each, `[1 + steps]`.

    Args:
      problem: the problem.
      solver: as in `task_if`, like the other arguments.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      num_newton_steps: steps after the first-order one, at least 0.

    Raises:
      ValueError: `num_newton_steps` negative, new weights of the wrong shape or not finite, and as `task_if`.
    """
    if isinstance(num_newton_steps, bool) or not isinstance(num_newton_steps, int) or num_newton_steps < 0:
        raise ValueError(f"num_newton_steps: expected a non-negative integer, got {num_newton_steps!r}")
    problem = with_hvp(problem, hvp)
    method = _Method.of(problem, solver, curvature, damping, batch_size, mesh)
    gradient = gradient_map(problem, batch_size, mesh)

    def run(meta_params: PyTree, tasks: Task, new_weights: Weights, weights: Weights | None = None) -> Edit:
        check_meta_params(meta_params)
        old = resolve_weights(weights, tasks)
        new = jax.tree.map(
            lambda w, like: w.astype(like.dtype), resolve_weights(new_weights, tasks, name="new_weights"), old
        )
        direction = jax.tree.map(jnp.subtract, new, old)

        # The first-order step and Newton's differ in the right-hand side and the weights, and share one compiled body.
        def step(
            carry: tuple[PyTree, PyTree, Array], number: Array
        ) -> tuple[tuple[PyTree, PyTree, Array], tuple[SolveInfo, Array, Array]]:
            current, best, least = carry
            first = number == 0
            here = method.at(current, tasks, optax.tree.where(first, old, new))
            nearer = (number == 1) | (~first & (here.gradient_norm < least))
            best, least = optax.tree.where(nearer, current, best), jnp.where(nearer, here.gradient_norm, least)
            expansion = here.expansion
            rhs = jax.lax.cond(first, lambda: expansion.mixed(direction), lambda: expansion.gradient)
            change, info = method.solve(here, rhs)
            moved = jax.tree.map(jnp.subtract, current, change)
            return (moved, best, least), (info, here.gradient_norm, expansion.inner_gradient_norm)

        start = (meta_params, meta_params, jnp.zeros_like(optax.tree.norm(meta_params)))
        (edited, best, least), (info, norms, inner_norms) = jax.lax.scan(step, start, jnp.arange(1 + num_newton_steps))
        final, final_inner = gradient(exact(), edited, tasks, edited, new)
        name_not_finite(final, tasks, "tasks")
        norm = optax.tree.norm(final)
        info = info._replace(
            outer_gradient_norm=jnp.append(norms[1:], norm),
            inner_gradient_norm=jnp.append(inner_norms[1:], final_inner),
        )
        return Edit(optax.tree.where(norm < least, edited, best) if num_newton_steps else edited, info)

    return run
