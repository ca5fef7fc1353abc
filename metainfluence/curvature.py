"""Which second-order operator stands for the total Hessian H = D_λ D_λ F.

Every curvature is the Hessian, at λ, of a *surrogate* of the task loss that is built at λ: the loss itself, the loss
with θ(λ) replaced by its tangent, by a constant, and so on. What they have in common (chunks over tasks, linearising
once, damping) is then written once, in `total_hessian`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from metainfluence.adaptation import weighted_sum
from metainfluence.bilevel import (
    Bilevel,
    check_meta_params,
    evaluate,
    meta_regularization,
    stationarity,
    weighted_losses,
    with_hvp,
)
from metainfluence.differentiation import FORWARD, REVERSE, check_forward, hessian_map, hessian_product, taylor
from metainfluence.operators import Losses, Operator, check_damping, from_matvec
from metainfluence.tasks import (
    Task,
    Weights,
    check_batch_size,
    check_mesh,
    coefficients,
    reduce_tasks,
    resolve_weights,
)

Surrogate = Callable[[Bilevel, PyTree, Task, Weights], Callable[[PyTree], tuple[Array, Array]]]


class Curvature(NamedTuple):
    """A choice of second-order operator.

    Attributes:
      name: for messages.
      surrogate: (problem, λ0, task, weights) -> function λ -> (surrogate of L_k, ‖∂_θ L_in‖) whose Hessian at λ0 is the
        task's share of the operator.
      shift: (problem, λ0, task, weights) -> scalar s_k; (1/T) Σ_k w_k s_k times the identity is added; None for
        nothing.
      needs: which part of the problem it needs beyond the task loss: None, "adapt" or "outer_head".
      keeps_gradient: whether the surrogate's gradient at λ0 is the total gradient.
      is_exact: whether the surrogate is the task loss itself.
    """

    name: str
    surrogate: Surrogate
    shift: Callable[[Bilevel, PyTree, Task, Weights], Array] | None = None
    needs: str | None = None
    keeps_gradient: bool = True
    is_exact: bool = False

    def __repr__(self) -> str:
        """The call that made it."""
        return f"{self.name}()"


def _adapt(problem: Bilevel, task: Task, weights: Weights) -> Callable[[PyTree], PyTree]:
    assert problem.adapt is not None
    adapt = problem.adapt
    return lambda meta_params: adapt(meta_params, task, weights)


def exact() -> Curvature:
    """The total Hessian itself, third-order terms included: forward over reverse through the adaptation."""

    def surrogate(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Callable[[PyTree], Any]:
        del at
        return lambda meta_params: evaluate(problem, meta_params, task, weights)

    return Curvature("exact", surrogate, is_exact=True)


def _linearized(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Callable[[PyTree], Any]:
    params, tangent = taylor(_adapt(problem, task, weights), at, problem.hvp)

    def loss(meta_params: PyTree) -> tuple[Array, Array]:
        value = problem.outer(tangent(meta_params), meta_params, task, weights)
        return value, stationarity(problem, params, at, task, weights, value)

    return loss


def linearized() -> Curvature:
    """Drops the terms with d²θ/dλ²: θ(λ) is replaced by its tangent at λ."""
    return Curvature("linearized", _linearized, needs="adapt")


def gamma() -> Curvature:
    """Theorem 5.1 of arXiv 2501.15963: `linearized`, and Γ I with Γ = (1/T) Σ_k w_k ‖∂_θ L_k‖₁ for what it drops."""

    def shift(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Array:
        params = _adapt(problem, task, weights)(at)
        slope = jax.grad(problem.outer)(params, at, task, weights)
        sizes = [jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(slope)]
        return sum(sizes[1:], sizes[0])

    return Curvature("gamma", _linearized, shift, needs="adapt")


def gauss_newton() -> Curvature:
    """Generalised Gauss–Newton: the head's Hessian between total Jacobians of the model's outputs.

    Positive semidefinite where the head is convex in the outputs. Needs `bilevel(model, adapt, outer_head=head)`.
    """

    def surrogate(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Callable[[PyTree], Any]:
        adapt = _adapt(problem, task, weights)
        assert problem.outputs is not None
        assert problem.head is not None
        model, head = problem.outputs, problem.head

        def forward(meta_params: PyTree) -> tuple[PyTree, PyTree]:
            params = adapt(meta_params)
            return model(params, meta_params, task), params

        (_, params), tangent = taylor(forward, at, problem.hvp)

        def loss(meta_params: PyTree) -> tuple[Array, Array]:
            value = head(tangent(meta_params)[0], task, weights)
            return value, stationarity(problem, params, at, task, weights, value)

        return loss

    return Curvature("gauss_newton", surrogate, needs="outer_head")


def direct() -> Curvature:
    """Ignores dθ/dλ, as if the adapted parameters were constants: ∂²_λ L_k.

    The mistake that the paper corrects, kept to be measured.
    """

    def surrogate(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Callable[[PyTree], Any]:
        params = jax.lax.stop_gradient(_adapt(problem, task, weights)(at))

        def loss(meta_params: PyTree) -> tuple[Array, Array]:
            value = problem.outer(params, meta_params, task, weights)
            return value, stationarity(problem, params, at, task, weights, value)

        return loss

    return Curvature("direct", surrogate, needs="adapt", keeps_gradient=False)


class Expansion(NamedTuple):
    """The outer objective's gradient map (λ, w) ↦ D_λF to first order at a point; a pytree, callables included.

    Attributes:
      gradient: D_λF, a pytree like λ.
      inner_gradient_norm: max over tasks of ‖∂_θ L_in‖.
      operator: its derivative in λ, the Hessian, or what the curvature puts in its place.
      mixed: (direction in w) -> ∂_w D_λF · direction, a pytree like λ.
      mixed_transposed: (vector like λ) -> ∂_w ⟨D_λF, vector⟩, as Weights.
    """

    gradient: PyTree
    inner_gradient_norm: Array
    operator: Operator
    mixed: Callable[[Weights], PyTree]
    mixed_transposed: Callable[[PyTree], Weights]


def check_curvature(problem: Bilevel, curvature: Curvature) -> None:
    """Raises ValueError where the curvature needs what the problem lacks."""
    if not isinstance(curvature, Curvature):
        raise TypeError(f"curvature: expected one of metainfluence.curvature, as exact(), got {curvature!r}")
    if curvature.needs == "adapt" and problem.adapt is None:
        raise ValueError(
            f"curvature: {curvature.name} expected a problem made by bilevel(outer_loss, adapt), whose levels can be "
            "told apart, got one made by from_task_loss; use curvature.exact()"
        )
    if curvature.needs == "outer_head" and problem.head is None:
        raise ValueError(
            f"curvature: {curvature.name} expected a problem made by bilevel(model, adapt, outer_head=head), got one "
            "without outer_head"
        )


def summed_gradient(
    problem: Bilevel, curvature: Curvature, at: PyTree, meta_params: PyTree, tasks: Task, weights: Weights
) -> tuple[PyTree, Array]:
    """Σ_k w_k times the gradient of task k's surrogate built at `at`, and ‖∂_θ L_in‖ of each task."""

    def total(meta_params: PyTree) -> tuple[Array, Array]:
        def single(task: Task, weights: Weights) -> tuple[Array, Array]:
            return curvature.surrogate(problem, at, task, weights)(meta_params)

        losses, norms = jax.vmap(single)(tasks, weights)
        return weighted_sum(losses, weights.task), norms

    return jax.grad(total, has_aux=True)(meta_params)


def check_derivatives(problem: Bilevel, at: PyTree, tasks: Task, weights: Weights, *, twice: bool) -> None:
    """Raises TypeError where the problem is to be differentiated in forward mode and cannot, see `check_forward`."""
    if problem.hvp != FORWARD:
        return

    def check(at: PyTree, tasks: Task, weights: Weights) -> None:
        first = jax.tree.map(lambda leaf: leaf[0], (tasks, weights))
        check_forward(lambda m: evaluate(problem, m, *first)[0], at, twice=twice)

    # The user's functions see JAX's arrays, whatever the data are.
    jax.eval_shape(check, at, tasks, weights)


def summed_product(
    problem: Bilevel, curvature: Curvature, at: PyTree, vector: PyTree, tasks: Task, weights: Weights
) -> PyTree:
    """Σ_k w_k H_k v."""

    def gradient(meta_params: PyTree) -> PyTree:
        return summed_gradient(problem, curvature, at, meta_params, tasks, weights)[0]

    return hessian_product(gradient, at, vector, problem.hvp)


def summed_linear(
    problem: Bilevel, curvature: Curvature, at: PyTree, tasks: Task, weights: Weights
) -> Callable[[PyTree], PyTree]:
    """The map v ↦ Σ_k w_k H_k v as a pytree, with all that does not depend on v done."""

    def gradient(meta_params: PyTree) -> tuple[PyTree, Array]:
        return summed_gradient(problem, curvature, at, meta_params, tasks, weights)

    return hessian_map(gradient, at, problem.hvp)[1]


def summed_shift(problem: Bilevel, curvature: Curvature, at: PyTree, tasks: Task, weights: Weights) -> Array:
    """Σ_k w_k s_k, see `Curvature.shift`; 0 without one."""
    if curvature.shift is None:
        return jnp.zeros((), jnp.result_type(*jax.tree.leaves(at)))
    shifts = jax.vmap(functools.partial(curvature.shift, problem, at))(tasks, weights)
    return weighted_sum(shifts, weights.task)


def summed_sensitivities(problem: Bilevel, at: PyTree, vector: PyTree, tasks: Task, weights: Weights) -> Weights:
    """∂_w ⟨Σ_k w_k D_λL_k, vector⟩: one derivative along the vector, then all weights'."""

    def total(meta_params: PyTree, weights: Weights) -> Array:
        return weighted_losses(problem, meta_params, tasks, weights)[0]

    def slope(weights: Weights) -> Array:
        return jax.jvp(lambda m: total(m, weights), (at,), (vector,))[1]

    if problem.hvp == REVERSE:
        return jax.vjp(lambda w: jax.grad(total)(at, w), weights)[1](vector)[0]
    return jax.grad(slope)(weights)


def gradient_map(
    problem: Bilevel, batch_size: int | None, mesh: Mesh | None = None
) -> Callable[..., tuple[PyTree, Array]]:
    """Makes (curvature, at, tasks, meta_params, weights) -> (∇F by the surrogates built at `at`, max ‖∂_θ L_in‖)."""

    def gradient(
        curvature: Curvature, at: PyTree, tasks: Task, meta_params: PyTree, weights: Weights
    ) -> tuple[PyTree, Array]:
        def chunk(data: tuple[Task, Weights]) -> tuple[PyTree, Array]:
            return summed_gradient(problem, curvature, at, meta_params, *data)

        total, norms = reduce_tasks(chunk, (tasks, weights), batch_size, mesh)
        regularizer = jax.grad(lambda meta_params: meta_regularization(problem, meta_params))(meta_params)
        count = weights.task.shape[0]
        return jax.tree.map(lambda g, r: g / count + r, total, regularizer), jnp.max(norms)

    return gradient


def expand(
    problem: Bilevel, curvature: Curvature, batch_size: int | None, mesh: Mesh | None = None
) -> Callable[..., Expansion]:
    """Makes (meta_params, tasks, weights) -> Expansion; arguments are the caller's to check.

    With all tasks at once the gradient map is linearised here, so that a product runs its linear part only; of the
    exact curvature that one linear map holds the mixed derivative too. In chunks, whose intermediates are not kept,
    each product runs the map again.
    """
    gradient = gradient_map(problem, batch_size, mesh)

    def recomputed(at: PyTree, tasks: Task, weights: Weights, vector: PyTree) -> PyTree:
        return hessian_product(lambda m: gradient(curvature, at, tasks, m, weights)[0], at, vector, problem.hvp)

    def mixed(at: PyTree, tasks: Task, weights: Weights, direction: Weights) -> PyTree:
        if problem.hvp == REVERSE:
            # Mixed derivatives are symmetric: ∂_w D_λF · direction = D_λ ⟨∂_wF, direction⟩.
            return jax.vjp(lambda m: jax.grad(objective, argnums=2)(m, tasks, weights), at)[1](direction)[0]
        return jax.jvp(lambda w: gradient(exact(), at, tasks, at, w)[0], (weights,), (direction,))[1]

    def objective(meta_params: PyTree, tasks: Task, weights: Weights) -> Array:
        """F without the meta-regulariser, which sees no weights."""

        def chunk(data: tuple[Task, Weights]) -> tuple[Array, Array]:
            return weighted_losses(problem, meta_params, *data)

        return reduce_tasks(chunk, (tasks, weights), batch_size, mesh)[0] / weights.task.shape[0]

    def mixed_transposed(at: PyTree, tasks: Task, weights: Weights, vector: PyTree) -> Weights:
        def chunk(data: tuple[Task, Weights]) -> tuple[tuple[()], Weights]:
            return (), summed_sensitivities(problem, at, vector, *data)

        _, sensitivities = reduce_tasks(chunk, (tasks, weights), batch_size, mesh)
        return jax.tree.map(lambda leaf: leaf / weights.task.shape[0], sensitivities)

    def shift(at: PyTree, tasks: Task, weights: Weights) -> Array:
        def chunk(data: tuple[Task, Weights]) -> tuple[Array, tuple[()]]:
            return summed_shift(problem, curvature, at, *data), ()

        return reduce_tasks(chunk, (tasks, weights), batch_size, mesh)[0] / weights.task.shape[0]

    def described(operator: Operator, at: PyTree, tasks: Task, weights: Weights) -> Operator:
        """The operator with what solvers can use besides its products."""
        count = weights.task.shape[0]
        losses = None if problem.adapt is None else Partial(_outer_losses(problem), at, tasks, weights)
        return dataclasses.replace(
            operator, losses=losses, sample=Partial(sample, at, tasks, weights), num_groups=count
        )

    def sample(at: PyTree, tasks: Task, weights: Weights, number: int) -> Operator:
        # A fixed key: the same λ and tasks give the same operator, and the order of the tasks means nothing.
        chosen = jax.random.permutation(jax.random.key(0), weights.task.shape[0])[:number]
        part = jax.tree.map(lambda leaf: leaf[chosen], (tasks, weights))
        return expand(problem, curvature, batch_size, mesh)(at, *part).operator

    def run(meta_params: PyTree, tasks: Task, weights: Weights) -> Expansion:
        # The other curvatures, and scores in chunks, take forward mode of functions that are not gradients.
        check_derivatives(problem, meta_params, tasks, weights, twice=batch_size is None and curvature.is_exact)
        expansion = expanded(meta_params, tasks, weights)
        return expansion._replace(operator=described(expansion.operator, meta_params, tasks, weights))

    def expanded(meta_params: PyTree, tasks: Task, weights: Weights) -> Expansion:
        at = meta_params
        if batch_size is None and curvature.is_exact and problem.hvp == FORWARD:
            slope, linear, norm = jax.linearize(
                functools.partial(gradient, curvature, at, tasks), at, weights, has_aux=True
            )
            no_step, no_change = jax.tree.map(jnp.zeros_like, (at, weights))
            operator = from_matvec(Partial(_along_first, linear, no_change), at)
            by_weights = Partial(_along_second, linear, no_step)
            return Expansion(slope, norm, operator, by_weights, Partial(_transposed, by_weights, no_change))

        product: Callable[..., PyTree]
        if batch_size is None:
            slope, product, norm = hessian_map(lambda m: gradient(curvature, at, tasks, m, weights), at, problem.hvp)
        else:
            slope, norm = gradient(curvature, at, tasks, at, weights)
            product = Partial(recomputed, at, tasks, weights)
        if not curvature.keeps_gradient:
            slope, norm = gradient(exact(), at, tasks, at, weights)
        operator = from_matvec(product, at)
        if curvature.shift is not None:
            operator = operator.damped(shift(at, tasks, weights))
        data = (at, tasks, weights)
        return Expansion(slope, norm, operator, Partial(mixed, *data), Partial(mixed_transposed, *data))

    return run


def _outer_losses(problem: Bilevel) -> Callable[[PyTree, Task, Weights], Losses]:
    def losses(at: PyTree, tasks: Task, weights: Weights) -> Losses:
        """The query losses at adapted parameters that are held fixed."""
        assert problem.adapt is not None
        assert problem.query_losses is not None
        query_losses = problem.query_losses
        params = jax.vmap(problem.adapt, in_axes=(None, 0, 0))(at, tasks, weights)
        scale = (weights.task / weights.task.shape[0])[:, None]
        return Losses(
            function=lambda meta_params, data: query_losses(data[0], meta_params, data[1]),
            point=at,
            data=(params, tasks),
            coefficients=scale * jax.vmap(coefficients)(weights.query, tasks.query_mask),
            regularizer=problem.meta_regularizer,
        )

    return losses


def _along_first(linear: Callable[..., PyTree], second: PyTree, first: PyTree) -> PyTree:
    return linear(first, second)


# Partial(linear, no_step) would take `linear`, itself a Partial, for a static function and its arrays for constants.
def _along_second(linear: Callable[..., PyTree], first: PyTree, second: PyTree) -> PyTree:
    return linear(first, second)


def _transposed(linear: Callable[..., PyTree], like: PyTree, vector: PyTree) -> PyTree:
    return jax.linear_transpose(linear, like)(vector)[0]


def total_hessian(
    problem: Bilevel,
    curvature: Curvature | None = None,
    *,
    damping: Any = 0.0,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    hvp: str | None = None,
) -> Callable[..., Operator]:
    """Makes (meta_params, tasks, weights=None) -> Operator, the total Hessian H = D_λ D_λ F plus damping · I.

    The operator is a pytree that may cross jit; `operator.matvec(v)` takes and returns pytrees like meta_params, and
    can be mapped over v.

    Args:
      problem: the problem.
      curvature: one of `metainfluence.curvature`; None for `exact()`.
      damping: non-negative number added to every eigenvalue. F is a mean over tasks, so it does not depend on T.
      batch_size: tasks per chunk, which bounds the memory at the cost of running the gradient map again in every
        product; None takes all tasks at once and keeps what its linearisation needs.
      mesh: devices over which the task axis is sharded, over all axes of the mesh; None for where the tasks are.
      hvp: "forward_over_reverse" or "reverse_over_reverse", see `bilevel`; None for the problem's own, which is the
        first unless it was told otherwise.

    Raises:
      ValueError: a curvature that needs what the problem lacks, a negative damping, or an unknown `hvp`.
      TypeError: at trace time, forward mode through a `custom_vjp`.
    """
    problem = with_hvp(problem, hvp)
    curvature = exact() if curvature is None else curvature
    check_curvature(problem, curvature)
    check_damping(damping)
    check_batch_size(batch_size)
    check_mesh(mesh)
    expansion = expand(problem, curvature, batch_size, mesh)

    def run(meta_params: PyTree, tasks: Task, weights: Weights | None = None) -> Operator:
        check_meta_params(meta_params)
        return expansion(meta_params, tasks, resolve_weights(weights, tasks)).operator.damped(damping)

    return run
