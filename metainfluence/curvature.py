"""Which second-order operator is used as the total Hessian H = D_λ D_λ F.

Every curvature is the Hessian, at λ, of a *surrogate* of the task loss that is built at λ: the loss itself, the loss
with θ(λ) replaced by its tangent or by a constant, and so on. What they have in common (sums over tasks, linearising
once, damping) is written once, in `metainfluence.response`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from metainfluence.data import Task, Weights
from metainfluence.differentiation import taylor
from metainfluence.problem import Bilevel, adapted, evaluate, norm_or_zero

__all__ = ["Curvature", "direct", "exact", "gamma", "gauss_newton", "linearized"]

Surrogate = Callable[[Bilevel, PyTree, Task, Weights], Callable[[PyTree], tuple[Array, Array]]]


class Curvature(NamedTuple):
    """A choice of second-order operator.

    Attributes:
      name: for messages.
      surrogate: (problem, λ0, task, weights) -> function λ -> (surrogate of L_k, ‖∂_θ L_in‖) whose Hessian at λ0 is the
        task's share of the operator, and whose value there is L_k.
      shift: (problem, λ0, task, weights) -> scalar s_k; (1/T) Σ_k w_k s_k times the identity is added; None adds
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


def _measured(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> tuple[PyTree, Array | None]:
    """The adapted parameters at λ0, held fixed, and ‖∂_θ L_in‖ there."""
    return jax.lax.stop_gradient(adapted(problem, at, task, weights))


def exact() -> Curvature:
    """The total Hessian itself, third-order terms included: forward over reverse through the adaptation.

    Examples:
      For L = (λ² − 2)² / 2 at λ = 1 this is 6λ² − 4 = 2:

      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> adapt = mi.adaptation.closed_form(lambda m, support, coefficients: m**2)
      >>> problem = mi.bilevel(lambda params, m, query: 0.5 * (params - query) ** 2, adapt)
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[2.0]]))
      >>> mi.total_hessian(problem, mi.curvature.exact())(jnp.asarray(1.0), tasks).dense().tolist()
      [[2.0]]
    """

    def surrogate(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Callable[[PyTree], Any]:
        del at
        return lambda meta_params: evaluate(problem, meta_params, task, weights)

    return Curvature("exact", surrogate, is_exact=True)


def _linearized(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Callable[[PyTree], Any]:
    _, tangent, norm = taylor(lambda m: adapted(problem, m, task, weights), at, problem.hvp)

    def loss(meta_params: PyTree) -> tuple[Array, Array]:
        value = problem.outer(tangent(meta_params), meta_params, task, weights)
        return value, norm_or_zero(norm, value)

    return loss


def linearized() -> Curvature:
    """Drops the terms with d²θ/dλ²: θ(λ) is replaced by its tangent at λ.

    Examples:
      For L = (λ² − 2)² / 2 at λ = 1 this is (2λ)² = 4. The term dropped is (λ² − 2) · d²λ²/dλ² = −2:

      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> adapt = mi.adaptation.closed_form(lambda m, support, coefficients: m**2)
      >>> problem = mi.bilevel(lambda params, m, query: 0.5 * (params - query) ** 2, adapt)
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[2.0]]))
      >>> mi.total_hessian(problem, mi.curvature.linearized())(jnp.asarray(1.0), tasks).dense().tolist()
      [[4.0]]
    """
    return Curvature("linearized", _linearized, needs="adapt")


def gamma() -> Curvature:
    """Theorem 5.1 of arXiv 2501.15963: `linearized` plus Γ I, Γ = (1/T) Σ_k w_k ‖∂_θ L_k‖₁, for what it drops.

    Examples:
      For L = (λ² − 2)² / 2 at λ = 1 this is (2λ)² + |λ² − 2| = 5:

      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> adapt = mi.adaptation.closed_form(lambda m, support, coefficients: m**2)
      >>> problem = mi.bilevel(lambda params, m, query: 0.5 * (params - query) ** 2, adapt)
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[2.0]]))
      >>> mi.total_hessian(problem, mi.curvature.gamma())(jnp.asarray(1.0), tasks).dense().tolist()
      [[5.0]]
    """

    def shift(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Array:
        params = _measured(problem, at, task, weights)[0]
        slope = jax.grad(problem.outer)(params, at, task, weights)
        sizes = [jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(slope)]
        return sum(sizes[1:], sizes[0])

    return Curvature("gamma", _linearized, shift, needs="adapt")


def gauss_newton() -> Curvature:
    """Generalised Gauss–Newton: the head's Hessian between total Jacobians of the model's outputs.

    Positive semidefinite where the head is convex in the outputs. Needs `bilevel(model, adapt, outer_head=head)`.

    Examples:
      For L = (λ² − 2)² / 2 at λ = 1 the Jacobian is 2λ and the head's Hessian is 1, which gives (2λ)² = 4:

      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> adapt = mi.adaptation.closed_form(lambda m, support, coefficients: m**2)
      >>> problem = mi.bilevel(
      ...     lambda params, m, query: params, adapt, outer_head=lambda outputs, query: 0.5 * (outputs - query) ** 2
      ... )
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[2.0]]))
      >>> mi.total_hessian(problem, mi.curvature.gauss_newton())(jnp.asarray(1.0), tasks).dense().tolist()
      [[4.0]]
    """

    def surrogate(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Callable[[PyTree], Any]:
        assert problem.outputs is not None
        assert problem.head is not None
        model, head = problem.outputs, problem.head

        def forward(meta_params: PyTree) -> tuple[PyTree, Array | None]:
            params, norm = adapted(problem, meta_params, task, weights)
            return model(params, meta_params, task), norm

        _, tangent, norm = taylor(forward, at, problem.hvp)

        def loss(meta_params: PyTree) -> tuple[Array, Array]:
            value = head(tangent(meta_params), task, weights)
            return value, norm_or_zero(norm, value)

        return loss

    return Curvature("gauss_newton", surrogate, needs="outer_head")


def direct() -> Curvature:
    """Ignores dθ/dλ, as if the adapted parameters were constants: ∂²_λ L_k.

    This is the mistake that the paper corrects, kept so that it can be measured.

    Examples:
      For L = (θ − 2)² / 2 with θ = λ² this is 0, since λ enters through θ alone:

      >>> import jax.numpy as jnp
      >>> import metainfluence as mi
      >>> adapt = mi.adaptation.closed_form(lambda m, support, coefficients: m**2)
      >>> problem = mi.bilevel(lambda params, m, query: 0.5 * (params - query) ** 2, adapt)
      >>> tasks = mi.Task(support=(), query=jnp.asarray([[2.0]]))
      >>> mi.total_hessian(problem, mi.curvature.direct())(jnp.asarray(1.0), tasks).dense().tolist()
      [[0.0]]
    """

    def surrogate(problem: Bilevel, at: PyTree, task: Task, weights: Weights) -> Callable[[PyTree], Any]:
        params, norm = _measured(problem, at, task, weights)

        def loss(meta_params: PyTree) -> tuple[Array, Array]:
            value = problem.outer(params, meta_params, task, weights)
            return value, norm_or_zero(norm, value)

        return loss

    return Curvature("direct", surrogate, needs="adapt", keeps_gradient=False)


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
