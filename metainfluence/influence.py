"""Influence: functions that query the response of a stationary point, a few lines each.

Forward (a direction in the data weights w) gives the change of λ: `task_if`, `instance_if`, `group_influence`, `edit`.
Reverse (a target φ(λ)) gives the scores of all data at once: `influence_scores`.

Signs: `delta` is dλ*/dw, the change on up-weighting, so removal is λ − delta. A score is the predicted change of the
target on removal, − w · dφ/dw. A datum with a positive score helps (removing it raises the target loss); one with a
negative score harms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from metainfluence._checks import concrete, described, is_array, maker
from metainfluence._chunks import reduce_tasks
from metainfluence._edit import Edit, edited
from metainfluence._spoilt import weighed, without_spoilt
from metainfluence.curvature import Curvature
from metainfluence.data import Task, Weights, resolve_weights, sizes
from metainfluence.differentiation import REVERSE
from metainfluence.problem import Bilevel, evaluate, task_loss
from metainfluence.response import (
    Influence,
    Options,
    Scores,
    check_target,
    check_total_effect,
    checked,
    optimum_at,
    shares_support,
    slopes_of,
    solve_once,
    warn_of_direct_effect,
)
from metainfluence.solvers import SolveInfo, Solver

__all__ = [
    "Edit",
    "Influence",
    "Scores",
    "edit",
    "group_influence",
    "influence_scores",
    "instance_if",
    "self_influence",
    "task_if",
]


class InfluenceOfTasks(Protocol):
    """What `task_if` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Influence:
        """Influence of every task."""


class InfluenceOfExamples(Protocol):
    """What `instance_if` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, index: Any, weights: Weights | None = None) -> Influence:
        """Influence of every example on one side of task `index`."""


class InfluenceOfGroup(Protocol):
    """What `group_influence` makes."""

    def __call__(
        self, meta_params: PyTree, tasks: Task, direction: Weights, weights: Weights | None = None
    ) -> Influence:
        """Influence along a direction in the data weights."""


class ScoresForTarget(Protocol):
    """What `influence_scores` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Scores:
        """Scores of all tasks and examples for the target at these arguments."""


class ScoresOfData(Protocol):
    """What `self_influence` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Scores:
        """Scores of all tasks and examples, each on its own term of F."""


class EditOfWeights(Protocol):
    """What `edit` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, new_weights: Weights, weights: Weights | None = None) -> Edit:
        """λ at the new weights."""


@maker
def task_if(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
) -> InfluenceOfTasks:
    """Makes (meta_params, tasks, weights=None) -> Influence of every task: task-IF.

    delta[k] = dλ*/dw_k = − H⁻¹ D_λ L_k / T, so that λ − delta[k] predicts λ without task k (arXiv 2501.15963, §4). All
    T right-hand sides are solved together, with one batched Hessian product per step.

    Args:
      problem: the problem.
      solver: one of `metainfluence.solvers`; None for `auto()`.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      damping: non-negative number added to every eigenvalue of H, or "auto" for the rule of `damping.auto`.
      batch_size: tasks per chunk, which bounds the memory. None chooses by shapes alone: on a CPU a chunk that stays in
        its cache, on an accelerator all tasks that fit.
      mesh: devices over which tasks are sharded, along all axes of the mesh; None leaves tasks where they are.
      hvp: how derivatives of gradients are taken, "forward_over_reverse" or "reverse_over_reverse", see `bilevel`; None
        for the problem's own, which by default is the first.
      precision: of matrix products, also the problem's, see `jax.default_matmul_precision`; None for JAX's setting.

    Returns:
      Function that returns delta with leaves `[T, ...]` and info with leaves `[T]`.

    Warns:
      SpoiltTaskWarning: outside jit, tasks whose gradients are NaN although their data are not, for example where a
        norm is taken at 0. The warning names the tasks and the place. They are treated as absent and get NaN; the other
        tasks keep their answers.

    Raises:
      ValueError: as `total_hessian`; and for tasks, weights or meta_params that are malformed or not finite.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> meta_params = jnp.asarray(2.0)  # the mean, which is the minimum
      >>> found = jax.jit(mi.task_if(problem))(meta_params, tasks)  # (query − 2) / 3
      >>> found.delta.round(3).tolist()
      [-0.667, -0.333, 1.0]
      >>> (meta_params - found.delta[2]).round(3).tolist()  # predicted without the last task; retrained: 0.5
      1.0
    """
    options = Options.of(**locals())

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Influence:
        with options.traced():
            point = checked(meta_params, tasks, weights)
            count = sizes(tasks).lead[0]
            at = optimum_at(options, *point, vectors=count)
            loss = task_loss(options.problem, precision=precision)

            def chunk(data: tuple[Task, Weights]) -> tuple[tuple[()], PyTree]:
                gradients = jax.vmap(lambda task, w: jax.grad(loss)(at.meta_params, task, w))(*data)
                return (), jax.tree.map(lambda g: -g / count, gradients)

            _, rhs = reduce_tasks(chunk, (tasks, at.weights), at.expansion.chunks.tasks, mesh)
            return Influence(*at.solve_many(rhs))

    return run


@maker
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
    precision: str | None = "highest",
) -> InfluenceOfExamples:
    """Makes (meta_params, tasks, index, weights=None) -> Influence of every example on one side of task `index`.

    delta[j] = dλ*/dw of example j. For a query example it is − H⁻¹ (w_k b_kj/T) D_λ ℓ_out. For a support example it is
    − H⁻¹ ∂_u D_λF, with the mixed derivative through the adapted parameters, which contains every term of the paper's
    D_λP with the opposite sign. λ − delta[j] predicts λ without the example, on either side.

    Args:
      problem: the problem.
      side: "support" or "query".
      solver: as in `task_if`.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      precision: as in `task_if`.

    Returns:
      Function that returns delta with leaves `[n, ...]` and info with leaves `[n]`; 0 for padding.

    Raises:
      ValueError: an unknown side, an index out of range, and as `task_if`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0, 2.0], [4.0, 6.0]]))
      >>> meta_params = jnp.asarray(3.0)  # the mean, which is the minimum
      >>> found = jax.jit(mi.instance_if(problem, "query"))(meta_params, tasks, 1)
      >>> found.delta.round(3).tolist()  # (query − 3) / 4
      [0.25, 0.75]
    """
    given = {name: value for name, value in locals().items() if name != "side"}
    if side not in ("support", "query"):
        raise ValueError(f"side: expected 'support' or 'query', got {side!r}")
    options = Options.of(**given)

    def run(meta_params: PyTree, tasks: Task, index: Any, weights: Weights | None = None) -> Influence:
        count = sizes(tasks).lead[0]
        if not is_array(index) or jnp.ndim(index) != 0 or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
            raise TypeError(f"index: expected one integer, got {described(index)}")
        if concrete(index) and not 0 <= int(index) < count:
            raise ValueError(f"index: expected a task from 0 to {count - 1}, got {int(index)}")
        with options.traced():
            at = optimum_at(options, *checked(meta_params, tasks, weights), vectors=getattr(sizes(tasks), side))
            task, own = jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], (tasks, at.weights))

            def term(meta_params: PyTree, values: Array) -> Array:
                return _term(options.problem, meta_params, task, own._replace(**{side: values}), count)

            rhs = _columns(options.problem, term, at.meta_params, getattr(own, side))
            if at.expansion.spoilt is not None:
                rhs = _present(own, rhs)
            return Influence(*at.solve_many(jax.tree.map(jnp.negative, rhs)))

    return run


@maker
def group_influence(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
) -> InfluenceOfGroup:
    """Makes (meta_params, tasks, direction, weights=None) -> Influence along a direction in the data weights.

    delta = (dλ*/dw) · direction, by one solve. λ + delta predicts λ at the weights w + direction; to remove a group,
    pass the direction `new_weights − weights`.

    Args:
      problem: the problem.
      solver: as in `task_if`.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      precision: as in `task_if`.

    Raises:
      ValueError: a direction of the wrong shape or not finite, and as `task_if`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> meta_params = jnp.asarray(2.0)  # the mean, which is the minimum
      >>> weights = mi.unit_weights(tasks)
      >>> direction = jax.tree.map(jnp.subtract, mi.drop(weights, tasks=[0, 1]), weights)
      >>> found = jax.jit(mi.group_influence(problem))(meta_params, tasks, direction)
      >>> (meta_params + found.delta).round(3).tolist()  # 2 + (2 − 0) / 3 + (2 − 1) / 3
      3.0
    """
    options = Options.of(**locals())

    def run(meta_params: PyTree, tasks: Task, direction: Weights, weights: Weights | None = None) -> Influence:
        direction = resolve_weights(direction, tasks, name="direction")
        with options.traced():
            point = checked(meta_params, tasks, weights)
            at = options.expanded(*point, options.chunks(*point[:2]))
            direction = jax.tree.map(lambda d, w: d.astype(w.dtype), direction, at.weights)
            return Influence(*solve_once(options, at, jax.tree.map(jnp.negative, at.mixed(direction))))

    return run


@maker
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
    precision: str | None = "highest",
    total_effect: bool = False,
) -> ScoresForTarget:
    """Makes (meta_params, tasks, *target_args, weights=None) -> Scores of all tasks and all examples, by one solve.

    Solves H s = ∇φ, then computes − dφ/dw = ∂_w ⟨D_λF, s⟩ by one transposed product with the mixed derivative ∂_w D_λF.
    The result is that of `scores(optimum(problem, …)(meta_params, tasks), target)(*target_args)`.

    A removed example may leave the target's own tasks too, for example where λ are hyperparameters and the target is
    the test loss of the model that they train. Then φ depends on w directly, and `total_effect=True` adds that part:
    − w · (∂_wφ + (dλ*/dw)ᵀ ∂_λφ).

    Args:
      problem: the problem.
      target: φ: (meta_params, *target_args) -> scalar, as made by `query_loss`. Its arguments are passed at the call,
        so that jit sees held-out data as arguments, not as constants.
      solver: as in `task_if`.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      precision: as in `task_if`.
      total_effect: whether φ also depends on the data weights. It is then called with `weights=`, the weights of the
        training tasks. `query_loss` adapts its k-th task with the support weights of the k-th training task.

    Returns:
      Function whose scores are − w · dφ/dw at the current weights: the predicted change of φ on removal, in φ's units.

    Warns:
      DirectEffectWarning: outside jit, a target whose tasks share support data with training, without `total_effect`;
        `check` gives the same warning, however the scores were made.
      SpoiltTaskWarning: as `task_if`.

    Raises:
      TypeError: a target that takes no `weights`, although `total_effect` is set.
      ValueError: a target that is not a scalar, and as `task_if`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> meta_params = jnp.asarray(2.0)  # the mean, which is the minimum
      >>> test_tasks = mi.Task(support=(), query=jnp.asarray([[3.0]]))
      >>> found = jax.jit(mi.influence_scores(problem, mi.query_loss(problem)))(meta_params, tasks, test_tasks)
      >>> found.task.round(3).tolist()  # (query − 2) / 3 · (3 − 2): the last task helps
      [-0.667, -0.333, 1.0]
    """
    given = {name: value for name, value in locals().items() if name not in ("target", "total_effect")}
    check_target(target)
    check_total_effect(total_effect)
    options = Options.of(**given)

    def run(meta_params: PyTree, tasks: Task, *target_args: Any, weights: Weights | None = None) -> Scores:
        with options.traced():
            point = checked(meta_params, tasks, weights)
            # Errors of the target are raised before the long part.
            slope, direct = slopes_of(target, point[0], target_args, point[2], total_effect)
            at = options.expanded(*point, options.chunks(*point[:2]))
            solution, info = solve_once(options, at, slope)
            change = at.mixed_transposed(solution)
            if direct is None:
                info = info._replace(support_shared=shares_support(tasks, target_args))
            else:
                change = jax.tree.map(jnp.subtract, change, direct)
            found = Scores(*weighed(at.given_weights, change, at.spoilt), info)
        warn_of_direct_effect(found)
        return found

    return run


@maker
def self_influence(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
) -> ScoresOfData:
    """Makes (meta_params, tasks, weights=None) -> Scores of every datum on its own term of F.

    With g = ∂_w D_λF of a datum, its score is w · gᵀ H⁻¹ g: the predicted change of ∂F/∂w, the datum's own term of F,
    when it is removed. Scores are not negative where H is positive definite. High values mark data that pull λ
    strongly. This takes one solve per datum; those of one task are solved together.

    Args:
      problem: the problem.
      solver: as in `task_if`.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      precision: as in `task_if`.

    Returns:
      Function that returns info with leaves `[T, 1 + n_support + n_query]`: the task, its support and query examples.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> meta_params = jnp.asarray(2.0)  # the mean, which is the minimum
      >>> jax.jit(mi.self_influence(problem))(meta_params, tasks).task.round(3).tolist()  # ((query − 2) / 3)²
      [0.444, 0.111, 1.0]
    """
    options = Options.of(**locals())

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Scores:
        size = sizes(tasks)
        with options.traced():
            at = optimum_at(options, *checked(meta_params, tasks, weights), vectors=1 + size.support + size.query)

            def single(data: tuple[Task, Weights]) -> tuple[Weights, SolveInfo]:
                task, own = data

                def term(meta_params: PyTree, weights: Weights) -> Array:
                    return _term(options.problem, meta_params, task, weights, size.lead[0])

                columns = _columns(options.problem, term, at.meta_params, own)
                if at.expansion.spoilt is not None:
                    columns = Weights(columns.task, *_present(own, (columns.support, columns.query)))
                task_column = jax.tree.map(lambda leaf: leaf[None], columns.task)
                rhs = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), task_column, columns.support, columns.query)
                solution, info = at.solve_many(rhs)
                products = jax.vmap(optax.tree.vdot)(rhs, solution)
                split = 1 + own.support.shape[0]
                parts = Weights(products[0], products[1:split], products[split:])
                parts = jax.tree.map(lambda w, p: p.astype(w.dtype), own, parts)
                return weighed(own, parts, at.expansion.spoilt), info

            (task, support, query), info = jax.lax.map(single, (tasks, at.weights))
            return Scores(task, support, query, info)

    return run


@maker
def edit(
    problem: Bilevel,
    *,
    solver: Solver | None = None,
    curvature: Curvature | None = None,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
    precision: str | None = "highest",
    num_newton_steps: int = 1,
) -> EditOfWeights:
    """Makes (meta_params, tasks, new_weights, weights=None) -> Edit: λ at new data weights, without retraining.

    First order: λ + (dλ*/dw) · (new_weights − weights). Then `num_newton_steps` Newton steps on F at the new weights,
    λ − H⁻¹ D_λF, each with the Hessian at the point reached.

    With `num_newton_steps` above 0, each step is shortened until F at the new weights falls: all of it is tried, then
    half, a quarter, and so on. A Newton step that leads uphill, because H is indefinite, is reversed. A step along
    which F does not fall is not taken. `objective`, `step_lengths` and `info.outer_gradient_norm` say how far each step
    got. With `num_newton_steps=0` the first-order step is taken in full, as in `group_influence`.

    Args:
      problem: the problem.
      solver: as in `task_if`.
      curvature: as in `task_if`.
      damping: as in `task_if`.
      batch_size: as in `task_if`.
      mesh: as in `task_if`.
      hvp: as in `task_if`.
      precision: as in `task_if`.
      num_newton_steps: steps after the first-order one, at least 0.

    Raises:
      ValueError: `num_newton_steps` negative, new weights of the wrong shape or not finite, and as `task_if`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> meta_params = jnp.asarray(2.0)  # the mean, which is the minimum
      >>> without_last = mi.drop(mi.unit_weights(tasks), tasks=[2])
      >>> found = jax.jit(mi.edit(problem))(meta_params, tasks, without_last)
      >>> round(float(found.meta_params), 3)  # the mean of the other two
      0.5
      >>> found.info.outer_gradient_norm.round(3).tolist()  # after the first-order step, and after Newton's
      [0.333, 0.0]
      >>> found.step_lengths.tolist(), found.objective.round(3).tolist()
      ([1.0, 1.0], [0.833, 0.167, 0.083])
    """
    given = {name: value for name, value in locals().items() if name != "num_newton_steps"}
    if isinstance(num_newton_steps, bool) or not isinstance(num_newton_steps, int) or num_newton_steps < 0:
        raise ValueError(f"num_newton_steps: expected a non-negative integer, got {num_newton_steps!r}")
    options = Options.of(**given)

    def run(meta_params: PyTree, tasks: Task, new_weights: Weights, weights: Weights | None = None) -> Edit:
        meta_params, _, old = checked(meta_params, tasks, weights)
        new = jax.tree.map(
            lambda w, like: w.astype(like.dtype), resolve_weights(new_weights, tasks, name="new_weights"), old
        )
        with options.traced():
            found = edited(options, num_newton_steps, meta_params, tasks, old, new)
        present = jax.tree.map(lambda a, b: jnp.abs(a) + jnp.abs(b), old, new)
        solved = jnp.all(jnp.isfinite(found.info.relative_residual))
        norms: Any = found.info.outer_gradient_norm
        norm = jnp.where(solved, norms[-1], jnp.nan)
        for either in (old, new):
            rest = without_spoilt(options.problem, norm, meta_params, tasks, either, present)
            if rest is not None:
                return run(meta_params, rest.tasks, rest.weights(new), rest.weights(old))
        return found

    return run


def _term(problem: Bilevel, meta_params: PyTree, task: Task, weights: Weights, count: int) -> Array:
    """One task's term of F, w_k L_k / T."""
    value = evaluate(problem, meta_params, task, weights)[0]
    return value * weights.task.astype(value.dtype) / count


def _present(own: Weights, columns: PyTree) -> PyTree:
    """Derivatives by the weights of a task's examples; 0 where the task's weight is 0, even if the task is spoilt."""
    return jax.tree.map(lambda leaf: jnp.where(own.task == 0, 0, leaf), columns)


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
