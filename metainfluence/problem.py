"""The problem: pure functions combined into the outer objective.

F(λ, w) = (1/T) Σ_k w_k · L_k(λ, w) + R(λ),    L_k = Σ_j b_kj v_kj · ℓ_out(θ_k(λ, w), λ; query_kj)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from metainfluence._checks import (
    calling,
    check_arrays,
    check_batch_size,
    check_floating,
    check_function,
    check_losses,
    check_mesh,
    check_precision,
    check_scalar,
    concrete,
    leaf_name,
    refuse_half,
    traced_at,
)
from metainfluence._chunks import reduce_tasks
from metainfluence._outline import outline
from metainfluence._working import working_eps
from metainfluence.adaptation import Adaptation, Loss
from metainfluence.data import (
    Task,
    Weights,
    coefficients,
    examples_of,
    fill_padding,
    map_examples,
    resolve_weights,
    sizes,
    weighted_sum,
)
from metainfluence.differentiation import FORWARD, check_forward, check_hvp
from metainfluence.operators import Operator

__all__ = [
    "Bilevel",
    "bilevel",
    "from_task_loss",
    "l2",
    "per_example",
    "query_loss",
    "task_loss",
    "total_gradient",
    "total_objective",
]


class Bilevel(NamedTuple):
    """A meta-learning problem as pure functions of one task and its `Weights`; made by `bilevel`, `from_task_loss`.

    Attributes:
      outer: (params, meta_params, task, weights) -> L_k.
      adapt: (meta_params, task, weights) -> params; None where the task loss is not split into levels.
      query_losses: (params, meta_params, task) -> losses `[n_query]`; None where `adapt` is None.
      inner_gradient_norm: (params, meta_params, task, weights) -> ‖∂_θ L_in‖; None unless adaptation is implicit.
      outputs: (params, meta_params, task) -> the model's outputs on the query set; None without a head.
      head: (outputs, task, weights) -> L_k; None without a head.
      meta_regularizer: (meta_params) -> R; None for 0.
      hvp: how the derivatives of gradients are taken.
    """

    outer: Callable[[PyTree, PyTree, Task, Weights], Array]
    adapt: Callable[[PyTree, Task, Weights], PyTree] | None = None
    query_losses: Callable[[PyTree, PyTree, Task], Array] | None = None
    inner_gradient_norm: Callable[[PyTree, PyTree, Task, Weights], Array] | None = None
    outputs: Callable[[PyTree, PyTree, Task], PyTree] | None = None
    head: Callable[[PyTree, Task, Weights], Array] | None = None
    meta_regularizer: Callable[[PyTree], Array] | None = None
    hvp: str = FORWARD


def bilevel(
    outer_loss: Callable[[PyTree, PyTree, PyTree], PyTree],
    adapt: Adaptation | Callable[[PyTree, PyTree, Array], PyTree],
    *,
    meta_regularizer: Callable[[PyTree], Array] | None = None,
    outer_head: Callable[[PyTree, PyTree], Float[Array, " n"]] | None = None,
    hvp: str = FORWARD,
) -> Bilevel:
    """Makes a problem from an outer loss and an adaptation.

    Args:
      outer_loss: (params, meta_params, query) -> losses `[n_query]`; with `outer_head`, the model: (params,
        meta_params, query) -> outputs.
      adapt: (meta_params, support, coefficients) -> params, from `metainfluence.adaptation`.
      meta_regularizer: (meta_params) -> scalar R, as made by `l2`.
      outer_head: (outputs, query) -> losses `[n_query]`, which makes the outer loss head ∘ model, as Gauss–Newton
        needs.
      hvp: how Hessian products and mixed derivatives of everything made from the problem are taken:
        "forward_over_reverse", or "reverse_over_reverse" where a function has a `custom_vjp`, which forward mode cannot
        differentiate. The second costs more.

    Raises:
      TypeError: a function that does not take these arguments.
      ValueError: an unknown `hvp`; at trace time, losses that are not one per example.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> adapt = mi.adaptation.closed_form(lambda m, support, coefficients: (m + coefficients @ support) / 2)
      >>> problem = mi.bilevel(lambda params, m, query: (params - query) ** 2, adapt)
      >>> task = mi.Task(support=jnp.asarray([0.0, 2.0]), query=jnp.asarray([4.0]))
      >>> float(mi.task_loss(problem)(jnp.asarray(3.0), task))  # params are (3 + 1) / 2
      4.0
    """
    returned = "losses [n_query]" if outer_head is None else "outputs"
    if isinstance(outer_loss, Adaptation):
        raise TypeError(
            f"outer_loss: expected a function (params, meta_params, query) -> {returned}, got an Adaptation; the order "
            "is bilevel(outer_loss, adapt)"
        )
    check_function("outer_loss", outer_loss, f"(params, meta_params, query) -> {returned}", *"pmq")
    check_function("adapt", adapt, "(meta_params, support, coefficients) -> params", *"msc")
    _check_meta_regularizer(meta_regularizer)
    if outer_head is not None:
        check_function("outer_head", outer_head, "(outputs, query) -> losses [n_query]", *"oq")
    check_hvp(hvp)

    chosen = adapt if isinstance(adapt, Adaptation) else Adaptation(adapt, known=False)

    def operands(meta_params: PyTree, task: Task, weights: Weights) -> tuple[PyTree, PyTree, Array]:
        support = fill_padding(task.support, task.support_mask)
        return meta_params, support, coefficients(weights.support, task.support_mask)

    def adapted(meta_params: PyTree, task: Task, weights: Weights) -> PyTree:
        with calling("adapt", "(meta_params, support, coefficients)"):
            return chosen(*operands(meta_params, task, weights))

    def measured(meta_params: PyTree, task: Task, weights: Weights) -> tuple[PyTree, Array | None]:
        with calling("adapt", "(meta_params, support, coefficients)"):
            return chosen.measured(*operands(meta_params, task, weights))

    @outline(outer_loss)
    def called(params: PyTree, meta_params: PyTree, query: PyTree) -> PyTree:
        with calling("outer_loss", "(params, meta_params, query)"):
            return outer_loss(params, meta_params, query)

    def outputs(params: PyTree, meta_params: PyTree, task: Task) -> PyTree:
        return called(params, meta_params, fill_padding(task.query, task.query_mask))

    def losses_of(outputs: PyTree, task: Task) -> Array:
        if outer_head is None:
            return outputs
        with calling("outer_head", "(outputs, query)"):
            return outer_head(outputs, fill_padding(task.query, task.query_mask))

    def query_losses(params: PyTree, meta_params: PyTree, task: Task) -> Array:
        return losses_of(outputs(params, meta_params, task), task)

    def head(outputs: PyTree, task: Task, weights: Weights) -> Array:
        name = "outer_loss" if outer_head is None else "outer_head"
        losses = check_losses(losses_of(outputs, task), weights.query.shape[0], name)
        return weighted_sum(losses, coefficients(weights.query, task.query_mask))

    def outer(params: PyTree, meta_params: PyTree, task: Task, weights: Weights) -> Array:
        return head(outputs(params, meta_params, task), task, weights)

    # Kept on the function itself, so that a problem whose `adapt` was replaced loses them with it.
    adapted.measured = measured  # type: ignore[attr-defined]
    if chosen.step_norms is not None:
        step_norms = chosen.step_norms
        adapted.inner_gradient_norms = lambda *data: step_norms(*operands(*data))  # type: ignore[attr-defined]
    adapted.known = chosen.known  # type: ignore[attr-defined]

    def inner_gradient_norm(params: PyTree, meta_params: PyTree, task: Task, weights: Weights) -> Array:
        assert chosen.inner_gradient_norm is not None
        return chosen.inner_gradient_norm(params, *operands(meta_params, task, weights))

    return Bilevel(
        outer=outer,
        adapt=adapted,
        query_losses=query_losses,
        inner_gradient_norm=None if chosen.inner_gradient_norm is None else inner_gradient_norm,
        outputs=None if outer_head is None else outputs,
        head=None if outer_head is None else head,
        meta_regularizer=meta_regularizer,
        hvp=hvp,
    )


def from_task_loss(
    task_loss: Callable[[PyTree, Task, Weights], Array],
    *,
    meta_regularizer: Callable[[PyTree], Array] | None = None,
    hvp: str = FORWARD,
) -> Bilevel:
    """Makes a problem from an existing meta-learning loss, adaptation included.

    Only the exact curvature is available, since the two levels cannot be told apart.

    Args:
      task_loss: (meta_params, task, weights) -> scalar L_k, for one task and its weights. The function itself
        multiplies the losses of its support and query examples by `weights.support` and `weights.query`, which are 0 on
        padding. The task's own weight is applied outside.
      meta_regularizer: (meta_params) -> scalar R.
      hvp: as in `bilevel`.

    Raises:
      TypeError: a function that does not take these arguments.
      ValueError: an unknown `hvp`; at trace time, a loss that is not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> def one_step(m, task, weights):
      ...     params = m - 0.5 * jnp.mean(weights.support * (m - task.support))
      ...     return jnp.sum(weights.query * (params - task.query) ** 2)
      >>> problem = mi.from_task_loss(one_step)
      >>> task = mi.Task(support=jnp.asarray([0.0, 2.0]), query=jnp.asarray([4.0]))
      >>> float(mi.task_loss(problem)(jnp.asarray(3.0), task))  # params are 3 - 0.5 * (3 - 1)
      4.0
    """
    check_hvp(hvp)
    check_function("task_loss", task_loss, "(meta_params, task, weights) -> scalar", *"mtw")
    _check_meta_regularizer(meta_regularizer)

    @outline(task_loss)
    def called(meta_params: PyTree, task: Task, weights: Weights) -> Array:
        with calling("task_loss", "(meta_params, task, weights)"):
            return check_scalar(task_loss(meta_params, task, weights), "task_loss")

    def outer(params: PyTree, meta_params: PyTree, task: Task, weights: Weights) -> Array:
        del params
        support, query = weights.support, weights.query
        if task.support_mask is not None:
            support = jnp.where(task.support_mask, support, 0.0)
        if task.query_mask is not None:
            query = jnp.where(task.query_mask, query, 0.0)
        filled = task._replace(
            support=fill_padding(task.support, task.support_mask), query=fill_padding(task.query, task.query_mask)
        )
        return called(meta_params, filled, Weights(weights.task, support, query))

    return Bilevel(outer, meta_regularizer=meta_regularizer, hvp=hvp)


def _check_meta_regularizer(meta_regularizer: Any) -> None:
    if meta_regularizer is not None:
        expected = "(meta_params) -> scalar, as metainfluence.l2(1e-3)"
        check_function("meta_regularizer", meta_regularizer, expected, "m")


def with_hvp(problem: Bilevel, hvp: str | None) -> Bilevel:
    """The problem, differentiated as `hvp` says; None leaves it as it is."""
    if not isinstance(problem, Bilevel):
        hint = ""
        if isinstance(problem, Operator):
            hint = "; of an operator, metainfluence.spectra.of_operator(operator, rank=40) gives the eigenvalues"
        raise TypeError(
            f"problem: expected one made by metainfluence.bilevel or from_task_loss, got {type(problem).__name__}{hint}"
        )
    if hvp is None:
        return problem
    check_hvp(hvp)
    return problem._replace(hvp=hvp)


def per_example(scalar_loss: Callable[[PyTree, PyTree, PyTree], Array]) -> Loss:
    """Turns a mean-reduced loss (params, meta_params, batch) -> scalar into one loss per example.

    The loss is run on batches of one example each, under vmap. A loss whose examples influence each other, as through
    batch normalisation, is not the mean of these losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> losses = mi.per_example(lambda params, meta_params, batch: jnp.mean((params - batch) ** 2))
      >>> losses(1.0, None, jnp.asarray([0.0, 1.0, 3.0])).tolist()
      [1.0, 0.0, 4.0]
    """

    def losses(params: PyTree, meta_params: PyTree, batch: PyTree) -> Array:
        def single(example: list[Array]) -> Array:
            rows = iter(example)
            alone = map_examples(lambda leaf: next(rows)[None], batch)
            return check_scalar(scalar_loss(params, meta_params, alone), "scalar_loss")

        return jax.vmap(single)(jax.tree.leaves(examples_of(batch)))

    return losses


def l2(delta: float) -> Callable[[PyTree], Array]:
    """The meta-regulariser R(λ) = δ/2 · ‖λ‖².

    Raises:
      ValueError: `delta` is negative or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> float(mi.l2(0.5)({"slope": jnp.asarray([1.0, 1.0]), "bias": jnp.asarray(2.0)}))
      1.5
    """
    if concrete(delta) and not (jnp.ndim(delta) == 0 and 0 <= float(delta) < float("inf")):
        raise ValueError(f"delta: expected a non-negative number, got {delta!r}")

    def regularizer(meta_params: PyTree) -> Array:
        check_arrays(meta_params, "meta_params")
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(meta_params)]
        return delta / 2 * sum(squares[1:], squares[0])

    return regularizer


def check_meta_params(meta_params: PyTree) -> None:
    """Raises, naming the leaf, unless λ holds finite floating-point numbers; traced values cannot be checked."""
    if isinstance(meta_params, Task):
        raise TypeError("meta_params: expected λ, got a Task; meta_params come first, then the tasks")
    check_floating(meta_params, "meta_params")
    refuse_half(meta_params, "meta_params")
    for path, leaf in jax.tree_util.tree_leaves_with_path(meta_params):
        if concrete(leaf) and not np.all(np.isfinite(np.asarray(leaf))):
            raise ValueError(f"{leaf_name('meta_params', path)}: expected finite numbers, got NaN or infinity")


def evaluate(problem: Bilevel, meta_params: PyTree, task: Task, weights: Weights) -> tuple[Array, Array]:
    """L_k and ‖∂_θ L_in‖ of one task, by one adaptation."""
    if problem.adapt is None:
        loss = problem.outer(None, meta_params, task, weights)
        return loss, jnp.zeros_like(loss)
    params, norm = adapted(problem, meta_params, task, weights)
    loss = problem.outer(params, meta_params, task, weights)
    return loss, norm_or_zero(norm, loss)


def check_derivatives(problem: Bilevel, at: PyTree, tasks: Task, weights: Weights, *, twice: bool) -> float:
    """Traces a task's loss, and returns the machine epsilon of the lowest precision in what depends on λ.

    That includes λ itself: derivatives by a leaf of λ are rounded to its dtype.

    Raises:
      TypeError: the problem is to be differentiated in forward mode and cannot, see `check_forward`.
    """
    found: list[float] = []

    def check(at: PyTree, tasks: Task, weights: Weights) -> None:
        first = jax.tree.map(lambda leaf: leaf[0], (tasks, weights))

        def loss(meta_params: PyTree) -> Array:
            return evaluate(problem, meta_params, *first)[0]

        # A trace of the loss is cheap compared with those of its second derivatives.
        jaxpr = jax.make_jaxpr(loss)(at).jaxpr
        found.append(working_eps(jaxpr))
        if problem.hvp == FORWARD:
            check_forward(loss, at, jaxpr, twice=twice)

    # The user's functions see JAX's arrays, whatever the data are.
    jax.eval_shape(check, at, tasks, weights)
    return max(found[0], *(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(at)))


def adapted(problem: Bilevel, meta_params: PyTree, task: Task, weights: Weights) -> tuple[PyTree, Array | None]:
    """θ_k, and ‖∂_θ L_in‖ there, which is not differentiated; None where there is no inner minimum."""
    assert problem.adapt is not None
    measured = getattr(problem.adapt, "measured", None)
    if measured is not None:
        params, norm = measured(meta_params, task, weights)
        return params, norm
    params = problem.adapt(meta_params, task, weights)
    if problem.inner_gradient_norm is None:
        return params, None
    frozen = jax.lax.stop_gradient((params, meta_params, weights))
    return params, problem.inner_gradient_norm(frozen[0], frozen[1], task, frozen[2])


def knows_inner(problem: Bilevel) -> bool:
    """Whether it is known how well tasks are adapted; False where that is left to the user's own program."""
    return problem.adapt is not None and bool(getattr(problem.adapt, "known", True))


def norm_or_zero(norm: Array | None, loss: Array) -> Array:
    """‖∂_θ L_in‖ in the dtype of the loss; 0 where there is no inner minimum to be far from."""
    return jnp.zeros_like(loss) if norm is None else jax.lax.stop_gradient(norm).astype(loss.dtype)


def meta_regularization(problem: Bilevel, meta_params: PyTree) -> Array:
    """R(λ), 0 where the problem has none."""
    if problem.meta_regularizer is None:
        return jnp.zeros((), jnp.result_type(*jax.tree.leaves(meta_params)))
    return check_scalar(problem.meta_regularizer(meta_params), "meta_regularizer")


class TaskLoss(Protocol):
    """What `task_loss` makes."""

    def __call__(self, meta_params: PyTree, task: Task, weights: Weights | None = None) -> Float[Array, ""]:
        """L_k of one task."""


class TaskGradient(Protocol):
    """What `total_gradient` makes."""

    def __call__(self, meta_params: PyTree, task: Task, weights: Weights | None = None) -> PyTree:
        """D_λ L_k of one task."""


class Objective(Protocol):
    """What `total_objective` makes."""

    def __call__(self, meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Float[Array, ""]:
        """F."""


class Target(Protocol):
    """What `query_loss` makes."""

    def __call__(self, meta_params: PyTree, test_tasks: Task, weights: Weights | None = None) -> Float[Array, ""]:
        """The mean of L_k; of the weights given, only those of support examples count."""


def task_loss(problem: Bilevel, *, precision: str | None = "highest") -> TaskLoss:
    """Makes (meta_params, task, weights=None) -> L_k, the adapted task's loss on its query set.

    The task's own weight w_k enters only in the objective, not here. The loss is differentiable in meta_params and
    weights.

    Args:
      problem: the problem.
      precision: of matrix products, also the problem's, see `jax.default_matmul_precision`; None for JAX's setting.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> loss = mi.task_loss(problem)
      >>> float(loss(jnp.asarray(2.0), mi.Task(support=(), query=jnp.asarray([5.0]))))
      4.5
    """
    check_precision(precision)

    def run(meta_params: PyTree, task: Task, weights: Weights | None = None) -> Array:
        check_meta_params(meta_params)
        weights = resolve_weights(weights, task, stacked=False)
        with traced_at(precision):
            return evaluate(problem, meta_params, task, weights)[0]

    return run


def total_gradient(problem: Bilevel, *, precision: str | None = "highest") -> TaskGradient:
    """Makes (meta_params, task, weights=None) -> D_λ L_k, a pytree like meta_params; `vmap` it over tasks.

    D_λ L_k = ∂_λ L_k + (dθ_k/dλ)ᵀ ∂_θ L_k: Theorem 4.1 of arXiv 2501.15963.

    Args:
      problem: the problem.
      precision: as in `task_loss`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [1.0], [5.0]]))
      >>> jax.vmap(mi.total_gradient(problem), in_axes=(None, 0))(jnp.asarray(2.0), tasks).tolist()
      [2.0, 1.0, -3.0]
    """
    gradient = jax.grad(task_loss(problem, precision=precision))

    def run(meta_params: PyTree, task: Task, weights: Weights | None = None) -> PyTree:
        # Under grad these values are traced, and cannot be checked.
        check_meta_params(meta_params)
        with traced_at(precision):
            return gradient(meta_params, task, resolve_weights(weights, task, stacked=False))

    return run


def total_objective(
    problem: Bilevel,
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    precision: str | None = "highest",
) -> Objective:
    """Makes (meta_params, tasks, weights=None) -> F, the outer objective.

    Args:
      problem: the problem.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once.
      mesh: devices over which tasks are sharded, along all axes of the mesh; None leaves tasks where they are.
      precision: as in `task_loss`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[0.0], [2.0], [6.0]]))
      >>> objective = mi.total_objective(problem)
      >>> without_last = mi.drop(mi.unit_weights(tasks), tasks=[2])  # whose part of the mean is then 0
      >>> [round(float(objective(jnp.asarray(3.0), tasks, weights)), 3) for weights in (None, without_last)]
      [3.167, 1.667]
    """
    check_batch_size(batch_size)
    check_mesh(mesh)
    check_precision(precision)

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Array:
        check_meta_params(meta_params)
        weights = resolve_weights(weights, tasks)
        with traced_at(precision):
            total, _ = reduce_tasks(
                lambda chunk: weighted_losses(problem, meta_params, *chunk), (tasks, weights), batch_size, mesh
            )
            return total / weights.task.shape[0] + meta_regularization(problem, meta_params)

    return run


def weighted_losses(problem: Bilevel, meta_params: PyTree, tasks: Task, weights: Weights) -> tuple[Array, Array]:
    """Σ_k w_k L_k over stacked tasks, and ‖∂_θ L_in‖ of each."""
    losses, norms = jax.vmap(lambda task, w: evaluate(problem, meta_params, task, w))(tasks, weights)
    return weighted_sum(losses, weights.task), norms


def query_loss(problem: Bilevel, *, batch_size: int | None = None, precision: str | None = "highest") -> Target:
    """Makes the usual target (meta_params, test_tasks, weights=None) -> mean of L_k, without the meta-regulariser.

    `weights` are those of training tasks with the same support sets, as `influence_scores(..., total_effect=True)`
    passes them. Support examples then count in the adaptation to the test tasks as they do in training. Test tasks and
    their query examples always have weight 1.

    Args:
      problem: the problem.
      batch_size: tasks per chunk, which bounds the memory; None takes all tasks at once.
      precision: as in `task_loss`.

    Raises:
      ValueError: at the call, weights whose support sets have other shapes than those of the test tasks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> problem = mi.from_task_loss(lambda m, task, w: 0.5 * jnp.sum(w.query * (m - task.query) ** 2))
      >>> test_tasks = mi.Task(support=(), query=jnp.asarray([[2.0], [4.0]]))
      >>> float(mi.query_loss(problem)(jnp.asarray(2.0), test_tasks))
      1.0
    """
    plain = problem._replace(meta_regularizer=None)
    objective = total_objective(plain, batch_size=batch_size, precision=precision)

    def target(meta_params: PyTree, test_tasks: Task, weights: Weights | None = None) -> Array:
        size = sizes(test_tasks, name="test_tasks")
        if weights is None:
            return objective(meta_params, test_tasks)
        if not isinstance(weights, Weights):
            raise TypeError(f"weights: expected metainfluence.Weights, got {type(weights).__name__}")
        expected = size.shapes()["support"]
        if jnp.shape(weights.support) != expected:
            raise ValueError(
                f"weights.support: expected shape {expected}, that of the test tasks' support sets, which are those of "
                f"the training tasks in their order, got {jnp.shape(weights.support)}; otherwise pass a target of your "
                "own, (meta_params, *target_args, weights=) -> scalar"
            )
        own = resolve_weights(None, test_tasks, name="test_tasks")
        return objective(meta_params, test_tasks, own._replace(support=weights.support))

    return target
